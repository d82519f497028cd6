//! The section on the calibration and the thresholds.

use super::capitalised;
use crate::decide::Calibration;
use crate::retrain::judge::calibration::CalibrationMethod;
use crate::retrain::judge::thresholds::{PRIOR_ROWS, ReviewTarget, ThresholdOutcome};
use crate::retrain::report::html::{Cell, escape, number, percent, table};
use crate::retrain::report::{Judgement, Report};

pub(in crate::retrain::report) fn calibration(report: &Report<'_>) -> String {
    let Some(Judgement {
        calibration: fitted,
        thresholds,
        ..
    }) = report.judgement
    else {
        return String::new();
    };
    let method = match fitted.method {
        CalibrationMethod::Platt => format!("Platt scaling, {}", line(fitted.calibration)),
        CalibrationMethod::Temperature => format!("temperature scaling, {}", line(fitted.calibration)),
        CalibrationMethod::Identity { reason } => format!("none, so the probability equals the score: {reason}"),
    };
    let text = format!(
        "<p>Calibration: {}. On {} rows, with effectively {:.0} hateful and {:.0} other rows, the log-loss \
         changed from {:.4} to {:.4}.</p>\n",
        escape(&method),
        fitted.rows,
        fitted.effective_hateful,
        fitted.effective_ok,
        fitted.log_loss_before,
        fitted.log_loss_after,
    );
    let review = match thresholds.targets.review {
        ReviewTarget::Recall(target) => format!("recall of at least {target}"),
        ReviewTarget::Share(target) => format!("at most {} of the traffic", percent(Some(target))),
    };
    let by = if thresholds.block.is_provisional() {
        "by its estimate"
    } else {
        "at its lower bound"
    };
    let block = format!("precision of at least {} {by}", thresholds.targets.block_precision);
    let row = |name: &str, target: String, outcome: &ThresholdOutcome| {
        let text = |text: &str| Cell::Text(text.to_owned());
        let mut row = vec![text(name), Cell::Text(target)];
        match outcome {
            ThresholdOutcome::Derived {
                value,
                figures,
                limited_by_block,
                provisional,
            } => {
                let remarks = [
                    (*provisional, "provisional: estimated from few rows"),
                    (*limited_by_block, "lowered to the block threshold"),
                ];
                let remarks = remarks.into_iter().filter(|(applies, _)| *applies);
                row.extend([
                    Cell::Number(format!("{value:.4}")),
                    with_interval(Some(figures.precision), figures.precision_interval),
                    with_interval(figures.recall, figures.recall_interval),
                    Cell::Number(percent(Some(figures.share))),
                    Cell::Text(remarks.map(|(_, remark)| remark).collect::<Vec<_>>().join("; ")),
                ]);
            }
            ThresholdOutcome::None { reason } => {
                let none = || Cell::Number("–".to_owned());
                row.extend([
                    none(),
                    none(),
                    none(),
                    none(),
                    Cell::Text(capitalised(&reason.to_string())),
                ]);
            }
        }
        row
    };
    let rows = vec![
        row("Block", block, &thresholds.block),
        row("Review", review, &thresholds.review),
    ];
    let caption = format!(
        "Thresholds of the calibrated probability, derived from {} rows, {} of them hateful, {}. Precision and recall \
         are those of these rows. The intervals contain those of other rows like them with a probability of 90 %, if \
         what the calibration expects counts as {PRIOR_ROWS} rows. If a threshold could not be derived, the one in the \
         settings applies.",
        thresholds.rows,
        thresholds.hateful,
        if thresholds.is_representative() {
            "weighted to represent the traffic"
        } else {
            "unweighted, which is not representative of the traffic"
        }
    );
    let columns = ["Threshold", "Target", "Value", "Precision", "Recall", "Share", "Remark"];
    format!(
        "<h2>Calibration and thresholds</h2>\n{text}{}",
        table(&caption, &columns, rows)
    )
}

/// Shows a share with its interval below.
fn with_interval(share: Option<f64>, interval: Option<[f64; 2]>) -> Cell {
    match interval {
        Some([low, high]) => Cell::Remarked(number(share), format!("{low:.3} to {high:.3}")),
        None => Cell::Number(number(share)),
    }
}

fn line(calibration: Calibration) -> String {
    match calibration {
        Calibration::Identity => "slope 1 and intercept 0".to_owned(),
        Calibration::Platt { slope, intercept } => format!("slope {slope:.4} and intercept {intercept:.4}"),
    }
}
