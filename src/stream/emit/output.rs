//! What is written for one input record: a decision, a dead letter or a tombstone, with its headers.

use rdkafka::message::{Header as KafkaHeader, OwnedHeaders};
use sha2::{Digest, Sha256};

use crate::decide::deleted;
use crate::hash::hex;
use crate::message::{Action, Decision, SourceRecord};
use crate::stream::record::{Finished, Outcome, Record, Rejection, RejectionStage};

/// Before the names of our own headers.
const OWN: &str = "moderatord.";

/// Before the names of Kafka Connect's error headers (KIP-298).
const CONNECT: &str = "__connect.errors.";

/// Room for a usual decision. One that grows from nothing is copied four times over and keeps up to
/// twice its size until it is committed.
const DECISION_BYTES: usize = 1280;

/// A key longer than this is replaced by its hash in a stripped dead letter.
const LONGEST_KEPT_KEY: usize = 4096;

/// Which topic an output goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Destination {
    Decisions,
    DeadLetters,
}

/// How an output is sent, from the usual to the last resort. A refusal moves it one step down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Form {
    /// Whole, in a batch with others.
    Whole,
    /// Whole, in a batch of its own: a batch that was refused for its size says nothing of each record.
    Alone,
    /// A dead letter with coordinates, sizes and a hash, and no value.
    Stripped,
}

/// What the metrics count once the output is committed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Tally {
    Decided { action: Action, probability: f64 },
    Deleted,
    Tombstone,
    DeadLetter { reason: &'static str },
}

/// An output, kept until it is committed: an aborted transaction is produced again from here.
#[derive(Debug)]
pub(super) struct Output {
    /// Tells it from all others of this process, for its acknowledgement.
    pub number: usize,
    pub record: Record,
    pub destination: Destination,
    pub form: Form,
    pub tally: Tally,
    payload: Payload,
    own_headers: Vec<(String, String)>,
}

#[derive(Debug)]
enum Payload {
    /// The decision's JSON.
    Json(Vec<u8>),
    /// The record's own value.
    Value,
    Null,
}

/// What every output says of where it comes from.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub topic: String,
    pub group: String,
    pub instance: String,
}

impl Origin {
    fn source(&self, record: &Record) -> SourceRecord {
        SourceRecord {
            topic: self.topic.clone(),
            partition: record.position.partition,
            offset: record.position.offset,
        }
    }

    /// The output of a finished record; it still needs its number.
    pub fn output(&self, finished: Finished) -> Output {
        let Finished { record, outcome } = finished;
        let source = self.source(&record);
        match outcome {
            Outcome::Scored {
                comment,
                scored,
                judge,
                at,
            } => {
                let decision = judge.decide(&comment, scored, Some(&source), at);
                let probability = decision.scoring.as_ref().map_or(0.0, |scoring| scoring.probability);
                let tally = Tally::Decided {
                    action: decision.action,
                    probability,
                };
                self.decision(record, &decision, tally)
            }
            Outcome::Deleted(comment) => self.decision(record, &deleted(&comment, Some(&source)), Tally::Deleted),
            Outcome::Tombstone => Output {
                number: 0,
                own_headers: self.source_headers(&record),
                record,
                destination: Destination::Decisions,
                form: Form::Whole,
                tally: Tally::Tombstone,
                payload: Payload::Null,
            },
            Outcome::Rejected(rejection) => self.dead_letter(record, &rejection),
        }
    }

    fn decision(&self, record: Record, decision: &Decision, tally: Tally) -> Output {
        let mut payload = Vec::with_capacity(DECISION_BYTES);
        serde_json::to_writer(&mut payload, decision).expect("a decision holds finite numbers, text keys and no maps");
        Output {
            number: 0,
            own_headers: self.source_headers(&record),
            record,
            destination: Destination::Decisions,
            form: Form::Whole,
            tally,
            payload: Payload::Json(payload),
        }
    }

    fn dead_letter(&self, record: Record, rejection: &Rejection) -> Output {
        let mut own_headers = self.source_headers(&record);
        own_headers.extend(self.connect_headers(&record, rejection));
        Output {
            number: 0,
            payload: if record.value.is_some() {
                Payload::Value
            } else {
                Payload::Null
            },
            own_headers,
            record,
            destination: Destination::DeadLetters,
            form: Form::Whole,
            tally: Tally::DeadLetter {
                reason: rejection.reason,
            },
        }
    }

    fn source_headers(&self, record: &Record) -> Vec<(String, String)> {
        let own = |name: &str, value: String| (format!("{OWN}source.{name}"), value);
        vec![
            own("topic", self.topic.clone()),
            own("partition", record.position.partition.to_string()),
            own("offset", record.position.offset.to_string()),
        ]
    }

