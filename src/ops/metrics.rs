//! Every metric's name, and the recorder that renders them.
//!
//! Names follow `moderatord_<noun>_<unit>[_total]`; labels take few, fixed values. Recorded once a
//! batch or a transaction, never in inner loops, and never with anything of a comment's text.

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Input records finished, by `outcome`: decided, deleted, tombstone, dead_letter.
pub const EVENTS: &str = "moderatord_events_total";
/// Decisions, by `action`.
pub const DECISIONS: &str = "moderatord_decisions_total";
/// Dead letters, by `reason`.
pub const DEAD_LETTERS: &str = "moderatord_dead_letters_total";
/// Transactions, by `result`: committed, aborted, fenced.
pub const TRANSACTIONS: &str = "moderatord_transactions_total";
/// Own tokens of a micro-batch.
pub const BATCH_TOKENS: &str = "moderatord_batch_tokens";
/// Own tokens that a micro-batch may have, as found at the start.
pub const BATCH_BUDGET: &str = "moderatord_batch_budget_tokens";
/// Rows of a micro-batch.
pub const BATCH_ROWS: &str = "moderatord_batch_rows";
/// Time of one batch in one `stage`: encode, wait, score, emit, commit.
pub const STAGE_SECONDS: &str = "moderatord_stage_seconds";
/// Events waiting, by `queue`.
pub const QUEUE_EVENTS: &str = "moderatord_queue_events";
/// Bytes waiting, by `queue`.
pub const QUEUE_BYTES: &str = "moderatord_queue_bytes";
/// Records between the committed offset and the end, by `partition`.
pub const LAG: &str = "moderatord_consumer_lag_records";
/// Time since the oldest record that is read but not committed was appended to its topic.
pub const OLDEST_UNFINISHED: &str = "moderatord_oldest_unfinished_seconds";
/// Time from a record's append to the commit of its decision.
pub const APPEND_TO_COMMIT: &str = "moderatord_append_to_commit_seconds";
/// The calibrated probability.
pub const PROBABILITY: &str = "moderatord_probability";
/// Always 1; its labels say what is being served.
pub const MODEL_INFO: &str = "moderatord_model_info";
/// Pointers followed while serving, by `result`: swapped, refused.
pub const ADAPTER_SWAPS: &str = "moderatord_adapter_swaps_total";
/// Failed calls of the scorer, by `verdict`: record, device.
pub const SCORE_FAILURES: &str = "moderatord_score_failures_total";

/// Installs the recorder of this process.
///
/// # Errors
/// A recorder is installed already.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    let seconds = [
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    ];
    let sizes = [
        1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    ];
    let probabilities: Vec<f64> = (1..=20).map(|twentieth| f64::from(twentieth) / 20.0).collect();
    let full = |name: &str| Matcher::Full(name.to_owned());
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(full(STAGE_SECONDS), &seconds)?
        .set_buckets_for_metric(full(APPEND_TO_COMMIT), &seconds)?
        .set_buckets_for_metric(full(BATCH_TOKENS), &sizes)?
        .set_buckets_for_metric(full(BATCH_ROWS), &sizes)?
        .set_buckets_for_metric(full(PROBABILITY), &probabilities)?
        .install_recorder()?;
    describe();
    Ok(handle)
}

fn describe() {
    describe_counter!(EVENTS, "Input records finished, by outcome.");
    describe_counter!(DECISIONS, "Decisions, by action.");
    describe_counter!(DEAD_LETTERS, "Dead letters, by reason.");
    describe_counter!(TRANSACTIONS, "Kafka transactions, by result.");
    describe_counter!(ADAPTER_SWAPS, "Pointers followed while serving, by result.");
    describe_counter!(SCORE_FAILURES, "Failed calls of the scorer, by verdict.");
    describe_histogram!(BATCH_TOKENS, "Own tokens of a micro-batch.");
    describe_gauge!(BATCH_BUDGET, "Own tokens that a micro-batch may have.");
    describe_histogram!(BATCH_ROWS, "Rows of a micro-batch.");
    describe_histogram!(STAGE_SECONDS, Unit::Seconds, "Time of one batch in one stage.");
    describe_histogram!(
        APPEND_TO_COMMIT,
        Unit::Seconds,
        "From a record's append to the commit of its decision."
    );
    describe_histogram!(PROBABILITY, "Calibrated probability that a comment is hateful.");
    describe_gauge!(QUEUE_EVENTS, "Events waiting, by queue.");
    describe_gauge!(QUEUE_BYTES, Unit::Bytes, "Bytes waiting, by queue.");
    describe_gauge!(LAG, "Records between the committed offset and the end, by partition.");
    describe_gauge!(
        OLDEST_UNFINISHED,
        Unit::Seconds,
        "Age of the oldest record read but not committed."
    );
    describe_gauge!(MODEL_INFO, "Always 1; its labels say what is being served.");
}
