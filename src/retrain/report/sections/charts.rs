//! The sections with charts, and their captions.

use crate::retrain::judge::evaluation::Estimate;
use crate::retrain::report::charts;
use crate::retrain::report::charts::{ChartError, Series};
use crate::retrain::report::html::{figure, number, percent};
use crate::retrain::report::{Report, ReportSide};

/// Explains the lines and marks of the charts.
const LEGEND: &str = "<ul class=\"legend\">\n\
    <li><svg viewBox=\"0 0 52 18\" aria-hidden=\"true\"><path d=\"M2 9H50\" stroke=\"#0072B2\" stroke-width=\"3\"/>\
    <circle cx=\"26\" cy=\"9\" r=\"5\" fill=\"#0072B2\"/></svg>challenger (solid, circles)</li>\n\
    <li><svg viewBox=\"0 0 52 18\" aria-hidden=\"true\"><path d=\"M2 9H50\" stroke=\"#C44E00\" stroke-width=\"3\" \
    stroke-dasharray=\"9 5\"/><path d=\"M21 4H31V14H21Z\" fill=\"#C44E00\"/></svg>champion (dashed, squares)</li>\n\
    <li><svg viewBox=\"0 0 52 18\" aria-hidden=\"true\"><path d=\"M2 9H50\" stroke=\"#5B6773\" stroke-width=\"2\" \
    stroke-dasharray=\"2 5\"/></svg>reference (dotted)</li>\n</ul>\n";

pub(in crate::retrain::report) fn curves(report: &Report<'_>) -> Result<String, ChartError> {
    let (champion, challenger) = (report.champion, report.challenger);
    let values = |name: fn(&ReportSide<'_>) -> Estimate| {
        let [champion, challenger] = [champion, challenger].map(|side| number(name(&side).value));
        format!("champion {champion}, challenger {challenger}")
    };
    let confusion = challenger.evaluation.weighted_confusion;
    let hateful = (confusion.true_positives + confusion.false_negatives) / confusion.total();
    let roc = figure(
        "ROC",
        &charts::roc(champion.curves, challenger.curves)?,
        &format!(
            "Area under the curve: {}. Dotted: chance.",
            values(|side| side.evaluation.figures.roc_auc)
        ),
    );
    let precision_recall = figure(
        "Precision and recall",
        &charts::precision_recall(champion.curves, challenger.curves, hateful)?,
        &format!(
            "Average precision: {}. Dotted: chance, {}.",
            values(|side| side.evaluation.figures.pr_auc),
            percent(Some(hateful))
        ),
    );
    let reliability = figure(
        "Reliability",
        &charts::reliability(champion.curves, challenger.curves)?,
        &format!(
            "Expected calibration error: {}. Dotted: perfect calibration. Larger marks represent more rows.",
            values(|side| side.evaluation.figures.ece)
        ),
    );
    Ok(format!(
        "<h2>Ranking and calibration</h2>\n{LEGEND}<div class=\"figures three\">\n{roc}{precision_recall}{reliability}</div>\n"
    ))
}

pub(in crate::retrain::report) fn predictions(report: &Report<'_>) -> Result<String, ChartError> {
    let sides = [
        (Series::Champion, "champion", report.champion),
        (Series::Challenger, "challenger", report.challenger),
    ];
    let highest = charts::highest([&report.champion.curves.histogram, &report.challenger.curves.histogram]);
    let mut figures = String::new();
    for (_, name, side) in sides {
        let threshold = side.evaluation.config.threshold;
        let chart = charts::histogram(name, &side.curves.histogram, threshold, highest)?;
        let caption = format!(
            "Hateful rows above the line, other rows below it, as shares of their class. The scale is a square root, \
             so that small bars are visible. Dotted: the threshold of {threshold}."
        );
        figures += &figure(&format!("Probabilities, {name}"), &chart, &caption);
    }
    for (series, name, side) in sides {
        let chart = charts::confusion(series, name, &side.evaluation.confusion)?;
        let caption = format!(
            "Number of rows at the threshold of {}, unweighted: labels in rows, predictions in columns.",
            side.evaluation.config.threshold
        );
        figures += &figure(&format!("Confusion matrix, {name}"), &chart, &caption);
    }
    Ok(format!(
        "<h2>Probabilities and predictions</h2>\n<div class=\"figures\">\n{figures}</div>\n"
    ))
}
