//! The page's sections, in order.

mod bands;
mod charts;
mod communities;

use super::html::{Cell, escape, facts as fact_table, number, table};
use super::{Judgement, Report, ReportSide};
use crate::retrain::judge::evaluation::{CALIBRATION_BINS, Estimate, Evaluation};
use crate::retrain::judge::gate::{MIN_CLASS_ROWS, MIN_OK_ROWS, Verdict};

pub(super) use bands::calibration;
pub(super) use charts::{calls, curves};
pub(super) use communities::communities;

/// What kind of page it is.
pub(super) fn title(report: &Report<'_>) -> &'static str {
    match report.judgement {
        Some(_) => "Retraining report",
        None => "Evaluation report",
    }
}

pub(super) fn verdict(report: &Report<'_>) -> String {
    let names = format!(
        "Challenger {} against champion {}, {}.",
        escape(report.challenger.name),
        escape(report.champion.name),
        escape(report.created_at),
    );
    let Some(Judgement { verdict, bands, .. }) = report.judgement else {
        let Evaluation { rows, hateful, .. } = report.challenger.evaluation;
        return format!(
            "<h1>Evaluation report</h1>\n<p class=\"sub\">{names} {rows} rows, {hateful} of them hateful.</p>\n"
        );
    };
    let (class, mark, heading) = if verdict.promote {
        ("yes", "✓", "Promoted")
    } else {
        ("no", "✗", "Not promoted: the champion stays")
    };
    let reasons = if verdict.promote {
        format!("<p>{}.</p>", escape(&capitalised(&verdict.to_string())))
    } else {
        let reasons = verdict
            .refusals
            .iter()
            .map(|refusal| format!("<li>{}.</li>\n", escape(&capitalised(&refusal.to_string()))));
        format!("<ul>\n{}</ul>", reasons.collect::<String>())
    };
    let not_representative = if bands.representative() {
        ""
    } else {
        "<p class=\"note\"><strong>Not representative.</strong> Too little of this feedback was sampled from the \
         traffic with a known rate. The figures hold for the labelled comments, not for all comments, and no \
         threshold for a recall or a share of the traffic was derived from them.</p>\n"
    };
    format!(
        "<h1>Retraining report</h1>\n<p class=\"sub\">{names} {} rows of the test part, {} of them hateful.</p>\n\
         <div class=\"verdict {class}\"><strong>{mark} {heading}</strong>\n{reasons}</div>\n{not_representative}",
        verdict.rows, verdict.hateful,
    )
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

/// Name, as shown, and which way is better.
const FIGURES: [(&str, &str, Better); 10] = [
    ("pr_auc", "PR-AUC (average precision)", Better::Higher),
    ("roc_auc", "ROC-AUC", Better::Higher),
    ("f1", "F1, hateful", Better::Higher),
    ("macro_f1", "F1, mean of classes", Better::Higher),
    ("precision", "Precision", Better::Higher),
    ("recall", "Recall", Better::Higher),
    ("accuracy", "Accuracy", Better::Higher),
    ("log_loss", "Log-loss", Better::Lower),
    ("brier", "Brier score", Better::Lower),
    ("ece", "Expected calibration error", Better::Lower),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Better {
    Higher,
    Lower,
}

pub(super) fn figures(report: &Report<'_>) -> String {
    let estimate = |side: ReportSide<'_>, name: &str| {
        let figures = side.evaluation.figures;
        figures
            .iter()
            .find(|(other, _)| *other == name)
            .map(|(_, &estimate)| estimate)
    };
    let cell = |estimate: Option<Estimate>| {
        let value = number(estimate.and_then(|estimate| estimate.value));
        match estimate.and_then(|estimate| estimate.interval) {
            Some([low, high]) => Cell::Remarked(value, format!("{low:.3} to {high:.3}")),
            None => Cell::Remarked(value, "no interval".to_owned()),
        }
    };
    let rows = FIGURES.map(|(name, shown, better)| {
        let [champion, challenger] = [report.champion, report.challenger].map(|side| estimate(side, name));
        let values = champion
            .and_then(|one| one.value)
            .zip(challenger.and_then(|one| one.value));
        let difference = match values {
            Some((champion, challenger)) => {
                let difference = challenger - champion;
                let gain = if better == Better::Higher {
                    difference
                } else {
                    -difference
                };
                // What rounds to nothing is neither.
                let word = match gain {
                    gain if gain >= 5e-4 => "better",
                    gain if gain <= -5e-4 => "worse",
                    _ => "the same",
                };
                Cell::Remarked(format!("{difference:+.3}"), word.to_owned())
            }
            None => Cell::Number("–".to_owned()),
        };
        vec![
            Cell::Text(shown.to_owned()),
            cell(champion),
            cell(challenger),
            difference,
        ]
    });
    let threshold = report.challenger.evaluation.config.threshold;
    let resamples = report.challenger.evaluation.config.bootstrap.resamples;
    let caption = format!(
        "On the rows that judge, with 95 % intervals from {resamples} resamples. Called hateful from probability {threshold} on."
    );
    let columns = ["Figure", "Champion", "Challenger", "Difference"];
    format!("<h2>Figures</h2>\n{}", table(&caption, &columns, rows.into()))
}

pub(super) fn facts(report: &Report<'_>) -> String {
    let data = fact_table("Rows of feedback", &report.data);
    let hyperparameters = fact_table("Training", &report.hyperparameters);
    let identities = fact_table("Content hashes and names", &report.identities);
    format!(
        "<h2>Data and training</h2>\n<div class=\"facts\">\n<div>{data}</div>\n<div>{hyperparameters}</div>\n</div>\n\
         <h2>Identities</h2>\n{identities}"
    )
}

pub(super) fn definitions(report: &Report<'_>) -> String {
    let (parts, gate) = report
        .judgement
        .map_or_else(Default::default, |judgement| gate(judgement.verdict));
    format!(
        "<h2>How to read this</h2>\n{parts}\
         <p>Figures are defined as in scikit-learn; a figure that is not defined is shown as a dash. PR-AUC is average \
         precision. The calibration error has {CALIBRATION_BINS} bins of equal width. Intervals are percentiles of a \
         bootstrap that draws rows plainly; the same seed gives the same intervals.</p>\n\
         {gate}<p class=\"quiet\">This page holds no text of any comment.</p>\n"
    )
}

/// What the parts are for, and how the gate judges.
fn gate(verdict: &Verdict) -> (String, String) {
    let growth = &verdict.training_rows;
    let parts = "<p>The test part judges and is never trained on; calibration and bands come from the validation part. The \
         side of a text is fixed by a key and does not change from one training to the next.</p>\n";
    let gate = format!(
        "<p>The gate compares PR-AUC by a paired bootstrap: the one-sided 95 % lower bound of the difference must be \
         above 0, or above -0.01 where the challenger was trained on at least {} more rows than the champion \
         ({} against {}). It needs {MIN_CLASS_ROWS} rows of each class. False positives are compared by exact one-sided \
         McNemar tests under Holm's levels, 5 % over all groups; communities with fewer than {MIN_OK_ROWS} harmless \
         rows are compared together.</p>\n",
        verdict.config.min_growth, growth.challenger, growth.champion,
    );
    (parts.to_owned(), gate)
}
