//! Checks that the topics of the stream exist and that the daemon may use them.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;
use tracing::warn;

use super::QuietContext;
use super::client::{Role, config};
use super::describe::{self, TopicDescription, TopicOperation};
use super::errors::{ErrorClass, reason, reason_of_code};
use super::topic_limits::{self, TopicLimits};
use crate::config::StreamConfig;
use crate::fault::{Fault, Faults};

/// The timeout of a metadata request: long enough for a busy broker, and short enough for a user who waits for the
/// result.
const METADATA_TIMEOUT: Duration = Duration::from_secs(10);

/// The timeout of a request to describe topics: brokers that support it answer quickly, and the others are sent a
/// metadata request afterwards.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a topic may be missing before it is reported: after it has been created, it takes a moment until every
/// broker knows it.
const MAX_CREATION_DELAY: Duration = Duration::from_secs(5);

/// The pause between two looks for a missing topic.
const CREATION_PAUSE: Duration = Duration::from_millis(500);

/// The size of a decision with long names and many headers, beyond what most decisions need.
const LARGE_DECISION_BYTES: usize = 16 << 10;

/// What the brokers report about the topics of the stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TopicFacts {
    /// The number of partitions of the comments topic.
    pub comments: i32,
    /// The number of partitions of the decisions topic.
    pub decisions: i32,
    /// The number of partitions of the dead-letter topic.
    pub dead_letters: i32,
    /// Whether the brokers give each topic an id of its own, by which a topic that is recreated is recognised.
    pub has_topic_ids: bool,
    /// What the decisions topic accepts.
    pub decision_limits: TopicLimits,
    /// What the dead-letter topic accepts.
    pub dead_letter_limits: TopicLimits,
}

/// The reason why the topics cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TopicsError {
    /// No broker answered; retrying later may succeed.
    #[error("cannot query the brokers {brokers}: {reason}")]
    Unreachable {
        /// The addresses of the brokers, separated by commas.
        brokers: String,
        /// The reason given by the Kafka client.
        reason: String,
    },
    /// The Kafka client cannot be created, because a setting is not valid.
    #[error("cannot create a Kafka client: {0}")]
    Client(String),
    /// Topics are missing, or the daemon lacks permissions on them.
    #[error("{0}")]
    Faults(Faults),
}

/// Checks that all topics exist and that the daemon may read or write them, without writing or creating anything.
///
/// # Errors
/// Returns an error if no broker answers, or all faults if topics are missing or permissions are lacking.
pub fn check(stream: &StreamConfig) -> Result<TopicFacts, TopicsError> {
    let consumer = lookup_client(stream)?;
    let deadline = Instant::now() + MAX_CREATION_DELAY;
    let mut described = describe_all(stream, &consumer)?;
    while described.iter().any(is_missing) && Instant::now() < deadline {
        std::thread::sleep(CREATION_PAUSE);
        described = describe_all(stream, &consumer)?;
    }
    let mut facts = check_all(stream, &described)?;
    // Brokers without ids are too old for this request, or are not Apache Kafka.
    if facts.has_topic_ids {
        match topic_limits::of_outputs(stream, DESCRIBE_TIMEOUT) {
            Ok(limits) => [facts.decision_limits, facts.dead_letter_limits] = limits,
            Err(error) => warn!(
                reason = reason(&error),
                "cannot read the settings of the output topics, so what they refuse is found only by trying"
            ),
        }
    }
    Ok(facts)
}

fn describe_all(
    stream: &StreamConfig,
    consumer: &BaseConsumer<QuietContext>,
) -> Result<Vec<TopicDescription>, TopicsError> {
    match describe::topics(consumer, &names(stream), DESCRIBE_TIMEOUT) {
        Ok(described) => Ok(described),
        // Brokers that do not support the request, such as the embedded one, do not answer it.
        Err(KafkaError::AdminOp(RDKafkaErrorCode::OperationTimedOut)) => describe_by_metadata(stream, consumer),
        Err(error) => Err(unreachable(stream, &error)),
    }
}

fn is_missing(topic: &TopicDescription) -> bool {
    topic
        .partitions
        .is_err_and(|code| ErrorClass::of(code) == ErrorClass::Missing)
}

/// Checks only that all topics exist, with a request that every broker supports.
///
/// # Errors
/// Returns an error if no broker answers, or all faults if topics are missing.
pub fn count_partitions(stream: &StreamConfig) -> Result<TopicFacts, TopicsError> {
    check_all(stream, &describe_by_metadata(stream, &lookup_client(stream)?)?)
}

