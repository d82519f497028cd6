//! librdkafka's settings for each role, from ours.
//!
//! Three layers: defaults that suit the daemon, the operator's `kafka.properties`, and on top what
//! exactly-once rests on, which nobody can override.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;

use crate::config::{Delivery, KafkaProperties, StreamConfig};
use crate::fault::{Fault, Faults};

/// Longest that a transaction may stay open before the broker aborts it: a crashed daemon's
/// partitions wait at most this long for another instance.
const TRANSACTION_TIMEOUT_MS: &str = "30000";

/// librdkafka's own defaults, for [`Timeouts::of`].
const DEFAULT_SESSION_TIMEOUT: Duration = Duration::from_secs(45);
const DEFAULT_POLL_INTERVAL: Duration = Duration::from_secs(300);

/// What a client is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Reads comments, as a member of the group.
    Consumer,
    /// Writes decisions and dead letters.
    Producer,
    /// Only asks.
    Inquirer,
}

/// The settings of a client.
pub fn config(stream: &StreamConfig, role: Role) -> ClientConfig {
    let mut config = ClientConfig::new();
    let client_id = format!("moderatord-{}", stream.instance);
    // Lookups fail fast enough to be told to a person; streams try for ever.
    config.set("client.id", client_id).set("socket.timeout.ms", "10000");
    match role {
        Role::Consumer => {
            config
                .set("fetch.wait.max.ms", "50")
                .set("statistics.interval.ms", "5000")
                // What is fetched ahead waits beside what is in flight: enough for a second, no more.
                .set("queued.min.messages", "20000")
                .set("queued.max.messages.kbytes", "16384");
        }
        Role::Producer => {
            config
                .set("linger.ms", "2")
                .set("compression.type", "lz4")
                // Smaller batches than the 1 MB that topics accept by default: a batch refused for
                // its size takes its innocent neighbours along.
                .set("batch.size", "262144")
                .set("message.max.bytes", MESSAGE_MAX_BYTES.to_string());
        }
        Role::Inquirer => {}
    }
    for (name, value) in stream.properties.iter() {
        config.set(name, value);
    }
    config.set("bootstrap.servers", stream.brokers.join(","));
    match role {
        Role::Consumer => consumer(&mut config, stream),
        Role::Producer => producer(&mut config, stream),
        Role::Inquirer => {
            config.set("group.id", &stream.group);
        }
    }
    config
}

/// What the topic allows decides, not the client: the largest event that can be configured, and the
/// headers around it.
const MESSAGE_MAX_BYTES: usize = (64 << 20) + (1 << 20);

fn consumer(config: &mut ClientConfig, stream: &StreamConfig) {
    config
        .set("group.id", &stream.group)
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("group.protocol", "classic")
        .set("isolation.level", "read_committed")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // Where to begin is decided at the assignment; an offset that is gone later is a gap.
        .set("auto.offset.reset", "error");
    if stream.static_membership {
        config.set("group.instance.id", &stream.instance);
    }
}

fn producer(config: &mut ClientConfig, stream: &StreamConfig) {
    config
        .set("enable.idempotence", "true")
        .set("acks", "all")
        // Where the partitions of input and output differ in number: as Kafka's own clients do.
        .set("partitioner", "murmur2_random");
    match stream.delivery {
        Delivery::ExactlyOnce => {
            config.set("transactional.id", transactional_id(stream));
            if config.get("transaction.timeout.ms").is_none() {
                config.set("transaction.timeout.ms", TRANSACTION_TIMEOUT_MS);
            }
        }
        // A message that gave up and was sent again later would overtake its successors.
        Delivery::AtLeastOnce => {
            config.set("message.timeout.ms", "0");
        }
    }
}

/// The same across restarts, different for each process of the group. An instance has no slash, so
/// two pairs never give the same id.
pub fn transactional_id(stream: &StreamConfig) -> String {
    format!("{}/{}", stream.group, stream.instance)
}

