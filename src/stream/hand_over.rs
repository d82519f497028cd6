//! The wait of a thread that gathers rows for the scorer.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Select, Sender};

use super::batch::{Batcher, MicroBatch};

/// The longest wait, which limits how late a thread notices that it has to end.
const MAX_WAIT: Duration = Duration::from_millis(100);

/// What has happened while a thread waited.
pub(crate) enum Waited<T> {
    /// More work has come.
    Input(T),
    /// No more work will come.
    InputEnded,
    /// The scorer has taken a micro-batch, or nothing has happened.
    Nothing,
    /// The scorer has ended.
    ScorerEnded,
}

/// Waits for more work, and hands a micro-batch over as soon as one is due and the scorer is free. Until it is full, more
/// can be added to it in the meantime.
pub(crate) fn wait<T, U>(
    batcher: &mut Batcher<U>,
    input: &Receiver<T>,
    batches: &Sender<MicroBatch<U>>,
    now: Instant,
) -> Waited<T> {
    let received = if batcher.is_due(now) {
        let mut select = Select::new_biased();
        let to_scorer = select.send(batches);
        if !batcher.is_full() {
            select.recv(input);
        }
        match select.select_timeout(MAX_WAIT) {
            Ok(operation) if operation.index() == to_scorer => {
                let batch = batcher.take().expect("a batch that is due has rows");
                return match operation.send(batches, batch) {
                    Ok(()) => Waited::Nothing,
                    Err(_) => Waited::ScorerEnded,
                };
            }
            Ok(operation) => operation.recv(input).map_err(RecvTimeoutError::from),
            Err(_) => Err(RecvTimeoutError::Timeout),
        }
    } else {
        let until_due = batcher.due().map(|due| due.saturating_duration_since(now));
        input.recv_timeout(until_due.map_or(MAX_WAIT, |until_due| until_due.min(MAX_WAIT)))
    };
    match received {
        Ok(item) => Waited::Input(item),
        Err(RecvTimeoutError::Timeout) => Waited::Nothing,
        Err(RecvTimeoutError::Disconnected) => Waited::InputEnded,
    }
}
