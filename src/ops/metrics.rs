//! Defines the names of all metrics and installs the recorder that renders them.
//!
//! Names follow the pattern `moderatord_<noun>_<unit>[_total]`, except for those of the process, and each label has a small, fixed set of values.
//! Metrics are recorded once per micro-batch or transaction, not in inner loops, and never contain any part of a
//! comment's text.

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

/// Counts finished input records by `outcome`: decided, deleted, tombstone or dead_letter.
pub const EVENTS: &str = "moderatord_events_total";
/// Counts committed decisions by `action`.
pub const DECISIONS: &str = "moderatord_decisions_total";
/// Counts committed decisions by `competence`: in_scope, unsure or out_of_scope; absent if the model does not say which
/// languages it was trained for.
pub const COMPETENCE: &str = "moderatord_competence_total";
/// Counts committed dead letters by `reason`, of which unscorable is the only one that is not about the event.
pub const DEAD_LETTERS: &str = "moderatord_dead_letters_total";
/// Counts Kafka transactions by `result`: committed, aborted or fenced.
pub const TRANSACTIONS: &str = "moderatord_transactions_total";
/// Counts aborted transactions by `reason`: refused, not_owned, undelivered, missing_topic, broker or producer.
pub const TRANSACTION_ABORTS: &str = "moderatord_transaction_aborts_total";
/// Records the number of own tokens in each micro-batch.
pub const BATCH_TOKENS: &str = "moderatord_batch_tokens";
/// The token budget of a micro-batch in own tokens, as chosen at startup.
pub const BATCH_BUDGET: &str = "moderatord_batch_budget_tokens";
/// Records the number of rows in each micro-batch.
pub const BATCH_ROWS: &str = "moderatord_batch_rows";
/// Counts comments that were looked up in the cache of margins by `result`: hit, coalesced (with a comment that was being
/// scored) or miss.
pub const CACHE_LOOKUPS: &str = "moderatord_cache_lookups_total";
/// The number of texts whose margins are remembered.
pub const CACHE_ENTRIES: &str = "moderatord_cache_entries";
/// Records the time that a batch spends in each `stage`: encode, wait, score, emit or commit.
pub const STAGE_SECONDS: &str = "moderatord_stage_seconds";
/// The number of events waiting in each `queue`: read, batch, commit, and in_flight, which is all of them together with
/// those that a stage works on.
pub const QUEUE_EVENTS: &str = "moderatord_queue_events";
/// The number of bytes waiting in each `queue`: batch, commit, and in_flight.
pub const QUEUE_BYTES: &str = "moderatord_queue_bytes";
/// The number of records of each assigned `partition` that are not finished and committed; 0 at the end of the
/// partition, even if the last offsets belong to transaction markers.
pub const LAG: &str = "moderatord_consumer_lag_records";
/// The age of the oldest record that has been read but not committed, counted from its append to the topic; absent while
/// no partition is assigned.
pub const OLDEST_UNFINISHED: &str = "moderatord_oldest_unfinished_seconds";
/// 1 if `/readyz` succeeds, otherwise 0.
pub const READY: &str = "moderatord_ready";
/// The number of partitions of the comments topic that are assigned to this process.
pub const ASSIGNED_PARTITIONS: &str = "moderatord_assigned_partitions";
/// The number of brokers that the consumer is connected to. It connects only to the brokers that it needs.
pub const BROKERS_UP: &str = "moderatord_brokers_up";
/// The Unix time of the last successful commit; absent before the first one.
pub const LAST_COMMIT: &str = "moderatord_last_commit_timestamp_seconds";
/// Counts changes of the assignment by `kind`: assigned, revoked or lost.
pub const REBALANCES: &str = "moderatord_rebalances_total";
/// Counts records that retention deleted before they were read, with `kafka.on_gap = "continue"`.
pub const GAP_RECORDS: &str = "moderatord_gap_records_total";
/// Records the time from the append of a record to the commit of its decision.
pub const APPEND_TO_COMMIT: &str = "moderatord_append_to_commit_seconds";
/// Records the calibrated probability of each scored comment.
pub const PROBABILITY: &str = "moderatord_probability";
/// 1 for the model in service, which the labels describe, and 0 for models that were in service before.
pub const MODEL_INFO: &str = "moderatord_model_info";
/// Counts attempts to swap the adapter while serving by `result`: swapped or refused.
pub const ADAPTER_SWAPS: &str = "moderatord_adapter_swaps_total";
/// Counts the times that the registry was read while serving by `result`: ok, failed or missing.
pub const REGISTRY_READS: &str = "moderatord_registry_reads_total";
/// The Unix time at which the registry was last read and had its version in service.
pub const REGISTRY_LAST_READ: &str = "moderatord_registry_last_read_timestamp_seconds";
/// 1 while the registry does not have the version last seen in service or a later one, and 0 otherwise.
pub const REGISTRY_MISSING: &str = "moderatord_registry_missing";
/// Counts reloads of the policy on SIGHUP by `result`: ok or refused.
pub const RELOADS: &str = "moderatord_reloads_total";
/// Counts failed scorer calls by `verdict`: record or device.
pub const SCORE_FAILURES: &str = "moderatord_score_failures_total";
/// Counts HTTP connections by `result`: completed, timed_out, invalid, failed, refused, refused_client or accept_failed.
pub const HTTP_CONNECTIONS: &str = "moderatord_http_connections_total";
/// The number of open HTTP connections.
pub const HTTP_OPEN_CONNECTIONS: &str = "moderatord_http_open_connections";
/// Counts requests to the API by `endpoint` (score, moderations, analyze, suggestscore or status), `caller`, and `status`,
/// the status code of HTTP: 200, 400, 401, 404, 405, 408, 413, 422, 429, 503 or 504.
pub const API_REQUESTS: &str = "moderatord_api_requests_total";
/// Records the time from the first byte of a request's head to its answer, by `endpoint` (score, moderations, analyze,
/// suggestscore or status).
pub const API_SECONDS: &str = "moderatord_api_request_seconds";
/// Counts comments that were decided for callers of the API by `action`.
pub const API_DECISIONS: &str = "moderatord_api_decisions_total";
/// Counts comments that were dropped unscored, because their caller had gone or their deadline had passed.
pub const API_DROPPED: &str = "moderatord_api_dropped_total";
/// The number of comments of requests that wait to be scored or are being scored.
pub const API_WAITING: &str = "moderatord_api_waiting";
/// Counts connections to the API by `result`, as [`HTTP_CONNECTIONS`].
pub const API_CONNECTIONS: &str = "moderatord_api_connections_total";
/// The number of open connections to the API.
pub const API_OPEN_CONNECTIONS: &str = "moderatord_api_open_connections";
/// Always 1; the labels `version`, `commit` and `features` describe the build.
pub const BUILD_INFO: &str = "moderatord_build_info";

