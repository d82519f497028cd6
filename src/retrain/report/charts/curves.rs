//! The ROC curve, the precision-recall curve and the reliability diagram, all drawn in the unit square.

use plotters::prelude::*;

use super::{
    ChartArea, ChartError, DrawResult, INK, LINE, MUTED, SCALE, SMALL_TEXT, STROKE, Series, TEXT, svg, thinned,
};
use crate::retrain::judge::evaluation::{Curves, Point, ReliabilityBin};

const SIZE: (u32, u32) = (380, 350);

type UnitChart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;
type UnitChartResult<'a, 'b> = Result<UnitChart<'a, 'b>, DrawingAreaErrorKind<std::io::Error>>;

/// Starts a chart of the unit square, with labelled axes.
fn unit_chart<'a, 'b>(area: &'a ChartArea<'b>, x: &str, y: &str) -> UnitChartResult<'a, 'b> {
    let mut chart = ChartBuilder::on(area)
        .margin_top(12 * SCALE)
        .margin_right(14 * SCALE)
        .x_label_area_size(48 * SCALE)
        .y_label_area_size(58 * SCALE)
        .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
    let font = |size: u32| ("sans-serif", size).into_font().color(&INK);
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|value| format!("{value:.1}"))
        .y_label_formatter(&|value| format!("{value:.1}"))
        .set_all_tick_mark_size(5 * SCALE)
        .axis_style(INK.stroke_width(2))
        .bold_line_style(LINE.stroke_width(2))
        .light_line_style(TRANSPARENT)
        .label_style(font(SMALL_TEXT))
        .axis_desc_style(font(TEXT))
        .draw()?;
    Ok(chart)
}

fn line(chart: &mut UnitChart<'_, '_>, points: Vec<(f64, f64)>, color: RGBColor, width: u32) -> DrawResult {
    chart.draw_series(LineSeries::new(points, color.stroke_width(width)))?;
    Ok(())
}

/// Returns the champion first, so that the challenger is drawn on top.
fn both<'a>(champion: &'a Curves, challenger: &'a Curves) -> [(Series, &'a Curves); 2] {
    [(Series::Champion, champion), (Series::Challenger, challenger)]
}

/// Draws the true positive rate against the false positive rate.
pub(in crate::retrain::report) fn roc(champion: &Curves, challenger: &Curves) -> Result<String, ChartError> {
    let label = "ROC curves: true positive rate against false positive rate, champion dashed, challenger solid";
    svg("ROC", label, SIZE, |area| {
        let mut chart = unit_chart(area, "false positive rate", "true positive rate")?;
        line(&mut chart, vec![(0.0, 0.0), (1.0, 1.0)], MUTED, 3)?;
        for (series, curves) in both(champion, challenger) {
            let points = thinned(curves.roc.iter().map(|point| (point.x, point.y)));
            line(&mut chart, points, series.color(), STROKE)?;
        }
        Ok(())
    })
}

/// Draws precision against recall, in steps. `hateful` is the share of hateful rows, which is the precision of a random
/// ranking.
pub(in crate::retrain::report) fn precision_recall(
    champion: &Curves,
    challenger: &Curves,
    hateful: f64,
) -> Result<String, ChartError> {
    let label = "precision-recall curves: precision against recall, champion dashed, challenger solid";
    svg("precision-recall", label, SIZE, |area| {
        let mut chart = unit_chart(area, "recall", "precision")?;
        line(&mut chart, vec![(0.0, hateful), (1.0, hateful)], MUTED, 3)?;
        for (series, curves) in both(champion, challenger) {
            line(&mut chart, steps(&curves.precision_recall), series.color(), STROKE)?;
        }
        Ok(())
    })
}

/// Adds the corners of the steps. Between two points, the precision is that of the right one, so the line first goes up
/// or down and then to the right.
fn steps(points: &[Point]) -> Vec<(f64, f64)> {
    let mut recall = 0.0;
    let corners = points.iter().flat_map(|point| {
        let corner = (std::mem::replace(&mut recall, point.x), point.y);
        [corner, (point.x, point.y)]
    });
    thinned(corners)
}

/// Draws the share of hateful rows against the mean probability of each bin: as squares for the champion, and as
/// circles for the challenger. Larger marks represent more rows.
pub(in crate::retrain::report) fn reliability(champion: &Curves, challenger: &Curves) -> Result<String, ChartError> {
    let label = "reliability diagram: share of hateful rows against mean probability, champion as squares, \
                 challenger as circles";
    svg("reliability", label, SIZE, |area| {
        let mut chart = unit_chart(area, "mean probability", "share hateful")?;
        line(&mut chart, vec![(0.0, 0.0), (1.0, 1.0)], MUTED, 3)?;
        for (series, curves) in both(champion, challenger) {
            let marks = marks(&curves.reliability);
            let points = marks.iter().map(|&(point, _)| point).collect();
            line(&mut chart, points, series.color(), 3)?;
            let style = series.color().filled();
            match series {
                Series::Champion => chart.draw_series(marks.iter().map(|&((x, y), size)| {
                    EmptyElement::at((x, y)) + Rectangle::new([(-size, -size), (size, size)], style)
                }))?,
                Series::Challenger => chart.draw_series(
                    marks
                        .iter()
                        .map(|&((x, y), size)| EmptyElement::at((x, y)) + Circle::new((0, 0), size + 2, style)),
                )?,
            };
        }
        Ok(())
    })
}

/// Returns the position and size of a mark for each bin that is not empty. The area of a mark grows with the number of
/// rows.
fn marks(bins: &[ReliabilityBin]) -> Vec<((f64, f64), i32)> {
    let largest = bins.iter().map(|bin| bin.rows).max().unwrap_or(1).max(1);
    let mark = |bin: &ReliabilityBin| {
        let share = bin.rows as f64 / largest as f64;
        let size = 6.0 + 12.0 * share.sqrt();
        Some(((bin.probability?, bin.hateful?), size.round() as i32))
    };
    bins.iter().filter_map(mark).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_precision_changes_before_the_recall() {
        let points = [Point { x: 0.5, y: 1.0 }, Point { x: 1.0, y: 0.75 }];
        assert_eq!(steps(&points), [(0.0, 1.0), (0.5, 1.0), (0.5, 0.75), (1.0, 0.75)]);
        assert!(steps(&[]).is_empty());
    }

    #[test]
    fn empty_bins_have_no_mark() {
        let bin = |rows, value| ReliabilityBin {
            from: 0.0,
            rows,
            probability: value,
            hateful: value,
        };
        let found = marks(&[bin(0, None), bin(100, Some(0.5)), bin(1, Some(0.9))]);
        assert_eq!(found, [((0.5, 0.5), 18), ((0.9, 0.9), 7)]);
    }
}