    fn connect_headers(&self, record: &Record, rejection: &Rejection) -> Vec<(String, String)> {
        [
            ("topic", self.topic.clone()),
            ("partition", record.position.partition.to_string()),
            ("offset", record.position.offset.to_string()),
            ("connector.name", self.group.clone()),
            ("task.id", self.instance.clone()),
            ("stage", rejection.stage.connect_name().to_owned()),
            ("class.name", "moderatord".to_owned()),
            ("exception.class.name", rejection.reason.to_owned()),
            ("exception.message", rejection.message.clone()),
        ]
        .map(|(name, value)| (format!("{CONNECT}{name}"), value))
        .into()
    }

    /// The broker has refused the output: one step down. False where there is none.
    pub fn step_down(&self, output: &mut Output) -> bool {
        match output.form {
            Form::Whole => output.form = Form::Alone,
            Form::Alone => self.strip(output),
            Form::Stripped => return false,
        }
        true
    }

    /// Leaves nothing of the record but where it stands and what it was: small enough for any topic.
    fn strip(&self, output: &mut Output) {
        let record = &mut output.record;
        let reason = match output.tally {
            Tally::DeadLetter { reason } => reason,
            _ => "output_refused",
        };
        let rejection = Rejection {
            reason,
            message: "the topic refuses the record whole; see its source".to_owned(),
            stage: RejectionStage::Emit,
        };
        let bytes = |value: Option<&[u8]>| value.map_or(0, <[u8]>::len).to_string();
        let mut own_headers = self.source_headers(record);
        own_headers.extend(self.connect_headers(record, &rejection));
        let value = record.value.as_deref().unwrap_or_default();
        let own = |name: &str, value: String| (format!("{OWN}{name}"), value);
        own_headers.extend([
            own("value.bytes", bytes(record.value.as_deref())),
            own("value.sha256", hex(&Sha256::digest(value))),
            own("key.bytes", bytes(record.key.as_deref())),
            own("headers.bytes", Record::size(None, None, &record.headers).to_string()),
        ]);
        // A compacted topic wants a key, so there always is one.
        match &record.key {
            Some(key) if key.len() <= LONGEST_KEPT_KEY => {}
            Some(key) => record.key = Some(hex(&Sha256::digest(key)).into_bytes()),
            None => {
                let position = record.position;
                record.key = Some(format!("{}/{}/{}", self.topic, position.partition, position.offset).into_bytes());
            }
        }
        record.headers.clear();
        output.own_headers = own_headers;
        output.destination = Destination::DeadLetters;
        output.payload = Payload::Null;
        output.tally = Tally::DeadLetter { reason };
        output.form = Form::Stripped;
    }
}

impl Output {
    pub fn payload(&self) -> Option<&[u8]> {
        match &self.payload {
            Payload::Json(json) => Some(json),
            Payload::Value => self.record.value.as_deref(),
            Payload::Null => None,
        }
    }

    /// A dead letter keeps the record's time, unless the topic refuses it; a decision was made now.
    pub fn timestamp(&self) -> Option<i64> {
        match (self.destination, self.form) {
            (Destination::DeadLetters, Form::Whole | Form::Alone) => self.record.timestamp,
            _ => None,
        }
    }

    /// The record's headers, then ours. What the record carries under our names was written by an
    /// earlier pass, or forged, and would be mistaken for ours.
    pub fn headers(&self) -> OwnedHeaders {
        let carried = self.record.headers.iter().filter(|(name, _)| !is_own(name));
        let mut headers = OwnedHeaders::new_with_capacity(self.record.headers.len() + self.own_headers.len());
        for (name, value) in carried {
            headers = headers.insert(KafkaHeader {
                key: name,
                value: value.as_deref(),
            });
        }
        for (name, value) in &self.own_headers {
            headers = headers.insert(KafkaHeader {
                key: name,
                value: Some(value.as_bytes()),
            });
        }
        headers
    }

    /// What keeping it costs beyond the record itself.
    pub fn own_bytes(&self) -> usize {
        match &self.payload {
            Payload::Json(json) => json.len(),
            Payload::Value | Payload::Null => 0,
        }
    }
}

