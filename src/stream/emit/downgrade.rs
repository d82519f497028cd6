//! If a topic refuses an output, writes it in a smaller form, so that one record cannot stop the stream.
//!
//! A broker refuses a whole batch because of one record that is too large. A refused output is therefore first sent
//! again in a batch of its own, and only then replaced by a dead letter with nothing but its coordinates.

use std::time::Instant;

use tracing::warn;

use super::Emitter;
use super::group::CommitGroup;
use super::outbox::Undelivered;
use super::output::{Form, Origin};
use crate::kafka::errors::{ErrorClass, reason};
use crate::stream::control::StreamError;

/// How many commits in a row may fail for a reason that a smaller form cannot fix, such as an unknown error.
const MAX_OTHER_FAILURES: usize = 30;

/// Moves refused outputs to the next smaller form, and ends the stream if commits keep failing for other reasons.
#[derive(Debug)]
pub(super) struct Downgrades {
    origin: Origin,
    /// How many commits in a row have failed on undelivered outputs, none of which was refused.
    other_failures: usize,
}

impl Downgrades {
    pub(super) fn new(origin: Origin) -> Self {
        Self {
            origin,
            other_failures: 0,
        }
    }

    /// Resets the count of failures after a successful commit.
    pub(super) fn reset(&mut self) {
        self.other_failures = 0;
    }

    /// Moves every refused output to the next smaller form. `reason` describes the failed commit.
    ///
    /// # Errors
    /// Returns an error if an output has no smaller form left, or if commits keep failing for other reasons.
    pub(super) fn downgrade_refused(
        &mut self,
        group: &mut CommitGroup,
        undelivered: &[Undelivered],
        reason: &str,
    ) -> Result<(), StreamError> {
        let mut is_other_failure = !undelivered.is_empty();
        for &(number, code) in undelivered {
            if ErrorClass::of(code) == ErrorClass::RecordRefused
                && let Some(index) = group.index_of(number)
            {
                self.downgrade(group, index)?;
                is_other_failure = false;
            }
        }
        self.other_failures = if is_other_failure { self.other_failures + 1 } else { 0 };
        if self.other_failures > MAX_OTHER_FAILURES {
            return Err(StreamError::Kafka {
                doing: "write outputs",
                reason: reason.to_owned(),
            });
        }
        Ok(())
    }

    fn downgrade(&self, group: &mut CommitGroup, index: usize) -> Result<(), StreamError> {
        let output = &mut group.outputs_mut()[index];
        let position = output.record.position;
        if !self.origin.downgrade(output) {
            return Err(StreamError::Kafka {
                doing: "write a dead letter that contains only coordinates",
                reason: "the topic refuses it".to_owned(),
            });
        }
        // Most outputs of a refused batch are accepted alone, so only the loss of the value is worth a warning.
        if output.form == Form::Stripped {
            let (partition, offset) = (position.partition, position.offset);
            warn!(
                partition,
                offset, "the topic refuses an output, writing its coordinates instead"
            );
        }
        Ok(())
    }
}

impl Emitter {
    /// Sends an output of the group, in a smaller form if the client refuses its size. Returns the reason if the
    /// transaction must be aborted.
    pub(super) fn send(&mut self, index: usize) -> Result<Option<String>, StreamError> {
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
                    return Ok(self.outbox.first_failure().filter(|_| self.transaction_is_open));
                }
                Ok(()) => return Ok(None),
                Err(error) if ErrorClass::of_error(&error) == ErrorClass::RecordRefused => {
                    self.downgrades.downgrade(&mut self.group, index)?;
                }
                Err(error) if self.transaction_is_open => return Ok(Some(reason(&error))),
                Err(error) => return Err(StreamError::kafka("write an output", &error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rdkafka::types::RDKafkaErrorCode as Code;

    use super::super::output::tests::{SamplePartition, origin};
    use super::*;

    /// A group of three outputs, numbered from 0.
    fn group(sample: &SamplePartition) -> CommitGroup {
        let mut group = CommitGroup::default();
        for number in 0..3 {
            let mut output = origin().output(sample.tombstone(number as i64));
            output.number = number;
            group.push(output, Instant::now(), Duration::ZERO);
        }
        group
    }

    fn forms(group: &CommitGroup) -> Vec<Form> {
        group.outputs().iter().map(|output| output.form).collect()
    }

    #[test]
    fn only_refused_outputs_are_downgraded() {
        let sample = SamplePartition::default();
        let (mut group, mut downgrades) = (group(&sample), Downgrades::new(origin()));
        let undelivered = [
            (0, Code::MessageSizeTooLarge),
            (1, Code::PurgeInflight),
            (7, Code::MessageSizeTooLarge),
        ];
        downgrades
            .downgrade_refused(&mut group, &undelivered, "refused")
            .unwrap();
        assert_eq!(forms(&group), [Form::Alone, Form::Whole, Form::Whole]);
        downgrades
            .downgrade_refused(&mut group, &undelivered[..1], "refused")
            .unwrap();
        assert_eq!(forms(&group), [Form::Stripped, Form::Whole, Form::Whole]);
        let error = downgrades
            .downgrade_refused(&mut group, &undelivered[..1], "refused")
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot write a dead letter that contains only coordinates: the topic refuses it"
        );
    }

    #[test]
    fn repeated_failures_without_a_refused_output_end_the_stream() {
        let sample = SamplePartition::default();
        let (mut group, mut downgrades) = (group(&sample), Downgrades::new(origin()));
        let mut fail =
            |downgrades: &mut Downgrades| downgrades.downgrade_refused(&mut group, &[(0, Code::Unknown)], "unknown");
        for _ in 0..MAX_OTHER_FAILURES {
            fail(&mut downgrades).unwrap();
        }
        downgrades.reset();
        for _ in 0..MAX_OTHER_FAILURES {
            fail(&mut downgrades).unwrap();
        }
        assert_eq!(
            fail(&mut downgrades).unwrap_err().to_string(),
            "cannot write outputs: unknown"
        );
        assert_eq!(forms(&group), [Form::Whole; 3]);
    }
}
