//! How margins become probabilities, and where the bands begin.

use super::capitalised;
use crate::decide::Calibration;
use crate::retrain::judge::calibration::Method;
use crate::retrain::judge::thresholds::{Band, ReviewTarget};
use crate::retrain::report::html::{Cell, escape, number, percent, table};
use crate::retrain::report::{Judgement, Report};

pub(in crate::retrain::report) fn calibration(report: &Report<'_>) -> String {
    let Some(Judgement {
        calibration: fitted,
        bands,
        ..
    }) = report.judgement
    else {
        return String::new();
    };
    let method = match fitted.method {
        Method::Platt => format!("Platt scaling, {}", line(fitted.calibration)),
        Method::Temperature => format!("temperature scaling, {}", line(fitted.calibration)),
        Method::Identity { reason } => format!("none, the model's own probability: {reason}"),
    };
    let text = format!(
        "<p>Calibration: {}. On {} validation rows, worth {:.0} hateful and {:.0} other ones, the log-loss went from \
         {:.4} to {:.4}.</p>\n",
        escape(&method),
        fitted.rows,
        fitted.effective_hateful,
        fitted.effective_ok,
        fitted.log_loss_before,
        fitted.log_loss_after,
    );
    let review = match bands.targets.review {
        ReviewTarget::Recall(target) => format!("recall of at least {target}"),
        ReviewTarget::Share(target) => format!("at most {} of the traffic", percent(Some(target))),
    };
    let block = format!(
        "precision of at least {}, at its lower bound",
        bands.targets.block_precision
    );
    let row = |name: &str, target: String, band: &Band| {
        let text = |text: &str| Cell::Text(text.to_owned());
        let mut row = vec![text(name), Cell::Text(target)];
        match band {
            Band::Derived {
                value,
                figures,
                limited_by_block,
            } => {
                row.extend([
                    Cell::Number(format!("{value:.4}")),
                    Cell::Remarked(
                        number(Some(figures.precision)),
                        format!("bound {:.3}", figures.precision_bound),
                    ),
                    Cell::Number(number(figures.recall)),
                    Cell::Number(percent(Some(figures.share))),
                    text(if *limited_by_block {
                        "met where blocking begins"
                    } else {
                        ""
                    }),
                ]);
            }
            Band::None { reason } => {
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
    let rows = vec![row("Block", block, &bands.block), row("Review", review, &bands.review)];
    let caption = format!(
        "Bands on the calibrated probability, from {} validation rows, {} of them hateful{}. Where none was derived, \
         the settings' threshold stays.",
        bands.rows,
        bands.hateful,
        if bands.representative() {
            ", weighted to stand for the traffic"
        } else {
            ", as labelled"
        }
    );
    let columns = ["Band", "Target", "From", "Precision", "Recall", "Share", "Remark"];
    format!(
        "<h2>Calibration and bands</h2>\n{text}{}",
        table(&caption, &columns, rows)
    )
}

fn line(calibration: Calibration) -> String {
    match calibration {
        Calibration::Identity => "the margin itself".to_owned(),
        Calibration::Platt { slope, intercept } => format!("slope {slope:.4} and intercept {intercept:.4}"),
    }
}
