//! Reads the settings of topics that decide which records they accept.

use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, ConfigResource, ResourceSpecifier};
use rdkafka::error::{KafkaError, KafkaResult};

use super::client::{Role, config};
use super::log::QuietContext;
use crate::config::StreamConfig;

/// What a topic accepts. The default is a topic about which nothing is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TopicLimits {
    /// The largest record batch that the topic accepts, in bytes after compression (`max.message.bytes`), if known.
    pub max_bytes: Option<usize>,
    /// Whether the topic refuses records without a key, because it is compacted.
    pub requires_key: bool,
}

/// Reads the limits of the decisions topic and of the dead-letter topic, in this order.
///
/// # Errors
/// Returns an error if no broker answers within `timeout`, or if the client may not read the settings of both topics,
/// which requires an ACL that allows DESCRIBE_CONFIGS.
pub(crate) fn of_outputs(stream: &StreamConfig, timeout: Duration) -> KafkaResult<[TopicLimits; 2]> {
    let client: AdminClient<QuietContext> = config(stream, Role::Lookup).create_with_context(QuietContext)?;
    let names = [&stream.topics.decisions, &stream.topics.dead_letters];
    let topics = names.map(|name| ResourceSpecifier::Topic(name));
    let options = AdminOptions::new().request_timeout(Some(timeout));
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.map_err(|_| KafkaError::AdminOpCreation("cannot start a runtime".to_owned()))?;
    let found = runtime.block_on(client.describe_configs(&topics, &options))?;
    let mut limits = [TopicLimits::default(); 2];
    for (limits, found) in limits.iter_mut().zip(found) {
        *limits = TopicLimits::of(&found.map_err(KafkaError::AdminOp)?);
    }
    Ok(limits)
}

impl TopicLimits {
    fn of(settings: &ConfigResource) -> Self {
        let value = |name: &str| settings.get(name).and_then(|entry| entry.value.as_deref());
        Self {
            max_bytes: value("max.message.bytes").and_then(|value| value.parse().ok()),
            requires_key: value("cleanup.policy").is_some_and(|policies| policies.split(',').any(is_compaction)),
        }
    }
}

fn is_compaction(policy: &str) -> bool {
    policy.trim() == "compact"
}

#[cfg(test)]
mod tests {
    use rdkafka::admin::{ConfigEntry, ConfigSource, OwnedResourceSpecifier};

    use super::*;

    #[test]
    fn limits_are_read_from_the_settings_of_a_topic() {
        let check = |entries: &[(&str, &str)], max_bytes, requires_key| {
            let entries = entries.iter().map(|(name, value)| ConfigEntry {
                name: (*name).to_owned(),
                value: Some((*value).to_owned()),
                source: ConfigSource::Default,
                is_read_only: false,
                is_default: true,
                is_sensitive: false,
            });
            let settings = ConfigResource {
                specifier: OwnedResourceSpecifier::Topic("t".to_owned()),
                entries: entries.collect(),
            };
            let expected = TopicLimits {
                max_bytes,
                requires_key,
            };
            assert_eq!(TopicLimits::of(&settings), expected);
        };
        check(&[], None, false);
        check(
            &[("max.message.bytes", "1048588"), ("cleanup.policy", "delete")],
            Some(1_048_588),
            false,
        );
        check(&[("cleanup.policy", "compact")], None, true);
        check(&[("cleanup.policy", "delete, compact")], None, true);
        check(&[("max.message.bytes", "many")], None, false);
    }
}
