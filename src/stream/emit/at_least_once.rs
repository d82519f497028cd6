//! Commits offsets once the outputs that they cover are acknowledged, for brokers without transactions.

use std::time::{Duration, Instant};

use rdkafka::consumer::{CommitMode, Consumer};
use tracing::warn;

use super::Emitter;
use super::outbox::{Undelivered, permanent_failure};
use super::transaction::offsets_to_commit;
use crate::kafka::errors::{reason, reason_of_code};
use crate::stream::control::StreamError;

/// The longest single wait for acknowledgements. Messages never time out, so without a broker the wait would not end,
/// and rebalance callbacks wait behind it.
const ACKNOWLEDGEMENT_TIMEOUT: Duration = Duration::from_secs(1);

impl Emitter {
    pub(super) fn commit_acknowledged(&mut self, leaving: &[i32], deadline: Instant) -> Result<(), StreamError> {
        let start = Instant::now();
        if !self.outbox.wait(deadline.min(start + ACKNOWLEDGEMENT_TIMEOUT)) {
            self.group.defer(Instant::now() + self.interval);
            if !leaving.is_empty() {
                self.group.retain_owned(&self.ownership, leaving);
            }
            return Ok(());
        }
        let undelivered = self.outbox.take_undelivered();
        if !undelivered.is_empty() {
            return self.resend_undelivered(&undelivered);
        }
        self.group.retain_owned(&self.ownership, &[]);
        let offsets = offsets_to_commit(&self.origin.topic, &self.group, &self.committed.metadata())
            .map_err(|error| StreamError::kafka("list offsets", &error))?;
        if offsets.count() > 0
            && let Err(error) = self.consumer.commit(&offsets, CommitMode::Sync)
        {
            // The outputs are written, and only their offsets are missing. A later commit covers them, or the new owner
            // of the partition writes the outputs again; readers recognise duplicates by the decision's id.
            warn!(reason = reason(&error), "cannot commit offsets yet");
            self.group.retain_owned(&self.ownership, leaving);
            self.back_off();
            return Ok(());
        }
        self.complete_commit(start);
        Ok(())
    }

    /// Sends undelivered outputs again, in a smaller form if they were refused. Later outputs may already be written,
    /// so without transactions this can change the order of outputs.
    fn resend_undelivered(&mut self, undelivered: &[Undelivered]) -> Result<(), StreamError> {
        if let Some(error) = permanent_failure(undelivered) {
            return Err(error);
        }
        let reason = undelivered.first().map(|&(_, code)| reason_of_code(code));
        self.downgrades
            .downgrade_refused(&mut self.group, undelivered, &reason.unwrap_or_default())?;
        self.back_off();
        for &(number, _) in undelivered {
            if let Some(index) = self.group.index_of(number) {
                self.send(index)?;
            }
        }
        Ok(())
    }
}
