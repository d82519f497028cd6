//! The last stage: writes decisions and dead letters, and commits the input offsets that they cover.
//!
//! One thread owns the producer. It writes outputs in the order in which their records were read and collects them in a
//! group, across micro-batches and partitions. The group is committed every `kafka.commit_interval`, or earlier while
//! little else is in flight ([`pace`]): in one Kafka transaction ([`exactly_once`]), or once its outputs are acknowledged
//! ([`at_least_once`]). An output that its topic
//! refuses is written in a smaller form ([`refused`]), if possible before it is refused ([`limits`]). After any other
//! failure, the outputs wait in the [`backlog`] and are sent again, by a new producer if necessary ([`recover`]).

mod output;
mod limits;
mod group;
mod backlog;
mod pace;
mod outage;
mod caller;
mod outbox;
mod transaction;
mod commit_metrics;
mod refused;
mod recover;
mod exactly_once;
mod at_least_once;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, never, select};
use metrics::{gauge, histogram};
use tracing::{debug, info, warn};

use super::committed::CommittedOffsets;
use super::control::{Control, StreamError};
use super::group::SharedConsumer;
use super::in_flight::InFlight;
use super::offsets::Lanes;
use super::ownership::Ownership;
use super::rebalance::Rebalance;
use super::record::{Finished, RecordPosition};
use crate::config::{Delivery, StreamConfig};
use crate::kafka::client::Timeouts;
use crate::kafka::errors::{ErrorClass, reason};
use crate::kafka::topics::TopicFacts;
use crate::ops::metrics as names;
use backlog::Backlog;
use group::CommitGroup;
use limits::OutputLimits;
use outage::Outage;
use outbox::Outbox;
use output::{Form, Origin, Output};
use pace::CommitPace;
use transaction::{Failure, Transaction};

/// The longest wait, which limits how late this thread notices that the stream is ending.
const MAX_WAIT: Duration = Duration::from_millis(50);

/// The pause between two commits while the stream ends.
const FINISH_PAUSE: Duration = Duration::from_millis(2);

/// How long the first producer may take to initialise its transactions.
const INIT_TIMEOUT: Duration = Duration::from_secs(60);

/// The minimum time between two warnings about outputs that their topic is known to refuse. The metrics count all of
/// them.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// How long an output may wait for room in the queue of the producer.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connected producer that is ready to write. With `exactly_once`, it has fenced earlier producers of the same
/// instance.
pub struct OutputProducer {
    outbox: Outbox,
    stream: StreamConfig,
    facts: TopicFacts,
    limits: OutputLimits,
    max_batch_bytes: usize,
}

impl OutputProducer {
    /// Connects the producer and initialises its transactions.
    ///
    /// # Errors
    /// Returns an error if the client cannot be created, or if its transactions cannot be initialised.
    pub fn connect(stream: &StreamConfig, facts: TopicFacts, control: &Control) -> Result<Self, StreamError> {
        let deadline = Instant::now() + INIT_TIMEOUT;
        let limits = OutputLimits::new(stream, &facts, Instant::now());
        // A batch that a topic refuses for its size then has only one record.
        let max_batch_bytes = limits.max_batch_bytes().unwrap_or(usize::MAX);
        loop {
            let outbox = Outbox::new(stream, facts, max_batch_bytes);
            let outbox = outbox.map_err(|error| StreamError::Client(error.to_string()))?;
            let initialised = match stream.delivery {
                Delivery::ExactlyOnce => Transaction::initialise(&outbox, control),
                Delivery::AtLeastOnce => Ok(()),
            };
            match initialised {
                Ok(()) => {
                    return Ok(Self {
                        outbox,
                        stream: stream.clone(),
                        facts,
                        limits,
                        max_batch_bytes,
                    });
                }
                Err(failure) if Instant::now() >= deadline => return Err(failure.into_error()),
                Err(Failure::Fatal(error)) => return Err(error),
                Err(failure) => warn!(
                    reason = failure.into_error().to_string(),
                    "cannot begin transactions yet"
                ),
            }
        }
    }
}

/// Writes and commits what the earlier stages have finished.
pub struct EmitStage {
    pub producer: OutputProducer,
    /// Commits offsets, or provides the group's metadata to the transaction. The ingest stage polls it.
    pub consumer: Arc<SharedConsumer>,
    pub ownership: Arc<Ownership>,
    /// Tells how much is in flight besides the outputs that are ready.
    pub in_flight: Arc<InFlight>,
    pub committed: Arc<CommittedOffsets>,
    pub control: Arc<Control>,
    /// Finished records from the encode and score stages, in any order.
    pub finished: Receiver<Vec<Finished>>,
    /// Changes of the assignment, from the rebalance callback.
    pub rebalances: Receiver<Rebalance>,
    /// Dropped when this stage has ended, so that the consumer outlives the last commit.
    pub ended: Sender<()>,
}

