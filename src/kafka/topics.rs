//! The topics as the brokers have them, against what the stream needs of them.

use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

use super::client::{Role, config};
use super::describe;
use super::describe::{Description, Operation};
use super::{QuietContext, reason};
use crate::config::StreamConfig;
use crate::fault::{Fault, Faults};

/// Long enough for a busy broker, short enough for a person who waits.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Brokers that describe topics do so at once; the others are asked again in another way.
const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Partitions of the three topics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partitions {
    /// Of the topic that is read.
    pub comments: i32,
    /// Of the decisions.
    pub decisions: i32,
    /// Of the dead letters.
    pub dead_letters: i32,
}

/// Why the topics cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TopicsError {
    /// No broker answers, or none will: it may be there later.
    #[error("cannot ask the brokers {brokers}: {reason}")]
    Unreachable {
        /// As set.
        brokers: String,
        /// What the client said.
        reason: String,
    },
    /// A setting of the client is wrong.
    #[error("cannot make a kafka client: {0}")]
    Client(String),
    /// Topics are missing or closed to us.
    #[error("{0}")]
    Faults(Faults),
}

/// Asks the brokers; writes nothing and creates nothing.
///
/// # Errors
/// [`TopicsError`], with every topic at fault.
pub fn ask(stream: &StreamConfig) -> Result<Partitions, TopicsError> {
    let consumer = inquirer(stream)?;
    let described = match describe::topics(&consumer, &names(stream), DESCRIBE_TIMEOUT) {
        Ok(described) => described,
        // Brokers that cannot describe topics, such as the embedded one, do not answer at all.
        Err(KafkaError::AdminOp(RDKafkaErrorCode::OperationTimedOut)) => list(stream, &consumer)?,
        Err(error) => return Err(unreachable(stream, &error)),
    };
    judge_all(stream, &described)
}

/// As [`ask`], without what we may do with the topics: a question that every broker answers.
///
/// # Errors
/// [`TopicsError`].
pub fn count(stream: &StreamConfig) -> Result<Partitions, TopicsError> {
    judge_all(stream, &list(stream, &inquirer(stream)?)?)
}

fn inquirer(stream: &StreamConfig) -> Result<BaseConsumer<QuietContext>, TopicsError> {
    config(stream, Role::Inquirer)
        .create_with_context(QuietContext)
        .map_err(|error| TopicsError::Client(error.to_string()))
}

fn names(stream: &StreamConfig) -> [&str; 3] {
    let topics = &stream.topics;
    [&topics.comments, &topics.decisions, &topics.dead_letters].map(String::as_str)
}

/// A consumer's question for metadata creates no topic.
fn list(stream: &StreamConfig, consumer: &BaseConsumer<QuietContext>) -> Result<Vec<Description>, TopicsError> {
    let mut described = Vec::new();
    for name in names(stream) {
        let metadata = consumer.fetch_metadata(Some(name), TIMEOUT);
        let metadata = metadata.map_err(|error| unreachable(stream, &error))?;
        described.extend(metadata.topics().iter().map(|topic| Description {
            name: topic.name().to_owned(),
            partitions: match topic.error() {
                None => Ok(i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX)),
                Some(code) => Err(code.into()),
            },
            operations: None,
        }));
    }
    Ok(described)
}

fn judge_all(stream: &StreamConfig, described: &[Description]) -> Result<Partitions, TopicsError> {
    let wanted = [
        ("topics.comments", &stream.topics.comments, Operation::Read),
        ("topics.decisions", &stream.topics.decisions, Operation::Write),
        ("topics.dead_letters", &stream.topics.dead_letters, Operation::Write),
    ];
    let mut faults = Faults::default();
    let counts = wanted.map(|(key, name, operation)| {
        let found = described.iter().find(|topic| topic.name == *name);
        match judge(found, operation) {
            Ok(count) => count,
            Err(expected) => {
                faults.push(Fault::setting(key, expected).with_value(Some(format!("\"{name}\""))));
                0
            }
        }
    });
    let [comments, decisions, dead_letters] = counts;
    if faults.is_empty() {
        Ok(Partitions {
            comments,
            decisions,
            dead_letters,
        })
    } else {
        Err(TopicsError::Faults(faults))
    }
}

