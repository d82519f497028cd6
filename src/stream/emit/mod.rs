//! The last stage: decisions, dead letters and input offsets, written together.
//!
//! One thread owns the producer. Outputs leave in the order in which their records were read, gather in a group, and
//! are committed every `kafka.commit_interval` across micro-batches and partitions: in one Kafka transaction
//! ([`exactly_once`]), or once the outputs are acknowledged ([`at_least_once`]). An output that its topic refuses is
//! written in a smaller form ([`downgrade`]).

mod output;
mod group;
mod outbox;
mod transaction;
mod accounts;
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
use crate::kafka::topics::Partitions;
use crate::ops::metrics as names;
use downgrade::Downgrades;
use group::CommitGroup;
use outbox::Outbox;
use output::Origin;
use transaction::Transaction;

/// Longest sleep: how soon this thread notices that the stream is ending.
const TICK: Duration = Duration::from_millis(50);

/// Wait after a failed commit, doubled with each that follows.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);

/// The producer of a stream, ready to write: with `exactly_once`, earlier producers of the same instance are fenced.
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
    /// The client cannot be made, or Kafka refuses the transactional id.
    pub fn connect(stream: &StreamConfig, partitions: Partitions) -> Result<Self, StreamError> {
        let outbox = Outbox::new(stream, partitions).map_err(|error| StreamError::Client(error.to_string()))?;
        if stream.delivery == Delivery::ExactlyOnce {
            Transaction::initialise(&outbox)?;
        }
        Ok(Self {
            outbox,
            origin: Origin {
                topic: stream.topics.comments.clone(),
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
    /// Writes the outputs.
    pub producer: OutputProducer,
    /// Commits offsets, or gives its group's metadata to the transaction. Owned by the ingest stage.
    pub consumer: Arc<GroupConsumer>,
    /// Which partitions belong to this process.
    pub ownership: Arc<Ownership>,
    /// Updated at each commit.
    pub committed: Arc<CommittedOffsets>,
    /// How the stream ends.
    pub control: Arc<Control>,
    /// Finished records, in the order in which stages finish them.
    pub finished: Receiver<Vec<Finished>>,
    /// Changes of the assignment, from the rebalance callback.
    pub rebalances: Receiver<Rebalance>,
    /// Closed when this stage has ended, so that the consumer outlives the last commit.
    pub ended: Sender<()>,
}

impl EmitStage {
    /// Writes until every earlier stage has ended, then commits the rest.
    ///
    /// # Errors
    /// What Kafka refuses for good. Nothing of an unfinished group becomes visible in that case, and its records are
    /// read again.
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
            backoff: FIRST_BACKOFF,
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
    /// What the next commit covers.
    group: CommitGroup,
    /// Opened with the first output or offset of a group, so that an idle daemon has no open transaction.
    transaction_is_open: bool,
    backoff: Duration,
    downgrades: Downgrades,
    /// Number of the next output.
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
            if self.control.gives_up(now) {
                return self.give_up();
            }
            let due = self.group.due(now);
            if due.is_some_and(|due| due <= now) {
                // A partition that leaves must not wait behind a commit that fails again and again.
                while let Ok(rebalance) = rebalances.try_recv() {
                    self.rebalance(rebalance)?;
                }
                self.commit(&[], now + self.timeouts.transaction)?;
                continue;
            }
            let wait = due.map_or(TICK, |due| TICK.min(due - now));
            select! {
                recv(rebalances) -> rebalance => match rebalance {
                    Ok(rebalance) => self.rebalance(rebalance)?,
                    // The consumer has ended, so the assignment no longer changes.
                    Err(_) => rebalances = never(),
                },
                recv(finished) -> batch => {
                    // A partition that came back was announced before its new records were read.
                    while let Ok(rebalance) = rebalances.try_recv() {
                        self.rebalance(rebalance)?;
                    }
                    match batch {
                        Ok(batch) => self.absorb(batch)?,
                        Err(_) => return self.finish(),
                    }
                }
                default(wait) => {}
            }
        }
    }

    /// Puts finished records in order and hands their outputs to the producer.
    fn absorb(&mut self, batch: Vec<Finished>) -> Result<(), StreamError> {
        let start = Instant::now();
        for finished in batch {
            let position = finished.record.position;
            // A record whose partition has left must not wait in a lane: its predecessors may never come.
            if !self.ownership.owns(position.partition, position.epoch) {
                continue;
            }
            let released: Vec<Finished> = self.lanes.finish(position, finished).collect();
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
        let (events, bytes) = self.group.load();
        gauge!(names::QUEUE_EVENTS, "queue" => "commit").set((events + self.lanes.held_back()) as f64);
        gauge!(names::QUEUE_BYTES, "queue" => "commit").set(bytes as f64);
        Ok(())
    }

    fn rebalance(&mut self, rebalance: Rebalance) -> Result<(), StreamError> {
        let now = Instant::now();
        match rebalance {
            Rebalance::Begins { partition, epoch, next } => {
                self.open_transaction()?;
                self.group.cover(partition, epoch, next, now, self.interval);
            }
            Rebalance::Revoked { partitions, done } => {
                self.lanes.close(&partitions);
                let leaving: Vec<i32> = partitions.iter().map(|&(partition, _)| partition).collect();
                self.commit(&leaving, now + self.timeouts.revoke())?;
                // A callback that stopped waiting has dropped its end of the channel.
                let _ = done.send(());
            }
            Rebalance::Lost(partitions) => {
                self.lanes.close(&partitions);
                if !self.group.is_owned(&self.ownership) {
                    self.abort_and_resend("partitions were lost", &[], Vec::new())?;
                }
            }
        }
        Ok(())
    }

    /// Commits the group, or keeps it for the next attempt. `leaving` partitions are not kept.
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
        self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
    }

    /// Counts and releases a group that was committed.
    fn record_commit(&mut self, start: Instant) {
        self.backoff = FIRST_BACKOFF;
        self.downgrades.reset();
        let group = self.group.take();
        for (partition, next) in group.offsets() {
            self.committed.committed(partition, next);
        }
        accounts::record(group.outputs(), SystemTime::now());
        histogram!(names::STAGE_SECONDS, "stage" => "commit").record(start.elapsed());
        debug!(outputs = group.load().0, "committed");
    }

    /// Every earlier stage has ended: makes the last commit, retrying until it succeeds or the deadline passes.
    fn finish(mut self) -> Result<(), StreamError> {
        while !self.group.is_empty() {
            let now = Instant::now();
            if self.control.gives_up(now) {
                return self.give_up();
            }
            let patience = now + self.timeouts.transaction;
            let deadline = self
                .control
                .deadline()
                .map_or(patience, |deadline| deadline.min(patience));
            self.commit(&[], deadline)?;
            if !self.group.is_empty() {
                std::thread::sleep(self.backoff.min(TICK));
            }
        }
        info!("committed everything that was read");
        Ok(())
    }

    /// The deadline has passed or another stage has failed: commits what is finished if that is quick, and leaves the
    /// rest to the partitions' next owner.
    fn give_up(mut self) -> Result<(), StreamError> {
        if !self.control.has_failed() {
            self.commit(&[], Instant::now() + TICK)?;
        }
        let unwritten = self.group.load().0 + self.lanes.held_back();
        if self.transaction_is_open {
            self.transaction().abort()?;
        }
        info!(unwritten, "ended with unfinished records; they will be read again");
        Ok(())
    }
}