/// Times that bound what the daemon may do while Kafka waits for it.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// A group member unheard of for this long is out.
    pub session: Duration,
    /// A consumer that does not poll for this long is out.
    pub poll_interval: Duration,
    /// A transaction open for this long is aborted by the broker.
    pub transaction: Duration,
}

impl Timeouts {
    /// As set, or librdkafka's defaults.
    pub fn of(properties: &KafkaProperties) -> Self {
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

    /// How long a rebalance callback may wait for the commit of what is finished.
    pub fn revoke(self) -> Duration {
        self.session.min(self.poll_interval).min(self.transaction) / 3
    }
}

/// Everything wrong with `kafka.properties` that librdkafka itself can tell, one fault a property.
pub fn properties_faults(properties: &KafkaProperties) -> Faults {
    let mut faults = Faults::default();
    for (name, value) in properties.iter() {
        let tried = ClientConfig::new().set(name, value).create_native_config();
        if let Err(KafkaError::ClientConfig(_, reason, ..)) = tried {
            // The value may be a secret, and librdkafka's reason is clear without it.
            let reason = lower_first(reason.trim().trim_end_matches('.'));
            faults.push(Fault::setting(&format!("kafka.properties.{name}"), reason));
        }
    }
    faults
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Sources};

    fn stream(variables: &[(&str, &str)]) -> StreamConfig {
        let needed = [
            ("MODERATORD__MODEL__PATH", "unused"),
            ("MODERATORD__KAFKA__BROKERS", "one:9092,two:9092"),
            ("MODERATORD__KAFKA__INSTANCE", "gpu0"),
            ("MODERATORD__TOPICS__COMMENTS", "comments"),
            ("MODERATORD__TOPICS__DECISIONS", "decisions"),
            ("MODERATORD__TOPICS__DEAD_LETTERS", "dead"),
        ];
        let sources = Sources {
            environment: needed
                .iter()
                .chain(variables)
                .map(|(name, value)| ((*name).into(), (*value).into()))
                .collect(),
            ..Sources::default()
        };
        Config::load(&sources).unwrap().require_stream().unwrap()
    }

    #[test]
    fn what_delivery_rests_on_is_set_last() {
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
        assert_eq!(consumer.get("group.instance.id"), None);
        // librdkafka knows every name and takes every value.
        consumer.create_native_config().unwrap();
        producer.create_native_config().unwrap();
    }

    #[test]
    fn without_transactions_a_message_never_times_out() {
        let producer = config(&stream(&[("MODERATORD__DELIVERY", "at_least_once")]), Role::Producer);
        assert_eq!(producer.get("transactional.id"), None);
        assert_eq!(producer.get("message.timeout.ms"), Some("0"));
    }

    #[test]
    fn each_wrong_property_is_named_without_its_value() {
        let stream = stream(&[
            ("MODERATORD__KAFKA__PROPERTIES__SASL_MECHANIZM", "hunter2"),
            ("MODERATORD__KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "soon"),
            ("MODERATORD__KAFKA__PROPERTIES__LINGER_MS", "5"),
        ]);
        let faults: Vec<String> = properties_faults(&stream.properties)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(faults.len(), 2, "{faults:?}");
        assert!(faults[0].starts_with("kafka.properties.sasl.mechanizm: no such configuration property"));
        assert!(
            faults[1].starts_with("kafka.properties.session.timeout.ms: "),
            "{faults:?}"
        );
        assert!(!faults.concat().contains("hunter2"));
    }

    #[test]
    fn a_revoke_is_bounded_by_the_shortest_timeout() {
        let stream = stream(&[("MODERATORD__KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "6000")]);
        assert_eq!(Timeouts::of(&stream.properties).revoke(), Duration::from_secs(2));
        assert_eq!(
            Timeouts::of(&KafkaProperties::default()).revoke(),
            Duration::from_secs(10)
        );
    }
}