fn is_own(name: &str) -> bool {
    name.starts_with(OWN) || name.starts_with(CONNECT)
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use rdkafka::message::Headers;

    use super::*;
    use crate::stream::in_flight::InFlight;
    use crate::stream::ownership::{Epoch, Ownership};
    use crate::stream::record::{Header, RecordPosition};

    /// Partition 2, owned under one assignment, and records of it.
    pub(in super::super) struct SamplePartition {
        pub ownership: Ownership,
        pub epoch: Epoch,
    }

    impl Default for SamplePartition {
        fn default() -> Self {
            let ownership = Ownership::default();
            let epoch = ownership.assign(2);
            Self { ownership, epoch }
        }
    }

    impl SamplePartition {
        /// A finished record without a value.
        pub fn tombstone(&self, offset: i64) -> Finished {
            let mut record = record(None, b"key", Vec::new());
            record.position = RecordPosition {
                epoch: self.epoch,
                offset,
                ..record.position
            };
            Finished {
                record,
                outcome: Outcome::Tombstone,
            }
        }
    }

    pub(in super::super) fn origin() -> Origin {
        Origin {
            topic: "comments".into(),
            group: "moderation".into(),
            instance: "gpu0".into(),
        }
    }

    fn record(value: Option<&[u8]>, key: &[u8], headers: Vec<Header>) -> Record {
        Record {
            position: RecordPosition {
                partition: 2,
                epoch: Ownership::default().assign(2),
                sequence: 0,
                offset: 41,
            },
            key: Some(key.to_vec()),
            value: value.map(<[u8]>::to_vec),
            headers,
            has_broken_headers: false,
            timestamp: Some(5),
            permit: Arc::new(InFlight::new(1, 1)).admit(0, None),
        }
    }

    fn shown(output: &Output) -> Vec<String> {
        let show = |header: KafkaHeader<'_, &[u8]>| {
            format!(
                "{}={}",
                header.key,
                String::from_utf8_lossy(header.value.unwrap_or(b"(null)"))
            )
        };
        output.headers().iter().map(show).collect()
    }

    fn rejected(record: Record) -> Output {
        let rejection = Rejection {
            reason: "not_json",
            message: "the event is not JSON at line 1, column 1: expected value".into(),
            stage: RejectionStage::Decode,
        };
        origin().output(Finished {
            record,
            outcome: Outcome::Rejected(rejection),
        })
    }

    #[test]
    fn a_dead_letter_is_the_record_and_what_was_wrong() {
        let headers = vec![
            ("traceparent".to_owned(), Some(b"00-1".to_vec())),
            ("empty".to_owned(), None),
            ("moderatord.source.offset".to_owned(), Some(b"7".to_vec())),
            ("__connect.errors.stage".to_owned(), Some(b"EARLIER".to_vec())),
        ];
        let output = rejected(record(Some(b"{"), b"key", headers));
        assert_eq!((output.payload(), output.timestamp()), (Some(&b"{"[..]), Some(5)));
        assert_eq!(output.destination, Destination::DeadLetters);
        insta::assert_snapshot!(shown(&output).join("\n"), @r#"
        traceparent=00-1
        empty=(null)
        moderatord.source.topic=comments
        moderatord.source.partition=2
        moderatord.source.offset=41
        __connect.errors.topic=comments
        __connect.errors.partition=2
        __connect.errors.offset=41
        __connect.errors.connector.name=moderation
        __connect.errors.task.id=gpu0
        __connect.errors.stage=VALUE_CONVERTER
        __connect.errors.class.name=moderatord
        __connect.errors.exception.class.name=not_json
        __connect.errors.exception.message=the event is not JSON at line 1, column 1: expected value
        "#);
    }

    #[test]
    fn what_is_refused_for_its_size_ends_as_coordinates() {
        let long = vec![b'k'; LONGEST_KEPT_KEY + 1];
        let headers = vec![("trace".to_owned(), Some(vec![0; 10]))];
        let mut output = rejected(record(Some(b"abc"), &long, headers));
        let origin = origin();
        assert!(origin.step_down(&mut output));
        assert_eq!((output.form, output.payload()), (Form::Alone, Some(&b"abc"[..])));
        assert!(origin.step_down(&mut output));
        assert_eq!(
            (output.form, output.payload(), output.record.key.as_ref().map(Vec::len)),
            (Form::Stripped, None, Some(64))
        );
        let headers = shown(&output);
        for expected in [
            "moderatord.source.offset=41",
            "__connect.errors.exception.class.name=not_json",
            "moderatord.value.bytes=3",
            "moderatord.value.sha256=ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "moderatord.key.bytes=4097",
            "moderatord.headers.bytes=15",
        ] {
            assert!(
                headers.iter().any(|header| header == expected),
                "{expected} in {headers:?}"
            );
        }
        assert!(!headers.iter().any(|header| header.starts_with("trace")));
        assert!(!origin.step_down(&mut output));
    }

    #[test]
    fn a_tombstone_passes_through() {
        let output = origin().output(Finished {
            record: record(None, b"key", Vec::new()),
            outcome: Outcome::Tombstone,
        });
        assert_eq!((output.payload(), output.destination), (None, Destination::Decisions));
        assert_eq!(output.record.key.as_deref(), Some(&b"key"[..]));
        assert_eq!(shown(&output).len(), 3);
    }
}
