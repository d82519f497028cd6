//! Derives the settings of librdkafka for each role of a client.
//!
//! The settings have three layers: defaults that suit the daemon, the operator's `kafka.properties`, and the settings
//! that exactly-once delivery depends on, which cannot be overridden.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;

use crate::config::{Delivery, KafkaProperties, StreamConfig};
use crate::fault::{Fault, Faults};

/// How long a transaction may stay open before the broker aborts it. After a crash, other instances wait at most this
/// long before they can continue with the partitions.
const TRANSACTION_TIMEOUT_MS: &str = "30000";

/// The default of `session.timeout.ms`, which decides how long the partitions of a daemon that was killed, and does not
/// come back, wait for another daemon. The client's default is 45 s. A cluster needs about ten seconds to replace a broker
/// that dies, and its clients some more to find the new coordinator of their group; a session must outlast that, or
/// every such failure costs the group a rebalance.
const DEFAULT_SESSION_TIMEOUT: Duration = Duration::from_secs(20);
/// The default of `heartbeat.interval.ms`, which also decides how soon a member notices a rebalance.
const DEFAULT_HEARTBEAT_INTERVAL: Duration = Duration::from_secs(2);
/// How often a consumer reports on its group, brokers and partitions.
const STATISTICS_INTERVAL_MS: &str = "1000";

/// How long a client waits before it tries to reach a broker again for the first time. librdkafka's default is 100 ms.
/// While no broker answers, a client without a coordinator tries one every half of this time; at the default, that takes
/// a fifth of a core.
const FIRST_BACKOFF_MS: u64 = 500;

/// librdkafka's default of `max.poll.interval.ms`.
const DEFAULT_POLL_INTERVAL: Duration = Duration::from_secs(300);

/// The purpose of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Reads comments, as a member of the group.
    Consumer,
    /// Writes decisions and dead letters.
    Producer,
    /// Looks up topics, without reading or writing records.
    Lookup,
}

/// The maximum size of a batch of several records: well below the 1 MB that topics accept by default.
const DEFAULT_BATCH_BYTES: usize = 256 << 10;

/// Returns the settings of a producer that sends no more than `max_batch_bytes` in a batch, except for a single larger
/// record, which is sent in a batch of its own.
pub(crate) fn producer_config(stream: &StreamConfig, max_batch_bytes: usize) -> ClientConfig {
    let mut config = config(stream, Role::Producer);
    let batch_bytes = config.get("batch.size").and_then(|size| size.parse().ok());
    let batch_bytes = batch_bytes.unwrap_or(DEFAULT_BATCH_BYTES).min(max_batch_bytes);
    config.set("batch.size", batch_bytes.to_string());
    config
}

