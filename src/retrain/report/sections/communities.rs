//! Who is called hateful how often, by community, and what the gate made of it.

use crate::retrain::judge::evaluation::CommunityFigures;
use crate::retrain::judge::gate::{Group, Verdict};
use crate::retrain::report::Report;
use crate::retrain::report::html::{Cell, number, percent, table};

/// Communities shown; the manifest has all.
const MOST_COMMUNITIES: usize = 25;

pub(in crate::retrain::report) fn communities(report: &Report<'_>) -> String {
    let [champion, challenger] = [report.champion, report.challenger].map(|side| &side.evaluation.communities);
    let name = |community: &Option<String>| community.clone().unwrap_or_else(|| "(none named)".to_owned());
    let rows = challenger.iter().take(MOST_COMMUNITIES).map(|one| {
        let before = champion.iter().find(|other| other.community == one.community);
        let pair = |shown: fn(Option<f64>) -> String, value: fn(&CommunityFigures) -> Option<f64>| {
            [shown(before.and_then(value)), shown(value(one))].map(Cell::Number)
        };
        let mut row = vec![
            Cell::Text(name(&one.community)),
            Cell::Number(one.rows.to_string()),
            Cell::Number(one.hateful.to_string()),
        ];
        row.extend(pair(percent, |one| one.false_positive_rate));
        row.extend(pair(number, |one| one.f1));
        row
    });
    let columns = [
        "Community",
        "Rows",
        "Hateful",
        "False positives, champion",
        "False positives, challenger",
        "F1, champion",
        "F1, challenger",
    ];
    let by_community = table(
        "At the threshold of the figures above, largest communities first.",
        &columns,
        rows.collect(),
    );
    let more = match challenger.len().saturating_sub(MOST_COMMUNITIES) {
        0 => String::new(),
        more => format!("<p class=\"quiet\">{more} smaller communities are not shown; the manifest has all.</p>\n"),
    };
    let compared = report
        .judgement
        .map_or_else(String::new, |judgement| compared(judgement.verdict));
    format!("<h2>Communities</h2>\n{by_community}{more}{compared}")
}

fn compared(verdict: &Verdict) -> String {
    // What speaks against the challenger must be among what is shown.
    let mut compared: Vec<_> = verdict.communities.iter().collect();
    compared.sort_by_key(|one| (!one.worse, std::cmp::Reverse(one.ok_rows)));
    let hidden = compared.len().saturating_sub(MOST_COMMUNITIES);
    let rows = compared.iter().take(MOST_COMMUNITIES).map(|one| {
        let outcome = match (one.worse, one.p_value) {
            (true, _) => "worse beyond noise",
            (false, Some(_)) => "not worse beyond noise",
            (false, None) => "too few rows to say",
        };
        let group = match &one.group {
            Group::Community { id } => id.clone(),
            other => format!("({other})"),
        };
        vec![
            Cell::Text(group),
            Cell::Number(one.ok_rows.to_string()),
            Cell::Number(percent(Some(one.champion_rate))),
            Cell::Number(percent(Some(one.challenger_rate))),
            Cell::Number(one.newly_called.to_string()),
            Cell::Number(one.no_longer_called.to_string()),
            Cell::Number(one.p_value.map_or_else(|| "–".to_owned(), |p| format!("{p:.4}"))),
            Cell::Text(outcome.to_owned()),
        ]
    });
    let columns = [
        "Group",
        "Harmless rows",
        "Called, champion",
        "Called, challenger",
        "Newly called",
        "No longer called",
        "p",
        "Outcome",
    ];
    let compared = table(
        "What the gate looked at: harmless comments that each adapter would act on with its own thresholds.",
        &columns,
        rows.collect(),
    );
    let hidden = match hidden {
        0 => String::new(),
        hidden => format!("<p class=\"quiet\">{hidden} more groups are not shown; the manifest has all.</p>\n"),
    };
    format!("<h3>False positives, before and after</h3>\n{compared}{hidden}")
}
