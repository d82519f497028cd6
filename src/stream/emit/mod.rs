//! The last stage: writes decisions and dead letters, and commits the input offsets that they cover.
//!
//! One thread owns the producer. It writes outputs in the order in which their records were read and collects them in a
//! group, across micro-batches and partitions. Every `kafka.commit_interval` the group is committed: in one Kafka
//! transaction ([`exactly_once`]), or once its outputs are acknowledged ([`at_least_once`]). An output that its topic
//! refuses is written in a smaller form ([`downgrade`]).

mod output;
mod group;
mod outbox;
mod transaction;
mod commit_metrics;
mod exactly_once;
mod at_least_once;
mod downgrade;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, never, select};
use metrics::{gauge, histogram};
use tracing::{debug, info};

use super::committed::CommittedOffsets;
use super::control::{Control, StreamError};
use super::group::GroupConsumer;
use super::offsets::Lanes;
use super::ownership::Ownership;
use super::rebalance::Rebalance;
use super::record::Finished;
use crate::config::{Delivery, StreamConfig};
use crate::kafka::client::Timeouts;
use crate::kafka::topics::PartitionCounts;
use crate::ops::metrics as names;
use downgrade::Downgrades;
use group::CommitGroup;
use outbox::Outbox;
use output::Origin;
use transaction::Transaction;

/// The longest wait, which limits how late this thread notices that the stream is ending.
const MAX_WAIT: Duration = Duration::from_millis(50);

/// The wait after a failed commit; it doubles with each further failure, up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(50);

const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// A connected producer that is ready to write. With `exactly_once`, it has fenced earlier producers of the same
/// instance.
pub struct OutputProducer {
    outbox: Outbox,
    origin: Origin,
    delivery: Delivery,
    interval: Duration,
    timeouts: Timeouts,
}

impl OutputProducer {
    /// Connects the producer and initialises its transactions.
    ///
    /// # Errors
    /// Returns an error if the client cannot be created, or if its transactions cannot be initialised.
    pub fn connect(stream: &StreamConfig, partitions: PartitionCounts) -> Result<Self, StreamError> {
        let outbox = Outbox::new(stream, partitions).map_err(|error| StreamError::Client(error.to_string()))?;
        if stream.delivery == Delivery::ExactlyOnce {
            Transaction::initialise(&outbox)?;
        }
        Ok(Self {
            outbox,
            origin: Origin {
                topic: stream.topics.comments.clone(),
                // Set when partitions are assigned.
                topic_id: None,
                group: stream.group.clone(),
                instance: stream.instance.clone(),
            },
            delivery: stream.delivery,
            interval: stream.commit_interval,
            timeouts: Timeouts::of(&stream.properties),
        })
    }
}

/// Writes and commits what the earlier stages have finished.
pub struct EmitStage {
    pub producer: OutputProducer,
    /// Commits offsets, or provides the group's metadata to the transaction. The ingest stage polls it.
    pub consumer: Arc<GroupConsumer>,
    pub ownership: Arc<Ownership>,
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
            committed,
            control,
            finished,
            rebalances,
            ended,
        } = self;
        let emitter = Emitter {
            outbox: producer.outbox,
            delivery: producer.delivery,
            interval: producer.interval,
            timeouts: producer.timeouts,
            downgrades: Downgrades::new(producer.origin.clone()),
            origin: producer.origin,
            consumer,
            ownership,
            committed,
            control,
            lanes: Lanes::default(),
            group: CommitGroup::default(),
            transaction_is_open: false,
            backoff: MIN_BACKOFF,
            next_number: 0,
        };
        let result = emitter.run(&finished, rebalances);
        drop(ended);
        result
    }
}

