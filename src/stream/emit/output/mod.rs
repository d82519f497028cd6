//! Makes the output of an input record: a decision, a dead letter or a tombstone, with its headers.

#[cfg(test)]
pub(super) mod tests;

use rdkafka::message::{Header as KafkaHeader, OwnedHeaders};
use sha2::{Digest, Sha256};

use crate::decide::deleted;
use crate::hash::hex;
use crate::message::{Action, Competence, Decision, SourceRecord};
use crate::stream::record::{Finished, Outcome, Record, Rejection, RejectionStage};

/// Prefix of the daemon's own headers.
const OWN_PREFIX: &str = "moderatord.";

/// Prefix of Kafka Connect's error headers (KIP-298).
const CONNECT_PREFIX: &str = "__connect.errors.";

/// Capacity for a typical decision. A buffer that grows from empty is copied four times and takes up to twice the size
/// until the decision is committed.
const DECISION_CAPACITY: usize = 1280;

/// A key longer than this is replaced by its hash in a stripped dead letter.
const MAX_KEY_BYTES: usize = 4096;

/// The topic that an output is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Destination {
    Decisions,
    DeadLetters,
}

/// The form in which an output is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Whole,
    /// A dead letter without a value, with only the coordinates, sizes and hash of the record.
    Stripped,
}

/// What an output is, as counted by the metrics once it is committed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum OutputKind {
    Decided {
        action: Action,
        probability: f64,
        competence: Option<Competence>,
    },
    Deleted,
    Tombstone,
    DeadLetter {
        reason: &'static str,
    },
}

/// An output, kept until it is committed so that it can be produced again after an aborted transaction.
#[derive(Debug)]
pub(super) struct Output {
    /// Identifies the output within this process, so that its acknowledgement can be matched to it.
    pub number: usize,
    pub record: Record,
    pub destination: Destination,
    pub form: Form,
    pub kind: OutputKind,
    payload: Payload,
    own_headers: Vec<(String, String)>,
}

#[derive(Debug)]
enum Payload {
    /// A decision as JSON.
    Json(Vec<u8>),
    /// The value of the record.
    Value,
    Null,
}

/// The names of the comments topic, the consumer group and the instance, for the headers of outputs.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub topic: String,
    /// Kafka's id of the topic; `None` if the brokers have no ids.
    pub topic_id: Option<String>,
    pub group: String,
    pub instance: String,
}

impl Origin {
    fn source(&self, record: &Record) -> SourceRecord {
        SourceRecord {
            topic: self.topic.clone(),
            topic_id: self.topic_id.clone(),
            partition: record.position.partition,
            offset: record.position.offset,
        }
    }

