//! Dead letters, and what is left of an output that a topic refuses.

use std::sync::Arc;

use rdkafka::message::Headers;

use super::*;
use crate::stream::in_flight::InFlight;
use crate::stream::ownership::{Epoch, Ownership};
use crate::stream::record::{Header, RecordPosition};

/// Makes records of partition 2, which is owned in one epoch.
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
    /// Makes a finished record without a value.
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
        topic_id: None,
        group: "moderation".into(),
        instance: "gpu0".into(),
    }
}

/// Makes a dead letter of partition 2.
pub(in super::super) fn dead_letter(value: Option<&[u8]>, key: Option<&[u8]>) -> Output {
    let mut record = record(value, b"", Vec::new());
    record.key = key.map(<[u8]>::to_vec);
    rejected(record)
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
        _in_flight: Arc::new(InFlight::new(1, 1)).add(0, None, std::time::Instant::now()),
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
fn every_header_of_a_dead_letter_is_documented() {
    let page = include_str!("../../../../docs/schema.md");
    let (_, section) = page.split_once("\n## Dead letters\n").unwrap();
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        let name = cells.next()?.trim_end_matches('`').to_owned();
        Some((name, cells.last()?.trim_end_matches(" |").to_owned()))
    };
    let documented: Vec<(String, String)> = section
        .lines()
        .filter_map(row)
        .filter(|(name, _)| name.contains('.'))
        .collect();
    let names = |output: &Output| -> Vec<String> {
        shown(output)
            .iter()
            .map(|header| header.split('=').next().unwrap().to_owned())
            .collect()
    };
    let mut output = rejected(record(Some(b"{"), b"key", Vec::new()));
    let complete = names(&output);
    origin().strip(&mut output);
    let stripped = names(&output);
    let listed: Vec<&String> = documented.iter().map(|(name, _)| name).collect();
    assert_eq!(listed, stripped.iter().collect::<Vec<_>>());
    for (name, absent) in &documented {
        let is_only_stripped = !complete.contains(name);
        assert_eq!(
            is_only_stripped,
            absent == "unless the value was left out",
            "{name}: {absent}"
        );
    }
}

#[test]
fn a_dead_letter_carries_the_record_and_the_reason() {
    let headers = vec![
        ("traceparent".to_owned(), Some(b"00-1".to_vec())),
        ("empty".to_owned(), None),
        ("moderatord.source.offset".to_owned(), Some(b"7".to_vec())),
        ("__connect.errors.stage".to_owned(), Some(b"EARLIER".to_vec())),
    ];
    let output = rejected(record(Some(b"{"), b"key", headers));
    assert_eq!(output.payload(), Some(&b"{"[..]));
    assert_eq!(output.destination, Destination::DeadLetters);
    insta::assert_snapshot!(shown(&output).join("\n"), @r#"
    traceparent=00-1
    empty=(null)
    moderatord.source.topic=comments
    moderatord.source.partition=2
    moderatord.source.offset=41
    moderatord.source.timestamp=5
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
fn a_refused_output_is_reduced_to_coordinates() {
    let long = vec![b'k'; MAX_KEY_BYTES + 1];
    let headers = vec![("trace".to_owned(), Some(vec![0; 10]))];
    let mut output = rejected(record(Some(b"abc"), &long, headers));
    assert_eq!((output.form, output.payload()), (Form::Whole, Some(&b"abc"[..])));
    origin().strip(&mut output);
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
}

#[test]
fn a_tombstone_passes_through() {
    let output = origin().output(Finished {
        record: record(None, b"key", Vec::new()),
        outcome: Outcome::Tombstone,
    });
    assert_eq!((output.payload(), output.destination), (None, Destination::Decisions));
    assert_eq!(output.record.key.as_deref(), Some(&b"key"[..]));
    assert_eq!(shown(&output).len(), 4);
}
