//! Continues after a failure: aborts the transaction or replaces the producer, and then sends the outputs again.
//!
//! Nothing is scored twice, because the group keeps its outputs until they are committed. A producer that the client
//! library or the brokers have given up on is replaced within the process. If its last transaction may have been
//! committed, the committed offsets of the consumer group tell: they are part of the same transaction.

use std::time::{Duration, Instant, SystemTime};

use metrics::counter;
use rdkafka::consumer::Consumer;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tracing::debug;

use super::outage::Outage;
use super::outbox::{Outbox, Undelivered};
use super::refused::strip_refused;
use super::transaction::{Failure, Transaction};
use super::{Emitter, commit_metrics};
use crate::config::Delivery;
use crate::kafka::errors::{ErrorClass, reason, reason_of_code};
use crate::kafka::group_members::GroupMember;
use crate::message::NextOffset;
use crate::ops::metrics as names;
use crate::stream::control::{MAX_TOPIC_ABSENCE, StreamError};

/// The timeout of one request about the group.
const GROUP_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause between two attempts of anything here.
const PAUSE: Duration = Duration::from_millis(200);

/// How many times within [`FENCE_INTERVAL`] a producer may be fenced by a process that is not found. The brokers also
/// fence a producer whose transaction has timed out, so one that has lived that long does not count.
const MAX_FENCES: usize = 3;

const FENCE_INTERVAL: Duration = Duration::from_secs(60);

/// How much longer than a session a process that has ended may be listed as a member of the group.
const SESSION_TOLERANCE: Duration = Duration::from_secs(3);

/// What a failure requires.
#[derive(Debug)]
pub(super) struct Cause {
    pub reason: String,
    /// The label of the metric that counts aborted transactions.
    label: &'static str,
    pub needs_producer: bool,
    is_fenced: bool,
    /// The failure has nothing to do with the outputs, so it is better to wait before they are sent again.
    pub is_outage: bool,
}

impl Cause {
    fn new(label: &'static str, reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            label,
            needs_producer: false,
            is_fenced: false,
            is_outage: true,
        }
    }
}

impl Emitter {
    /// Continues after a failure. The outputs of partitions that are still owned, and are not `leaving`, are sent again.
    pub(super) fn recover(&mut self, failure: Failure, leaving: &[i32]) -> Result<(), StreamError> {
        let undelivered = self.outbox.take_undelivered();
        let cause = self.examine(failure, &undelivered)?;
        self.start_again(cause, leaving)
    }

    /// Finds out what a failure requires, given the messages that were not delivered, and strips the outputs that were
    /// refused.
    pub(super) fn examine(&mut self, failure: Failure, undelivered: &[Undelivered]) -> Result<Cause, StreamError> {
        let mut cause = match failure {
            Failure::Fatal(error) => return Err(error),
            Failure::NotOwned => Cause {
                is_outage: false,
                ..Cause::new("not_owned", "partitions are no longer owned")
            },
            Failure::Undelivered => Cause::new("undelivered", "outputs were not delivered"),
            Failure::MissingTopic(topic) => {
                self.check_absence(&topic)?;
                Cause::new("missing_topic", format!("the topic `{topic}` does not exist"))
            }
            Failure::Abort(reason) => Cause::new("broker", reason),
            Failure::Producer { reason, is_fenced } => Cause {
                needs_producer: true,
                is_fenced,
                ..Cause::new("producer", reason)
            },
        };
        self.examine_undelivered(undelivered, &mut cause)?;
        if let Some((code, reason)) = self.outbox.fatal_error() {
            cause.needs_producer = true;
            cause.is_fenced |= ErrorClass::of(code) == ErrorClass::Fenced;
            cause.reason = reason;
        }
        Ok(cause)
    }

