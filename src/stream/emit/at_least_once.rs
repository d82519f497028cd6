//! Commits offsets once the outputs that they cover are acknowledged, for brokers without transactions.

use std::time::{Duration, Instant};

use rdkafka::consumer::{CommitMode, Consumer};

use super::Emitter;
use super::outbox::Delivered;
use super::transaction::{Failure, offsets_to_commit};
use crate::kafka::errors::reason;
use crate::stream::control::StreamError;

/// The longest single wait for acknowledgements. Messages never time out, so without a broker the wait would not end,
/// and rebalance callbacks wait behind it.
const ACKNOWLEDGEMENT_TIMEOUT: Duration = Duration::from_secs(1);

impl Emitter {
    pub(super) fn commit_acknowledged(&mut self, leaving: &[i32], deadline: Instant) -> Result<(), StreamError> {
        let start = Instant::now();
        match self.outbox.wait(deadline.min(start + ACKNOWLEDGEMENT_TIMEOUT)) {
            Delivered::All => {}
            Delivered::NotAll => {
                return self.resend_undelivered(leaving);
            }
            Delivered::Unknown => {
                let now = Instant::now();
                self.outage.note_failure(start, now, "outputs are not acknowledged");
                self.group.defer(now + self.pace.interval());
                if !leaving.is_empty() {
                    self.group.retain_owned(&self.ownership, leaving);
                }
                return Ok(());
            }
        }
        self.group.retain_owned(&self.ownership, &[]);
        let consumer = self.consumer.get();
        let offsets = offsets_to_commit(&self.origin.topic, &self.group, &self.committed.metadata())
            .map_err(|error| StreamError::kafka("list offsets", &error))?;
        let committed = if offsets.count() == 0 {
            Ok(())
        } else if !consumer.context().is_same_member(&consumer) {
            // As a new member, it could set offsets back that others have committed in the meantime.
            Err("the group has expelled this process".to_owned())
        } else {
            let committed = consumer.commit(&offsets, CommitMode::Sync);
            committed.map_err(|error| format!("cannot commit offsets: {}", reason(&error)))
        };
        if let Err(reason) = committed {
            // The outputs are written, and only their offsets are missing. A later commit covers them, or the new owner
            // of the partition writes the outputs again; readers recognise duplicates by the decision's id.
            let now = Instant::now();
            self.outage.note_failure(start, now, &reason);
            self.group.retain_owned(&self.ownership, leaving);
            self.group.defer(now + self.backlog.back_off(now));
            return Ok(());
        }
        self.complete_commit(start);
        Ok(())
    }

    /// Continues after an output could not be sent. The outputs that were sent before stay in the group, because they may
    /// be written already; only this one waits.
    pub(super) fn wait_to_send(&mut self, failure: Failure) -> Result<(), StreamError> {
        // What was not delivered is left for the next commit.
        let cause = self.examine(failure, &[])?;
        if cause.needs_producer {
            return self.start_again(cause, &[]);
        }
        let now = Instant::now();
        self.outage.note_failure(now, now, &cause.reason);
        self.backlog.back_off(now);
        Ok(())
    }

    /// Sends undelivered outputs again, in a smaller form if they were refused. Later outputs may already be written,
    /// so without transactions this can change the order of outputs.
    fn resend_undelivered(&mut self, leaving: &[i32]) -> Result<(), StreamError> {
        // Taken once: what fails from here on is left for the next commit.
        let undelivered = self.outbox.take_undelivered();
        let numbers: Vec<usize> = undelivered.iter().map(|&(number, _)| number).collect();
        let cause = self.examine(Failure::Undelivered, &undelivered)?;
        if cause.needs_producer {
            return self.start_again(cause, leaving);
        }
        let now = Instant::now();
        if cause.is_outage {
            self.outage.note_failure(now, now, &cause.reason);
            self.group.defer(now + self.backlog.back_off(now));
        }
        for number in numbers {
            if let Some(index) = self.group.index_of(number) {
                let mut output = self.group.remove(index);
                let sent = self.send(&mut output);
                self.group.insert(index, output);
                if let Err(failure) = sent {
                    return self.recover(failure, leaving);
                }
            }
        }
        Ok(())
    }
}
