//! The confusion matrix. The larger a cell's share of its row, the darker the cell.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::{ChartError, INK, SCALE, SMALL_TEXT, Series, TEXT, svg, text_style};
use crate::retrain::judge::evaluation::Confusion;

const SIZE: (u32, u32) = (560, 250);
/// Left edge of the cells, in pixels as shown.
const LEFT: u32 = 110;
/// Top edge of the cells.
const TOP: u32 = 44;
/// Width and height of a cell.
const CELL: (u32, u32) = (215, 100);

/// Draws the four counts of a confusion matrix.
pub(in crate::retrain::report) fn confusion(
    series: Series,
    name: &str,
    confusion: &Confusion,
) -> Result<String, ChartError> {
    let rows = [
        ("hateful", [confusion.true_positives, confusion.false_negatives]),
        ("not hateful", [confusion.false_positives, confusion.true_negatives]),
    ];
    let label = format!(
        "confusion matrix of the {name}: {} hateful rows predicted hateful and {} not, \
         {} other rows predicted hateful and {} not",
        rows[0].1[0], rows[0].1[1], rows[1].1[0], rows[1].1[1]
    );
    let at = |x: u32, y: u32| ((x * SCALE) as i32, (y * SCALE) as i32);
    svg("confusion", &label, SIZE, |area| {
        for (column, heading) in (0..).zip(["predicted hateful", "predicted not hateful"]) {
            let center = at(LEFT + column * CELL.0 + CELL.0 / 2, TOP - 14);
            area.draw(&Text::new(heading, center, text_style(TEXT, INK, HPos::Center)))?;
        }
        for (row, (heading, counts)) in (0..).zip(rows) {
            let middle = TOP + row * CELL.1 + CELL.1 / 2;
            let right = at(LEFT - 8, middle);
            area.draw(&Text::new(heading, right, text_style(TEXT, INK, HPos::Right)))?;
            let all = counts[0] + counts[1];
            for (column, count) in (0..).zip(counts) {
                let (x, y) = (LEFT + column * CELL.0, TOP + row * CELL.1);
                let share = if all > 0.0 { count / all } else { 0.0 };
                // Light enough for the text to be readable.
                let shade = series.color().mix(0.05 + 0.35 * share).filled();
                let corners = [at(x, y), at(x + CELL.0, y + CELL.1)];
                area.draw(&Rectangle::new(corners, shade))?;
                area.draw(&Rectangle::new(corners, INK.stroke_width(2)))?;
                let center = x + CELL.0 / 2;
                let large = text_style(TEXT * 3 / 2, INK, HPos::Center);
                area.draw(&Text::new(format!("{count}"), at(center, middle - 12), large))?;
                let small = text_style(SMALL_TEXT, INK, HPos::Center);
                let percent = format!("{:.1} % of row", 100.0 * share);
                area.draw(&Text::new(percent, at(center, middle + 16), small))?;
            }
        }
        Ok(())
    })
}
