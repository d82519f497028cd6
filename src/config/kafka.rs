//! Reads the settings of the stream: brokers, topics, consumer group, delivery guarantee and settings of librdkafka.
//!
//! Only the form of the values is checked here, without contacting the brokers. Settings that exactly-once delivery
//! depends on cannot be set through `kafka.properties`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Config;
use super::reader::SettingsReader;
use crate::fault::{Fault, Faults};

/// The `kafka` section, in which the settings that only the stream needs may be missing.
#[derive(Debug, Clone)]
pub struct KafkaConfig {
    /// The bootstrap brokers, as `host:port`; empty if they are not set.
    pub brokers: Vec<String>,
    /// The name of the consumer group.
    pub group: String,
    /// A name that identifies this process within its group; if it is not set, the host name is used.
    pub instance: Option<String>,
    /// Where to start reading if the group has no committed offsets.
    pub start: Start,
    /// What to do if the topic no longer holds the committed offsets.
    pub on_gap: OnGap,
    /// Whether the group keeps the partitions of this process assigned to it across a restart (static membership).
    pub static_membership: bool,
    /// The file that contains the SASL password.
    pub password_file: Option<PathBuf>,
    /// How long finished records may wait to be committed together.
    pub commit_interval: Duration,
    /// Further settings of librdkafka, without the password from `password_file`.
    pub properties: KafkaProperties,
}

/// The `topics` section, in which any topic may be missing.
#[derive(Debug, Clone)]
pub struct TopicsConfig {
    /// The topic that comment events are read from.
    pub comments: Option<String>,
    /// The topic that decisions are written to.
    pub decisions: Option<String>,
    /// The topic to which events that could not be decided are written.
    pub dead_letters: Option<String>,
    /// The topic that `retrain` reads labelled comments from.
    pub feedback: Option<String>,
}

/// Where to start reading if the group has no committed offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the oldest record of each partition.
    Earliest,
    /// At the end of each partition, so that only new records are read.
    Latest,
}

/// What to do if the topic no longer holds the committed offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnGap {
    /// Stop the daemon and report the gap.
    Stop,
    /// Continue from the oldest record that is left.
    Continue,
}

/// The delivery guarantee for decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Decisions, dead letters and offsets are committed in one Kafka transaction.
    ExactlyOnce,
    /// Offsets are committed after the outputs, without a transaction, so consumers have to remove duplicates.
    AtLeastOnce,
}

impl Delivery {
    /// Returns the value of the setting `delivery`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ExactlyOnce => "exactly_once",
            Self::AtLeastOnce => "at_least_once",
        }
    }
}

/// Settings of librdkafka by name; the `Debug` output redacts the values of secret ones.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct KafkaProperties(BTreeMap<String, String>);

