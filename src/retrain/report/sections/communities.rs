//! The section on communities: their figures, and the gate's comparison of false positives.

use crate::retrain::judge::evaluation::CommunityFigures;
use crate::retrain::judge::gate::{CommunityGroup, Verdict};
use crate::retrain::report::Report;
use crate::retrain::report::html::{Cell, number, percent, table};

/// Maximum number of communities shown.
const MAX_COMMUNITIES: usize = 25;

pub(in crate::retrain::report) fn communities(report: &Report<'_>) -> String {
    let [champion, challenger] = [report.champion, report.challenger].map(|side| &side.evaluation.communities);
    let name = |community: &Option<String>| community.clone().unwrap_or_else(|| "(none)".to_owned());
    let rows = challenger.iter().take(MAX_COMMUNITIES).map(|figures| {
        let before = champion.iter().find(|other| other.community == figures.community);
        let pair = |shown: fn(Option<f64>) -> String, value: fn(&CommunityFigures) -> Option<f64>| {
            [shown(before.and_then(value)), shown(value(figures))].map(Cell::Number)
        };
        let mut row = vec![
            Cell::Text(name(&figures.community)),
            Cell::Number(figures.rows.to_string()),
            Cell::Number(figures.hateful.to_string()),
        ];
        row.extend(pair(percent, |figures| figures.false_positive_rate));
        row.extend(pair(number, |figures| figures.f1));
        row
    });
    let columns = [
        "Community",
        "Rows",
        "Hateful",
        "False positive rate, champion",
        "False positive rate, challenger",
        "F1, champion",
        "F1, challenger",
    ];
    let by_community = table(
        "At the same threshold as the figures above, with the largest communities first.",
        &columns,
        rows.collect(),
    );
    let more = match report.judgement {
        Some(_) => left_out(challenger.len(), "communities", "; the manifest lists all"),
        None => left_out(challenger.len(), "communities", ""),
    };
    let compared = report
        .judgement
        .map_or_else(String::new, |judgement| compared(judgement.verdict));
    format!("<h2>Communities</h2>\n{by_community}{more}{compared}")
}

/// Returns a remark if only some communities or groups are shown.
fn left_out(count: usize, what: &str, elsewhere: &str) -> String {
    if count <= MAX_COMMUNITIES {
        return String::new();
    }
    format!("<p class=\"quiet\">{MAX_COMMUNITIES} of {count} {what} are shown{elsewhere}.</p>\n")
}

fn compared(verdict: &Verdict) -> String {
    // The groups that count against the challenger come first, so that they are always shown.
    let mut compared: Vec<_> = verdict.communities.iter().collect();
    compared.sort_by_key(|comparison| (!comparison.worse, std::cmp::Reverse(comparison.ok_rows)));
    let hidden = left_out(compared.len(), "groups", "; the manifest lists all");
    let rows = compared.iter().take(MAX_COMMUNITIES).map(|comparison| {
        let outcome = match (comparison.worse, comparison.p_value) {
            (true, _) => "significantly worse",
            (false, Some(_)) => "not significantly worse",
            (false, None) => "too few rows for a test",
        };
        let group = match &comparison.group {
            CommunityGroup::Community { id } => id.clone(),
            other => format!("({other})"),
        };
        vec![
            Cell::Text(group),
            Cell::Number(comparison.ok_rows.to_string()),
            Cell::Number(percent(Some(comparison.champion_rate))),
            Cell::Number(percent(Some(comparison.challenger_rate))),
            Cell::Number(comparison.newly_called.to_string()),
            Cell::Number(comparison.no_longer_called.to_string()),
            Cell::Number(comparison.p_value.map_or_else(|| "–".to_owned(), |p| format!("{p:.4}"))),
            Cell::Text(outcome.to_owned()),
        ]
    });
    let columns = [
        "Group",
        "Harmless rows",
        "Flagged, champion",
        "Flagged, challenger",
        "Newly flagged",
        "No longer flagged",
        "p",
        "Outcome",
    ];
    let caption = match verdict.flag_rates {
        Some(rates) => format!(
            "Comparison by the gate: harmless comments that each adapter flags if both flag {} of the judged rows. By \
             their own thresholds, the champion flags {} and the challenger {}.",
            percent(Some(rates.compared)),
            percent(Some(rates.champion)),
            percent(Some(rates.challenger)),
        ),
        None => "Comparison by the gate: harmless comments that each adapter flags, by its own thresholds.".to_owned(),
    };
    let compared = table(&caption, &columns, rows.collect());
    format!("<h3>False positives of champion and challenger</h3>\n{compared}{hidden}")
}
