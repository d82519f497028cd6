//! The charts, as inline SVG.
//!
//! Drawn by plotters in the light colours; the page's style sheet knows them by name and puts the dark
//! ones in their place. Champion and challenger differ in dashes and marks as well as in colour.

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

/// A chart cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("cannot draw the report's {chart} chart: {reason}")]
pub struct ChartError {
    chart: String,
    reason: String,
}

// The style sheet repeats each of these.
const INK: RGBColor = RGBColor(0x1f, 0x29, 0x33);
const MUTED: RGBColor = RGBColor(0x5b, 0x67, 0x73);
const LINE: RGBColor = RGBColor(0xd5, 0xdb, 0xe1);
const CHALLENGER: RGBColor = RGBColor(0x00, 0x72, 0xb2);
const CHAMPION: RGBColor = RGBColor(0xc4, 0x4e, 0x00);
const HATEFUL: RGBColor = RGBColor(0x8c, 0x2d, 0x6b);
const HARMLESS: RGBColor = RGBColor(0x75, 0x82, 0x8f);

/// Dashes of the champion's lines and of lines to compare with.
const DASHES: [(RGBColor, &str); 2] = [(CHAMPION, "20 10"), (MUTED, "4 10")];

/// plotters puts everything on whole pixels: charts are drawn this much larger than they are shown,
/// so that curves stay smooth.
const SCALE: u32 = 3;
/// Sizes of text; plotters makes them smaller by a quarter.
const TEXT: u32 = 19 * SCALE;
const SMALL_TEXT: u32 = 17 * SCALE;
const STROKE: u32 = 5;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Which adapter is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    Champion,
    Challenger,
}

impl Who {
    fn color(self) -> RGBColor {
        match self {
            Self::Champion => CHAMPION,
            Self::Challenger => CHALLENGER,
        }
    }
}

/// Draws a chart of a size given as shown; `label` is read out to who cannot see it.
fn svg(
    chart: &str,
    label: &str,
    (width, height): (u32, u32),
    draw: impl FnOnce(&Area<'_>) -> Drawn,
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
    // The page decides on the size. Inside HTML an SVG needs no namespace, and the page stays free of
    // anything that looks like an address.
    let inner = text.split_once('>').map_or("", |(_, inner)| inner);
    Ok(format!(
        "<svg class=\"chart\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {} {}\">{inner}",
        escape(label),
        width * SCALE,
        height * SCALE
    ))
}

/// Text in the chart's own colours.
fn text_style(size: u32, color: RGBColor, h_pos: HPos) -> TextStyle<'static> {
    let style = ("sans-serif", size).into_font().color(&color);
    style.pos(Pos::new(h_pos, VPos::Center))
}

/// At most about this many points a unit: more do not show.
const RESOLUTION: f64 = 600.0;

/// Leaves points out that are too close to the last one to be told apart; the last one stays.
fn thinned(points: impl IntoIterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let mut kept: Vec<(f64, f64)> = Vec::new();
    let mut left_out = None;
    for point in points {
        let near = |&(x, y): &(f64, f64)| (point.0 - x).abs() + (point.1 - y).abs() < 1.0 / RESOLUTION;
        if kept.last().is_some_and(near) {
            left_out = Some(point);
        } else {
            kept.push(point);
            left_out = None;
        }
    }
    kept.extend(left_out);
    kept
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
        let kept = thinned(line.clone());
        assert!(kept.len() < 1300, "{}", kept.len());
        assert_eq!((kept.first(), kept.last()), (line.first(), line.last()));
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