fn lookup_client(stream: &StreamConfig) -> Result<BaseConsumer<QuietContext>, TopicsError> {
    config(stream, Role::Lookup)
        .create_with_context(QuietContext)
        .map_err(|error| TopicsError::Client(error.to_string()))
}

fn names(stream: &StreamConfig) -> [&str; 3] {
    let topics = &stream.topics;
    [&topics.comments, &topics.decisions, &topics.dead_letters].map(String::as_str)
}

/// Describes the topics without their permitted operations. A consumer's metadata request does not create topics.
fn describe_by_metadata(
    stream: &StreamConfig,
    consumer: &BaseConsumer<QuietContext>,
) -> Result<Vec<TopicDescription>, TopicsError> {
    let mut described = Vec::new();
    for name in names(stream) {
        let metadata = consumer.fetch_metadata(Some(name), METADATA_TIMEOUT);
        let metadata = metadata.map_err(|error| unreachable(stream, &error))?;
        described.extend(metadata.topics().iter().map(|topic| TopicDescription {
            name: topic.name().to_owned(),
            id: None,
            partitions: match topic.error() {
                None => Ok(i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX)),
                Some(code) => Err(code.into()),
            },
            operations: None,
        }));
    }
    Ok(described)
}

fn check_all(stream: &StreamConfig, described: &[TopicDescription]) -> Result<TopicFacts, TopicsError> {
    let required = [
        ("topics.comments", &stream.topics.comments, TopicOperation::Read),
        ("topics.decisions", &stream.topics.decisions, TopicOperation::Write),
        (
            "topics.dead_letters",
            &stream.topics.dead_letters,
            TopicOperation::Write,
        ),
    ];
    let mut faults = Faults::default();
    let counts = required.map(|(key, name, operation)| {
        let found = described.iter().find(|topic| topic.name == *name);
        match check_topic(found, operation) {
            Ok(count) => count,
            Err(problem) => {
                faults.push(Fault::setting(key, problem).with_value(Some(format!("\"{name}\""))));
                0
            }
        }
    });
    let [comments, decisions, dead_letters] = counts;
    if faults.is_empty() {
        Ok(TopicFacts {
            comments,
            decisions,
            dead_letters,
            has_topic_ids: described.iter().any(|topic| topic.id.is_some()),
            ..TopicFacts::default()
        })
    } else {
        Err(TopicsError::Faults(faults))
    }
}

/// Returns the number of partitions if the operation is permitted, or a description of the problem.
fn check_topic(found: Option<&TopicDescription>, operation: TopicOperation) -> Result<i32, String> {
    let (acl_operation, verb) = match operation {
        TopicOperation::Read => ("READ", "read from"),
        TopicOperation::Write => ("WRITE", "write to"),
    };
    let Some(topic) = found else {
        return Err("the brokers returned no information about this topic".to_owned());
    };
    match topic.partitions {
        Ok(count) => match &topic.operations {
            Some(operations) if !operations.contains(&operation) => Err(format!(
                "no permission to {verb} this topic, expected an ACL that allows {acl_operation}"
            )),
            _ => Ok(count),
        },
        Err(code) => Err(match ErrorClass::of(code) {
            ErrorClass::Missing => {
                "the topic does not exist, expected an existing topic (moderatord does not create topics)".to_owned()
            }
            _ if code == RDKafkaErrorCode::TopicAuthorizationFailed => format!(
                "the topic does not exist or is not visible to this user, expected an ACL that allows {acl_operation}"
            ),
            _ => format!("the brokers reported: {}", reason_of_code(code)),
        }),
    }
}

fn unreachable(stream: &StreamConfig, error: &KafkaError) -> TopicsError {
    TopicsError::Unreachable {
        brokers: stream.brokers.join(", "),
        reason: reason(error),
    }
}