/// The CPU time of the process. This metric and those below have no prefix, because dashboards expect these names.
pub const PROCESS_CPU_SECONDS: &str = "process_cpu_seconds_total";
/// The memory of the process that is in RAM.
pub const PROCESS_RESIDENT_MEMORY: &str = "process_resident_memory_bytes";
/// The number of open file descriptors.
pub const PROCESS_OPEN_FDS: &str = "process_open_fds";
/// The maximum number of open file descriptors.
pub const PROCESS_MAX_FDS: &str = "process_max_fds";
/// The time at which the process started, in seconds since 1970.
pub const PROCESS_START_TIME: &str = "process_start_time_seconds";
/// The number of threads of the process.
pub const PROCESS_THREADS: &str = "process_threads";

/// The features that this build was compiled with.
const FEATURES: &str = match (cfg!(feature = "cuda"), cfg!(feature = "vendored-openssl")) {
    (false, false) => "",
    (true, false) => "cuda",
    (false, true) => "vendored-openssl",
    (true, true) => "cuda,vendored-openssl",
};

/// The value of a gauge whose value is not known. [`Exporter::render`] leaves its series out.
pub const UNKNOWN: f64 = f64::NAN;

/// Renders the metrics of this process.
#[derive(Clone, Debug)]
pub struct Exporter(PrometheusHandle);