impl EmitStage {
    /// Writes until every earlier stage has ended, then commits the rest.
    ///
    /// # Errors
    /// Returns an error if Kafka fails in a way that retrying cannot fix. The offsets of the group are then not
    /// committed, so its records are read again; with `exactly_once`, none of its outputs becomes visible.
    pub fn run(self) -> Result<(), StreamError> {
        let Self {
            producer,
            consumer,
            ownership,
            in_flight,
            committed,
            control,
            finished,
            rebalances,
            ended,
        } = self;
        let stream = producer.stream;
        let emitter = Emitter {
            delivery: stream.delivery,
            pace: CommitPace::new(stream.commit_interval),
            timeouts: Timeouts::of(&stream.properties),
            origin: Origin {
                topic: stream.topics.comments.clone(),
                // Set when partitions are assigned.
                topic_id: None,
                group: stream.group.clone(),
                instance: stream.instance.clone(),
            },
            stream,
            facts: producer.facts,
            max_batch_bytes: producer.max_batch_bytes,
            outbox: producer.outbox,
            limits: producer.limits,
            consumer,
            ownership,
            in_flight,
            committed,
            control,
            lanes: Lanes::default(),
            backlog: Backlog::default(),
            group: CommitGroup::default(),
            outage: Outage::default(),
            transaction_is_open: false,
            is_in_doubt: false,
            group_may_be_down: false,
            last_refusal: None,
            fences: Vec::new(),
            next_number: 0,
        };
        let result = emitter.run(&finished, rebalances);
        drop(ended);
        result
    }
}

/// The state of the running stage.
struct Emitter {
    stream: StreamConfig,
    facts: TopicFacts,
    delivery: Delivery,
    pace: CommitPace,
    timeouts: Timeouts,
    origin: Origin,
    outbox: Outbox,
    limits: OutputLimits,
    /// The maximum size of a batch of several records for the next producer.
    max_batch_bytes: usize,
    consumer: Arc<SharedConsumer>,
    ownership: Arc<Ownership>,
    in_flight: Arc<InFlight>,
    committed: Arc<CommittedOffsets>,
    control: Arc<Control>,
    /// Holds back records that finished before their predecessors.
    lanes: Lanes<Finished>,
    /// The outputs that are not part of the group yet. It is empty unless something has failed.
    backlog: Backlog,
    /// The outputs and offsets of the next commit, all of which have been sent.
    group: CommitGroup,
    outage: Outage,
    /// A transaction is opened with the first output or offset of a group, so that an idle daemon has none open.
    transaction_is_open: bool,
    /// It is not known whether the transaction that the group was sent in was committed.
    is_in_doubt: bool,
    /// The coordinator of the group may not answer, so it is asked before the next transaction is opened.
    group_may_be_down: bool,
    /// When an output was last reported that its topic is known to refuse.
    last_refusal: Option<Instant>,
    /// When the producer was fenced.
    fences: Vec<Instant>,
    /// The number of the next output.
    next_number: usize,
}

impl Emitter {
    fn run(
        mut self,
        finished: &Receiver<Vec<Finished>>,
        mut rebalances: Receiver<Rebalance>,
    ) -> Result<(), StreamError> {
        loop {
            let now = Instant::now();
            if self.control.must_stop(now) {
                return self.stop_early();
            }
            let due = self.group.due(now, &self.pace, self.in_flight.totals().0);
            if due.is_some_and(|due| due <= now) {
                // A revocation must not wait behind a commit that keeps failing.
                while let Ok(rebalance) = rebalances.try_recv() {
                    self.rebalance(rebalance)?;
                }
                self.commit(&[], now + self.timeouts.acknowledgement())?;
                continue;
            }
            self.fill()?;
            let wait = due.map_or(MAX_WAIT, |due| MAX_WAIT.min(due - now));
            select! {
                recv(rebalances) -> rebalance => match rebalance {
                    Ok(rebalance) => self.rebalance(rebalance)?,
                    // The consumer has ended, so the assignment no longer changes.
                    Err(_) => rebalances = never(),
                },
                recv(finished) -> batch => {
                    // Changes of assignment come first: they were sent before any record of the new epoch was read.
                    while let Ok(rebalance) = rebalances.try_recv() {
                        self.rebalance(rebalance)?;
                    }
                    match batch {
                        Ok(batch) => self.write(batch)?,
                        Err(_) => return self.finish(),
                    }
                }
                default(wait) => {}
            }
        }
    }

