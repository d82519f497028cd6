//! Every kind of record gets its output, once and in order.

use std::collections::BTreeMap;

use rdkafka::message::{Header, OwnedHeaders};

use crate::broker::{Broker, OutputRecord};
use crate::daemon::{Daemon, Names, Scripted, Setup, eventually};

/// Waits until the group has committed the expected offset of every partition.
pub fn await_committed(broker: &Broker, names: &Names, expected: &[i64]) {
    let partitions = i32::try_from(expected.len()).unwrap();
    eventually("every offset is committed", || {
        broker.committed(&names.group, &names.comments, partitions) == expected
    });
}

/// Checks that every input record has exactly one output, in the same partition and in order. `counts` gives the number
/// of input records of each partition.
pub fn assert_each_once(decisions: &[OutputRecord], dead_letters: &[OutputRecord], counts: &[i64]) {
    for outputs in [decisions, dead_letters] {
        let mut last: BTreeMap<i32, i64> = BTreeMap::new();
        for output in outputs {
            let (partition, offset) = output.source();
            assert_eq!(partition, output.partition);
            let before = last.insert(partition, offset).unwrap_or(-1);
            assert!(before < offset, "partition {partition}: {offset} after {before}");
        }
    }
    let mut seen: Vec<(i32, i64)> = decisions.iter().chain(dead_letters).map(OutputRecord::source).collect();
    seen.sort_unstable();
    let expected: Vec<(i32, i64)> = (0..)
        .zip(counts)
        .flat_map(|(partition, &count)| (0..count).map(move |offset| (partition, offset)))
        .collect();
    assert_eq!(seen.len(), expected.len());
    assert_eq!(seen, expected);
}

pub fn comment(id: usize, text: &str) -> Vec<u8> {
    serde_json::json!({ "content_id": format!("c{id}"), "text": text })
        .to_string()
        .into_bytes()
}

fn start(broker: &Broker, names: &Names) -> Daemon {
    Setup::new(broker, names).start(broker, Scripted::by_length())
}

/// An output with the timestamp of an old comment could be deleted by time retention as soon as it is written.
#[test]
fn outputs_are_written_with_the_current_time_and_name_the_original() {
    const LONG_AGO: i64 = 1000;
    let broker = Broker::start();
    let names = Names::new("timestamps");
    // The comments themselves must survive until they are read; the output topics keep the default retention.
    let keep_all: &[(&str, &str)] = if broker.is_apache() {
        &[("retention.ms", "-1")]
    } else {
        &[]
    };
    broker.create_topic_with(&names.comments, 1, keep_all);
    broker.create_topic(&names.decisions, 1);
    broker.create_topic(&names.dead_letters, 1);
    let event = comment(1, "hello");
    let values: [(i32, &str, Option<&[u8]>); 3] = [(0, "k", Some(&event)), (0, "k", None), (0, "k", Some(b"no json"))];
    let before = now_millis();
    broker.produce_at(&names.comments, values, LONG_AGO);
    let daemon = start(&broker, &names);
    await_committed(&broker, &names, &[3]);
    daemon.stop().unwrap();

    let (decisions, dead_letters) = (broker.read(&names.decisions), broker.read(&names.dead_letters));
    assert_each_once(&decisions, &dead_letters, &[3]);
    for output in decisions.iter().chain(&dead_letters) {
        assert!(
            (before..=now_millis()).contains(&output.timestamp),
            "{}",
            output.timestamp
        );
        assert_eq!(output.headers["moderatord.source.timestamp"], LONG_AGO.to_string());
    }
}

fn now_millis() -> i64 {
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    i64::try_from(now.as_millis()).unwrap()
}

