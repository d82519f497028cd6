//! Commits a group in one Kafka transaction, together with the offsets that it covers.

use std::time::Instant;

use metrics::counter;

use super::Emitter;
use super::transaction::{Failure, Transaction};
use crate::config::Delivery;
use crate::ops::metrics as names;
use crate::stream::control::StreamError;

impl Emitter {
    /// Opens a transaction if outputs are written in one and none is open.
    pub(super) fn open_transaction(&mut self) -> Result<(), Failure> {
        if self.delivery == Delivery::ExactlyOnce && !self.transaction_is_open {
            Transaction::begin(&self.outbox)?;
            self.transaction_is_open = true;
        }
        Ok(())
    }

    pub(super) fn transaction(&mut self) -> Transaction<'_> {
        Transaction {
            outbox: &self.outbox,
            consumer: self.consumer.get(),
            control: &self.control,
            outage: &mut self.outage,
            offset_metadata: self.committed.metadata(),
        }
    }

    pub(super) fn commit_transaction(&mut self, leaving: &[i32], deadline: Instant) -> Result<(), StreamError> {
        let start = Instant::now();
        let committed = {
            let mut transaction = Transaction {
                outbox: &self.outbox,
                consumer: self.consumer.get(),
                control: &self.control,
                outage: &mut self.outage,
                offset_metadata: self.committed.metadata(),
            };
            let prepared = transaction.prepare(&self.origin.topic, &self.group, &self.ownership, deadline);
            prepared.and_then(|()| {
                self.is_in_doubt = true;
                transaction.commit()
            })
        };
        match committed {
            Ok(()) => {
                self.transaction_is_open = false;
                self.is_in_doubt = false;
                counter!(names::TRANSACTIONS, "result" => "committed").increment(1);
                self.complete_commit(start);
                Ok(())
            }
            Err(failure) => self.recover(failure, leaving),
        }
    }
}