    fn examine_undelivered(&mut self, undelivered: &[Undelivered], cause: &mut Cause) -> Result<(), StreamError> {
        let mut is_refusal = false;
        for &(number, code) in undelivered {
            match ErrorClass::of(code) {
                ErrorClass::Forbidden => {
                    return Err(StreamError::Forbidden {
                        doing: "write an output",
                        reason: format!("{} ({})", reason_of_code(code), self.outbox.topics().join(" or ")),
                    });
                }
                ErrorClass::Missing => {
                    let index = self.group.index_of(number);
                    let output = index.map(|index| &self.group.outputs()[index]);
                    if let Some(topic) = output.map(|output| self.outbox.topic_of(output).to_owned()) {
                        self.check_absence(&topic)?;
                        *cause = Cause {
                            needs_producer: cause.needs_producer,
                            ..Cause::new("missing_topic", format!("the topic `{topic}` does not exist"))
                        };
                    }
                }
                ErrorClass::RecordRefused => is_refusal = true,
                class @ (ErrorClass::Fenced | ErrorClass::Fatal) => {
                    cause.needs_producer = true;
                    cause.is_fenced |= class == ErrorClass::Fenced;
                    cause.reason = reason_of_code(code);
                }
                _ if cause.label == "undelivered" => cause.reason = reason_of_code(code),
                _ => {}
            }
        }
        if is_refusal {
            let refusal = strip_refused(
                self.group.outputs_mut(),
                undelivered,
                self.outbox.batch_bytes(),
                &self.origin,
                &mut self.limits,
            )?;
            if refusal.needs_smaller_batches {
                self.max_batch_bytes = self.outbox.batch_bytes() / 2;
                debug!(bytes = self.max_batch_bytes, "sending smaller batches");
                cause.needs_producer = true;
            }
            if let Some((position, reason)) = refusal.first_stripped {
                self.warn_refused(position, &reason);
            }
            cause.label = "refused";
            cause.is_outage = false;
            self.backlog.shrink_groups();
        }
        Ok(())
    }

    fn check_absence(&mut self, topic: &str) -> Result<(), StreamError> {
        let now = Instant::now();
        let since = self.outage.note_missing_topic(now, topic);
        if now.saturating_duration_since(since) < MAX_TOPIC_ABSENCE {
            return Ok(());
        }
        Err(StreamError::MissingTopic {
            topic: topic.to_owned(),
        })
    }

    /// Aborts the open transaction or replaces the producer, and makes the outputs wait to be sent again.
    pub(super) fn start_again(&mut self, mut cause: Cause, leaving: &[i32]) -> Result<(), StreamError> {
        let start = Instant::now();
        if cause.is_outage {
            self.outage.note_failure(start, start, &cause.reason);
            // After an outage, a producer may wait for a coordinator that no longer is one; a new one looks it up.
            cause.needs_producer |= self.delivery == Delivery::ExactlyOnce;
            self.group_may_be_down = true;
        }
        // Only after a new producer has ended the transaction is its outcome final.
        cause.needs_producer |= self.is_in_doubt;
        if self.transaction_is_open {
            debug!(
                reason = cause.reason,
                outputs = self.group.outputs().len(),
                "aborting a transaction"
            );
            counter!(names::TRANSACTIONS, "result" => "aborted").increment(1);
            counter!(names::TRANSACTION_ABORTS, "reason" => cause.label).increment(1);
            if !cause.needs_producer {
                match self.transaction().abort() {
                    Ok(()) => {}
                    Err(Failure::Fatal(error)) => return Err(error),
                    Err(failure) => {
                        let worse = self.examine(failure, &[])?;
                        cause.needs_producer = true;
                        cause.is_fenced |= worse.is_fenced;
                        cause.reason = worse.reason;
                    }
                }
            }
            self.transaction_is_open = false;
        }
        // What the abort has purged is reported as undelivered.
        drop(self.outbox.take_undelivered());
        if cause.needs_producer {
            self.replace_producer(&cause)?;
        }
        let outputs = self.group.take_outputs();
        self.backlog.put_back(outputs);
        self.group.retain_owned(&self.ownership, leaving);
        self.backlog.retain_owned(&self.ownership, leaving);
        if cause.is_outage {
            // What remains in the group are the offsets at which partitions start.
            let now = Instant::now();
            self.group.defer(now + self.backlog.back_off(now));
        }
        self.end_outage_without_work();
        Ok(())
    }