/// Returns the settings of a client.
pub fn config(stream: &StreamConfig, role: Role) -> ClientConfig {
    let mut config = ClientConfig::new();
    // A lookup fails within seconds, because a user may be waiting for it. The clients of a stream retry indefinitely.
    config
        .set("client.id", client_id(stream))
        .set("socket.timeout.ms", "10000")
        .set("reconnect.backoff.ms", FIRST_BACKOFF_MS.to_string())
        // The longest such wait; the client's default is ten seconds.
        .set("reconnect.backoff.max.ms", "2000");
    match role {
        Role::Consumer => {
            config
                .set("session.timeout.ms", DEFAULT_SESSION_TIMEOUT.as_millis().to_string())
                .set(
                    "heartbeat.interval.ms",
                    DEFAULT_HEARTBEAT_INTERVAL.as_millis().to_string(),
                )
                .set("fetch.wait.max.ms", "50")
                // How soon partitions that were added to the topic are read; the client's default is five minutes.
                .set("topic.metadata.refresh.interval.ms", "5000")
                // Prefetched records use memory besides the records in flight, so only about a second's worth is kept.
                .set("queued.min.messages", "20000")
                .set("queued.max.messages.kbytes", "16384");
        }
        Role::Producer => {
            config
                // Outputs of a micro-batch are sent within this time, so they share requests; a longer wait would only
                // delay the commit, which waits for their acknowledgements.
                .set("linger.ms", "0.5")
                .set("compression.type", "lz4")
                .set("batch.size", DEFAULT_BATCH_BYTES.to_string())
                .set("message.max.bytes", MESSAGE_MAX_BYTES.to_string());
        }
        Role::Lookup => {}
    }
    for (name, value) in stream.properties.iter() {
        config.set(name, value);
    }
    // The client refuses a first wait that is longer than the longest one.
    let set: BTreeMap<&str, &str> = stream.properties.iter().collect();
    if let Some(longest) = set.get("reconnect.backoff.max.ms")
        && longest.parse().is_ok_and(|longest: u64| longest < FIRST_BACKOFF_MS)
        && !set.contains_key("reconnect.backoff.ms")
    {
        config.set("reconnect.backoff.ms", *longest);
    }
    // The client logs what `debug` asks for only at this level, and our own log then filters it.
    if config.get("debug").is_some() {
        config.set_log_level(RDKafkaLogLevel::Debug);
    }
    config.set("bootstrap.servers", stream.brokers.join(","));
    match role {
        Role::Consumer => consumer(&mut config, stream),
        Role::Producer => producer(&mut config, stream),
        Role::Lookup => {
            config.set("group.id", &stream.group);
        }
    }
    config
}

/// The maximum size of a message: the largest event that `input.max_bytes` allows, and 1 MiB for its headers. The
/// limit of the topic, not that of the client, decides which messages are accepted.
const MESSAGE_MAX_BYTES: usize = (64 << 20) + (1 << 20);

fn consumer(config: &mut ClientConfig, stream: &StreamConfig) {
    config
        .set("group.id", &stream.group)
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("group.protocol", "classic")
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // The stream chooses the first offset itself on assignment; an offset that is removed later is a gap.
        .set("auto.offset.reset", "error")
        // Readiness and the lag depend on these reports.
        .set("statistics.interval.ms", STATISTICS_INTERVAL_MS);
    if stream.static_membership {
        config.set("group.instance.id", &stream.instance);
    }
}

fn producer(config: &mut ClientConfig, stream: &StreamConfig) {
    config
        .set("enable.idempotence", "true")
        .set("acks", "all")
        // The partitioner of Kafka's Java client; used if the topics differ in their number of partitions.
        .set("partitioner", "murmur2_random");
    match stream.delivery {
        Delivery::ExactlyOnce => {
            config.set("transactional.id", transactional_id(stream));
            let timeout = config.get("transaction.timeout.ms").unwrap_or(TRANSACTION_TIMEOUT_MS);
            let timeout = timeout.to_owned();
            // The client refuses a longer timeout for a request than for the whole transaction.
            let millis = |text: Option<&str>| text.and_then(|text| text.parse::<u64>().ok());
            if millis(config.get("socket.timeout.ms")) > millis(Some(&timeout)) {
                config.set("socket.timeout.ms", &timeout);
            }
            config.set("transaction.timeout.ms", timeout);
        }
        // A message that timed out and was sent again later would arrive after its successors.
        Delivery::AtLeastOnce => {
            config.set("message.timeout.ms", "0");
        }
    }
}

/// Returns the name by which the brokers list the clients of this process, unless the operator sets another.
pub(crate) fn client_id(stream: &StreamConfig) -> String {
    format!("moderatord-{}", stream.instance)
}

/// Returns the transactional id, which stays the same across restarts and differs between the processes of a group.
///
/// The name of an instance contains no slash, so different pairs of group and instance have different ids.
pub(crate) fn transactional_id(stream: &StreamConfig) -> String {
    format!("{}/{}", stream.group, stream.instance)
}

