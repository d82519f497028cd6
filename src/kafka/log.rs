//! librdkafka's log lines, at the level that they deserve here.

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

/// A condition that lasts is told again after this long.
const REPEAT: Duration = Duration::from_secs(60);

/// One line of librdkafka's log. It holds broker names and topics, never a record's content.
///
/// Nearly all of it is about connections that it will try again, many lines for each; what an operator
/// should know comes as a [`condition`], or back from the call that failed.
pub(crate) fn line(level: RDKafkaLogLevel, facility: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            warn!(facility, line = message, "kafka client");
        }
        _ => debug!(severity = ?level, facility, line = message, "kafka client"),
    }
}

/// A client-wide condition, such as no broker that answers: told once, and again when it lasts.
pub(crate) fn condition(error: &KafkaError, reason: &str) {
    static TOLD: Mutex<BTreeMap<i32, Instant>> = Mutex::new(BTreeMap::new());
    let code = error.rdkafka_error_code().map_or(0, |code| code as i32);
    let now = Instant::now();
    let mut told = TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    if told.get(&code).is_some_and(|&last| now.duration_since(last) < REPEAT) {
        debug!(%error, reason, "kafka client");
    } else {
        told.insert(code, now);
        warn!(reason, "kafka client");
    }
}

/// For clients that only look something up.
#[derive(Debug, Clone, Copy, Default)]
pub struct QuietContext;

impl ClientContext for QuietContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        // What went wrong is in the answer; the retries on the way are for debugging.
        debug!(severity = ?level, facility, line = message, "kafka client");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        debug!(%error, reason, "kafka client");
    }

    fn stats(&self, _: Statistics) {}
}

impl ConsumerContext for QuietContext {}

impl ProducerContext for QuietContext {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}
