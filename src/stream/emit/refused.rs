//! If a topic refuses outputs, writes them in a smaller form, so that one record cannot stop the stream.
//!
//! A broker refuses a whole batch because of one record. Which one it is follows from the batch's maximum size: a larger
//! output is sent in a batch of its own, and with smaller ones, the batches are made smaller until that is so. What a
//! topic refuses for another reason is either named by the broker, or has no key.

use std::collections::BTreeMap;

use rdkafka::types::RDKafkaErrorCode as Code;

use super::limits::OutputLimits;
use super::outbox::Undelivered;
use super::output::{Form, Origin, Output};
use crate::kafka::errors::{ErrorClass, reason_of_code};
use crate::stream::control::StreamError;
use crate::stream::record::RecordPosition;

/// The batches of a producer are not made smaller than this.
const MIN_BATCH_BYTES: usize = 1 << 10;

/// More than what a batch and its only record take in addition to the record's content, without the headers.
const RECORD_OVERHEAD: usize = 128;

/// More than what a header takes in addition to its name and value.
const HEADER_OVERHEAD: usize = 8;

/// What follows from the refusal of outputs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The position of the first output that was replaced by a dead letter without a value, and why, if any was.
    pub first_stripped: Option<(RecordPosition, String)>,
    /// The outputs may have been refused because of others in their batch, so smaller batches are necessary.
    pub needs_smaller_batches: bool,
}

/// Finds out which outputs of a failed commit were refused for what they are, and strips all of them at once.
///
/// `batch_bytes` is the size of the largest batch of several records.
///
/// # Errors
/// Returns an error if the topic refuses an output that is stripped already.
pub(super) fn strip_refused(
    outputs: &mut [Output],
    undelivered: &[Undelivered],
    batch_bytes: usize,
    origin: &Origin,
    limits: &mut OutputLimits,
) -> Result<Refusal, StreamError> {
    let codes: BTreeMap<usize, Code> = undelivered
        .iter()
        .copied()
        .filter(|&(_, code)| ErrorClass::of(code) == ErrorClass::RecordRefused)
        .collect();
    let refused: Vec<(&mut Output, Code)> = outputs
        .iter_mut()
        .filter_map(|output| codes.get(&output.number).map(|&code| (output, code)))
        .collect();
    let lacks_key =
        |(output, code): &(&mut Output, Code)| *code != Code::MessageSizeTooLarge && output.record.key.is_none();
    let has_keyless = refused.iter().any(lacks_key);
    let mut refusal = Refusal::default();
    for (output, code) in refused {
        if code == Code::MessageSizeTooLarge {
            let could_share_batch = max_batch_bytes_alone(output) < batch_bytes;
            if could_share_batch && batch_bytes > MIN_BATCH_BYTES {
                refusal.needs_smaller_batches = true;
                continue;
            }
            limits.exceeded_by(output);
        } else if has_keyless {
            if output.record.key.is_some() {
                // Brokers that do not name the record at fault refuse all records of the batch.
                continue;
            }
            limits.require_key(output.destination);
        }
        if output.form == Form::Stripped {
            return Err(StreamError::Kafka {
                doing: "write a dead letter that contains only coordinates",
                reason: format!("the topic refuses it ({})", reason_of_code(code)),
            });
        }
        origin.strip(output);
        let position = output.record.position;
        refusal
            .first_stripped
            .get_or_insert_with(|| (position, reason_of_code(code)));
    }
    Ok(refusal)
}

/// Returns the maximum size of a batch in which the output is the only record.
fn max_batch_bytes_alone(output: &Output) -> usize {
    output.content_bytes() + RECORD_OVERHEAD + HEADER_OVERHEAD * output.header_count()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::limits::tests::limits;
    use super::super::output::tests::{dead_letter, origin};
    use super::*;

    /// Three outputs, numbered from 0, with values of the given sizes, and keys except where the size is odd.
    fn outputs(sizes: [usize; 3]) -> Vec<Output> {
        let output = |(number, size): (usize, usize)| {
            let key = Some(&b"key"[..]).filter(|_| size.is_multiple_of(2));
            let mut output = dead_letter(Some(&vec![b'a'; size]), key);
            output.number = number;
            output
        };
        sizes.into_iter().enumerate().map(output).collect()
    }

    fn stripped(outputs: &[Output]) -> Vec<usize> {
        let stripped = outputs.iter().filter(|output| output.form == Form::Stripped);
        stripped.map(|output| output.number).collect()
    }

    fn strip(outputs: &mut [Output], undelivered: &[Undelivered], batch_bytes: usize) -> Result<Refusal, StreamError> {
        strip_refused(
            outputs,
            undelivered,
            batch_bytes,
            &origin(),
            &mut limits(Instant::now()),
        )
    }

    #[test]
    fn all_outputs_that_were_refused_alone_are_stripped_at_once() {
        let mut outputs = outputs([20_000, 10, 30_000]);
        let undelivered = [
            (0, Code::MessageSizeTooLarge),
            (1, Code::PurgeInflight),
            (2, Code::MessageSizeTooLarge),
            (7, Code::MessageSizeTooLarge),
        ];
        let refusal = strip(&mut outputs, &undelivered, 10_000).unwrap();
        assert_eq!(refusal.first_stripped.unwrap().1, "Broker: Message size too large");
        assert!(!refusal.needs_smaller_batches);
        assert_eq!(stripped(&outputs), [0, 2]);
    }

    #[test]
    fn outputs_that_may_have_shared_a_batch_are_sent_in_smaller_batches_first() {
        let mut outputs = outputs([20_000, 10, 30_000]);
        let undelivered = [(0, Code::MessageSizeTooLarge), (1, Code::MessageSizeTooLarge)];
        let mut batch_bytes = 1 << 18;
        while strip(&mut outputs, &undelivered, batch_bytes)
            .unwrap()
            .needs_smaller_batches
        {
            batch_bytes /= 2;
            assert!(batch_bytes >= MIN_BATCH_BYTES / 2, "the batches shrink without end");
            if !stripped(&outputs).is_empty() {
                // From here on, the topic accepts what is left.
                break;
            }
        }
        assert_eq!(stripped(&outputs), [0]);
    }

    #[test]
    fn of_a_batch_with_an_output_without_a_key_only_that_one_is_stripped() {
        let refused = [0, 1, 2].map(|number| (number, Code::InvalidRecord));
        let mut mixed = outputs([10, 11, 12]);
        strip(&mut mixed, &refused, 10_000).unwrap();
        assert_eq!(stripped(&mixed), [1]);
        // Without such an output, there is another reason.
        let mut keyed = outputs([10, 12, 14]);
        strip(&mut keyed, &refused[..2], 10_000).unwrap();
        assert_eq!(stripped(&keyed), [0, 1]);
    }

    #[test]
    fn a_stripped_output_that_is_refused_ends_the_stream() {
        let mut outputs = outputs([20_000, 10, 12]);
        let undelivered = [(0, Code::PolicyViolation)];
        strip(&mut outputs, &undelivered, 10_000).unwrap();
        let error = strip(&mut outputs, &undelivered, 10_000).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot write a dead letter that contains only coordinates: the topic refuses it (Broker: Policy violation)"
        );
    }
}