impl KafkaProperties {
    /// Returns the names and values, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    fn is_secret(name: &str) -> bool {
        // Covers sasl.password, ssl.*.password, ssl.*.pem and the settings of OAUTHBEARER, of which the free-form
        // `sasl.oauthbearer.config` may contain a token.
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

/// The settings of the stream, with nothing missing.
#[derive(Debug, Clone)]
pub struct StreamConfig {
    /// The bootstrap brokers, as `host:port`; there is at least one.
    pub brokers: Vec<String>,
    /// The name of the consumer group.
    pub group: String,
    /// A name that identifies this process within its group.
    pub instance: String,
    /// Where to start reading if the group has no committed offsets.
    pub start: Start,
    /// What to do if the topic no longer holds the committed offsets.
    pub on_gap: OnGap,
    /// Whether the group keeps the partitions of this process assigned to it across a restart (static membership).
    pub static_membership: bool,
    /// Further settings of librdkafka, including the password.
    pub properties: KafkaProperties,
    /// The names of the topics.
    pub topics: Topics,
    /// The delivery guarantee for decisions.
    pub delivery: Delivery,
    /// How long finished records may wait to be committed together.
    pub commit_interval: Duration,
}

/// The names of the topics of the stream, all different.
#[derive(Debug, Clone)]
pub struct Topics {
    /// The topic that comment events are read from.
    pub comments: String,
    /// The topic that decisions are written to.
    pub decisions: String,
    /// The topic to which events that could not be decided are written.
    pub dead_letters: String,
}

impl Config {
    /// Returns the settings of the stream, which `score` and `check` do not need.
    ///
    /// # Errors
    /// Returns all faults if a required setting is missing or the password file cannot be read.
    pub fn require_stream(&self) -> Result<StreamConfig, Faults> {
        let mut faults = Vec::new();
        let mut require = |key: &str, expected: &str| {
            let variable = format!("MODERATORD__{}", key.to_uppercase().replace('.', "__"));
            faults.push(Fault::setting(
                key,
                format!("not set, expected {expected}; set it in the settings file or as {variable}"),
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
                require(key, "a topic name");
            }
            topic.clone().unwrap_or_default()
        });
        let instance = self.kafka.instance.clone().or_else(host_name);
        if instance.is_none() {
            require("kafka.instance", "a name, because the host has none");
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
    /// Returns the settings of librdkafka, including the password from `password_file`.
    pub(super) fn properties_with_password(&self) -> Result<KafkaProperties, Fault> {
        let mut properties = self.properties.clone();
        if let Some(path) = &self.password_file {
            // The path is left out, because it may be the password itself.
            let password = read_password(path).map_err(|reason| Fault::setting("kafka.password_file", reason))?;
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
    let text =
        std::fs::read_to_string(path).map_err(|error| format!("cannot read the password from this file: {error}"))?;
    let password = text.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        return Err("is empty, expected a password".to_owned());
    }
    Ok(password.to_owned())
}

/// Settings of librdkafka that `kafka.properties` must not contain, each with an alternative or the reason.
const RESERVED: &[(&str, &str)] = &[
    ("bootstrap.servers", "set kafka.brokers instead"),
    ("metadata.broker.list", "set kafka.brokers instead"),
    ("group.id", "set kafka.group instead"),
    (
        "group.instance.id",
        "set kafka.static_membership and kafka.instance instead",
    ),
    ("auto.offset.reset", "set kafka.start instead"),
    ("transactional.id", "it is derived from kafka.group and kafka.instance"),
    ("isolation.level", NEEDED_FOR_DELIVERY),
    ("enable.auto.commit", NEEDED_FOR_DELIVERY),
    ("auto.commit.enable", NEEDED_FOR_DELIVERY),
    ("auto.commit.interval.ms", NEEDED_FOR_DELIVERY),
    ("enable.auto.offset.store", NEEDED_FOR_DELIVERY),
    ("acks", NEEDED_FOR_DELIVERY),
    ("request.required.acks", NEEDED_FOR_DELIVERY),
    ("enable.idempotence", NEEDED_FOR_DELIVERY),
    ("enable.gapless.guarantee", NEEDED_FOR_DELIVERY),
    ("group.protocol", NEEDED_FOR_DELIVERY),
    ("partition.assignment.strategy", NEEDED_FOR_DELIVERY),
    ("message.timeout.ms", NEEDED_FOR_DELIVERY),
    ("delivery.timeout.ms", NEEDED_FOR_DELIVERY),
    ("statistics.interval.ms", "readiness and the lag depend on it"),
    ("partitioner", "a decision is written to the partition of its comment"),
];

/// The maximum of `kafka.commit_interval`: with a longer interval, a transaction could exceed the broker's timeout.
const MAX_COMMIT_INTERVAL: Duration = Duration::from_secs(5);

const NEEDED_FOR_DELIVERY: &str = "exactly-once delivery depends on the value that moderatord sets";

pub(super) fn read(reader: &mut SettingsReader) -> Option<(KafkaConfig, TopicsConfig, Delivery)> {
    let brokers = brokers(reader);
    let group = reader.string("kafka.group");
    let instance = reader.optional_string("kafka.instance");
    if instance.as_ref().is_some_and(|name| !is_kafka_name(name)) {
        reader.fault("kafka.instance", "expected a name of letters, digits, `.`, `_` and `-`");
    }
    let start = reader.choice(
        "kafka.start",
        &[("earliest", Start::Earliest), ("latest", Start::Latest)],
    );
    let on_gap = reader.choice("kafka.on_gap", &[("stop", OnGap::Stop), ("continue", OnGap::Continue)]);
    let static_membership = reader.bool("kafka.static_membership");
    let password_file = reader.optional_path("kafka.password_file");
    let commit_interval = reader.duration("kafka.commit_interval", Duration::from_millis(1)..=MAX_COMMIT_INTERVAL);
    let properties = properties(reader, password_file.is_some());
    let topics = topics(reader);
    let choices = [Delivery::ExactlyOnce, Delivery::AtLeastOnce].map(|delivery| (delivery.as_str(), delivery));
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
    // Brokers appear in the log, so anything that is not an address must not get there.
    if let Some(wrong) = brokers.iter().position(|broker| !is_broker(broker)) {
        let expected = format!(
            "entry {} is not valid, expected a list of host:port addresses, without user names and passwords",
            wrong + 1
        );
        reader.fault("kafka.brokers", expected);
        return None;
    }
    Some(brokers)
}

/// Returns whether a text has the form `host:port` or `host`, for which librdkafka uses port 9092.
fn is_broker(text: &str) -> bool {
    let is_host = |host: &str| {
        // An IPv6 address is enclosed in brackets, and may name a network interface after a percent sign.
        let (host, separators) = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => (address, [':', '.', '%']),
            None => (host, ['-', '.', '_']),
        };
        !host.is_empty() && host.chars().all(|c| c.is_alphanumeric() || separators.contains(&c))
    };
    match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => is_host(host) && port.parse::<u16>().is_ok_and(|port| port > 0),
        _ => is_host(text),
    }
}

fn properties(reader: &mut SettingsReader, has_password_file: bool) -> KafkaProperties {
    let mut properties = BTreeMap::new();
    let mut pending: Vec<_> = reader.entries("kafka.properties").into_iter().collect();
    while let Some((name, found)) = pending.pop() {
        // In TOML, a key with dots and without quotes, such as `fetch.min.bytes`, is a path through nested tables.
        if let Some(table) = found.table() {
            pending.extend(table.into_iter().map(|(rest, found)| (format!("{name}.{rest}"), found)));
            continue;
        }
        let Some(value) = found.scalar() else {
            reader.reject_without_value(&found, "expected a string, a number or a boolean");
            continue;
        };
        if let Some((_, instead)) = RESERVED.iter().find(|(reserved, _)| *reserved == name) {
            reader.reject_without_value(&found, format!("cannot be set here; {instead}"));
        } else if name == "sasl.password" && has_password_file {
            reader.reject_without_value(&found, "kafka.password_file is set as well, expected one of the two");
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
            reader.fault(
                key,
                "expected a topic name of at most 249 letters, digits, `.`, `_` and `-`",
            );
        }
        name
    });
    for (later, key) in keys.iter().enumerate() {
        // A daemon that writes to the topic that it reads would process its own outputs for ever.
        if let Some(earlier) = (0..later).find(|&earlier| names[later].is_some() && names[later] == names[earlier]) {
            reader.fault(key, format!("expected a different topic from {}", keys[earlier]));
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

/// Returns whether Kafka allows the name for a topic.
fn is_kafka_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ['.', '_', '-'].contains(&c);
    !matches!(name, "" | "." | "..") && name.len() <= 249 && name.chars().all(allowed)
}
