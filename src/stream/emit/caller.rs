//! Makes calls to the client library on a thread of their own, so that one that does not return can be given up.
//!
//! Some calls ignore their timeout. `send_offsets_to_transaction`, for example, waits for the broker that the producer
//! remembers as the coordinator of the group, even if that broker is down and the group has another one by now.

use std::cell::Cell;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use rdkafka::error::{KafkaError, KafkaResult};

type Call = Box<dyn FnOnce() -> KafkaResult<()> + Send>;

/// Makes one call at a time, and gives up all further ones after a call that did not return.
pub(super) struct Caller {
    calls: Option<Sender<Call>>,
    results: Receiver<KafkaResult<()>>,
    thread: Option<JoinHandle<()>>,
    is_stuck: Cell<bool>,
}

impl Caller {
    /// Starts the thread.
    ///
    /// # Errors
    /// Returns an error if the system cannot start another thread.
    pub fn start() -> KafkaResult<Self> {
        let (calls, received) = bounded::<Call>(1);
        let (result, results) = bounded(1);
        let work = move || {
            for call in received {
                // Sending fails if the caller no longer waits.
                let _ = result.send(call());
            }
        };
        let thread = Builder::new().name("transactions".to_owned()).spawn(work);
        let thread = thread.map_err(|error| KafkaError::ClientCreation(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            calls: Some(calls),
            results,
            thread: Some(thread),
            is_stuck: Cell::new(false),
        })
    }

    /// Makes a call and returns its result, or `None` if it does not return within `limit`, or an earlier one did not.
    pub fn call(
        &self,
        limit: Duration,
        call: impl FnOnce() -> KafkaResult<()> + Send + 'static,
    ) -> Option<KafkaResult<()>> {
        if self.is_stuck.get() {
            return None;
        }
        let sent = self.calls.as_ref()?.send(Box::new(call));
        let result = sent.ok().and_then(|()| self.results.recv_timeout(limit).ok());
        self.is_stuck.set(result.is_none());
        result
    }
}

impl Drop for Caller {
    /// Waits for the thread, unless a call did not return: the thread then ends with that call.
    fn drop(&mut self) {
        drop(self.calls.take());
        if let Some(thread) = self.thread.take()
            && !self.is_stuck.get()
        {
            // A panic in the client library's wrapper has been reported by the panic hook.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_does_not_return_is_given_up() {
        let caller = Caller::start().unwrap();
        let limit = Duration::from_secs(20);
        assert_eq!(caller.call(limit, || Ok(())), Some(Ok(())));
        assert_eq!(
            caller.call(limit, || Err(KafkaError::Canceled)),
            Some(Err(KafkaError::Canceled))
        );
        let (release, released) = bounded::<()>(0);
        let wait = move || {
            let _ = released.recv();
            Ok(())
        };
        assert_eq!(caller.call(Duration::from_millis(10), wait), None);
        assert_eq!(caller.call(limit, || Ok(())), None);
        // Does not wait for the call.
        drop(caller);
        drop(release);
    }
}