/// The state of the running stage.
struct Emitter {
    outbox: Outbox,
    origin: Origin,
    delivery: Delivery,
    interval: Duration,
    timeouts: Timeouts,
    consumer: Arc<GroupConsumer>,
    ownership: Arc<Ownership>,
    committed: Arc<CommittedOffsets>,
    control: Arc<Control>,
    /// Holds back records that finished before their predecessors.
    lanes: Lanes<Finished>,
    /// The outputs and offsets of the next commit.
    group: CommitGroup,
    /// A transaction is opened with the first output or offset of a group, so that an idle daemon has none open.
    transaction_is_open: bool,
    backoff: Duration,
    downgrades: Downgrades,
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
            let due = self.group.due(now);
            if due.is_some_and(|due| due <= now) {
                // A revocation must not wait behind a commit that keeps failing.
                while let Ok(rebalance) = rebalances.try_recv() {
                    self.rebalance(rebalance)?;
                }
                self.commit(&[], now + self.timeouts.transaction)?;
                continue;
            }
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
                self.open_transaction()?;
                self.group.push(output, start, self.interval);
                if let Some(reason) = self.send(self.group.outputs().len() - 1)? {
                    self.abort_and_resend(&reason, &[], Vec::new())?;
                }
            }
        }
        histogram!(names::STAGE_SECONDS, "stage" => "emit").record(start.elapsed());
        gauge!(names::QUEUE_EVENTS, "queue" => "commit").set(self.uncommitted_count() as f64);
        gauge!(names::QUEUE_BYTES, "queue" => "commit").set(self.group.bytes() as f64);
        Ok(())
    }

    /// Returns the number of finished records that are not committed yet.
    fn uncommitted_count(&self) -> usize {
        self.group.outputs().len() + self.lanes.waiting_count()
    }

    fn rebalance(&mut self, rebalance: Rebalance) -> Result<(), StreamError> {
        let now = Instant::now();
        match rebalance {
            Rebalance::Assigned { partition, epoch, next } => {
                self.open_transaction()?;
                self.group.add_offset(partition, epoch, next, now, self.interval);
            }
            Rebalance::Revoked { partitions, done } => {
                self.lanes.end_epochs(&partitions);
                let leaving: Vec<i32> = partitions.iter().map(|&(partition, _)| partition).collect();
                self.commit(&leaving, now + self.timeouts.revoke())?;
                // Sending fails if the callback has stopped waiting.
                let _ = done.send(());
            }
            Rebalance::Lost(partitions) => {
                self.lanes.end_epochs(&partitions);
                if !self.group.is_owned(&self.ownership) {
                    self.abort_and_resend("partitions were lost", &[], Vec::new())?;
                }
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
        match self.delivery {
            Delivery::ExactlyOnce => self.commit_transaction(leaving, deadline),
            Delivery::AtLeastOnce => self.commit_acknowledged(leaving, deadline),
        }
    }

    /// Defers the next commit, longer each time until one succeeds.
    fn back_off(&mut self) {
        self.group.defer(Instant::now() + self.backoff);
        self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
    }

    /// Updates offsets and metrics after a successful commit, and empties the group.
    fn complete_commit(&mut self, start: Instant) {
        self.backoff = MIN_BACKOFF;
        self.downgrades.reset();
        let group = self.group.take();
        for (partition, next) in group.offsets() {
            self.committed.set(partition, next);
        }
        commit_metrics::record(group.outputs(), SystemTime::now());
        histogram!(names::STAGE_SECONDS, "stage" => "commit").record(start.elapsed());
        debug!(outputs = group.outputs().len(), "committed");
    }

    /// Makes the last commit after every earlier stage has ended, retrying until it succeeds or the deadline passes.
    fn finish(mut self) -> Result<(), StreamError> {
        while !self.group.is_empty() {
            let now = Instant::now();
            if self.control.must_stop(now) {
                return self.stop_early();
            }
            let timeout = now + self.timeouts.transaction;
            let deadline = self
                .control
                .deadline()
                .map_or(timeout, |deadline| deadline.min(timeout));
            self.commit(&[], deadline)?;
            if !self.group.is_empty() {
                std::thread::sleep(self.backoff.min(MAX_WAIT));
            }
        }
        info!("committed everything that was read");
        Ok(())
    }

    /// Ends the stage after another stage has failed or the drain has run out of time. In the latter case, it first
    /// makes one quick attempt to commit. Records that are not committed are read again by the partitions' next owner.
    fn stop_early(mut self) -> Result<(), StreamError> {
        if !self.control.has_failed() {
            self.commit(&[], Instant::now() + MAX_WAIT)?;
        }
        let unfinished = self.uncommitted_count();
        if self.transaction_is_open {
            self.transaction().abort()?;
        }
        info!(
            unfinished,
            "stopped before every record was committed; the uncommitted ones will be read again"
        );
        Ok(())
    }
}