    /// Restores the order of finished records and sends the outputs of those that are released.
    fn write(&mut self, batch: Vec<Finished>) -> Result<(), StreamError> {
        let start = Instant::now();
        // The topic may have been recreated since the last assignment.
        self.origin.topic_id = self.committed.metadata().topic_id;
        for finished in batch {
            let position = finished.record.position;
            // A record of a partition that is no longer owned must not wait in a lane: its predecessors may never
            // arrive.
            if !self.ownership.owns(position.partition, position.epoch) {
                continue;
            }
            let released: Vec<Finished> = self.lanes.insert(position, finished).collect();
            for finished in released {
                let mut output = self.origin.output(finished);
                output.number = self.next_number;
                self.next_number += 1;
                self.backlog.push(output);
            }
        }
        self.fill()?;
        histogram!(names::STAGE_SECONDS, "stage" => "emit").record(start.elapsed());
        gauge!(names::QUEUE_EVENTS, "queue" => "commit").set(self.uncommitted_count() as f64);
        gauge!(names::QUEUE_BYTES, "queue" => "commit").set(self.group.bytes() as f64);
        Ok(())
    }

    /// Moves outputs from the backlog to the group and sends them, until the group is full.
    fn fill(&mut self) -> Result<(), StreamError> {
        if self.backlog.is_due(Instant::now()) && !self.may_open_transaction() {
            return Ok(());
        }
        while !self.group.is_full(self.backlog.max_group()) {
            let now = Instant::now();
            let Some(mut output) = self.backlog.pop(now) else {
                break;
            };
            if self.limits.refuse(&output, now) {
                self.warn_refused(output.record.position, "known limits of the topic");
                self.origin.strip(&mut output);
            }
            if let Err(failure) = self.open_transaction().and_then(|()| self.send(&mut output)) {
                self.backlog.put_back(vec![output]);
                return match self.delivery {
                    Delivery::ExactlyOnce => self.recover(failure, &[]),
                    Delivery::AtLeastOnce => self.wait_to_send(failure),
                };
            }
            self.group.push(output, now);
        }
        Ok(())
    }

    /// Logs, from time to time, that an output is not written in full, without anything of its content.
    fn warn_refused(&mut self, position: RecordPosition, reason: &str) {
        let now = Instant::now();
        let is_recent = |last: Instant| now.saturating_duration_since(last) < WARNING_INTERVAL;
        if self.last_refusal.is_some_and(is_recent) {
            return;
        }
        self.last_refusal = Some(now);
        let (partition, offset) = (position.partition, position.offset);
        warn!(
            partition,
            offset, reason, "the topic does not accept an output, writing its coordinates to the dead letters instead"
        );
    }

    /// Returns whether a transaction is open or may be opened. After an outage, the group's coordinator must answer first;
    /// as long as it does not, the outputs wait.
    fn may_open_transaction(&mut self) -> bool {
        if self.group_may_be_down && !self.transaction_is_open {
            self.group_may_be_down = !self.group_answers();
            if self.group_may_be_down {
                let now = Instant::now();
                self.group.defer(now + self.backlog.back_off(now));
            }
        }
        !self.group_may_be_down || self.transaction_is_open
    }

    /// Sends an output, in a smaller form if the client refuses its size.
    fn send(&self, output: &mut Output) -> Result<(), Failure> {
        let deadline = Instant::now() + QUEUE_TIMEOUT;
        match self.outbox.send(output, deadline) {
            Err(error) if ErrorClass::of_error(&error) == ErrorClass::RecordRefused && output.form == Form::Whole => {
                self.origin.strip(output);
                self.send(output)
            }
            Err(error) if ErrorClass::of_error(&error) == ErrorClass::Missing => {
                Err(Failure::MissingTopic(self.outbox.topic_of(output).to_owned()))
            }
            // The transaction has already failed, or the queue is full because no broker answers.
            Err(error) if !ErrorClass::of_error(&error).is_permanent() => {
                Err(Failure::Abort(format!("cannot write an output: {}", reason(&error))))
            }
            Err(error) => Err(Failure::of("write an output", &error)),
            Ok(()) => Ok(()),
        }
    }