fn judge(found: Option<&Description>, operation: Operation) -> Result<i32, String> {
    let (noun, verb) = match operation {
        Operation::Read => ("READ", "read"),
        Operation::Write => ("WRITE", "write to"),
    };
    let Some(topic) = found else {
        return Err("the brokers do not speak of it, expected a topic".to_owned());
    };
    match topic.partitions {
        Ok(count) => match &topic.operations {
            Some(operations) if !operations.contains(&operation) => {
                Err(format!("we may not {verb} it, expected an ACL that allows {noun}"))
            }
            _ => Ok(count),
        },
        Err(RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic) => {
            Err("there is no such topic, expected one; moderatord creates none".to_owned())
        }
        Err(RDKafkaErrorCode::TopicAuthorizationFailed) => Err(format!(
            "we may not even see it (or it is not there), expected an ACL that allows {noun}"
        )),
        Err(code) => Err(format!("the brokers say: {}", reason(&KafkaError::AdminOp(code)))),
    }
}

fn unreachable(stream: &StreamConfig, error: &KafkaError) -> TopicsError {
    TopicsError::Unreachable {
        brokers: stream.brokers.join(", "),
        reason: reason(error),
    }
}

impl Partitions {
    /// What an operator should know of counts that differ; nothing where all are equal.
    pub fn warning(&self) -> Option<String> {
        let differs = |name: &str, count: i32| {
            (count != self.comments).then(|| format!("{name} {count} (comments has {})", self.comments))
        };
        let differing: Vec<String> = [
            differs("decisions has", self.decisions),
            differs("dead_letters has", self.dead_letters),
        ]
        .into_iter()
        .flatten()
        .collect();
        (!differing.is_empty()).then(|| {
            format!(
                "{}: outputs go to the partition of their key's hash there, and order holds for each key alone",
                differing.join(", ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(partitions: Result<i32, RDKafkaErrorCode>, operations: Option<&[Operation]>) -> Description {
        Description {
            name: "t".into(),
            partitions,
            operations: operations.map(|operations| operations.iter().copied().collect()),
        }
    }

    #[test]
    fn a_topic_is_judged_by_what_we_may_do_with_it() {
        use Operation::{Read, Write};
        assert_eq!(judge(Some(&described(Ok(6), None)), Read), Ok(6));
        assert_eq!(judge(Some(&described(Ok(6), Some(&[Read]))), Read), Ok(6));
        let check = |topic: Option<&Description>, text: &str| {
            let error = judge(topic, Write).unwrap_err();
            assert!(error.contains(text), "{error}");
        };
        check(None, "do not speak of it");
        check(Some(&described(Ok(6), Some(&[Read]))), "may not write to it");
        check(
            Some(&described(Err(RDKafkaErrorCode::UnknownTopicOrPartition), None)),
            "no such topic",
        );
        check(
            Some(&described(Err(RDKafkaErrorCode::TopicAuthorizationFailed), None)),
            "may not even see it",
        );
        check(
            Some(&described(Err(RDKafkaErrorCode::LeaderNotAvailable), None)),
            "the brokers say: ",
        );
    }

    #[test]
    fn counts_that_differ_are_told() {
        let counts = |decisions, dead_letters| Partitions {
            comments: 6,
            decisions,
            dead_letters,
        };
        assert_eq!(counts(6, 6).warning(), None);
        let warning = counts(3, 1).warning().unwrap();
        assert!(
            warning.starts_with("decisions has 3 (comments has 6), dead_letters has 1 (comments has 6): "),
            "{warning}"
        );
    }
}
