//! One page about one retraining: a self-contained HTML file for people who must answer for it.
//!
//! No scripts, nothing loaded from elsewhere, light and dark. It holds numbers, ids, hashes and settings,
//! never a comment's text, and everything that comes from outside is escaped. The same input gives the
//! same bytes.

mod charts;
mod html;
mod sections;

use super::judge::calibration::Fitted;
use super::judge::evaluation::{Curves, Evaluation};
use super::judge::gate::Verdict;
use super::judge::thresholds::Bands;

pub use charts::ChartError;

/// Everything that the page says.
#[derive(Debug, Clone)]
pub struct Report<'a> {
    /// When the challenger was made, RFC 3339 UTC.
    pub created_at: &'a str,
    /// The adapter in service.
    pub champion: ReportSide<'a>,
    /// The new one.
    pub challenger: ReportSide<'a>,
    /// What a retraining found beside the figures; absent where two adapters are only compared.
    pub judgement: Option<Judgement<'a>>,
    /// Rows read, dropped and used.
    pub data: Vec<Fact>,
    /// What shaped the training.
    pub hyperparameters: Vec<Fact>,
    /// Content hashes of base, adapters, prompt, calibration, data and so on.
    pub identities: Vec<Fact>,
}

/// What a retraining finds about its challenger.
#[derive(Debug, Clone, Copy)]
pub struct Judgement<'a> {
    /// What the gate said.
    pub verdict: &'a Verdict,
    /// How its margins become probabilities.
    pub calibration: &'a Fitted,
    /// Where its bands begin.
    pub bands: &'a Bands,
}

/// One of the two adapters on the rows that judge.
#[derive(Debug, Clone, Copy)]
pub struct ReportSide<'a> {
    /// Its version, or what else it is called.
    pub name: &'a str,
    /// Its figures.
    pub evaluation: &'a Evaluation,
    /// Its curves.
    pub curves: &'a Curves,
}

/// A line of a list of facts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// What.
    pub name: String,
    /// Its value.
    pub value: String,
}

impl Fact {
    /// A fact of anything that has a text.
    pub fn new(name: impl Into<String>, value: impl ToString) -> Self {
        Self {
            name: name.into(),
            value: value.to_string(),
        }
    }
}

/// The page.
///
/// # Errors
/// [`ChartError`]: a chart cannot be drawn.
pub fn render(report: &Report<'_>) -> Result<String, ChartError> {
    let title = format!("{}, {}", sections::title(report), report.challenger.name);
    let title = html::escape(&title);
    let style = include_str!("style.css");
    let body = [
        sections::verdict(report),
        sections::figures(report),
        sections::curves(report)?,
        sections::calls(report)?,
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