    /// Returns the number of finished records that are not committed yet.
    fn uncommitted_count(&self) -> usize {
        self.group.outputs().len() + self.backlog.len() + self.lanes.waiting_count()
    }

    fn rebalance(&mut self, rebalance: Rebalance) -> Result<(), StreamError> {
        let now = Instant::now();
        match rebalance {
            Rebalance::Assigned { partition, epoch, next } => {
                self.group.add_start(partition, epoch, next, now);
            }
            Rebalance::Revoked { partitions, done } => {
                self.lanes.end_epochs(&partitions);
                let leaving: Vec<i32> = partitions.iter().map(|&(partition, _)| partition).collect();
                self.commit(&leaving, now + self.timeouts.revoke())?;
                self.backlog.retain_owned(&self.ownership, &leaving);
                // Sending fails if the callback has stopped waiting.
                let _ = done.send(());
            }
            Rebalance::Lost(partitions) => {
                self.lanes.end_epochs(&partitions);
                self.backlog.retain_owned(&self.ownership, &[]);
                match self.delivery {
                    _ if partitions.is_empty() && !self.transaction_is_open => {}
                    // The group may have another coordinator, which this producer does not know.
                    Delivery::ExactlyOnce => self.recover(Failure::lost(), &[])?,
                    Delivery::AtLeastOnce => self.group.retain_owned(&self.ownership, &[]),
                }
                self.end_outage_without_work();
            }
        }
        Ok(())
    }

    /// Commits the group, or keeps it for the next attempt if the commit fails. Records of the `leaving` partitions are
    /// not kept.
    fn commit(&mut self, leaving: &[i32], deadline: Instant) -> Result<(), StreamError> {
        if self.group.is_empty() {
            return Ok(());
        }
        // The group may hold only the offsets at which partitions start.
        if !self.may_open_transaction() {
            self.group.retain_owned(&self.ownership, leaving);
            return Ok(());
        }
        if let Err(failure) = self.open_transaction() {
            return self.recover(failure, leaving);
        }
        match self.delivery {
            Delivery::ExactlyOnce => self.commit_transaction(leaving, deadline),
            Delivery::AtLeastOnce => self.commit_acknowledged(leaving, deadline),
        }
    }

    /// Updates offsets and metrics after a successful commit, and empties the group.
    fn complete_commit(&mut self, start: Instant) {
        let now = Instant::now();
        self.outage.note_commit(now);
        self.pace.note_commit(start, now);
        self.backlog.note_commit();
        let group = self.group.take();
        for (partition, next) in group.offsets() {
            self.committed.set(partition, next);
        }
        self.committed.record_commit(Instant::now(), SystemTime::now());
        commit_metrics::record(group.outputs(), SystemTime::now());
        histogram!(names::STAGE_SECONDS, "stage" => "commit").record(start.elapsed());
        debug!(outputs = group.outputs().len(), "committed");
    }

    /// Commits the rest after every earlier stage has ended, until nothing is left or the deadline passes.
    fn finish(mut self) -> Result<(), StreamError> {
        loop {
            self.fill()?;
            if self.group.is_empty() && self.backlog.is_empty() {
                break;
            }
            let now = Instant::now();
            if self.control.must_stop(now) {
                return self.stop_early();
            }
            let timeout = now + self.timeouts.acknowledgement();
            let deadline = self.control.deadline();
            self.commit(&[], deadline.map_or(timeout, |deadline| deadline.min(timeout)))?;
            if !self.group.is_empty() || !self.backlog.is_empty() {
                std::thread::sleep(FINISH_PAUSE);
            }
        }
        info!("committed everything that was read");
        Ok(())
    }

    /// Ends the stage after another stage has failed or the drain has run out of time. In the latter case, it first
    /// makes one quick attempt to commit. Records that are not committed are read again by the partitions' next owner.
    fn stop_early(mut self) -> Result<(), StreamError> {
        if !self.control.has_failed() && self.transaction_is_open {
            self.commit(&[], Instant::now() + MAX_WAIT)?;
        }
        let unfinished = self.uncommitted_count();
        if self.transaction_is_open
            && let Err(failure) = self.transaction().abort()
        {
            // The brokers abort it when it times out, or when the next producer of this instance starts.
            debug!(
                reason = failure.into_error().to_string(),
                "cannot abort the last transaction"
            );
        }
        info!(
            unfinished,
            "stopped before every record was committed; the uncommitted ones will be read again"
        );
        Ok(())
    }
}
