//! What happens to an output that its topic refuses: it is written in a smaller form.
//!
//! A broker refuses a whole batch for one record that is too large, so a refused output is first tried alone, and
//! only then replaced by its coordinates. Whatever a topic accepts, the stream goes on.

use std::time::Instant;

use tracing::warn;

use super::Emitter;
use super::group::CommitGroup;
use super::outbox::Undelivered;
use super::output::{Form, Origin};
use crate::kafka::errors::{ErrorClass, reason};
use crate::stream::control::StreamError;

/// Commits in a row that may fail on outputs that no smaller form can help, such as for an unknown error.
const MAX_UNEXPLAINED: usize = 30;

/// Moves refused outputs to the next smaller form, and limits how long failures may go on that this does not explain.
#[derive(Debug)]
pub(super) struct Downgrades {
    origin: Origin,
    /// Failed commits in a row in which no output was refused for its own sake.
    unexplained: usize,
}

impl Downgrades {
    pub(super) fn new(origin: Origin) -> Self {
        Self { origin, unexplained: 0 }
    }

    /// A commit has succeeded.
    pub(super) fn reset(&mut self) {
        self.unexplained = 0;
    }

    /// Moves every output that was refused for its own sake to the next smaller form.
    ///
    /// # Errors
    /// An output has no smaller form left, or commits keep failing for another reason.
    pub(super) fn refused(
        &mut self,
        group: &mut CommitGroup,
        undelivered: &[Undelivered],
        reason: &str,
    ) -> Result<(), StreamError> {
        let mut is_explained = undelivered.is_empty();
        for &(number, code) in undelivered {
            if ErrorClass::of(code) == ErrorClass::RecordRefused
                && let Some(index) = group.index_of(number)
            {
                self.step_down(group, index)?;
                is_explained = true;
            }
        }
        self.unexplained = if is_explained { 0 } else { self.unexplained + 1 };
        if self.unexplained > MAX_UNEXPLAINED {
            return Err(StreamError::Kafka {
                doing: "write outputs",
                reason: reason.to_owned(),
            });
        }
        Ok(())
    }

    fn step_down(&self, group: &mut CommitGroup, index: usize) -> Result<(), StreamError> {
        let output = &mut group.outputs_mut()[index];
        let position = output.record.position;
        if !self.origin.step_down(output) {
            return Err(StreamError::Kafka {
                doing: "write a dead letter that holds coordinates alone",
                reason: "the topic refuses it".to_owned(),
            });
        }
        // Most outputs of a refused batch are accepted alone: only one that loses its value is worth a warning.
        if output.form == Form::Stripped {
            let (partition, offset) = (position.partition, position.offset);
            warn!(
                partition,
                offset, "the topic refuses an output: writing its coordinates instead"
            );
        }
        Ok(())
    }
}

impl Emitter {
    /// Hands an output of the group to the producer. An output that the client refuses for its size is sent in a
    /// smaller form. Returns the reason if the transaction is broken and must be aborted.
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
                    return Ok(self.outbox.refusal().filter(|_| self.transaction_is_open));
                }
                Ok(()) => return Ok(None),
                Err(error) if ErrorClass::of_error(&error) == ErrorClass::RecordRefused => {
                    self.downgrades.step_down(&mut self.group, index)?;
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
    fn only_refused_outputs_step_down() {
        let sample = SamplePartition::default();
        let (mut group, mut downgrades) = (group(&sample), Downgrades::new(origin()));
        let undelivered = [
            (0, Code::MessageSizeTooLarge),
            (1, Code::PurgeInflight),
            (7, Code::MessageSizeTooLarge),
        ];
        downgrades.refused(&mut group, &undelivered, "refused").unwrap();
        assert_eq!(forms(&group), [Form::Alone, Form::Whole, Form::Whole]);
        downgrades.refused(&mut group, &undelivered[..1], "refused").unwrap();
        assert_eq!(forms(&group), [Form::Stripped, Form::Whole, Form::Whole]);
        let error = downgrades
            .refused(&mut group, &undelivered[..1], "refused")
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot write a dead letter that holds coordinates alone: the topic refuses it"
        );
    }

    #[test]
    fn failures_that_no_smaller_form_explains_end_the_stream() {
        let sample = SamplePartition::default();
        let (mut group, mut downgrades) = (group(&sample), Downgrades::new(origin()));
        let mut fail = |downgrades: &mut Downgrades| downgrades.refused(&mut group, &[(0, Code::Unknown)], "unknown");
        for _ in 0..MAX_UNEXPLAINED {
            fail(&mut downgrades).unwrap();
        }
        downgrades.reset();
        for _ in 0..MAX_UNEXPLAINED {
            fail(&mut downgrades).unwrap();
        }
        assert_eq!(
            fail(&mut downgrades).unwrap_err().to_string(),
            "cannot write outputs: unknown"
        );
        assert_eq!(forms(&group), [Form::Whole; 3]);
    }
}