    /// Makes the output of a finished record. The caller sets its number.
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
                let kind = OutputKind::Decided {
                    action: decision.action,
                    probability,
                    competence: scored.competence,
                };
                self.decision(record, &decision, kind)
            }
            Outcome::Deleted(comment) => self.decision(record, &deleted(&comment, Some(&source)), OutputKind::Deleted),
            Outcome::Tombstone => Output {
                number: 0,
                own_headers: self.source_headers(&record),
                record,
                destination: Destination::Decisions,
                form: Form::Whole,
                kind: OutputKind::Tombstone,
                payload: Payload::Null,
            },
            Outcome::Rejected(rejection) => self.dead_letter(record, &rejection),
        }
    }

    fn decision(&self, record: Record, decision: &Decision, kind: OutputKind) -> Output {
        let mut payload = Vec::with_capacity(DECISION_CAPACITY);
        serde_json::to_writer(&mut payload, decision).expect("a decision holds finite numbers, text keys and no maps");
        Output {
            number: 0,
            own_headers: self.source_headers(&record),
            record,
            destination: Destination::Decisions,
            form: Form::Whole,
            kind,
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
            kind: OutputKind::DeadLetter {
                reason: rejection.reason,
            },
        }
    }

    fn source_headers(&self, record: &Record) -> Vec<(String, String)> {
        let own = |name: &str, value: String| (format!("{OWN_PREFIX}source.{name}"), value);
        let mut headers = vec![
            own("topic", self.topic.clone()),
            own("partition", record.position.partition.to_string()),
            own("offset", record.position.offset.to_string()),
        ];
        // The output itself carries the time at which it is written: with the record's own, retention by time could
        // delete it at once.
        headers.extend(
            record
                .timestamp
                .map(|timestamp| own("timestamp", timestamp.to_string())),
        );
        headers
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
        .map(|(name, value)| (format!("{CONNECT_PREFIX}{name}"), value))
        .into()
    }

    /// Replaces an output by a dead letter with the coordinates, sizes and hash of its record, which is small enough
    /// for any topic and always has a key.
    pub fn strip(&self, output: &mut Output) {
        let record = &mut output.record;
        let reason = match output.kind {
            OutputKind::DeadLetter { reason } => reason,
            _ => "output_refused",
        };
        let rejection = Rejection {
            reason,
            message: "the topic refuses the complete record; read it from its source".to_owned(),
            stage: RejectionStage::Emit,
        };
        let bytes = |value: Option<&[u8]>| value.map_or(0, <[u8]>::len).to_string();
        let mut own_headers = self.source_headers(record);
        own_headers.extend(self.connect_headers(record, &rejection));
        let value = record.value.as_deref().unwrap_or_default();
        let own = |name: &str, value: String| (format!("{OWN_PREFIX}{name}"), value);
        own_headers.extend([
            own("value.bytes", bytes(record.value.as_deref())),
            own("value.sha256", hex(&Sha256::digest(value))),
            own("key.bytes", bytes(record.key.as_deref())),
            own("headers.bytes", Record::size(None, None, &record.headers).to_string()),
        ]);
        // A compacted topic requires a key.
        match &record.key {
            Some(key) if key.len() <= MAX_KEY_BYTES => {}
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
        output.kind = OutputKind::DeadLetter { reason };
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

    /// Returns the headers of the record, followed by the daemon's own.
    ///
    /// Headers of the record with the prefixes of the daemon's own are left out: they come from an earlier pass or are
    /// forged, and would be mistaken for the daemon's.
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

    /// Returns the bytes of the key, the value and the headers, in the order in which a record batch stores them.
    pub fn content(&self) -> Vec<u8> {
        let carried = self.record.headers.iter().filter(|(name, _)| !is_own(name));
        let mut content = Vec::new();
        content.extend_from_slice(self.record.key.as_deref().unwrap_or_default());
        content.extend_from_slice(self.payload().unwrap_or_default());
        for (name, value) in carried {
            content.extend_from_slice(name.as_bytes());
            content.extend_from_slice(value.as_deref().unwrap_or_default());
        }
        for (name, value) in &self.own_headers {
            content.extend_from_slice(name.as_bytes());
            content.extend_from_slice(value.as_bytes());
        }
        content
    }

    /// Returns the length of [`Output::content`].
    pub fn content_bytes(&self) -> usize {
        let carried = self.record.headers.iter().filter(|(name, _)| !is_own(name));
        let carried = carried.map(|(name, value)| name.len() + value.as_ref().map_or(0, Vec::len));
        let own = self.own_headers.iter().map(|(name, value)| name.len() + value.len());
        self.record.key.as_ref().map_or(0, Vec::len)
            + self.payload().map_or(0, <[u8]>::len)
            + carried.chain(own).sum::<usize>()
    }

    /// Returns the number of headers, or more.
    pub fn header_count(&self) -> usize {
        self.record.headers.len() + self.own_headers.len()
    }

    /// Returns the number of bytes that the output takes in addition to its record.
    pub fn own_bytes(&self) -> usize {
        match &self.payload {
            Payload::Json(json) => json.len(),
            Payload::Value | Payload::Null => 0,
        }
    }
}

fn is_own(name: &str) -> bool {
    name.starts_with(OWN_PREFIX) || name.starts_with(CONNECT_PREFIX)
}