impl Exporter {
    /// Returns all metrics in Prometheus' text format, without the series of gauges that are [`UNKNOWN`].
    ///
    /// The recorder cannot remove a series at once, and a query that adds up a NaN has no result.
    pub fn render(&self) -> String {
        let text = self.0.render();
        let known = text.split_inclusive('\n').filter(|line| !line.ends_with(" NaN\n"));
        known.collect()
    }

    /// Moves the samples of histograms into their buckets, which bounds the memory that they use.
    pub fn run_upkeep(&self) {
        self.0.run_upkeep();
    }
}

/// Installs the metrics recorder of this process.
///
/// # Errors
/// Returns an error if a recorder is already installed.
pub fn install() -> Result<Exporter, BuildError> {
    let (recorder, exporter) = build()?;
    metrics::set_global_recorder(recorder)?;
    describe();
    gauge!(
        BUILD_INFO,
        "version" => env!("CARGO_PKG_VERSION"),
        "commit" => env!("MODERATORD_COMMIT"),
        "features" => FEATURES
    )
    .set(1.0);
    start_at_zero();
    Ok(exporter)
}

/// Creates a recorder with the buckets of the histograms, and its exporter, without installing it.
///
/// # Errors
/// Returns an error if a histogram has no buckets.
pub fn build() -> Result<(PrometheusRecorder, Exporter), BuildError> {
    let seconds = [
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    ];
    let sizes = [
        1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    ];
    let probabilities: Vec<f64> = (1..=20).map(|twentieth| f64::from(twentieth) / 20.0).collect();
    let full = |name: &str| Matcher::Full(name.to_owned());
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(full(STAGE_SECONDS), &seconds)?
        .set_buckets_for_metric(full(APPEND_TO_COMMIT), &seconds)?
        .set_buckets_for_metric(full(API_SECONDS), &seconds)?
        .set_buckets_for_metric(full(BATCH_TOKENS), &sizes)?
        .set_buckets_for_metric(full(BATCH_ROWS), &sizes)?
        .set_buckets_for_metric(full(PROBABILITY), &probabilities)?
        .build_recorder();
    let exporter = Exporter(recorder.handle());
    Ok((recorder, exporter))
}

/// Creates the counters of events that should not happen, so that the first of them is seen as an increase.
fn start_at_zero() {
    for result in ["committed", "aborted", "fenced"] {
        counter!(TRANSACTIONS, "result" => result).increment(0);
    }
    for reason in [
        "refused",
        "not_owned",
        "undelivered",
        "missing_topic",
        "broker",
        "producer",
    ] {
        counter!(TRANSACTION_ABORTS, "reason" => reason).increment(0);
    }
    for kind in ["assigned", "revoked", "lost"] {
        counter!(REBALANCES, "kind" => kind).increment(0);
    }
    for verdict in ["record", "device"] {
        counter!(SCORE_FAILURES, "verdict" => verdict).increment(0);
    }
    for result in ["swapped", "refused"] {
        counter!(ADAPTER_SWAPS, "result" => result).increment(0);
    }
    for result in ["ok", "refused"] {
        counter!(RELOADS, "result" => result).increment(0);
    }
    counter!(DEAD_LETTERS, "reason" => "unscorable").increment(0);
    counter!(GAP_RECORDS).increment(0);
}

