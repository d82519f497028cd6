//! Draws the figures as SVG: for each broker, the quantiles at each load, and the recovery from an overload.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::figures::{BrokerFigures, QUANTILES};

const INK: RGBColor = RGBColor(0x1f, 0x29, 0x33);
const LINE: RGBColor = RGBColor(0xd5, 0xdb, 0xe1);
/// One colour for each load, from light to dark.
const COLORS: [RGBColor; 4] = [
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0xc4, 0x4e, 0x00),
];
const WIDTH: u32 = 1200;
const HEIGHT: u32 = 440;
const TEXT: u32 = 18;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = Result<(), Box<dyn std::error::Error>>;

/// Returns the plot of all brokers.
pub fn svg(brokers: &[BrokerFigures], cpu: &str) -> String {
    let mut text = String::new();
    let size = (WIDTH, HEIGHT * brokers.len() as u32);
    let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
    area.fill(&WHITE).unwrap();
    for (area, broker) in area.split_evenly((brokers.len(), 1)).iter().zip(brokers) {
        let title = format!("{}, {cpu}", broker.name);
        let area = area.titled(&title, font(22)).unwrap();
        let (left, right) = area.split_horizontally(WIDTH / 2);
        quantiles(&left, broker).unwrap();
        recovery(&right, broker).unwrap();
    }
    area.present().unwrap();
    drop(area);
    text
}

/// Draws latency by quantile, where each step to the right is a tenth as many comments.
fn quantiles(area: &Area<'_>, broker: &BrokerFigures) -> DrawResult {
    let slowest = broker.levels.iter().flat_map(|level| level.visible.curve.last());
    let highest = slowest.copied().fold(100.0, f64::max) * 1.5;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(70)
        .build_cartesian_2d((1.0..1100.0).log_scale(), (1.0..highest).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("quantile")
        .y_desc("latency in ms (due to visible, committed)")
        .x_label_formatter(&|slower| format!("{} %", 100.0 - 100.0 / slower))
        .y_label_formatter(&|value| format!("{value}"))
        .x_labels(4)
        .axis_style(INK)
        .bold_line_style(LINE)
        .light_line_style(TRANSPARENT)
        .label_style(font(TEXT))
        .axis_desc_style(font(TEXT))
        .draw()?;
    for (level, color) in broker.levels.iter().zip(COLORS) {
        let points = QUANTILES.iter().map(|share| 1.0 / (1.0 - share));
        let points: Vec<(f64, f64)> = points.zip(level.visible.curve.iter().copied()).collect();
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(3)))?
            .label(format!("{:.0} % of capacity", level.share * 100.0))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)));
        chart.draw_series(points.into_iter().map(|point| Circle::new(point, 4, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE)
        .border_style(LINE)
        .label_font(font(TEXT))
        .draw()?;
    Ok(())
}

/// Draws the median latency of each second of an overload and of the time after it.
fn recovery(area: &Area<'_>, broker: &BrokerFigures) -> DrawResult {
    let recovery = &broker.recovery;
    let highest = recovery.timeline.iter().copied().fold(100.0, f64::max) * 1.5;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..recovery.timeline.len() as f64, (1.0..highest).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("seconds; 200 % of capacity until the line, then 50 %")
        .y_desc("median latency in ms")
        .y_label_formatter(&|value| format!("{value}"))
        .axis_style(INK)
        .bold_line_style(LINE)
        .light_line_style(TRANSPARENT)
        .label_style(font(TEXT))
        .axis_desc_style(font(TEXT))
        .draw()?;
    let end = recovery.overload.as_secs_f64();
    chart.draw_series(LineSeries::new([(end, 1.0), (end, highest)], INK.stroke_width(1)))?;
    let points = recovery.timeline.iter().enumerate();
    let points = points.map(|(second, &median)| (second as f64 + 0.5, median.max(1.0)));
    chart.draw_series(LineSeries::new(points, COLORS[3].stroke_width(3)))?;
    Ok(())
}

fn font(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}
