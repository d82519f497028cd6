//! What the stream needs to know: brokers, topics, group, and librdkafka's own settings.
//!
//! Only their shape is judged here. Settings that exactly-once rests on cannot be set through
//! `kafka.properties`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Config;
use super::reader::SettingsReader;
use crate::fault::{Fault, Faults};

/// How Kafka is reached, as far as it is set.
#[derive(Debug, Clone)]
pub struct KafkaConfig {
    /// `host:port` each; empty where not set.
    pub brokers: Vec<String>,
    /// Consumer group.
    pub group: String,
    /// Tells this process from the group's others; the host's name where not set.
    pub instance: Option<String>,
    /// Where a group without committed offsets begins.
    pub start: Start,
    /// What happens when committed offsets have fallen out of retention.
    pub on_gap: OnGap,
    /// Keep the assignment across a restart.
    pub static_membership: bool,
    /// File that holds the SASL password.
    pub password_file: Option<PathBuf>,
    /// How long finished records may wait for the others of their transaction.
    pub commit_interval: Duration,
    /// librdkafka's settings.
    pub properties: KafkaProperties,
}

/// The topics, as far as they are set.
#[derive(Debug, Clone)]
pub struct TopicsConfig {
    /// Read.
    pub comments: Option<String>,
    /// Written.
    pub decisions: Option<String>,
    /// Written: what could not be decided.
    pub dead_letters: Option<String>,
    /// Read by retraining: labelled texts.
    pub feedback: Option<String>,
}

/// Where a group without committed offsets begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the oldest comment.
    Earliest,
    /// With the next comment.
    Latest,
}

/// What happens when committed offsets have fallen out of retention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnGap {
    /// The daemon stops and names the gap.
    Stop,
    /// It goes on after the gap.
    Continue,
}

/// What is promised of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Decisions, dead letters and offsets commit in one transaction.
    ExactlyOnce,
    /// For brokers without transactions: readers deduplicate.
    AtLeastOnce,
}

/// librdkafka's settings; secret ones print redacted.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct KafkaProperties(BTreeMap<String, String>);

impl KafkaProperties {
    /// Name and value of each, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    fn is_secret(name: &str) -> bool {
        // librdkafka's secret settings: sasl.password, ssl.*.password, ssl.*.pem, and those of
        // OAUTHBEARER, whose free-form `sasl.oauthbearer.config` may hold a token.
        ["password", "secret", "pem", "oauthbearer.config"]
            .iter()
            .any(|part| name.contains(part))
    }
}

impl fmt::Debug for KafkaProperties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |(name, value)| (name, if Self::is_secret(name) { "<redacted>" } else { value });
        f.debug_map().entries(self.iter().map(shown)).finish()
    }
}

/// Everything the stream needs, complete.
#[derive(Debug, Clone)]
pub struct StreamConfig {
    /// `host:port` each; at least one.
    pub brokers: Vec<String>,
    /// Consumer group.
    pub group: String,
    /// Tells this process from the group's others.
    pub instance: String,
    /// Where a group without committed offsets begins.
    pub start: Start,
    /// What happens when committed offsets have fallen out of retention.
    pub on_gap: OnGap,
    /// Keep the assignment across a restart.
    pub static_membership: bool,
    /// librdkafka's settings, the password among them.
    pub properties: KafkaProperties,
    /// What is read and written.
    pub topics: Topics,
    /// What is promised of a decision.
    pub delivery: Delivery,
    /// How long finished records may wait for the others of their transaction.
    pub commit_interval: Duration,
}

/// The topics, all different.
#[derive(Debug, Clone)]
pub struct Topics {
    /// Read.
    pub comments: String,
    /// Written.
    pub decisions: String,
    /// Written: what could not be decided.
    pub dead_letters: String,
}

