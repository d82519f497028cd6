//! Logs the messages of librdkafka at levels that suit the daemon.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::KafkaError;
use rdkafka::producer::{DeliveryResult, ProducerContext};
use rdkafka::statistics::Statistics;
use tracing::{debug, warn};

/// The minimum time between two warnings about the same kind of error.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Logs a line of librdkafka's log, which contains the names of brokers and topics, but never the content of a record.
///
/// Nearly all lines are about connections that librdkafka retries, with many lines for each, so they are logged at
/// debug level. Errors that an operator should see are reported through [`client_error`] or returned by the call that
/// failed.
pub(crate) fn line(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            warn!(facility, line = message, "librdkafka log");
        }
        _ => debug!(severity = severity(level), facility, line = message, "librdkafka log"),
    }
}

/// Returns the name of a level, as in syslog.
fn severity(level: RDKafkaLogLevel) -> &'static str {
    match level {
        RDKafkaLogLevel::Emerg => "emergency",
        RDKafkaLogLevel::Alert => "alert",
        RDKafkaLogLevel::Critical => "critical",
        RDKafkaLogLevel::Error => "error",
        RDKafkaLogLevel::Warning => "warning",
        RDKafkaLogLevel::Notice => "notice",
        RDKafkaLogLevel::Info => "info",
        RDKafkaLogLevel::Debug => "debug",
    }
}

/// Logs an error that concerns a whole client, such as that no broker can be reached.
///
/// Each kind of error is logged as a warning at most once per minute, and otherwise at debug level.
pub(crate) fn client_error(error: &KafkaError, reason: &str) {
    static LAST_WARNINGS: Mutex<BTreeMap<i32, Instant>> = Mutex::new(BTreeMap::new());
    let code = error.rdkafka_error_code().map_or(0, |code| code as i32);
    let now = Instant::now();
    let mut last_warnings = LAST_WARNINGS.lock().unwrap_or_else(PoisonError::into_inner);
    if last_warnings
        .get(&code)
        .is_some_and(|&last| now.duration_since(last) < WARNING_INTERVAL)
    {
        debug!(%error, reason, "kafka client error");
    } else {
        last_warnings.insert(code, now);
        warn!(reason, "kafka client error");
    }
}

/// The context of clients for short tasks, which logs everything at debug level.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct QuietContext;

impl ClientContext for QuietContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // The caller reports whether the call succeeded; the retries in between matter only for debugging.
        debug!(severity = severity(level), facility, line = message, "librdkafka log");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        debug!(%error, reason, "kafka client error");
    }

    fn stats(&self, _: Statistics) {}
}

impl ConsumerContext for QuietContext {}

impl ProducerContext for QuietContext {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}
