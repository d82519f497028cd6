//! The histogram of probabilities: hateful rows above the line, other rows below it.
//!
//! The height of a bar is the square root of its share. A good adapter puts most rows of a class into a single bar, and
//! the mistakes, which are in the others, would be invisible on a linear scale.

use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

use super::{ChartError, HARMLESS, HATEFUL, INK, LINE, MUTED, SCALE, SMALL_TEXT, TEXT, svg, text_style};
use crate::retrain::judge::evaluation::Histogram;

const SIZE: (u32, u32) = (560, 330);

/// Draws the share of each class by probability, up to `highest` in both directions, and the threshold.
pub(in crate::retrain::report) fn histogram(
    name: &str,
    histogram: &Histogram,
    threshold: f64,
    highest: f64,
) -> Result<String, ChartError> {
    let label = format!("histogram of the probabilities of the {name}: hateful rows upwards, other rows downwards");
    let top = highest.sqrt();
    svg("histogram", &label, SIZE, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin_top(12 * SCALE)
            .margin_right(14 * SCALE)
            .x_label_area_size(48 * SCALE)
            .y_label_area_size(70 * SCALE)
            .build_cartesian_2d(0.0..1.0, -top..top)?;
        let font = |size: u32| ("sans-serif", size).into_font().color(&INK);
        chart
            .configure_mesh()
            .x_desc("probability")
            .y_desc("share of the class")
            .x_labels(6)
            .y_labels(9)
            .x_label_formatter(&|value| format!("{value:.1}"))
            .y_label_formatter(&|value| format!("{:.0} %", 100.0 * value * value))
            .set_all_tick_mark_size(5 * SCALE)
            .axis_style(INK.stroke_width(2))
            .bold_line_style(LINE.stroke_width(2))
            .light_line_style(TRANSPARENT)
            .label_style(font(SMALL_TEXT))
            .axis_desc_style(font(TEXT))
            .draw()?;
        for (counts, sign, color) in [(&histogram.hateful, 1.0, HATEFUL), (&histogram.ok, -1.0, HARMLESS)] {
            let bars = shares(counts).into_iter().enumerate().filter(|&(_, share)| share > 0.0);
            chart.draw_series(bars.map(|(bin, share)| {
                let [from, to] = [bin as f64, bin as f64 + 1.0].map(|edge| edge / counts.len() as f64);
                // A small gap separates neighbouring bars.
                Rectangle::new([(from + 0.004, 0.0), (to - 0.004, sign * share.sqrt())], color.filled())
            }))?;
        }
        chart.draw_series(LineSeries::new([(0.0, 0.0), (1.0, 0.0)], INK.stroke_width(2)))?;
        let mark = [(threshold, -top), (threshold, top)];
        chart.draw_series(LineSeries::new(mark, MUTED.stroke_width(3)))?;
        // Each half is labelled in the corner where few bars are expected.
        let names = [
            ("hateful", 0.02, 0.9, HPos::Left),
            ("not hateful", 0.98, -0.9, HPos::Right),
        ];
        chart.draw_series(
            names.map(|(text, x, y, h_pos)| Text::new(text, (x, y * top), text_style(TEXT, INK, h_pos))),
        )?;
        Ok(())
    })
}

/// Returns a common upper end of the scale for both histograms, slightly above the largest share.
pub(in crate::retrain::report) fn highest(histograms: [&Histogram; 2]) -> f64 {
    let shares = histograms
        .iter()
        .flat_map(|histogram| [&histogram.hateful, &histogram.ok])
        .flat_map(|counts| shares(counts));
    (1.1 * shares.fold(0.0, f64::max)).clamp(0.1, 1.0)
}

fn shares(counts: &[usize]) -> Vec<f64> {
    let all = counts.iter().sum::<usize>().max(1);
    counts.iter().map(|&count| count as f64 / all as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_histograms_share_a_scale() {
        let histogram = |ok: [usize; 2], hateful: [usize; 2]| Histogram {
            ok: ok.to_vec(),
            hateful: hateful.to_vec(),
        };
        let (first, second) = (histogram([3, 1], [1, 1]), histogram([0, 0], [1, 4]));
        assert!((highest([&first, &second]) - 0.88).abs() < 1e-12);
        assert_eq!(highest([&histogram([5, 0], [0, 0]), &first]), 1.0);
        assert_eq!(highest([&histogram([0, 0], [0, 0]); 2]), 0.1);
    }
}