fn describe() {
    describe_counter!(EVENTS, "Number of input records finished, by outcome.");
    describe_counter!(DECISIONS, "Number of decisions committed, by action.");
    describe_counter!(
        COMPETENCE,
        "Number of decisions committed, by whether the text is in a language of the model."
    );
    describe_counter!(DEAD_LETTERS, "Number of dead letters committed, by reason.");
    describe_counter!(TRANSACTIONS, "Number of Kafka transactions, by result.");
    describe_counter!(
        TRANSACTION_ABORTS,
        "Number of aborted Kafka transactions, by reason: refused (a topic refuses outputs), not_owned (the assignment \
         has changed), undelivered, missing_topic, broker, or producer (the producer was replaced)."
    );
    describe_counter!(
        ADAPTER_SWAPS,
        "Number of attempts to swap the adapter while serving, by result."
    );
    describe_counter!(
        REGISTRY_READS,
        "Number of times that the registry was read while serving, by result."
    );
    describe_gauge!(
        REGISTRY_LAST_READ,
        Unit::Seconds,
        "Unix time at which the registry was last read and had its version in service."
    );
    describe_gauge!(
        REGISTRY_MISSING,
        "1 while the registry does not have the version last seen in service or a later one, otherwise 0."
    );
    describe_counter!(RELOADS, "Number of reloads of the policy on SIGHUP, by result.");
    describe_counter!(
        SCORE_FAILURES,
        "Number of failed scorer calls, by verdict: bad record or device fault."
    );
    describe_counter!(
        HTTP_CONNECTIONS,
        "Number of HTTP connections that ended or could not be served, by result."
    );
    describe_gauge!(
        BUILD_INFO,
        "Always 1; the labels name the version, the commit and the features of the build."
    );
    describe_gauge!(HTTP_OPEN_CONNECTIONS, "Number of open HTTP connections.");
    describe_counter!(
        API_REQUESTS,
        "Number of requests to the API, by endpoint, caller and status."
    );
    describe_histogram!(
        API_SECONDS,
        Unit::Seconds,
        "Time from the head of a request to the API to its answer, by endpoint."
    );
    describe_counter!(
        API_DECISIONS,
        "Number of comments decided for callers of the API, by action."
    );
    describe_counter!(
        API_DROPPED,
        "Number of comments dropped unscored, because their caller had gone or their deadline had passed."
    );
    describe_gauge!(
        API_WAITING,
        "Number of comments of requests that wait to be scored or are being scored."
    );
    describe_counter!(
        API_CONNECTIONS,
        "Number of connections to the API that ended or could not be served, by result."
    );
    describe_gauge!(API_OPEN_CONNECTIONS, "Number of open connections to the API.");
    describe_histogram!(BATCH_TOKENS, "Number of own tokens in a micro-batch.");
    describe_gauge!(
        BATCH_BUDGET,
        "Token budget of a micro-batch in own tokens, as chosen at startup."
    );
    describe_counter!(
        CACHE_LOOKUPS,
        "Number of comments looked up in the cache of margins, by result: hit, coalesced (with a comment that was being \
         scored) or miss."
    );
    describe_gauge!(CACHE_ENTRIES, "Number of texts whose margins are remembered.");
    describe_histogram!(BATCH_ROWS, "Number of rows in a micro-batch.");
    describe_histogram!(
        STAGE_SECONDS,
        Unit::Seconds,
        "Time that a batch spends in a stage, by stage."
    );
    describe_histogram!(
        APPEND_TO_COMMIT,
        Unit::Seconds,
        "Time from the append of a record to the commit of its decision."
    );
    describe_histogram!(PROBABILITY, "Calibrated probability that a comment is hateful.");
    describe_gauge!(QUEUE_EVENTS, "Number of events waiting, by queue.");
    describe_gauge!(QUEUE_BYTES, Unit::Bytes, "Number of bytes waiting, by queue.");
    describe_gauge!(
        LAG,
        "Number of records of an assigned partition that are not committed, by partition."
    );
    describe_gauge!(READY, "1 if the daemon is ready, otherwise 0.");
    describe_gauge!(ASSIGNED_PARTITIONS, "Number of partitions assigned to this process.");
    describe_gauge!(BROKERS_UP, "Number of brokers that the consumer is connected to.");
    describe_gauge!(LAST_COMMIT, Unit::Seconds, "Unix time of the last successful commit.");
    describe_counter!(REBALANCES, "Number of changes of the assignment, by kind.");
    describe_counter!(
        GAP_RECORDS,
        "Number of records that retention deleted before they were read."
    );
    describe_gauge!(
        OLDEST_UNFINISHED,
        Unit::Seconds,
        "Age of the oldest record that has been read but not committed."
    );
    describe_gauge!(
        MODEL_INFO,
        "1 for the model in service, which the labels describe, and 0 for earlier models."
    );
}