/// The timeouts of Kafka that limit how long the daemon may take for its work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    /// The time without a heartbeat after which a member is removed from the group.
    pub session: Duration,
    /// The time without a poll after which a consumer leaves the group.
    pub poll_interval: Duration,
    /// The time after which the broker aborts an open transaction.
    pub transaction: Duration,
}

impl Timeouts {
    /// Returns the timeouts that are set, and the default for each of the others.
    pub(crate) fn of(properties: &KafkaProperties) -> Self {
        let set: BTreeMap<&str, &str> = properties.iter().collect();
        let millis = |name: &str, default: Duration| {
            let set = set.get(name).and_then(|value| value.parse().ok());
            set.map_or(default, Duration::from_millis)
        };
        let transaction = TRANSACTION_TIMEOUT_MS
            .parse()
            .map_or(Duration::MAX, Duration::from_millis);
        Self {
            session: millis("session.timeout.ms", DEFAULT_SESSION_TIMEOUT),
            poll_interval: millis("max.poll.interval.ms", DEFAULT_POLL_INTERVAL),
            transaction: millis("transaction.timeout.ms", transaction),
        }
    }

    /// Returns how long to wait for the acknowledgement of outputs. The transaction must not time out meanwhile.
    pub(crate) fn acknowledgement(self) -> Duration {
        self.transaction * 2 / 3
    }

    /// Returns how long a rebalance callback may wait for the commit of finished records.
    ///
    /// The client sends heartbeats during a callback, so the session timeout does not matter.
    pub(crate) fn revoke(self) -> Duration {
        self.poll_interval.min(self.transaction) / 3
    }
}

/// Returns a fault for each property in `kafka.properties` that librdkafka rejects.
pub(crate) fn properties_faults(properties: &KafkaProperties) -> Faults {
    let mut faults = Faults::default();
    for (name, value) in properties.iter() {
        let result = ClientConfig::new().set(name, value).create_native_config();
        if let Err(KafkaError::ClientConfig(_, reason, ..)) = result {
            // The value is left out, because it may be a secret.
            let reason = without_value(&lower_first(reason.trim().trim_end_matches('.')), value);
            faults.push(Fault::setting(&format!("kafka.properties.{name}"), reason));
        }
    }
    faults
}