impl Config {
    /// The settings of the stream, which `score` and `check` can do without.
    ///
    /// # Errors
    /// Every setting that is missing, and a password file that cannot be read.
    pub fn require_stream(&self) -> Result<StreamConfig, Faults> {
        let mut faults = Vec::new();
        let mut require = |key: &str, expected: &str| {
            let variable = format!("MODERATORD__{}", key.to_uppercase().replace('.', "__"));
            faults.push(Fault::setting(
                key,
                format!("not set, expected {expected}; set it in the file or as {variable}"),
            ));
        };
        if self.kafka.brokers.is_empty() {
            require("kafka.brokers", "at least one host:port");
        }
        let topics = [
            ("topics.comments", &self.topics.comments),
            ("topics.decisions", &self.topics.decisions),
            ("topics.dead_letters", &self.topics.dead_letters),
        ]
        .map(|(key, topic)| {
            if topic.is_none() {
                require(key, "a topic");
            }
            topic.clone().unwrap_or_default()
        });
        let instance = self.kafka.instance.clone().or_else(host_name);
        if instance.is_none() {
            require("kafka.instance", "a name, as the host has none");
        }
        let properties = match self.kafka.properties_with_password() {
            Ok(properties) => properties,
            Err(fault) => {
                faults.push(fault);
                KafkaProperties::default()
            }
        };
        if !faults.is_empty() {
            return Err(Faults::from(faults));
        }
        let [comments, decisions, dead_letters] = topics;
        Ok(StreamConfig {
            brokers: self.kafka.brokers.clone(),
            group: self.kafka.group.clone(),
            instance: instance.unwrap_or_default(),
            start: self.kafka.start,
            on_gap: self.kafka.on_gap,
            static_membership: self.kafka.static_membership,
            properties,
            topics: Topics {
                comments,
                decisions,
                dead_letters,
            },
            delivery: self.delivery,
            commit_interval: self.kafka.commit_interval,
        })
    }
}

impl KafkaConfig {
    /// librdkafka's settings with the password of its file.
    pub(super) fn properties_with_password(&self) -> Result<KafkaProperties, Fault> {
        let mut properties = self.properties.clone();
        if let Some(path) = &self.password_file {
            let password = read_password(path).map_err(|reason| {
                Fault::setting("kafka.password_file", reason).with_value(Some(path.display().to_string()))
            })?;
            properties.0.insert("sasl.password".to_owned(), password);
        }
        Ok(properties)
    }
}

fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

fn read_password(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read the password: {error}"))?;
    let password = text.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        return Err("is empty, expected a password".to_owned());
    }
    Ok(password.to_owned())
}

/// Settings of librdkafka that are ours, and what stands in their place.
const RESERVED: &[(&str, &str)] = &[
    ("bootstrap.servers", "set kafka.brokers"),
    ("metadata.broker.list", "set kafka.brokers"),
    ("group.id", "set kafka.group"),
    ("group.instance.id", "set kafka.static_membership and kafka.instance"),
    ("auto.offset.reset", "set kafka.start"),
    ("transactional.id", "it is made of kafka.group and kafka.instance"),
    ("isolation.level", ONCE),
    ("enable.auto.commit", ONCE),
    ("auto.commit.enable", ONCE),
    ("auto.commit.interval.ms", ONCE),
    ("enable.auto.offset.store", ONCE),
    ("acks", ONCE),
    ("request.required.acks", ONCE),
    ("enable.idempotence", ONCE),
    ("enable.gapless.guarantee", ONCE),
    ("group.protocol", ONCE),
    ("partition.assignment.strategy", ONCE),
    ("message.timeout.ms", ONCE),
    ("delivery.timeout.ms", ONCE),
    ("partitioner", "a decision goes to the partition of its comment"),
];

/// Beyond it a transaction is in danger of the broker's timeout.
const LONGEST_COMMIT_INTERVAL: Duration = Duration::from_secs(5);

const ONCE: &str = "exactly-once delivery rests on the value that moderatord sets";

