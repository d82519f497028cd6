//! Classifies the error codes of Kafka by how the daemon has to respond.
//!
//! Error codes are classified only here.

use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

/// A class of errors that call for the same response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The brokers deny access, and an operator must change an ACL.
    Forbidden,
    /// The topic or partition does not exist.
    Missing,
    /// Another process with the same transactional id or group instance id has replaced this one.
    Fenced,
    /// The partition does not contain the next offset to read.
    OffsetOutOfRange,
    /// The broker refuses a record because of its content, such as its size or a missing key; another form of it may be
    /// accepted.
    RecordRefused,
    /// The queue of the producer is currently full.
    QueueFull,
    /// librdkafka reports that this client can no longer be used.
    Fatal,
    /// Any other error, which retrying may resolve.
    Other,
}

impl ErrorClass {
    /// Returns the class of an error code.
    pub fn of(code: RDKafkaErrorCode) -> Self {
        use RDKafkaErrorCode as Code;
        match code {
            Code::TopicAuthorizationFailed
            | Code::GroupAuthorizationFailed
            | Code::ClusterAuthorizationFailed
            | Code::TransactionalIdAuthorizationFailed => Self::Forbidden,
            Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition => Self::Missing,
            Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch | Code::FencedInstanceId => Self::Fenced,
            Code::AutoOffsetReset | Code::OffsetOutOfRange => Self::OffsetOutOfRange,
            Code::MessageSizeTooLarge | Code::InvalidRecord | Code::InvalidMessage | Code::PolicyViolation => {
                Self::RecordRefused
            }
            Code::QueueFull => Self::QueueFull,
            Code::Fatal => Self::Fatal,
            _ => Self::Other,
        }
    }

    /// Returns the class of an error, which is [`ErrorClass::Other`] if the error has no code.
    pub fn of_error(error: &KafkaError) -> Self {
        error.rdkafka_error_code().map_or(Self::Other, Self::of)
    }

    /// Returns whether retrying is pointless, because only a change outside of this process can resolve the error.
    pub fn is_permanent(self) -> bool {
        matches!(self, Self::Forbidden | Self::Missing | Self::Fenced | Self::Fatal)
    }
}

/// Returns librdkafka's description of an error, without what the `rdkafka` crate adds to it.
pub fn reason(error: &KafkaError) -> String {
    match error {
        KafkaError::Transaction(error) => error.string(),
        error => error
            .rdkafka_error_code()
            .map_or_else(|| error.to_string(), reason_of_code),
    }
}

/// Returns librdkafka's description of an error code.
pub fn reason_of_code(code: RDKafkaErrorCode) -> String {
    // The `rdkafka` crate prints `Name (Broker: description)`.
    let text = code.to_string();
    match text.split_once('(') {
        Some((_, description)) => description.trim_end_matches(')').to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_codes_are_classified() {
        use RDKafkaErrorCode as Code;
        let check = |class, is_permanent, codes: &[Code]| {
            for &code in codes {
                assert_eq!(ErrorClass::of(code), class, "{code:?}");
                assert_eq!(ErrorClass::of(code).is_permanent(), is_permanent, "{code:?}");
            }
        };
        check(
            ErrorClass::Forbidden,
            true,
            &[Code::TopicAuthorizationFailed, Code::TransactionalIdAuthorizationFailed],
        );
        check(
            ErrorClass::Missing,
            true,
            &[Code::UnknownTopicOrPartition, Code::UnknownTopic],
        );
        check(
            ErrorClass::Fenced,
            true,
            &[Code::ProducerFenced, Code::FencedInstanceId],
        );
        check(ErrorClass::Fatal, true, &[Code::Fatal]);
        check(ErrorClass::OffsetOutOfRange, false, &[Code::AutoOffsetReset]);
        check(
            ErrorClass::RecordRefused,
            false,
            &[Code::MessageSizeTooLarge, Code::InvalidRecord],
        );
        check(ErrorClass::QueueFull, false, &[Code::QueueFull]);
        check(
            ErrorClass::Other,
            false,
            &[
                Code::BrokerTransportFailure,
                Code::RequestTimedOut,
                // Other records in the batch were refused.
                Code::InvalidDifferentRecord,
                // The clock of this host is wrong, which affects all records.
                Code::InvalidTimestamp,
            ],
        );
        assert_eq!(ErrorClass::of_error(&KafkaError::Canceled), ErrorClass::Other);
    }

    #[test]
    fn a_reason_is_only_the_description_of_librdkafka() {
        let error = KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge);
        assert_eq!(reason(&error), "Broker: Message size too large");
    }
}
