//! Updates the metrics of committed outputs, once per commit.

use std::collections::BTreeMap;
use std::time::SystemTime;

use metrics::{counter, histogram};

use super::output::{Output, OutputKind};
use crate::message::Action;
use crate::ops::metrics as names;

/// Counts by the value of a metric's label.
type LabelCounts = BTreeMap<&'static str, u64>;

/// Counts outputs that were committed at `now`.
pub(super) fn record(outputs: &[Output], now: SystemTime) {
    let now = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |now| i64::try_from(now.as_millis()).unwrap_or(i64::MAX));
    let (mut outcomes, mut actions, mut reasons) = (LabelCounts::new(), LabelCounts::new(), LabelCounts::new());
    let mut competences = LabelCounts::new();
    let latency = histogram!(names::APPEND_TO_COMMIT);
    let score = histogram!(names::PROBABILITY);
    for output in outputs {
        let outcome = match output.kind {
            OutputKind::Decided {
                action,
                probability,
                competence,
            } => {
                if let Some(competence) = competence {
                    *competences.entry(competence.as_str()).or_default() += 1;
                }
                score.record(probability);
                *actions.entry(action.name()).or_default() += 1;
                "decided"
            }
            OutputKind::Deleted => {
                *actions.entry(Action::Delete.name()).or_default() += 1;
                "deleted"
            }
            OutputKind::Tombstone => "tombstone",
            OutputKind::DeadLetter { reason } => {
                *reasons.entry(reason).or_default() += 1;
                "dead_letter"
            }
        };
        *outcomes.entry(outcome).or_default() += 1;
        if let Some(timestamp) = output.record.timestamp {
            latency.record((now - timestamp).max(0) as f64 / 1e3);
        }
    }
    for (outcome, count) in outcomes {
        counter!(names::EVENTS, "outcome" => outcome).increment(count);
    }
    for (action, count) in actions {
        counter!(names::DECISIONS, "action" => action).increment(count);
    }
    for (competence, count) in competences {
        counter!(names::COMPETENCE, "competence" => competence).increment(count);
    }
    for (reason, count) in reasons {
        counter!(names::DEAD_LETTERS, "reason" => reason).increment(count);
    }
}
