//! Commits a group in one Kafka transaction, together with the offsets that it covers.
//!
//! After an abort, the outputs of partitions that are still owned are produced again from the group, so nothing is
//! scored twice.

use std::time::Instant;

use metrics::counter;
use tracing::warn;

use super::Emitter;
use super::outbox::Undelivered;
use super::transaction::{Transaction, TransactionError};
use crate::config::Delivery;
use crate::ops::metrics as names;
use crate::stream::control::StreamError;

/// How many transactions in a row may be aborted before the stream ends. Each refused output aborts two,
/// and if the topic's size limit is too small, a group can contain many of them.
const MAX_ATTEMPTS: usize = 1000;

impl Emitter {
    /// Opens a transaction if outputs are written in one and none is open.
    pub(super) fn open_transaction(&mut self) -> Result<(), StreamError> {
        if self.delivery == Delivery::ExactlyOnce && !self.transaction_is_open {
            self.transaction().begin()?;
            self.transaction_is_open = true;
        }
        Ok(())
    }

    pub(super) fn transaction(&self) -> Transaction<'_> {
        Transaction {
            outbox: &self.outbox,
            consumer: &self.consumer,
            control: &self.control,
            offset_metadata: self.committed.metadata(),
        }
    }

    pub(super) fn commit_transaction(&mut self, leaving: &[i32], deadline: Instant) -> Result<(), StreamError> {
        let start = Instant::now();
        let committed = self
            .transaction()
            .commit(&self.origin.topic, &self.group, &self.ownership, deadline);
        match committed {
            Ok(()) => {
                self.transaction_is_open = false;
                counter!(names::TRANSACTIONS, "result" => "committed").increment(1);
                self.complete_commit(start);
                Ok(())
            }
            Err(TransactionError::Abort { reason, undelivered }) => {
                self.abort_and_resend(&reason, leaving, undelivered)
            }
            Err(TransactionError::Fatal(error)) => {
                if matches!(error, StreamError::Fenced { .. }) {
                    counter!(names::TRANSACTIONS, "result" => "fenced").increment(1);
                }
                Err(error)
            }
        }
    }

    /// Aborts the open transaction, and produces the outputs of owned partitions again in a new one. Outputs that were
    /// refused are produced in a smaller form.
    pub(super) fn abort_and_resend(
        &mut self,
        reason: &str,
        leaving: &[i32],
        mut undelivered: Vec<Undelivered>,
    ) -> Result<(), StreamError> {
        let mut reason = reason.to_owned();
        for _ in 0..MAX_ATTEMPTS {
            if self.transaction_is_open {
                warn!(reason, outputs = self.group.outputs().len(), "aborting a transaction");
                undelivered.extend(self.outbox.take_undelivered());
                let aborted = self.transaction().abort();
                counter!(names::TRANSACTIONS, "result" => "aborted").increment(1);
                self.transaction_is_open = false;
                aborted?;
            }
            self.downgrades
                .downgrade_refused(&mut self.group, &undelivered, &reason)?;
            undelivered.clear();
            self.group.retain_owned(&self.ownership, leaving);
            if self.group.is_empty() {
                return Ok(());
            }
            self.back_off();
            match self.resend()? {
                None => return Ok(()),
                Some(failure) => reason = failure,
            }
        }
        Err(StreamError::Kafka {
            doing: "write outputs again after an abort",
            reason,
        })
    }

    /// Produces the whole group in a new transaction. Returns the reason if that one must be aborted too.
    fn resend(&mut self) -> Result<Option<String>, StreamError> {
        self.open_transaction()?;
        for index in 0..self.group.outputs().len() {
            if let Some(reason) = self.send(index)? {
                return Ok(Some(reason));
            }
        }
        Ok(None)
    }
}
