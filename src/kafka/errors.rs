//! What Kafka's error codes mean for a stream: the one place where codes are classified.

use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

/// What an error calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// The brokers deny access: someone must change an ACL.
    Forbidden,
    /// The topic or partition does not exist.
    Missing,
    /// Another process has taken this one's place.
    Fenced,
    /// The next offset to read is not in the partition.
    OffsetOutOfRange,
    /// The record itself is refused, such as for its size or its missing key; another form of it may be accepted.
    RecordRefused,
    /// The producer's queue has no room at the moment.
    QueueFull,
    /// The client library has given up on this client.
    Fatal,
    /// Anything else, which may pass.
    Other,
}

impl ErrorClass {
    /// Returns what an error code calls for.
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
            Code::MessageSizeTooLarge
            | Code::InvalidTimestamp
            | Code::InvalidRecord
            | Code::InvalidMessage
            | Code::PolicyViolation => Self::RecordRefused,
            Code::QueueFull => Self::QueueFull,
            Code::Fatal => Self::Fatal,
            _ => Self::Other,
        }
    }

    /// Returns what an error calls for; one without a code is [`ErrorClass::Other`].
    pub fn of_error(error: &KafkaError) -> Self {
        error.rdkafka_error_code().map_or(Self::Other, Self::of)
    }

    /// Returns whether retrying cannot succeed until something outside of this process changes.
    pub fn is_permanent(self) -> bool {
        matches!(self, Self::Forbidden | Self::Missing | Self::Fenced | Self::Fatal)
    }
}

/// Returns librdkafka's reason, without the wrapper's name for the call.
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
    // The wrapper prints `Name (Broker: description)`; the description is what people read.
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
    fn codes_by_what_they_call_for() {
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
            &[Code::BrokerTransportFailure, Code::RequestTimedOut],
        );
        assert_eq!(ErrorClass::of_error(&KafkaError::Canceled), ErrorClass::Other);
    }

    #[test]
    fn a_reason_leaves_the_wrappers_words_out() {
        let error = KafkaError::MessageProduction(RDKafkaErrorCode::MessageSizeTooLarge);
        assert_eq!(reason(&error), "Broker: Message size too large");
    }
}