    /// Replaces the producer by a new one, which ends whatever transaction the old one has left open. Tries until it
    /// succeeds or the stream must stop.
    fn replace_producer(&mut self, cause: &Cause) -> Result<(), StreamError> {
        let start = Instant::now();
        if cause.is_fenced {
            let may_have_timed_out = self.outbox.age(start) >= self.timeouts.transaction;
            let other = self.find_other_process();
            let is_known = other.is_some();
            self.fences
                .retain(|&fence| start.saturating_duration_since(fence) < FENCE_INTERVAL);
            if !may_have_timed_out {
                self.fences.push(start);
            }
            if is_known || self.fences.len() > MAX_FENCES {
                counter!(names::TRANSACTIONS, "result" => "fenced").increment(1);
                return Err(StreamError::Fenced {
                    doing: "commit outputs",
                    reason: cause.reason.clone(),
                    other: other.map(|other| other.to_string()),
                });
            }
        }
        debug!(reason = cause.reason, "replacing the producer");
        loop {
            if self.control.must_stop(Instant::now()) {
                return Ok(());
            }
            self.outbox = Outbox::new(&self.stream, self.facts, self.max_batch_bytes)
                .map_err(|error| StreamError::Client(error.to_string()))?;
            if self.delivery == Delivery::AtLeastOnce {
                return Ok(());
            }
            match Transaction::initialise(&self.outbox, &self.control) {
                Ok(()) => break,
                Err(Failure::Fatal(error)) => return Err(error),
                Err(failure) => {
                    let reason = failure.into_error().to_string();
                    debug!(reason, "the new producer cannot begin transactions yet");
                    self.outage
                        .note_failure(start, Instant::now(), "no producer can begin transactions");
                    std::thread::sleep(PAUSE);
                }
            }
        }
        if self.is_in_doubt {
            self.resolve_doubt();
        }
        Ok(())
    }

    /// Forgets an outage if nothing is left to commit, because its partitions have gone to another process.
    pub(super) fn end_outage_without_work(&mut self) {
        if self.group.is_empty() && self.backlog.is_empty() {
            self.outage = Outage::default();
        }
    }

    /// Returns whether the group's coordinator answers. As long as it does not, nothing can be committed, and a producer
    /// that tries would have to be replaced again.
    pub(super) fn group_answers(&mut self) -> bool {
        let Some(&partition) = self.ownership.partitions().first() else {
            return true;
        };
        let (start, consumer) = (Instant::now(), self.consumer.get());
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.origin.topic, partition);
        let found = consumer.committed_offsets(list, GROUP_TIMEOUT);
        let found = found.and_then(|found| found.elements().iter().try_for_each(|element| element.error()));
        match found {
            Ok(()) => true,
            Err(error) => {
                let reason = format!("the coordinator of the group does not answer: {}", reason(&error));
                self.outage.note_failure(start, Instant::now(), &reason);
                false
            }
        }
    }

    /// Finds out whether the transaction that the old producer was committing has succeeded. The new producer has ended
    /// it, so the answer is final.
    ///
    /// It looks only at partitions that are still owned in the same epoch, which no other process can have committed.
    fn resolve_doubt(&mut self) {
        self.group.retain_owned(&self.ownership, &[]);
        let consumer = self.consumer.get();
        let mut list = TopicPartitionList::new();
        for (partition, _) in self.group.offsets() {
            list.add_partition(&self.origin.topic, partition);
        }
        if list.count() == 0 {
            self.is_in_doubt = false;
            return;
        }
        let start = Instant::now();
        let found = loop {
            let now = Instant::now();
            if self.control.must_stop(now) {
                return;
            }
            let found = consumer.committed_offsets(list.clone(), GROUP_TIMEOUT);
            match found.and_then(|found| {
                found.elements().iter().try_for_each(|element| element.error())?;
                Ok(found)
            }) {
                Ok(found) => break found,
                Err(error) => {
                    let reason = format!("cannot read the committed offsets: {}", reason(&error));
                    self.outage.note_failure(start, now, &reason);
                    std::thread::sleep(PAUSE);
                }
            }
        };
        self.is_in_doubt = false;
        let mut committed = Vec::new();
        for element in found.elements() {
            if let Offset::Offset(next) = element.offset() {
                let next = NextOffset::from_committed(next);
                committed.extend(self.group.take_committed(element.partition(), next));
                self.committed.set(element.partition(), next);
            }
        }
        if !committed.is_empty() {
            self.committed.record_commit(Instant::now(), SystemTime::now());
        }
        commit_metrics::record(&committed, SystemTime::now());
        debug!(
            outputs = committed.len(),
            "the last transaction of the old producer was committed"
        );
    }

    /// Looks for a live process with the same instance name. A process that has ended stays in the group until its
    /// session ends, so only one that stays longer is alive.
    fn find_other_process(&self) -> Option<GroupMember> {
        let deadline = Instant::now() + self.timeouts.session + SESSION_TOLERANCE;
        loop {
            let consumer = self.consumer.get();
            let found = consumer.context().other_members(&consumer);
            let now = Instant::now();
            match found {
                Ok(others) if others.is_empty() => return None,
                Ok(mut others) if now >= deadline => return others.pop(),
                Err(_) if now >= deadline => return None,
                _ if self.control.must_stop(now) => return None,
                _ => std::thread::sleep(PAUSE),
            }
        }
    }
}
