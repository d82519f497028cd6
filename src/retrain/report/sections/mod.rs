//! The sections of the report.

mod calibration;
mod charts;
mod communities;

use super::html::{Cell, escape, facts as fact_table, number, table};
use super::{Judgement, Report, ReportSide};
use crate::retrain::judge::evaluation::{CALIBRATION_BINS, Estimate, Evaluation, SMOOTHING};
use crate::retrain::judge::gate::{GROWTH_TOLERANCE, MIN_CLASS_ROWS, MIN_OK_ROWS, Verdict};

pub(super) use calibration::calibration;
pub(super) use charts::{curves, predictions};
pub(super) use communities::communities;

/// Returns the title, which depends on whether the report is about a retraining.
pub(super) fn title(report: &Report<'_>) -> &'static str {
    match report.judgement {
        Some(_) => "Retraining report",
        None => "Evaluation report",
    }
}

pub(super) fn verdict(report: &Report<'_>) -> String {
    let names = format!(
        "Challenger: {}. Champion: {}. Created: {}.",
        escape(report.challenger.name),
        escape(report.champion.name),
        escape(report.created_at),
    );
    let Some(Judgement {
        verdict, thresholds, ..
    }) = report.judgement
    else {
        let Evaluation { rows, hateful, .. } = report.challenger.evaluation;
        return format!(
            "<h1>Evaluation report</h1>\n<p class=\"sub\">{names} {rows} rows, {hateful} of them labelled hateful.</p>\n"
        );
    };
    let (class, mark, heading) = if verdict.promote {
        ("yes", "✓", "Accepted for promotion")
    } else {
        ("no", "✗", "Not promoted: the champion stays in service")
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
    let power = verdict.power.as_ref().map_or_else(String::new, |power| {
        format!(
            "<p class=\"quiet\">What these rows can show: {}.</p>\n",
            escape(&power.to_string())
        )
    });
    let judged = if verdict.folds > 1 {
        format!("{} rows judged in {} folds", verdict.rows, verdict.folds)
    } else {
        format!("{} rows in the test part", verdict.rows)
    };
    let not_representative = if thresholds.is_representative() {
        ""
    } else {
        "<p class=\"note\"><strong>Not representative.</strong> Too few of the labelled comments were \
         sampled from the traffic at a known rate. The figures and thresholds apply to the labelled comments, not to \
         all comments.</p>\n"
    };
    format!(
        "<h1>Retraining report</h1>\n<p class=\"sub\">{names} {judged}, {} of them labelled hateful.</p>\n\
         <div class=\"verdict {class}\"><strong>{mark} {heading}</strong>\n{reasons}</div>\n{power}{not_representative}",
        verdict.hateful,
    )
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}

/// The figures shown: name in JSON, name in the report, and which direction is better.
const FIGURES: [(&str, &str, Better); 10] = [
    ("pr_auc", "PR-AUC (average precision)", Better::Higher),
    ("roc_auc", "ROC-AUC", Better::Higher),
    ("f1", "F1, hateful class", Better::Higher),
    ("macro_f1", "F1, mean of both classes", Better::Higher),
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
    let figures = FIGURES.map(|(name, shown, better)| {
        let [champion, challenger] = [report.champion, report.challenger].map(|side| estimate(side, name));
        let value = |estimate: Option<Estimate>| estimate.and_then(|estimate| estimate.value);
        let values = value(champion).zip(value(challenger));
        let difference = match values {
            Some((champion, challenger)) => {
                let difference = challenger - champion;
                let gain = if better == Better::Higher {
                    difference
                } else {
                    -difference
                };
                // A difference that is shown as 0.000 is neither better nor worse.
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
    let rows = if report.judgement.is_some() {
        "the test part"
    } else {
        "all rows"
    };
    let caption = format!(
        "Computed on {rows}, with 95 % intervals from {resamples} resamples. Rows with a probability of at least \
         {threshold} are predicted hateful."
    );
    let columns = ["Figure", "Champion", "Challenger", "Difference"];
    format!("<h2>Figures</h2>\n{}", table(&caption, &columns, figures.into()))
}

pub(super) fn facts(report: &Report<'_>) -> String {
    let data = fact_table("Feedback", &report.data);
    let hyperparameters = fact_table("Training settings", &report.hyperparameters);
    let identities = fact_table("Names and content hashes", &report.identities);
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
        "<h2>How to read this report</h2>\n{parts}\
         <p>Figures are defined as in scikit-learn; a dash means that a figure is not defined. PR-AUC is average \
         precision. The expected calibration error has {CALIBRATION_BINS} bins of equal width. Intervals are \
         percentiles of bootstrap resamples, which are not stratified by class; the same seed gives the same \
         intervals.</p>\n\
         {gate}<p class=\"quiet\">This page does not contain the text of any comment.</p>\n"
    )
}

/// Describes the parts of the data, and how the gate compares the adapters.
fn gate(verdict: &Verdict) -> (String, String) {
    let growth = &verdict.training_rows;
    let parts = if verdict.folds > 1 {
        format!(
            "<p>Judging is cross-fitted: the labelled rows are divided into {} folds. The challenger predicts the rows \
             of the first, the test part, and for each other fold an adapter that was trained in the same way, but \
             without the fold. Rows are ranked against rows of the same fold only, and PR-AUC is the mean over the \
             folds. Rows that resemble those that the champion was trained on do not judge. All other figures and \
             the charts are those of the test part, on which the challenger was never trained. The calibration and \
             the thresholds are derived from the other rows. A fixed key determines the fold of a text, so this does \
             not change from one retraining to the next.</p>\n",
            verdict.folds
        )
    } else {
        "<p>The adapters are compared on the test part, which is never trained on. The calibration and the thresholds \
         are derived from the validation part. A fixed key determines which part a text belongs to, so this does not \
         change from one retraining to the next.</p>\n"
            .to_owned()
    };
    let gate = format!(
        "<p>The gate compares PR-AUC by a paired bootstrap: the one-sided 95 % lower bound of the difference must be \
         above 0. If the challenger was trained on at least {} more rows than the champion (here, on {} rows compared \
         with {}), the 97.5 % lower bound must be above -{GROWTH_TOLERANCE} instead. The bounds are those of a smoothed \
         difference, which varies less: {:.0} % more rows, hateful at the rate of all rows, are added above each margin, \
         and the result is converted to units of PR-AUC. At least {MIN_CLASS_ROWS} rows of each class are required. \
         False positives are compared with both adapters flagging the same share of the rows, by exact one-sided \
         McNemar tests, with Holm's correction for a level of 5 % over all groups. Communities with fewer than \
         {MIN_OK_ROWS} harmless rows are compared together. A row is harmless if it is not labelled hateful.</p>\n",
        verdict.config.min_growth,
        growth.challenger,
        growth.champion,
        100.0 * SMOOTHING,
    );
    (parts, gate)
}