pub(super) fn read(reader: &mut SettingsReader) -> Option<(KafkaConfig, TopicsConfig, Delivery)> {
    let brokers = brokers(reader);
    let group = reader.string("kafka.group");
    let instance = reader.optional_string("kafka.instance");
    if instance.as_ref().is_some_and(|name| !is_kafka_name(name)) {
        reader.fault("kafka.instance", "expected letters, digits, `.`, `_` and `-`");
    }
    let start = reader.choice(
        "kafka.start",
        &[("earliest", Start::Earliest), ("latest", Start::Latest)],
    );
    let on_gap = reader.choice("kafka.on_gap", &[("stop", OnGap::Stop), ("continue", OnGap::Continue)]);
    let static_membership = reader.bool("kafka.static_membership");
    let password_file = reader.optional_path("kafka.password_file");
    let commit_interval = reader.duration(
        "kafka.commit_interval",
        Duration::from_millis(1)..=LONGEST_COMMIT_INTERVAL,
    );
    let properties = properties(reader, password_file.is_some());
    let topics = topics(reader);
    let choices = [
        ("exactly_once", Delivery::ExactlyOnce),
        ("at_least_once", Delivery::AtLeastOnce),
    ];
    let delivery = reader.choice("delivery", &choices);
    let kafka = KafkaConfig {
        brokers: brokers?,
        group: group?,
        instance,
        start: start?,
        on_gap: on_gap?,
        static_membership: static_membership?,
        password_file,
        commit_interval: commit_interval?,
        properties,
    };
    Some((kafka, topics, delivery?))
}

fn brokers(reader: &mut SettingsReader) -> Option<Vec<String>> {
    if reader.find("kafka.brokers").is_none() {
        return Some(Vec::new());
    }
    let brokers = reader.strings("kafka.brokers")?;
    let is_broker = |broker: &String| {
        // Without a port librdkafka takes 9092; an IPv6 address stands in brackets.
        let (host, port) = match broker.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port),
            _ => (broker.as_str(), "9092"),
        };
        let one_host = !host.contains(':') || (host.starts_with('[') && host.ends_with(']'));
        let named = !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c == '/');
        one_host && named && port.parse::<u16>().is_ok_and(|port| port > 0)
    };
    if !brokers.iter().all(is_broker) {
        reader.fault("kafka.brokers", "expected host:port each");
        return None;
    }
    Some(brokers)
}

fn properties(reader: &mut SettingsReader, has_password_file: bool) -> KafkaProperties {
    let mut properties = BTreeMap::new();
    let mut open: Vec<_> = reader.entries("kafka.properties").into_iter().collect();
    while let Some((name, found)) = open.pop() {
        // `fetch.min.bytes = 1` without quotes is three nested tables in TOML.
        if let Some(table) = found.table() {
            open.extend(table.into_iter().map(|(rest, found)| (format!("{name}.{rest}"), found)));
            continue;
        }
        let Some(value) = found.scalar() else {
            reader.reject_unquoted(&found, "expected a text, a number or a boolean");
            continue;
        };
        if let Some((_, instead)) = RESERVED.iter().find(|(reserved, _)| *reserved == name) {
            reader.reject_unquoted(&found, format!("cannot be set here: {instead}"));
        } else if name == "sasl.password" && has_password_file {
            reader.reject_unquoted(&found, "is set beside kafka.password_file, expected one of the two");
        } else {
            properties.insert(name, value);
        }
    }
    KafkaProperties(properties)
}

fn topics(reader: &mut SettingsReader) -> TopicsConfig {
    let keys = [
        "topics.comments",
        "topics.decisions",
        "topics.dead_letters",
        "topics.feedback",
    ];
    let names = keys.map(|key| {
        let name = reader.optional_string(key);
        if name.as_ref().is_some_and(|name| !is_kafka_name(name)) {
            reader.fault(key, "expected a topic: at most 249 letters, digits, `.`, `_` and `-`");
        }
        name
    });
    for (later, key) in keys.iter().enumerate() {
        // A daemon that reads what it writes never ends.
        if let Some(earlier) = (0..later).find(|&earlier| names[later].is_some() && names[later] == names[earlier]) {
            reader.fault(key, format!("expected another topic than {}", keys[earlier]));
        }
    }
    let [comments, decisions, dead_letters, feedback] = names;
    TopicsConfig {
        comments,
        decisions,
        dead_letters,
        feedback,
    }
}

fn is_kafka_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ['.', '_', '-'].contains(&c);
    !matches!(name, "" | "." | "..") && name.len() <= 249 && name.chars().all(allowed)
}
