//! Draws the charts as inline SVG.
//!
//! Charts are drawn with plotters in the colours of the light scheme, which the style sheet of the page replaces in the
//! dark scheme. Champion and challenger differ in their dashes and marks as well as in colour.

mod confusion;
mod curves;
mod histogram;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::html::escape;

pub(super) use confusion::confusion;
pub(super) use curves::{precision_recall, reliability, roc};
pub(super) use histogram::{highest, histogram};

/// A chart of the report cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw the report's {chart} chart: {reason}")]
pub struct ChartError {
    chart: String,
    reason: String,
}

// The style sheet repeats each of these colours, to replace it in the dark scheme.
const INK: RGBColor = RGBColor(0x1f, 0x29, 0x33);
const MUTED: RGBColor = RGBColor(0x5b, 0x67, 0x73);
const LINE: RGBColor = RGBColor(0xd5, 0xdb, 0xe1);
const CHALLENGER: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const CHAMPION: RGBColor = RGBColor(0xc4, 0x4e, 0x00);
const HATEFUL: RGBColor = RGBColor(0x8c, 0x2d, 0x6b);
const HARMLESS: RGBColor = RGBColor(0x75, 0x82, 0x8f);

/// Dash patterns of the champion's lines and of reference lines, by their colour.
const DASHES: [(RGBColor, &str); 2] = [(CHAMPION, "20 10"), (MUTED, "4 10")];

/// The factor by which charts are drawn larger than they are shown. plotters rounds all coordinates to whole pixels, so
/// curves would not be smooth otherwise.
const SCALE: u32 = 3;
/// Text size of axis descriptions and headings. plotters draws text a quarter smaller than this.
const TEXT: u32 = 19 * SCALE;
/// Text size of axis labels and remarks.
const SMALL_TEXT: u32 = 17 * SCALE;
/// Width of the curves.
const STROKE: u32 = 5;

type ChartArea<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type DrawResult = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// The adapter whose results are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Series {
    Champion,
    Challenger,
}

impl Series {
    fn color(self) -> RGBColor {
        match self {
            Self::Champion => CHAMPION,
            Self::Challenger => CHALLENGER,
        }
    }
}

/// Draws a chart of the given size, in pixels as shown. Screen readers read out `label`.
fn svg(
    chart: &str,
    label: &str,
    (width, height): (u32, u32),
    draw: impl FnOnce(&ChartArea<'_>) -> DrawResult,
) -> Result<String, ChartError> {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, (width * SCALE, height * SCALE)).into_drawing_area();
    let drawn = draw(&area).and_then(|()| area.present());
    drop(area);
    drawn.map_err(|error| ChartError {
        chart: chart.to_owned(),
        reason: error.to_string(),
    })?;
    for (color, dashes) in DASHES {
        let stroke = format!("stroke=\"#{:02X}{:02X}{:02X}\"", color.0, color.1, color.2);
        text = text.replace(&stroke, &format!("{stroke} stroke-dasharray=\"{dashes}\""));
    }
    // The opening tag is replaced by one without a size, which the page determines, and without a namespace, which
    // inline SVG does not need and which would be the only URL in the page.
    let inner = text.split_once('>').map_or("", |(_, inner)| inner);
    Ok(format!(
        "<svg class=\"chart\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {} {}\">{inner}",
        escape(label),
        width * SCALE,
        height * SCALE
    ))
}

/// Returns a style for text that is centred vertically.
fn text_style(size: u32, color: RGBColor, h_pos: HPos) -> TextStyle<'static> {
    let style = ("sans-serif", size).into_font().color(&color);
    style.pos(Pos::new(h_pos, VPos::Center))
}

/// Number of points per unit of length that can be distinguished on the screen.
const RESOLUTION: f64 = 600.0;

/// Leaves out points that are too close to the previous one to be distinguished, except for the last point.
fn thinned(points: impl IntoIterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let mut thinned: Vec<(f64, f64)> = Vec::new();
    let mut left_out = None;
    for point in points {
        let near = |&(x, y): &(f64, f64)| (point.0 - x).abs() + (point.1 - y).abs() < 1.0 / RESOLUTION;
        if thinned.last().is_some_and(near) {
            left_out = Some(point);
        } else {
            thinned.push(point);
            left_out = None;
        }
    }
    thinned.extend(left_out);
    thinned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_the_ends_and_the_shape() {
        let line: Vec<_> = (0..=100_000)
            .map(|index| f64::from(index) / 1e5)
            .map(|x| (x, x * x))
            .collect();
        let found = thinned(line.clone());
        assert!(found.len() < 1300, "{}", found.len());
        assert_eq!((found.first(), found.last()), (line.first(), line.last()));
        assert_eq!(thinned([(0.0, 0.0), (1.0, 1.0)]).len(), 2);
        assert!(thinned([]).is_empty());
    }

    #[test]
    fn every_colour_is_in_the_style_sheet() {
        let style = include_str!("../style.css");
        for RGBColor(r, g, b) in [INK, MUTED, LINE, CHALLENGER, CHAMPION, HATEFUL, HARMLESS] {
            let color = format!("#{r:02X}{g:02X}{b:02X}");
            assert!(style.contains(&format!("=\"{color}\"]")), "{color}");
            assert!(style.contains(&color.to_lowercase()), "{color}");
        }
    }
}