#[test]
fn every_kind_of_record_gets_its_output_once() {
    let broker = Broker::start();
    let names = Names::create(&broker, "outcomes", 1);
    let large = format!(r#"{{"content_id":"c","text":"{}"}}"#, "long ".repeat(300));
    let values: [(&str, Option<&[u8]>, &str); 13] = [
        (
            "plain",
            Some(br#"{"content_id":"c1","event_id":"e1","community_id":"garden","revision":3,"text":"hello"}"#),
            "allow",
        ),
        ("gone", None, "tombstone"),
        ("deleted", Some(br#"{"content_id":"c2","op":"delete"}"#), "delete"),
        ("bytes", Some(b"\xff\xfe"), "not_utf8"),
        ("words", Some(b"hello"), "not_json"),
        ("list", Some(b"[1]"), "not_an_object"),
        ("empty", Some(b"{}"), "missing_field"),
        ("number", Some(br#"{"content_id":"c3","text":5}"#), "wrong_type"),
        ("nameless", Some(br#"{"text":"hello"}"#), "missing_field"),
        (
            "twice",
            Some(br#"{"content_id":"c4","text":"a","text":"b"}"#),
            "duplicate_field",
        ),
        ("large", Some(large.as_bytes()), "too_large"),
        (
            "half",
            Some(br#"{"content_id":12345678901234567890123,"text":"hello \ud83d"}"#),
            "allow",
        ),
        (
            "marked",
            Some(b"\xef\xbb\xbf{\"content_id\":\"c5\",\"text\":\"hello\"}"),
            "allow",
        ),
    ];
    let headers = OwnedHeaders::new()
        .insert(Header {
            key: "traceparent",
            value: Some("00-1"),
        })
        .insert(Header {
            key: "moderatord.source.offset",
            value: Some("900"),
        });
    broker.produce_with(&names.comments, values.map(|(key, value, _)| (0, key, value)), &headers);
    let mut setup = Setup::new(&broker, &names);
    setup.max_bytes = 1024;
    let daemon = setup.start(&broker, Scripted::new(|rows| Ok(vec![-1.0; rows.len()])));
    await_committed(&broker, &names, &[13]);
    daemon.stop().unwrap();

    let (decisions, dead_letters) = (broker.read(&names.decisions), broker.read(&names.dead_letters));
    assert_each_once(&decisions, &dead_letters, &[13]);
    let outcome = |output: &OutputRecord| match (
        &output.value,
        output.headers.get("__connect.errors.exception.class.name"),
    ) {
        (_, Some(reason)) => reason.clone(),
        (None, None) => "tombstone".to_owned(),
        (Some(_), None) => output.json()["action"].as_str().unwrap().to_owned(),
    };
    for output in decisions.iter().chain(&dead_letters) {
        let (_, offset) = output.source();
        let (key, value, expected) = &values[usize::try_from(offset).unwrap()];
        assert_eq!(output.key.as_deref(), Some(key.as_bytes()));
        assert_eq!(outcome(output), *expected, "{key}");
        assert_eq!(output.headers["traceparent"], "00-1");
        assert_eq!(output.headers["moderatord.source.topic"], names.comments);
        if output.headers.contains_key("__connect.errors.stage") {
            assert_eq!(output.value.as_deref(), *value, "{key}");
        }
    }
    let half = decisions.iter().find(|output| output.key.as_deref() == Some(b"half"));
    let half = half.unwrap().json();
    assert_eq!(half["content_id"], "12345678901234567890123");
    assert_eq!(half["replaced_surrogates"], 1);
    let mut decision = decisions[0].json();
    for (key, value) in [("scored_at", "[time]"), ("decision_id", "[id]")] {
        assert!(decision[key].is_string());
        decision[key] = value.into();
    }
    decision["source"]["topic"] = "comments".into();
    // The embedded broker has no topic ids.
    let id = decision["source"].as_object_mut().unwrap().remove("topic_id");
    assert_eq!(id.is_some_and(|id| id.is_string()), broker.is_apache());
    insta::assert_snapshot!(serde_json::to_string_pretty(&decision).unwrap(), @r#"
    {
      "action": "allow",
      "automated_decision": "fully",
      "automated_detection": true,
      "community_id": "garden",
      "content_id": "c1",
      "decision_id": "[id]",
      "event_id": "e1",
      "label": "ok",
      "margin": -1.0,
      "model": {
        "adapter": "none",
        "base": "scripted",
        "calibration": "identity",
        "device": "cpu",
        "dtype": "f32",
        "normalizer": "none",
        "prompt": "none",
        "quantization": "none"
      },
      "policy": "sha256:720aa6b97c0651fb0abb9ca201ba099e5add671f9467930493587530639f50ab",
      "probability": 0.2689414213699951,
      "revision": 3,
      "schema": "moderatord.decision.v1",
      "score": 0.2689414213699951,
      "scored_at": "[time]",
      "source": {
        "offset": 0,
        "partition": 0,
        "topic": "comments"
      },
      "text_sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
      "thresholds": {
        "block": 0.9,
        "review": 0.5
      },
      "windows": 1
    }
    "#);
}

#[test]
fn partitions_keep_their_order_with_every_kind_of_record() {
    let broker = Broker::start();
    let names = Names::create(&broker, "order", 3);
    let records: Vec<(i32, String, Option<Vec<u8>>)> = (0..900)
        .map(|id| {
            let value = match id % 10 {
                3 => None,
                5 => Some(b"no json".to_vec()),
                // Several windows, so that the comment is spread over micro-batches.
                7 => Some(comment(id, &"a word or two about the garden ".repeat(1 + id % 20))),
                _ => Some(comment(id, "hello")),
            };
            (i32::try_from(id % 3).unwrap(), format!("k{id}"), value)
        })
        .collect();
    let daemon = start(&broker, &names);
    broker.produce(
        &names.comments,
        records
            .iter()
            .map(|(partition, key, value)| (*partition, key.as_str(), value.as_deref())),
    );
    await_committed(&broker, &names, &[300, 300, 300]);
    daemon.stop().unwrap();
    assert_each_once(
        &broker.read(&names.decisions),
        &broker.read(&names.dead_letters),
        &[300; 3],
    );
}

#[test]
fn the_largest_window_decides_and_a_truncated_text_is_reviewed() {
    let broker = Broker::start();
    let names = Names::create(&broker, "windows", 1);
    let long = "a word or two about the garden ".repeat(60);
    let values = [comment(0, "hello"), comment(1, &long), comment(2, "bye")];
    broker.produce(
        &names.comments,
        values.iter().map(|value| (0, "k", Some(value.as_slice()))),
    );
    let mut setup = Setup::new(&broker, &names);
    setup.max_windows = 8;
    // Each window that is scored gets a larger margin than the one before; all are low enough for `allow`.
    let mut count = 0;
    let daemon = setup.start(
        &broker,
        Scripted::new(move |rows| {
            Ok(rows
                .iter()
                .map(|_| {
                    count += 1;
                    count as f32 / 100.0 - 5.0
                })
                .collect())
        }),
    );
    await_committed(&broker, &names, &[3]);
    daemon.stop().unwrap();
    let decisions = broker.read(&names.decisions);
    let (first, long, last) = (decisions[0].json(), decisions[1].json(), decisions[2].json());
    assert_eq!(first["windows"], 1);
    assert_eq!(long["windows"], 8);
    let margin = |decision: &serde_json::Value| decision["margin"].as_f64().unwrap();
    // The last window of the long comment is scored just before the next comment.
    assert!((margin(&last) - margin(&long) - 0.01).abs() < 1e-4);
    assert!((margin(&long) - margin(&first) - 0.08).abs() < 1e-4);
    assert_eq!((&first["action"], &long["action"]), (&"allow".into(), &"review".into()));
}

#[test]
fn keys_stay_in_order_when_partition_counts_differ() {
    let broker = Broker::start();
    let names = Names::new("counts");
    broker.create_topic(&names.comments, 4);
    broker.create_topic(&names.decisions, 2);
    broker.create_topic(&names.dead_letters, 1);
    let records: Vec<(i32, String, Vec<u8>)> = (0..400usize)
        .map(|id| {
            let key = id % 37;
            (i32::try_from(key % 4).unwrap(), format!("k{key}"), comment(id, "hello"))
        })
        .collect();
    broker.produce(
        &names.comments,
        records
            .iter()
            .map(|(partition, key, value)| (*partition, key.as_str(), Some(value.as_slice()))),
    );
    let daemon = start(&broker, &names);
    let counts = [0, 1, 2, 3].map(|partition| records.iter().filter(|record| record.0 == partition).count() as i64);
    await_committed(&broker, &names, &counts);
    daemon.stop().unwrap();
    let decisions = broker.read(&names.decisions);
    assert_eq!(decisions.len(), 400);
    let mut by_key: BTreeMap<Vec<u8>, Vec<(i32, i64)>> = BTreeMap::new();
    for decision in &decisions {
        by_key
            .entry(decision.key.clone().unwrap())
            .or_default()
            .push((decision.partition, decision.source().1));
    }
    for (key, outputs) in by_key {
        assert!(
            outputs
                .windows(2)
                .all(|pair| pair[0].0 == pair[1].0 && pair[0].1 < pair[1].1),
            "{key:?} {outputs:?}"
        );
    }
}
