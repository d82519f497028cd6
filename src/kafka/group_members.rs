//! The members of a consumer group, and which of them a consumer is.

#![expect(unsafe_code, reason = "the rdkafka crate does not offer rd_kafka_memberid")]

use std::ffi::{CStr, c_void};
use std::fmt;
use std::time::Duration;

use rdkafka::bindings as rdsys;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::KafkaResult;

/// A member of a consumer group, as the brokers list it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GroupMember {
    pub id: String,
    pub client_id: String,
    /// The address from which it connects.
    pub host: String,
}

impl fmt::Display for GroupMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.id, self.host)
    }
}

/// Returns the members of a consumer's group that have the given client id, without the consumer itself.
///
/// # Errors
/// Returns an error if the group's coordinator does not answer within `timeout`.
pub(crate) fn others<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    group: &str,
    client_id: &str,
    timeout: Duration,
) -> KafkaResult<Vec<GroupMember>> {
    let own = member_id(consumer);
    let list = consumer.fetch_group_list(Some(group), timeout)?;
    let members = list.groups().iter().flat_map(|group| group.members());
    let members = members.map(|member| GroupMember {
        id: member.id().to_owned(),
        client_id: member.client_id().to_owned(),
        host: member.client_host().trim_start_matches('/').to_owned(),
    });
    Ok(members
        .filter(|member| member.client_id == client_id && Some(&member.id) != own.as_ref())
        .collect())
}

/// Returns the id that the group has given to this consumer, or `None` if it is not a member at the moment.
pub(crate) fn member_id<C: ConsumerContext>(consumer: &BaseConsumer<C>) -> Option<String> {
    // SAFETY: the client outlives this call. The string that is returned belongs to the caller, who frees it with
    // librdkafka's own function after copying it.
    unsafe {
        let client = consumer.client().native_ptr();
        let id = rdsys::rd_kafka_memberid(client);
        if id.is_null() {
            return None;
        }
        let copy = CStr::from_ptr(id).to_string_lossy().into_owned();
        rdsys::rd_kafka_mem_free(client, id.cast::<c_void>());
        Some(copy).filter(|id| !id.is_empty())
    }
}
