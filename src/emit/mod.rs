//! The last stage: decisions, dead letters and input offsets, written together.
//!
//! One thread owns the producer. Outputs leave in the order in which their records were read, gather
//! in a group, and are committed every `kafka.commit_interval` across micro-batches and
//! partitions. With `exactly_once` the group is one Kafka transaction; an aborted one is produced
//! again from what the group keeps, never scored again. With `at_least_once` offsets are committed
//! once the outputs are acknowledged.

mod accounts;
mod group;
mod outbox;
mod output;
mod transaction;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, never, select};
use metrics::{counter, gauge, histogram};
use rdkafka::consumer::{CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;
use tracing::{debug, info, warn};

use crate::config::{Delivery, StreamConfig};
use crate::ingest::GroupConsumer;
use crate::kafka::client::Timeouts;
use crate::kafka::reason;
use crate::kafka::topics::Partitions;
use crate::message::NextOffset;
use crate::ops::metrics as names;
use crate::stream::{Control, Epoch, Finished, Lanes, Ownership, Progress, StreamError};
use group::Group;
use outbox::{Outbox, Undelivered};
use output::{Form, Origin};
use transaction::{Failed, Transaction, is_forbidden};

/// Longest sleep: how soon this thread notices that the stream is ending.
const TICK: Duration = Duration::from_millis(50);

/// First wait after an abort, doubled with each that follows.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(2);

/// Transactions that may break one after the other before the producer is given up. Each output that
/// its topic refuses breaks two; a group has as many as the operator's limit is off.
const MAX_ATTEMPTS: usize = 1000;

/// Settlings in a row that may fail on outputs for a reason that is none of theirs, as far as we know.
const MAX_UNMENDED: usize = 30;

/// What the rebalance callback tells the emitter.
#[derive(Debug)]
pub enum Command {
    /// A partition begins at an offset that its group has not committed yet.
    Begins {
        /// The partition.
        partition: i32,
        /// The assignment.
        epoch: Epoch,
        /// Where it begins.
        next: NextOffset,
    },
    /// Partitions are about to leave: commit what is finished, drop the rest, then answer.
    Revoked {
        /// The partitions, and the assignments that end.
        partitions: Vec<(i32, Epoch)>,
        /// Where the callback waits.
        done: Sender<()>,
    },
    /// Partitions have left already: abort.
    Lost(Vec<(i32, Epoch)>),
}

/// The stage.
pub struct Emitter {
    consumer: Arc<GroupConsumer>,
    control: Arc<Control>,
    ownership: Arc<Ownership>,
    progress: Arc<Progress>,
    outbox: Outbox,
    origin: Origin,
    delivery: Delivery,
    interval: Duration,
    timeouts: Timeouts,
    lanes: Lanes<Finished>,
    group: Group,
    /// A transaction is open. Opened with the first output or offset of a group.
    is_open: bool,
    backoff: Duration,
    /// Outputs so far; the next one's number.
    numbered: usize,
    /// Settlings in a row that failed on outputs without a form that could mend it.
    unmended: usize,
}

/// What the stage needs of the others.
pub struct Shared {
    /// Of the ingest stage.
    pub consumer: Arc<GroupConsumer>,
    /// How the stream ends.
    pub control: Arc<Control>,
    /// Who owns what.
    pub ownership: Arc<Ownership>,
    /// Told at each commit.
    pub progress: Arc<Progress>,
}

impl Emitter {
    /// Makes the producer and, with `exactly_once`, fences this instance's earlier selves.
    ///
    /// # Errors
    /// What Kafka refuses.
    pub fn new(stream: &StreamConfig, partitions: Partitions, shared: Shared) -> Result<Self, StreamError> {
        let outbox = Outbox::new(stream, partitions).map_err(|error| StreamError::Client(error.to_string()))?;
        if stream.delivery == Delivery::ExactlyOnce {
            Transaction::initialise(&outbox)?;
        }
        Ok(Self {
            consumer: shared.consumer,
            control: shared.control,
            ownership: shared.ownership,
            progress: shared.progress,
            outbox,
            origin: Origin {
                topic: stream.topics.comments.clone(),
                group: stream.group.clone(),
                instance: stream.instance.clone(),
            },
            delivery: stream.delivery,
            interval: stream.commit_interval,
            timeouts: Timeouts::of(&stream.properties),
            lanes: Lanes::default(),
            group: Group::default(),
            is_open: false,
            backoff: FIRST_BACKOFF,
            numbered: 0,
            unmended: 0,
        })
    }

    /// Writes until every earlier stage has ended, then commits the rest.
    ///
    /// # Errors
    /// What Kafka refuses for good; nothing of an unfinished group is visible then, and its records
    /// are read again.
    pub fn run(mut self, finished: &Receiver<Vec<Finished>>, commands: &Receiver<Command>) -> Result<(), StreamError> {
        let mut commands = commands.clone();
        loop {
            let now = Instant::now();
            if self.control.gives_up(now) {
                return self.give_up();
            }
            let due = self.group.due(now);
            if due.is_some_and(|due| due <= now) {
                // Whoever leaves must not wait behind a settling that fails again and again.
                while let Ok(command) = commands.try_recv() {
                    self.obey(command)?;
                }
                self.settle(&[], now + self.timeouts.transaction)?;
                continue;
            }
            let wait = due.map_or(TICK, |due| TICK.min(due - now));
            select! {
                recv(commands) -> command => match command {
                    Ok(command) => self.obey(command)?,
                    // The consumer has ended; nothing comes and goes any more.
                    Err(_) => commands = never(),
                },
                recv(finished) -> batch => {
                    // A partition that came back was told of before its new records were read.
                    while let Ok(command) = commands.try_recv() {
                        self.obey(command)?;
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

    fn absorb(&mut self, batch: Vec<Finished>) -> Result<(), StreamError> {
        let start = Instant::now();
        for finished in batch {
            let place = finished.record.place;
            // What is no longer ours must not wait in a lane: its predecessors may never come.
            if !self.ownership.owns(place.partition, place.epoch) {
                continue;
            }
            let released: Vec<Finished> = self.lanes.finish(place, finished).collect();
            for finished in released {
                let mut output = self.origin.output(finished);
                output.number = self.numbered;
                self.numbered += 1;
                self.open()?;
                self.group.push(output, start, self.interval);
                if let Some(broken) = self.send(self.group.outputs().len() - 1)? {
                    self.again(&broken, &[], Vec::new())?;
                }
            }
        }
        histogram!(names::STAGE_SECONDS, "stage" => "emit").record(start.elapsed());
        let (events, bytes) = self.group.load();
        gauge!(names::QUEUE_EVENTS, "queue" => "commit").set((events + self.lanes.held_back()) as f64);
        gauge!(names::QUEUE_BYTES, "queue" => "commit").set(bytes as f64);
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<(), StreamError> {
        let now = Instant::now();
        match command {
            Command::Begins { partition, epoch, next } => {
                self.open()?;
                self.group.cover(partition, epoch, next, now, self.interval);
            }
            Command::Revoked { partitions, done } => {
                self.lanes.close(&partitions);
                let leaving: Vec<i32> = partitions.iter().map(|&(partition, _)| partition).collect();
                self.settle(&leaving, now + self.timeouts.revoke())?;
                // A callback that no longer waits has gone on without us.
                let _ = done.send(());
            }
            Command::Lost(partitions) => {
                self.lanes.close(&partitions);
                if !self.group.is_owned(&self.ownership) {
                    self.again("partitions were lost", &[], Vec::new())?;
                }
            }
        }
        Ok(())
    }

    /// A transaction is begun with its first message, so that an idle daemon has none open.
    fn open(&mut self) -> Result<(), StreamError> {
        if self.delivery == Delivery::ExactlyOnce && !self.is_open {
            self.transaction().begin()?;
            self.is_open = true;
        }
        Ok(())
    }

    fn transaction(&self) -> Transaction<'_> {
        Transaction {
            outbox: &self.outbox,
            consumer: &self.consumer,
            control: &self.control,
        }
    }

    /// Hands an output of the group to the producer; gives the reason when its transaction is broken.
    /// An output that the client refuses for its size is sent in a smaller form.
    fn send(&mut self, index: usize) -> Result<Option<String>, StreamError> {
        let deadline = Instant::now() + self.timeouts.transaction;
        loop {
            let output = &self.group.outputs()[index];
            let is_alone = output.form == Form::Alone;
            if is_alone {
                self.outbox.wait(deadline);
            }
            match self.outbox.send(output, deadline) {
                Ok(()) if is_alone => {
                    self.outbox.wait(deadline);
                    return Ok(self.outbox.refusal().filter(|_| self.is_open));
                }
                Ok(()) => return Ok(None),
                Err(error) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) => {
                    self.step_down(index)?;
                }
                Err(error) if self.is_open => return Ok(Some(reason(&error))),
                Err(error) => return Err(refused(&error)),
            }
        }
    }

    fn step_down(&mut self, index: usize) -> Result<(), StreamError> {
        let output = &mut self.group.outputs_mut()[index];
        let place = output.record.place;
        if !self.origin.step_down(output) {
            return Err(StreamError::Kafka {
                doing: "write a dead letter of coordinates alone",
                reason: "the topic refuses it".to_owned(),
            });
        }
        // Most of a refused batch are innocent and go through alone: only what is stripped is news.
        if output.form == Form::Stripped {
            let (partition, offset) = (place.partition, place.offset);
            warn!(partition, offset, "an output is refused whole: writing its coordinates");
        }
        Ok(())
    }

    /// Commits the group, or keeps it for the next try. `leaving` partitions are not kept.
    fn settle(&mut self, leaving: &[i32], deadline: Instant) -> Result<(), StreamError> {
        if self.group.is_empty() {
            return Ok(());
        }
        match self.delivery {
            Delivery::ExactlyOnce => self.settle_transaction(leaving, deadline),
            Delivery::AtLeastOnce => self.settle_acknowledged(leaving, deadline),
        }
    }

    fn settle_transaction(&mut self, leaving: &[i32], deadline: Instant) -> Result<(), StreamError> {
        let start = Instant::now();
        let committed = self
            .transaction()
            .commit(&self.origin.topic, &self.group, &self.ownership, deadline);
        match committed {
            Ok(()) => {
                self.is_open = false;
                counter!(names::TRANSACTIONS, "result" => "committed").increment(1);
                self.committed(start);
                Ok(())
            }
            Err(Failed::Abort { reason, undelivered }) => self.again(&reason, leaving, undelivered),
            Err(Failed::Fatal(error)) => {
                if matches!(error, StreamError::Fenced { .. }) {
                    counter!(names::TRANSACTIONS, "result" => "fenced").increment(1);
                }
                Err(error)
            }
        }
    }

    /// Aborts, and produces what is still ours again, in a form that was not refused yet.
    fn again(&mut self, reason: &str, leaving: &[i32], mut undelivered: Vec<Undelivered>) -> Result<(), StreamError> {
        let mut reason = reason.to_owned();
        for _ in 0..MAX_ATTEMPTS {
            if self.is_open {
                warn!(reason, outputs = self.group.load().0, "aborting a transaction");
                undelivered.extend(self.outbox.undelivered());
                let aborted = self.transaction().abort();
                counter!(names::TRANSACTIONS, "result" => "aborted").increment(1);
                self.is_open = false;
                aborted?;
            }
            self.blame(undelivered.drain(..).as_slice(), &reason)?;
            self.group.keep_owned(&self.ownership, leaving);
            if self.group.is_empty() {
                return Ok(());
            }
            self.group.defer(Instant::now() + self.backoff);
            self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
            match self.send_all()? {
                None => return Ok(()),
                Some(broken) => reason = broken,
            }
        }
        Err(StreamError::Kafka {
            doing: "write outputs again after an abort",
            reason,
        })
    }

    /// Moves what the brokers refuse one step down. Refusals that no other form can mend end the daemon
    /// when they go on and on.
    fn blame(&mut self, undelivered: &[Undelivered], reason: &str) -> Result<(), StreamError> {
        let mut is_mended = undelivered.is_empty();
        for &(number, code) in undelivered {
            if is_refused(code)
                && let Some(index) = self.group.index_of(number)
            {
                self.step_down(index)?;
                is_mended = true;
            }
        }
        self.unmended = if is_mended { 0 } else { self.unmended + 1 };
        if self.unmended > MAX_UNMENDED {
            return Err(StreamError::Kafka {
                doing: "write outputs",
                reason: reason.to_owned(),
            });
        }
        Ok(())
    }

    /// Everything in the group, in a new transaction; the reason where that is broken again.
    fn send_all(&mut self) -> Result<Option<String>, StreamError> {
        self.open()?;
        for index in 0..self.group.outputs().len() {
            if let Some(broken) = self.send(index)? {
                return Ok(Some(broken));
            }
        }
        Ok(None)
    }

    fn settle_acknowledged(&mut self, leaving: &[i32], deadline: Instant) -> Result<(), StreamError> {
        let start = Instant::now();
        // Messages never time out, so with no broker this waits; in slices, since callbacks wait too.
        if !self.outbox.wait(deadline.min(start + Duration::from_secs(1))) {
            self.group.defer(Instant::now() + self.interval);
            if !leaving.is_empty() {
                self.group.keep_owned(&self.ownership, leaving);
            }
            return Ok(());
        }
        let undelivered = self.outbox.undelivered();
        if !undelivered.is_empty() {
            return self.send_smaller(undelivered);
        }
        self.group.keep_owned(&self.ownership, &[]);
        let mut offsets = TopicPartitionList::new();
        for (partition, next) in self.group.offsets() {
            let added = offsets.add_partition_offset(&self.origin.topic, partition, Offset::Offset(next.get()));
            added.map_err(|error| refused(&error))?;
        }
        if offsets.count() > 0
            && let Err(error) = self.consumer.commit(&offsets, CommitMode::Sync)
        {
            // The outputs are there; only their offsets are not. A later commit covers them, or their
            // new owner writes them again, which readers recognise by the decision's id.
            warn!(reason = reason(&error), "cannot commit offsets yet");
            self.group.keep_owned(&self.ownership, leaving);
            self.group.defer(Instant::now() + self.backoff);
            self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
            return Ok(());
        }
        self.committed(start);
        Ok(())
    }

    /// Sends what was refused once more, in another form where that can help. Its successors may have been
    /// written before it: without transactions order gives way here.
    fn send_smaller(&mut self, undelivered: Vec<Undelivered>) -> Result<(), StreamError> {
        if let Some(&(_, code)) = undelivered.iter().find(|&&(_, code)| is_forbidden(code)) {
            return Err(refused(&KafkaError::MessageProduction(code)));
        }
        let reason = undelivered
            .first()
            .map(|&(_, code)| reason(&KafkaError::MessageProduction(code)));
        self.blame(&undelivered, &reason.unwrap_or_default())?;
        self.group.defer(Instant::now() + self.backoff);
        self.backoff = (self.backoff * 2).min(LONGEST_BACKOFF);
        for (number, _) in undelivered {
            if let Some(index) = self.group.index_of(number) {
                self.send(index)?;
            }
        }
        Ok(())
    }

    /// Counts what is committed, and lets go of it.
    fn committed(&mut self, start: Instant) {
        (self.backoff, self.unmended) = (FIRST_BACKOFF, 0);
        let group = self.group.take();
        for (partition, next) in group.offsets() {
            self.progress.committed(partition, next);
        }
        accounts::record(group.outputs(), SystemTime::now());
        histogram!(names::STAGE_SECONDS, "stage" => "commit").record(start.elapsed());
        debug!(outputs = group.load().0, "committed");
    }

    /// Every earlier stage has ended: the last commit, tried until it succeeds or time is up.
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
            self.settle(&[], deadline)?;
            if !self.group.is_empty() {
                std::thread::sleep(self.backoff.min(TICK));
            }
        }
        info!("everything that was read is committed");
        Ok(())
    }

    /// Time is up, or another stage has failed: commits what is finished, if that is quick, and leaves
    /// the rest to whoever reads it next.
    fn give_up(mut self) -> Result<(), StreamError> {
        if !self.control.has_failed() {
            self.settle(&[], Instant::now() + TICK)?;
        }
        let unwritten = self.group.load().0 + self.lanes.held_back();
        if self.is_open {
            self.transaction().abort()?;
        }
        info!(unwritten, "ended with work unfinished; it will be read again");
        Ok(())
    }
}

/// What is refused for the record's own sake, for good: its size, its time, a key that a compacted topic
/// wants, a rule of the broker's. Another form can mend it.
fn is_refused(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::MessageSizeTooLarge
            | RDKafkaErrorCode::InvalidTimestamp
            | RDKafkaErrorCode::InvalidRecord
            | RDKafkaErrorCode::InvalidMessage
            | RDKafkaErrorCode::PolicyViolation
    )
}

fn refused(error: &KafkaError) -> StreamError {
    let (doing, reason) = ("write an output", reason(error));
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::TopicAuthorizationFailed | RDKafkaErrorCode::ClusterAuthorizationFailed) => {
            StreamError::Forbidden { doing, reason }
        }
        _ => StreamError::Kafka { doing, reason },
    }
}