/// Removes the quotations of a value, or of parts of it, from a message of librdkafka.
fn without_value(message: &str, value: &str) -> String {
    let mut kept = String::new();
    // Every second part is between quotation marks.
    for (index, part) in message.split('"').enumerate() {
        if index % 2 == 0 {
            kept += part;
        } else if value.contains(part) {
            kept.truncate(kept.trim_end().len());
        } else {
            kept += &format!("\"{part}\"");
        }
    }
    kept
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::{Config, Sources};

    /// Returns valid settings of a stream, with the given variables on top.
    pub(crate) fn stream(variables: &[(&str, &str)]) -> StreamConfig {
        let required = [
            ("MODERATORD__MODEL__PATH", "unused"),
            ("MODERATORD__KAFKA__BROKERS", "one:9092,two:9092"),
            ("MODERATORD__KAFKA__INSTANCE", "gpu0"),
            ("MODERATORD__TOPICS__COMMENTS", "comments"),
            ("MODERATORD__TOPICS__DECISIONS", "decisions"),
            ("MODERATORD__TOPICS__DEAD_LETTERS", "dead"),
        ];
        let sources = Sources {
            environment: required
                .iter()
                .chain(variables)
                .map(|(name, value)| ((*name).into(), (*value).into()))
                .collect(),
            ..Sources::default()
        };
        Config::load(&sources).unwrap().require_stream().unwrap()
    }

    #[test]
    fn settings_that_delivery_depends_on_are_set_last() {
        let stream = stream(&[("MODERATORD__KAFKA__PROPERTIES__LINGER_MS", "9")]);
        let (consumer, producer) = (config(&stream, Role::Consumer), config(&stream, Role::Producer));
        for (config, name, value) in [
            (&consumer, "bootstrap.servers", "one:9092,two:9092"),
            (&consumer, "isolation.level", "read_committed"),
            (&consumer, "enable.auto.commit", "false"),
            (&producer, "enable.idempotence", "true"),
            (&producer, "transactional.id", "moderatord/gpu0"),
            (&producer, "linger.ms", "9"),
        ] {
            assert_eq!(config.get(name), Some(value), "{name}");
        }
        assert_eq!(consumer.get("group.instance.id"), Some("gpu0"));
        // librdkafka accepts all names and values.
        consumer.create_native_config().unwrap();
        producer.create_native_config().unwrap();
    }

    #[test]
    fn the_first_wait_before_a_connection_is_never_longer_than_the_longest() {
        let longest = ("MODERATORD__KAFKA__PROPERTIES__RECONNECT_BACKOFF_MAX_MS", "300");
        let config = config(&stream(&[longest]), Role::Consumer);
        assert_eq!(config.get("reconnect.backoff.ms"), Some("300"));
        config.create_native_config().unwrap();
    }

    #[test]
    fn a_request_never_takes_longer_than_a_transaction() {
        let variables = [("MODERATORD__KAFKA__PROPERTIES__TRANSACTION_TIMEOUT_MS", "3000")];
        let producer = config(&stream(&variables), Role::Producer);
        assert_eq!(producer.get("socket.timeout.ms"), Some("3000"));
        producer.create_native_config().unwrap();
    }

    #[test]
    fn a_batch_never_exceeds_the_smallest_limit() {
        let check = |variables: &[(&str, &str)], limit, expected| {
            let config = producer_config(&stream(variables), limit);
            assert_eq!(config.get("batch.size"), Some(expected));
        };
        check(&[], 1_048_588, "262144");
        check(&[], 4000, "4000");
        let larger = [("MODERATORD__KAFKA__PROPERTIES__BATCH_SIZE", "900000")];
        check(&larger, 1_048_588, "900000");
        check(&larger, 500_000, "500000");
    }

    #[test]
    fn without_transactions_a_message_never_times_out() {
        let producer = config(&stream(&[("MODERATORD__DELIVERY", "at_least_once")]), Role::Producer);
        assert_eq!(producer.get("transactional.id"), None);
        assert_eq!(producer.get("message.timeout.ms"), Some("0"));
    }

    #[test]
    fn each_invalid_property_is_reported_without_its_value() {
        let stream = stream(&[
            ("MODERATORD__KAFKA__PROPERTIES__SASL_MECHANIZM", "hunter2"),
            ("MODERATORD__KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "soon"),
            ("MODERATORD__KAFKA__PROPERTIES__SASL_USERNAME", "hunter3"),
            ("MODERATORD__KAFKA__PROPERTIES__SECURITY_PROTOCOL", "hunter4"),
            ("MODERATORD__KAFKA__PROPERTIES__DEBUG", "all,hunter5"),
            ("MODERATORD__KAFKA__PROPERTIES__LINGER_MS", "5"),
        ]);
        let faults: Vec<String> = properties_faults(&stream.properties)
            .iter()
            .map(ToString::to_string)
            .collect();
        insta::assert_snapshot!(faults.join("\n"), @r#"
        kafka.properties.debug: invalid value for configuration property "debug"
        kafka.properties.sasl.mechanizm: no such configuration property: "sasl.mechanizm"
        kafka.properties.security.protocol: invalid value for configuration property "security.protocol"
        kafka.properties.session.timeout.ms: invalid value for configuration property "session.timeout.ms"
        "#);
    }

    #[test]
    fn a_revoke_may_take_a_third_of_the_shortest_timeout() {
        let stream = stream(&[("MODERATORD__KAFKA__PROPERTIES__TRANSACTION_TIMEOUT_MS", "6000")]);
        assert_eq!(Timeouts::of(&stream.properties).revoke(), Duration::from_secs(2));
        assert_eq!(
            Timeouts::of(&KafkaProperties::default()).revoke(),
            Duration::from_secs(10)
        );
    }
}
