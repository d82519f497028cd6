//! Everything that knows how Kafka's client library is spoken to, apart from the two stages that read
//! and write records.

pub mod client;
pub mod describe;
pub mod embedded;
pub(crate) mod log;
pub mod snapshot;
pub mod topics;

pub use client::{Role, properties_faults};
pub use log::QuietContext;

use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

/// The reason in librdkafka's words, without the wrapper's name for the call.
pub fn reason(error: &KafkaError) -> String {
    match error {
        KafkaError::Transaction(error) => error.string(),
        error => error
            .rdkafka_error_code()
            .map_or_else(|| error.to_string(), |code| describe_code(code).to_owned()),
    }
}

fn describe_code(code: RDKafkaErrorCode) -> String {
    // The wrapper prints `Name (Broker: what it means)`; the second half is what people read.
    let text = code.to_string();
    match text.split_once('(') {
        Some((_, meaning)) => meaning.trim_end_matches(')').to_owned(),
        None => text,
    }
}
