//! The charts and what stands below them.

use crate::retrain::judge::evaluation::Estimate;
use crate::retrain::report::charts;
use crate::retrain::report::charts::{ChartError, Who};
use crate::retrain::report::html::{figure, number, percent};
use crate::retrain::report::{Report, ReportSide};

/// Lines and marks as the charts draw them.
const LEGEND: &str = "<ul class=\"legend\">\n\
    <li><svg viewBox=\"0 0 52 18\" aria-hidden=\"true\"><path d=\"M2 9H50\" stroke=\"#0072B2\" stroke-width=\"3\"/>\
    <circle cx=\"26\" cy=\"9\" r=\"5\" fill=\"#0072B2\"/></svg>challenger (solid, circles)</li>\n\
    <li><svg viewBox=\"0 0 52 18\" aria-hidden=\"true\"><path d=\"M2 9H50\" stroke=\"#C44E00\" stroke-width=\"3\" \
    stroke-dasharray=\"9 5\"/><path d=\"M21 4H31V14H21Z\" fill=\"#C44E00\"/></svg>champion (dashed, squares)</li>\n\
    <li><svg viewBox=\"0 0 52 18\" aria-hidden=\"true\"><path d=\"M2 9H50\" stroke=\"#5B6773\" stroke-width=\"2\" \
    stroke-dasharray=\"2 5\"/></svg>to compare with (dotted)</li>\n</ul>\n";

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
            "Area: {}. Dotted: chance.",
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
            "Calibration error: {}. Dotted: perfect. Larger marks hold more rows.",
            values(|side| side.evaluation.figures.ece)
        ),
    );
    Ok(format!(
        "<h2>Ranking and calibration</h2>\n{LEGEND}<div class=\"figures three\">\n{roc}{precision_recall}{reliability}</div>\n"
    ))
}

pub(in crate::retrain::report) fn calls(report: &Report<'_>) -> Result<String, ChartError> {
    let sides = [
        (Who::Champion, "champion", report.champion),
        (Who::Challenger, "challenger", report.challenger),
    ];
    let highest = charts::highest([&report.champion.curves.histogram, &report.challenger.curves.histogram]);
    let mut figures = String::new();
    for (_, name, side) in sides {
        let threshold = side.evaluation.config.threshold;
        let chart = charts::histogram(name, &side.curves.histogram, threshold, highest)?;
        let caption = format!(
            "Hateful rows above the line, the others below it, each as a share of its class, on a square-root scale so \
             that small bars show. Dotted: threshold {threshold}."
        );
        figures += &figure(&format!("Probabilities, {name}"), &chart, &caption);
    }
    for (who, name, side) in sides {
        let chart = charts::confusion(who, name, &side.evaluation.confusion)?;
        let caption = format!(
            "Rows of the test part at threshold {}: labels in rows, calls in columns, unweighted.",
            side.evaluation.config.threshold
        );
        figures += &figure(&format!("Confusion matrix, {name}"), &chart, &caption);
    }
    Ok(format!(
        "<h2>Probabilities and calls</h2>\n<div class=\"figures\">\n{figures}</div>\n"
    ))
}
