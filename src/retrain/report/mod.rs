//! Renders the report of a retraining or an evaluation: one HTML file, for the people who are accountable for the
//! result.
//!
//! The file is self-contained, has no scripts, and follows the reader's light or dark colour scheme. It contains
//! numbers, ids, hashes and settings, but never the text of a comment, and everything in it is escaped. The same input
//! gives the same bytes.

mod charts;
mod html;
mod sections;

use super::judge::calibration::FittedCalibration;
use super::judge::evaluation::{Curves, Evaluation};
use super::judge::gate::Verdict;
use super::judge::thresholds::ThresholdDerivation;

pub use charts::ChartError;

/// The content of a report.
#[derive(Debug, Clone)]
pub struct Report<'a> {
    /// When the challenger was trained, or the evaluation made: RFC 3339, UTC.
    pub created_at: &'a str,
    /// The adapter in service, or the bare base model.
    pub champion: ReportSide<'a>,
    /// The adapter that is compared with the champion.
    pub challenger: ReportSide<'a>,
    /// What a retraining adds to the figures; absent if two adapters are only compared.
    pub judgement: Option<Judgement<'a>>,
    /// The feedback: how much was read, left out and used.
    pub data: Vec<Fact>,
    /// The settings of the training.
    pub hyperparameters: Vec<Fact>,
    /// Names and content hashes of the base model, the adapter, the prompt and so on.
    pub identities: Vec<Fact>,
}

/// What a retraining adds to the figures of its challenger.
#[derive(Debug, Clone, Copy)]
pub struct Judgement<'a> {
    /// The verdict of the gate.
    pub verdict: &'a Verdict,
    /// The calibration, with the evidence for it.
    pub calibration: &'a FittedCalibration,
    /// The derived thresholds, with the evidence for them.
    pub thresholds: &'a ThresholdDerivation,
}

/// The results of one of the two adapters.
#[derive(Debug, Clone, Copy)]
pub struct ReportSide<'a> {
    /// The version, or another name for the adapter.
    pub name: &'a str,
    /// The figures of the adapter.
    pub evaluation: &'a Evaluation,
    /// The curves of the adapter.
    pub curves: &'a Curves,
}

/// A name and a value, shown as one line of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// The name, in words.
    pub name: String,
    /// The value, as shown.
    pub value: String,
}

impl Fact {
    /// Formats the value for display.
    pub fn new(name: impl Into<String>, value: impl ToString) -> Self {
        Self {
            name: name.into(),
            value: value.to_string(),
        }
    }
}

/// Renders a report as HTML.
///
/// # Errors
/// Returns an error if a chart cannot be drawn.
pub fn render(report: &Report<'_>) -> Result<String, ChartError> {
    let title = format!("{}, {}", sections::title(report), report.challenger.name);
    let title = html::escape(&title);
    let style = include_str!("style.css");
    let body = [
        sections::verdict(report),
        sections::figures(report),
        sections::curves(report)?,
        sections::predictions(report)?,
        sections::communities(report),
        sections::calibration(report),
        sections::facts(report),
        sections::definitions(report),
    ];
    let body = body.concat();
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    ))
}
