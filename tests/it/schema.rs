//! docs/schema.md lists every field of every format, with its type and when it is absent.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use moderatord::config::InputFields;
use moderatord::message::{
    Action, AutomatedDecision, Competence, DECISION_SCHEMA, Decision, Label, ModelIdentity, Scoring, SourceRecord,
    Thresholds,
};
use moderatord::retrain::data::feedback::{self, FeedbackRules};
use moderatord::stream::decode::{decode, require_content_id};
use regex::Regex;
use serde_json::{Value, json};

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Returns the type and the last column of each row of the tables below a heading, by the name in the first column.
fn table(heading: &str) -> BTreeMap<String, (String, String)> {
    let page = read("docs/schema.md");
    let (_, section) = page.split_once(&format!("\n## {heading}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let row = Regex::new(r"(?m)^\| `([^`]+)` \| (.+?) \|(?: (.+) \|)?$").unwrap();
    let mut rows = BTreeMap::new();
    for found in row.captures_iter(section) {
        let absent = found.get(3).map_or("", |absent| absent.as_str());
        let entry = (found[2].to_owned(), absent.to_owned());
        assert!(
            rows.insert(found[1].to_owned(), entry).is_none(),
            "{} is listed twice",
            &found[1]
        );
    }
    rows
}

/// Returns the JSON type of each value that is not an object, by its path.
fn types(value: &Value, path: &str, found: &mut BTreeMap<String, &'static str>) {
    let kind = match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() {
                    name.clone()
                } else {
                    format!("{path}.{name}")
                };
                types(value, &path, found);
            }
            return;
        }
        Value::String(_) => "string",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::Null | Value::Array(_) => panic!("{path} is {value}"),
    };
    found.insert(path.to_owned(), kind);
}

fn fields(decision: &Decision) -> BTreeMap<String, &'static str> {
    let mut found = BTreeMap::new();
    types(&serde_json::to_value(decision).unwrap(), "", &mut found);
    found
}

/// Returns a decision in which every field is set.
fn complete() -> Decision {
    let text = || Some("x".to_owned());
    Decision {
        schema: DECISION_SCHEMA.into(),
        decision_id: text(),
        event_id: text(),
        content_id: text(),
        revision: Some(1),
        community_id: text(),
        replaced_surrogates: 1,
        action: Action::Block,
        scoring: Some(Scoring {
            probability: 0.5,
            score: 0.5,
            margin: 0.5,
            label: Label::Ok,
            competence: Some(Competence::Unsure),
            thresholds: Thresholds {
                review: 0.1,
                block: 0.2,
            },
            policy: "x".into(),
            model: ModelIdentity {
                base: "x".into(),
                adapter: "x".into(),
                adapter_version: text(),
                prompt: "x".into(),
                calibration: "x".into(),
                normalizer: "x".into(),
                device: "x".into(),
                dtype: "x".into(),
                quantization: "x".into(),
            },
            text_sha256: "x".into(),
            windows: 1,
            scored_at: "x".into(),
        }),
        source: Some(SourceRecord {
            topic: "x".into(),
            topic_id: text(),
            partition: 0,
            offset: 0,
        }),
        automated_detection: true,
        automated_decision: AutomatedDecision::Fully,
    }
}

#[test]
fn every_field_of_a_decision_is_documented() {
    let documented = table("Decisions");
    let complete = complete();
    let types: BTreeMap<String, String> = fields(&complete)
        .into_iter()
        .map(|(path, kind)| (path, kind.to_owned()))
        .collect();
    let listed: BTreeMap<String, String> = documented
        .iter()
        .map(|(path, (kind, _))| (path.clone(), kind.split([' ', ':']).next().unwrap().to_owned()))
        .collect();
    assert_eq!(listed, types);
    // What may be absent: everything that is optional, the score of a deletion, and the source in a file.
    let scoring = complete.scoring.clone().map(|mut scoring| {
        scoring.model.adapter_version = None;
        scoring.competence = None;
        scoring
    });
    let source = complete.source.clone().map(|source| SourceRecord {
        topic_id: None,
        ..source
    });
    let bare = Decision {
        decision_id: None,
        event_id: None,
        content_id: None,
        revision: None,
        community_id: None,
        replaced_surrogates: 0,
        scoring,
        source: None,
        ..complete.clone()
    };
    let in_file = fields(&bare);
    let deletion = fields(&Decision {
        scoring: None,
        ..bare.clone()
    });
    let from_topic = fields(&Decision { source, ..bare });
    for (path, (_, absent)) in &documented {
        let case = |holds: bool, words: &str| {
            assert_eq!(holds, absent.contains(words), "{path}: `{absent}`");
        };
        case(deletion.contains_key(path), "never");
        if in_file.contains_key(path) && !deletion.contains_key(path) {
            assert!(absent.starts_with("for deletions;"), "{path}: `{absent}`");
        }
        if from_topic.contains_key(path) && !in_file.contains_key(path) {
            case(true, "not read from a topic");
        }
    }
}

#[test]
fn every_value_of_a_decision_is_documented() {
    let documented = table("Decisions");
    let check = |path: &str, values: Vec<Value>| {
        for value in values {
            let value = value.as_str().unwrap().to_owned();
            assert!(
                documented[path].0.contains(&format!("`{value}`")),
                "{path} may be {value}"
            );
        }
    };
    let actions = [Action::Allow, Action::Review, Action::Block, Action::Delete];
    check("action", actions.iter().map(|action| json!(action)).collect());
    check("label", vec![json!(Label::Hateful), json!(Label::Ok)]);
    let all = [Competence::InScope, Competence::Unsure, Competence::OutOfScope];
    check("competence", all.iter().map(|one| json!(one)).collect());
    assert!(all.iter().all(|one| json!(one) == one.as_str()));
    let decisions = [AutomatedDecision::Fully, AutomatedDecision::Not];
    check(
        "automated_decision",
        decisions.iter().map(|decision| json!(decision)).collect(),
    );
    check("schema", vec![json!(DECISION_SCHEMA)]);
}

#[test]
fn every_field_of_an_event_is_documented() {
    let documented = table("Comment events");
    let fields = InputFields::default();
    let names: BTreeSet<&str> = fields.iter().map(|(name, _)| name).collect();
    assert_eq!(documented.keys().map(String::as_str).collect::<BTreeSet<_>>(), names);
    let event =
        json!({"event_id": 1, "content_id": "c", "revision": 1, "op": "edit", "community_id": "g", "text": "a"});
    let read = |event: &Value| {
        let comment = decode(event.to_string().as_bytes(), &[], &fields, 1000)?;
        require_content_id(&comment, &fields).map(|()| comment)
    };
    read(&event).unwrap();
    for (name, (kind, absent)) in &documented {
        let with = |value: Value| {
            let mut event = event.clone();
            event[name] = value;
            read(&event)
        };
        assert!(with(json!([])).unwrap_err().to_string().contains(&format!("/{name}")));
        assert_eq!(with(json!(1)).is_ok(), kind.contains("integer"), "{name}: `{kind}`");
        assert_eq!(
            with(json!("create")).is_ok(),
            kind.contains("string"),
            "{name}: `{kind}`"
        );
        let is_required = absent.starts_with("never") || absent.starts_with("only");
        assert_eq!(with(Value::Null).is_err(), is_required, "{name}: `{absent}`");
    }
}

#[test]
fn every_field_of_feedback_is_documented() {
    let documented = table("Feedback");
    let source = read("src/retrain/data/feedback.rs");
    let source = source.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
    let used = Regex::new(r#"fields\.(?:id|string|number|get)\("(\w+)"\)"#).unwrap();
    let used: BTreeSet<&str> = used
        .captures_iter(source)
        .map(|found| found.get(1).unwrap().as_str())
        .collect();
    let listed: BTreeSet<&str> = documented.keys().map(|path| path.split('.').next().unwrap()).collect();
    assert_eq!(listed, used);
    let record = json!({
        "content_id": "c", "text": "a", "label": 1, "source": "user", "community_id": "g", "weight": 2,
        "sample": {"rate": 0.5}, "feedback_id": "f", "supersedes": "e",
    });
    let decode = |record: &Value, lenient| {
        let rules = FeedbackRules {
            max_bytes: 1000,
            lenient,
        };
        feedback::decode(record.to_string().as_bytes(), 1, rules)
    };
    decode(&record, false).unwrap();
    for (path, (kind, absent)) in &documented {
        let pointer = format!("/{}", path.replace('.', "/"));
        let with = |value: Value, lenient| {
            let mut record = record.clone();
            match record.pointer_mut(&pointer) {
                Some(found) => *found = value,
                None => panic!("{path} is not in the complete record"),
            }
            decode(&record, lenient)
        };
        let name = path.split('.').next().unwrap();
        let error = with(json!([]), false).unwrap_err().to_string();
        assert!(error.contains(&format!("`{name}`")), "{path}: {error}");
        let number = with(json!(1), false).is_ok();
        assert_eq!(
            number,
            kind.contains("integer") || kind.contains("number"),
            "{path}: `{kind}`"
        );
        let mut without = record.clone();
        without.as_object_mut().unwrap().remove(name);
        let required = ["never", "only in files"].map(|words| absent.starts_with(words));
        assert_eq!(
            decode(&without, false).is_err(),
            required.contains(&true),
            "{path}: `{absent}`"
        );
        assert_eq!(decode(&without, true).is_err(), required[0], "{path}: `{absent}`");
    }
}

#[test]
fn every_reason_of_a_dead_letter_is_documented() {
    let mut reasons = BTreeSet::new();
    for (file, pattern) in [
        ("src/stream/decode/mod.rs", r#"Self::\w+ \{ \.\. \} => "(\w+)""#),
        ("src/stream/encode/encoder.rs", r#"reason: "(\w+)""#),
        ("src/stream/score/mod.rs", r#"reason: "(\w+)""#),
        ("src/stream/emit/output/mod.rs", r#"_ => "(\w+)""#),
    ] {
        let source = read(file);
        let source = source.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
        let found: BTreeSet<String> = Regex::new(pattern)
            .unwrap()
            .captures_iter(source)
            .map(|found| found[1].to_owned())
            .collect();
        assert!(!found.is_empty(), "{file} has no reason");
        reasons.extend(found);
    }
    let documented = table("Dead letters");
    let listed: BTreeSet<String> = documented.into_keys().filter(|name| !name.contains('.')).collect();
    assert_eq!(listed, reasons);
}
