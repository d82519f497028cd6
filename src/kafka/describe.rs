//! Topics and what we may do with them, asked without writing or creating anything.
//!
//! The one place that calls librdkafka directly: the wrapper has no `DescribeTopics`, its metadata
//! call can create the topic it asks for, and only this call says what the brokers would permit.

#![expect(unsafe_code, reason = "the wrapper does not offer rd_kafka_DescribeTopics")]

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char};
use std::slice;
use std::time::Duration;

use rdkafka::bindings as rdsys;
use rdkafka::client::Client;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{IsError, KafkaError};
use rdkafka::types::{RDKafka, RDKafkaErrorCode};

use super::QuietContext;

/// What a client may do with a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// Consume.
    Read,
    /// Produce.
    Write,
}

/// What the brokers say of one topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its partitions, or why there are none to be seen.
    pub partitions: Result<i32, RDKafkaErrorCode>,
    /// What we may do with it; absent where the brokers do not say.
    pub operations: Option<BTreeSet<Operation>>,
}

/// Asks for several topics in one request.
///
/// # Errors
/// No answer in time, or a refusal of the request as a whole.
pub fn topics(
    consumer: &BaseConsumer<QuietContext>,
    names: &[&str],
    timeout: Duration,
) -> Result<Vec<Description>, KafkaError> {
    let client: &Client<QuietContext> = consumer.client();
    let names: Vec<CString> = names.iter().map(|name| CString::new(*name)).collect::<Result<_, _>>()?;
    let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the client outlives this call; the names outlive the collection, which copies them;
    // each object made here is freed by its guard, after the last use of what it lends.
    unsafe {
        let client: *mut RDKafka = client.native_ptr();
        let queue = DestroyOnDrop(rdsys::rd_kafka_queue_new(client), rdsys::rd_kafka_queue_destroy);
        let wanted = DestroyOnDrop(
            rdsys::rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len()),
            rdsys::rd_kafka_TopicCollection_destroy,
        );
        let options = DestroyOnDrop(
            rdsys::rd_kafka_AdminOptions_new(client, rdsys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS),
            rdsys::rd_kafka_AdminOptions_destroy,
        );
        let mut text = [0; 512];
        rdsys::rd_kafka_AdminOptions_set_request_timeout(options.0, timeout_ms, text.as_mut_ptr(), text.len());
        let refused = rdsys::rd_kafka_AdminOptions_set_include_authorized_operations(options.0, 1);
        if !refused.is_null() {
            drop(DestroyOnDrop(refused, rdsys::rd_kafka_error_destroy));
        }
        rdsys::rd_kafka_DescribeTopics(client, wanted.0, options.0, queue.0);
        let event = rdsys::rd_kafka_queue_poll(queue.0, timeout_ms.saturating_add(1000));
        if event.is_null() {
            return Err(KafkaError::AdminOp(RDKafkaErrorCode::OperationTimedOut));
        }
        let event = DestroyOnDrop(event, rdsys::rd_kafka_event_destroy);
        let code = rdsys::rd_kafka_event_error(event.0);
        if code.is_error() {
            return Err(KafkaError::AdminOp(code.into()));
        }
        let result = rdsys::rd_kafka_event_DescribeTopics_result(event.0);
        let mut count = 0;
        let topics = rdsys::rd_kafka_DescribeTopics_result_topics(result, &raw mut count);
        Ok(list(topics.cast_const(), count)
            .iter()
            .map(|&topic| description(topic))
            .collect())
    }
}

/// # Safety
/// `topic` is a description that lives as long as the call.
unsafe fn description(topic: *const rdsys::rd_kafka_TopicDescription_t) -> Description {
    // SAFETY: the caller's promise; what the accessors lend lives as long as the description.
    unsafe {
        let name = CStr::from_ptr(rdsys::rd_kafka_TopicDescription_name(topic));
        let error = rdsys::rd_kafka_TopicDescription_error(topic);
        let code = if error.is_null() {
            RDKafkaErrorCode::NoError
        } else {
            rdsys::rd_kafka_error_code(error).into()
        };
        let mut count = 0;
        rdsys::rd_kafka_TopicDescription_partitions(topic, &raw mut count);
        let partitions = match code {
            RDKafkaErrorCode::NoError => Ok(i32::try_from(count).unwrap_or(i32::MAX)),
            code => Err(code),
        };
        let mut count = 0;
        let operations = rdsys::rd_kafka_TopicDescription_authorized_operations(topic, &raw mut count);
        let operations = (!operations.is_null()).then(|| {
            use rdsys::rd_kafka_AclOperation_t as Acl;
            let named = |&operation: &Acl| match operation {
                Acl::RD_KAFKA_ACL_OPERATION_READ => Some(Operation::Read),
                Acl::RD_KAFKA_ACL_OPERATION_WRITE => Some(Operation::Write),
                _ => None,
            };
            list(operations, count).iter().filter_map(named).collect()
        });
        Description {
            name: name.to_string_lossy().into_owned(),
            partitions,
            operations,
        }
    }
}

/// # Safety
/// `first` is null or the first of `count` values that live for `'a`.
unsafe fn list<'a, T>(first: *const T, count: usize) -> &'a [T] {
    if first.is_null() || count == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts(first, count) }
}

/// Frees a native object when it goes out of scope.
struct DestroyOnDrop<T>(*mut T, unsafe extern "C" fn(*mut T));

impl<T> Drop for DestroyOnDrop<T> {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the constructor that belongs to this destructor, and is freed
        // once.
        unsafe { (self.1)(self.0) }
    }
}
