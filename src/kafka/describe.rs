//! Looks up topics and the operations that this client is permitted on them, without writing or creating anything.
//!
//! Only this module calls librdkafka directly, because the `rdkafka` crate does not offer `DescribeTopics`. The
//! crate's metadata request does not return the permitted operations, and may create the topic.

#![expect(unsafe_code, reason = "the rdkafka crate does not offer rd_kafka_DescribeTopics")]

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char};
use std::slice;
use std::time::Duration;

use rdkafka::bindings as rdsys;
use rdkafka::client::Client;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::{IsError, KafkaError};
use rdkafka::types::{RDKafka, RDKafkaErrorCode};

/// The id that brokers without topic ids report: 16 zero bytes in base64.
const NO_ID: &str = "AAAAAAAAAAAAAAAAAAAAAA";

/// An operation on a topic that a client needs permission for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TopicOperation {
    Read,
    Write,
}

/// The brokers' description of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TopicDescription {
    pub name: String,
    /// Kafka's id of the topic, which a topic that is recreated does not share; `None` if the brokers have no ids.
    pub id: Option<String>,
    /// The number of partitions, or why the topic cannot be described.
    pub partitions: Result<i32, RDKafkaErrorCode>,
    /// The permitted operations; `None` if the brokers do not report them.
    pub operations: Option<BTreeSet<TopicOperation>>,
}

/// Requests the descriptions of several topics at once.
///
/// # Errors
/// Returns an error if no broker answers within `timeout`, or if the request as a whole fails.
pub(crate) fn topics<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    names: &[&str],
    timeout: Duration,
) -> Result<Vec<TopicDescription>, KafkaError> {
    let client: &Client<C> = consumer.client();
    let names: Vec<CString> = names.iter().map(|name| CString::new(*name)).collect::<Result<_, _>>()?;
    let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the client and the names outlive this call, and the collection copies the names. Each object that is
    // created here is freed by its guard, after the last use of the pointers obtained from it.
    unsafe {
        let client: *mut RDKafka = client.native_ptr();
        let queue = DestroyOnDrop(rdsys::rd_kafka_queue_new(client), rdsys::rd_kafka_queue_destroy);
        let collection = DestroyOnDrop(
            rdsys::rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len()),
            rdsys::rd_kafka_TopicCollection_destroy,
        );
        let options = DestroyOnDrop(
            rdsys::rd_kafka_AdminOptions_new(client, rdsys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS),
            rdsys::rd_kafka_AdminOptions_destroy,
        );
        let mut error_text = [0; 512];
        rdsys::rd_kafka_AdminOptions_set_request_timeout(
            options.0,
            timeout_ms,
            error_text.as_mut_ptr(),
            error_text.len(),
        );
        let error = rdsys::rd_kafka_AdminOptions_set_include_authorized_operations(options.0, 1);
        if !error.is_null() {
            drop(DestroyOnDrop(error, rdsys::rd_kafka_error_destroy));
        }
        rdsys::rd_kafka_DescribeTopics(client, collection.0, options.0, queue.0);
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
        Ok(slice_of(topics.cast_const(), count)
            .iter()
            .map(|&topic| description(topic))
            .collect())
    }
}

/// Converts a description from librdkafka.
///
/// # Safety
/// `topic` must point to a description that lives as long as the call.
unsafe fn description(topic: *const rdsys::rd_kafka_TopicDescription_t) -> TopicDescription {
    // SAFETY: the caller guarantees that the description is valid, and what the accessors return lives as long as it.
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
            let convert = |&operation: &Acl| match operation {
                Acl::RD_KAFKA_ACL_OPERATION_READ => Some(TopicOperation::Read),
                Acl::RD_KAFKA_ACL_OPERATION_WRITE => Some(TopicOperation::Write),
                _ => None,
            };
            slice_of(operations, count).iter().filter_map(convert).collect()
        });
        let id = rdsys::rd_kafka_TopicDescription_topic_id(topic);
        let id = (!id.is_null()).then(|| CStr::from_ptr(rdsys::rd_kafka_Uuid_base64str(id)));
        TopicDescription {
            name: name.to_string_lossy().into_owned(),
            id: id.map(|id| id.to_string_lossy().into_owned()).filter(|id| id != NO_ID),
            partitions,
            operations,
        }
    }
}

/// Returns the values of a C array, which is empty if `first` is null.
///
/// # Safety
/// `first` must be null or point to the first of `count` values that live for `'a`.
unsafe fn slice_of<'a, T>(first: *const T, count: usize) -> &'a [T] {
    if first.is_null() || count == 0 {
        return &[];
    }
    // SAFETY: the caller guarantees that there are `count` values that live for `'a`.
    unsafe { slice::from_raw_parts(first, count) }
}

/// Frees a native object when it goes out of scope.
struct DestroyOnDrop<T>(*mut T, unsafe extern "C" fn(*mut T));

impl<T> Drop for DestroyOnDrop<T> {
    fn drop(&mut self) {
        // SAFETY: the pointer comes from the constructor that belongs to this destructor, and is freed only here.
        unsafe { (self.1)(self.0) }
    }
}
