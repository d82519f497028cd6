//! ROC, precision-recall and reliability: lines in the unit square.

use plotters::prelude::*;

use super::{Area, ChartError, Drawn, INK, LINE, MUTED, SCALE, SMALL_TEXT, STROKE, TEXT, Who, svg, thinned};
use crate::retrain::judge::evaluation::{Curves, Point, ReliabilityBin};

const SIZE: (u32, u32) = (380, 350);

type Unit<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;
type Started<'a, 'b> = Result<Unit<'a, 'b>, DrawingAreaErrorKind<std::io::Error>>;

/// A unit square with labelled axes.
fn unit<'a, 'b>(area: &'a Area<'b>, x: &str, y: &str) -> Started<'a, 'b> {
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

fn line(chart: &mut Unit<'_, '_>, points: Vec<(f64, f64)>, color: RGBColor, width: u32) -> Drawn {
    chart.draw_series(LineSeries::new(points, color.stroke_width(width)))?;
    Ok(())
}

/// Champion first, so that the challenger lies on top.
fn sides<'a>(champion: &'a Curves, challenger: &'a Curves) -> [(Who, &'a Curves); 2] {
    [(Who::Champion, champion), (Who::Challenger, challenger)]
}

/// True positive rate over false positive rate.
pub(in crate::retrain::report) fn roc(champion: &Curves, challenger: &Curves) -> Result<String, ChartError> {
    let label = "ROC curves: true positive rate over false positive rate, champion dashed, challenger solid";
    svg("ROC", label, SIZE, |area| {
        let mut chart = unit(area, "false positive rate", "true positive rate")?;
        line(&mut chart, vec![(0.0, 0.0), (1.0, 1.0)], MUTED, 3)?;
        for (who, curves) in sides(champion, challenger) {
            let points = thinned(curves.roc.iter().map(|point| (point.x, point.y)));
            line(&mut chart, points, who.color(), STROKE)?;
        }
        Ok(())
    })
}

/// Precision over recall, in steps; `hateful` is the share that chance alone would give.
pub(in crate::retrain::report) fn precision_recall(
    champion: &Curves,
    challenger: &Curves,
    hateful: f64,
) -> Result<String, ChartError> {
    let label = "precision-recall curves: precision over recall, champion dashed, challenger solid";
    svg("precision-recall", label, SIZE, |area| {
        let mut chart = unit(area, "recall", "precision")?;
        line(&mut chart, vec![(0.0, hateful), (1.0, hateful)], MUTED, 3)?;
        for (who, curves) in sides(champion, challenger) {
            line(&mut chart, steps(&curves.precision_recall), who.color(), STROKE)?;
        }
        Ok(())
    })
}

/// Between two points precision is that of the right one: up or down first, then to the right.
fn steps(points: &[Point]) -> Vec<(f64, f64)> {
    let mut recall = 0.0;
    let corners = points.iter().flat_map(|point| {
        let corner = (std::mem::replace(&mut recall, point.x), point.y);
        [corner, (point.x, point.y)]
    });
    thinned(corners)
}

/// Share of hateful rows over mean probability, each bin a mark: the champion's squares, the challenger's
/// circles, larger where there are more rows.
pub(in crate::retrain::report) fn reliability(champion: &Curves, challenger: &Curves) -> Result<String, ChartError> {
    let label = "reliability: share of hateful rows over mean probability, champion in squares, challenger in circles";
    svg("reliability", label, SIZE, |area| {
        let mut chart = unit(area, "mean probability", "share hateful")?;
        line(&mut chart, vec![(0.0, 0.0), (1.0, 1.0)], MUTED, 3)?;
        for (who, curves) in sides(champion, challenger) {
            let marks = marks(&curves.reliability);
            let points = marks.iter().map(|&(point, _)| point).collect();
            line(&mut chart, points, who.color(), 3)?;
            let style = who.color().filled();
            match who {
                Who::Champion => chart.draw_series(marks.iter().map(|&((x, y), size)| {
                    EmptyElement::at((x, y)) + Rectangle::new([(-size, -size), (size, size)], style)
                }))?,
                Who::Challenger => chart.draw_series(
                    marks
                        .iter()
                        .map(|&((x, y), size)| EmptyElement::at((x, y)) + Circle::new((0, 0), size + 2, style)),
                )?,
            };
        }
        Ok(())
    })
}

/// Bins that hold anything: where their mark stands and how large it is, its area by the rows.
fn marks(bins: &[ReliabilityBin]) -> Vec<((f64, f64), i32)> {
    let most = bins.iter().map(|bin| bin.rows).max().unwrap_or(1).max(1);
    let mark = |bin: &ReliabilityBin| {
        let share = bin.rows as f64 / most as f64;
        let size = 6.0 + 12.0 * share.sqrt();
        Some(((bin.probability?, bin.hateful?), size.round() as i32))
    };
    bins.iter().filter_map(mark).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precision_changes_before_recall() {
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