impl TopicFacts {
    /// Returns warnings about topics that fit together badly, or that refuse outputs which can occur.
    ///
    /// `max_event_bytes` is the size of the largest event that is accepted.
    pub fn warnings(&self, max_event_bytes: usize) -> Vec<String> {
        let mut warnings = Vec::new();
        let outputs = [("decisions", self.decisions), ("dead_letters", self.dead_letters)];
        let differing: Vec<String> = outputs
            .iter()
            .filter(|&&(_, count)| count != self.comments)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        if !differing.is_empty() {
            warnings.push(format!(
                "partition counts differ: comments {}, {}; outputs to a topic with a different count are partitioned \
                 by the hash of their key, so their order is preserved only for each key",
                self.comments,
                differing.join(", ")
            ));
        }
        for (name, limits) in [
            ("decisions", self.decision_limits),
            ("dead_letters", self.dead_letter_limits),
        ] {
            if limits.requires_key {
                warnings.push(format!(
                    "topics.{name} is compacted and refuses records without a key; \
                     the output of an event without a key is a dead letter without its value"
                ));
            }
        }
        match self.dead_letter_limits.max_bytes {
            Some(max_bytes) if max_bytes < max_event_bytes => warnings.push(format!(
                "topics.dead_letters accepts batches of {max_bytes} bytes (max.message.bytes), \
                 but an event may have {max_event_bytes} (input.max_bytes); \
                 the dead letter of one that does not fit has no value"
            )),
            _ => {}
        }
        match self.decision_limits.max_bytes {
            Some(max_bytes) if max_bytes < LARGE_DECISION_BYTES => warnings.push(format!(
                "topics.decisions accepts batches of {max_bytes} bytes (max.message.bytes), \
                 but a decision with its headers may have {LARGE_DECISION_BYTES}; \
                 one that does not fit is replaced by a dead letter"
            )),
            _ => {}
        }
        warnings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(partitions: Result<i32, RDKafkaErrorCode>, operations: Option<&[TopicOperation]>) -> TopicDescription {
        TopicDescription {
            name: "t".into(),
            id: None,
            partitions,
            operations: operations.map(|operations| operations.iter().copied().collect()),
        }
    }

    #[test]
    fn a_topic_is_usable_only_if_the_operation_is_permitted() {
        use TopicOperation::{Read, Write};
        assert_eq!(check_topic(Some(&described(Ok(6), None)), Read), Ok(6));
        assert_eq!(check_topic(Some(&described(Ok(6), Some(&[Read]))), Read), Ok(6));
        let check = |topic: Option<&TopicDescription>, text: &str| {
            let error = check_topic(topic, Write).unwrap_err();
            assert!(error.contains(text), "{error}");
        };
        check(None, "no information about this topic");
        check(
            Some(&described(Ok(6), Some(&[Read]))),
            "no permission to write to this topic",
        );
        check(
            Some(&described(Err(RDKafkaErrorCode::UnknownTopicOrPartition), None)),
            "the topic does not exist, ",
        );
        check(
            Some(&described(Err(RDKafkaErrorCode::TopicAuthorizationFailed), None)),
            "not visible to this user",
        );
        check(
            Some(&described(Err(RDKafkaErrorCode::LeaderNotAvailable), None)),
            "the brokers reported: ",
        );
    }

    fn facts(decisions: i32, dead_letters: i32) -> TopicFacts {
        TopicFacts {
            comments: 6,
            decisions,
            dead_letters,
            ..TopicFacts::default()
        }
    }

    #[test]
    fn partition_counts_that_differ_give_a_warning() {
        assert!(facts(6, 6).warnings(1 << 20).is_empty());
        let warnings = facts(3, 1).warnings(1 << 20);
        assert!(
            warnings[0].starts_with("partition counts differ: comments 6, decisions 3, dead_letters 1; "),
            "{warnings:?}"
        );
    }

    #[test]
    fn topics_that_refuse_outputs_give_warnings() {
        let limits = |max_bytes, requires_key| TopicLimits {
            max_bytes: Some(max_bytes),
            requires_key,
        };
        let check = |decision_limits, dead_letter_limits, expected: &[&str]| {
            let facts = TopicFacts {
                decision_limits,
                dead_letter_limits,
                ..facts(6, 6)
            };
            let warnings = facts.warnings(1 << 20);
            assert_eq!(warnings.len(), expected.len(), "{warnings:?}");
            for (warning, expected) in warnings.iter().zip(expected) {
                assert!(warning.starts_with(expected), "{warning}");
            }
        };
        // The default of Kafka is slightly more than the default of `input.max_bytes`.
        check(limits(1_048_588, false), limits(1_048_588, false), &[]);
        check(
            limits(1_048_588, true),
            limits(100_000, true),
            &[
                "topics.decisions is compacted",
                "topics.dead_letters is compacted",
                "topics.dead_letters accepts batches of 100000 bytes",
            ],
        );
        check(
            limits(2000, false),
            limits(1_048_588, false),
            &["topics.decisions accepts batches of 2000 bytes"],
        );
    }
}
