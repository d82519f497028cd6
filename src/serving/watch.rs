//! Follows the registry's pointer while the daemon serves.
//!
//! A version that cannot serve is refused, logged and counted, once for each pointer; what served goes
//! on serving, and the next pointer is tried again.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use metrics::{counter, gauge};
use tokio::runtime::Runtime;
use tracing::{error, info, warn};

use super::{ModelSource, Served};
use crate::message::ModelIdentity;
use crate::ops::metrics as names;
use crate::registry::{Pointer, Registry};
use crate::stream::score::Replacement;

/// Follows until the daemon ends.
pub struct Watch {
    /// What is loaded.
    pub source: ModelSource,
    /// Where versions are.
    pub registry: Registry,
    /// The pointer that is in service; 0 for none.
    pub serving: u64,
    /// Own tokens of a micro-batch.
    pub max_tokens: usize,
    /// How often to look.
    pub poll: Duration,
}

impl Watch {
    /// Looks at every poll and nudge, until the nudging side is gone.
    pub fn run(mut self, nudges: &Receiver<()>, swap: &Sender<Replacement>) {
        let runtime = match super::runtime() {
            Ok(runtime) => runtime,
            Err(error) => return error!(%error, "cannot watch the registry"),
        };
        let mut refused = 0;
        loop {
            match nudges.recv_timeout(self.poll) {
                Err(RecvTimeoutError::Disconnected) => return,
                // Whoever nudges wants a refused version tried again.
                Ok(()) => refused = 0,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let pointer = match runtime.block_on(self.registry.current()) {
                Ok(Some(pointer)) => pointer,
                Ok(None) => continue,
                Err(error) => {
                    warn!(%error, "cannot look at the registry");
                    continue;
                }
            };
            if pointer.sequence == self.serving || pointer.sequence == refused {
                continue;
            }
            match self.swap(&runtime, &pointer, swap) {
                Ok(true) => self.serving = pointer.sequence,
                Ok(false) => return,
                Err(reason) => {
                    refused = pointer.sequence;
                    counter!(names::ADAPTER_SWAPS, "result" => "refused").increment(1);
                    let version = pointer.version.as_ref().map_or("none", |version| version.as_str());
                    error!(
                        version,
                        pointer = pointer.sequence,
                        reason,
                        "refused a version; the old one serves on"
                    );
                }
            }
        }
    }

    /// Loads beside what serves, and hands over; false when nobody takes it any more.
    fn swap(&self, runtime: &Runtime, pointer: &Pointer, swap: &Sender<Replacement>) -> Result<bool, String> {
        let start = Instant::now();
        let loaded = runtime.block_on(self.source.load(Some(&self.registry), Some(pointer)));
        // The batch size of the start stays: the base is the same, and so is its speed.
        let served = loaded.and_then(|loaded| self.source.verify(loaded, self.max_tokens));
        let served = served.map_err(|error| error.to_string())?;
        let identity = served.judged.identity.clone();
        let version = identity.adapter_version.clone().unwrap_or_else(|| "none".to_owned());
        let Served {
            classifier,
            canary,
            judged,
        } = served;
        let replacement = Replacement {
            scorer: Box::new(classifier),
            canary,
            judged,
        };
        if swap.send(replacement).is_err() {
            return Ok(false);
        }
        counter!(names::ADAPTER_SWAPS, "result" => "swapped").increment(1);
        announce(&identity);
        let seconds = start.elapsed().as_secs_f64();
        info!(
            version,
            pointer = pointer.sequence,
            seconds,
            "adapter swapped between two batches"
        );
        Ok(true)
    }
}

/// Tells the metrics what serves; what served before goes to 0.
pub fn announce(identity: &ModelIdentity) {
    static LAST: std::sync::Mutex<Option<ModelIdentity>> = std::sync::Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let set = |identity: &ModelIdentity, value: f64| {
        gauge!(
            names::MODEL_INFO,
            "base" => identity.base.clone(),
            "adapter" => identity.adapter.clone(),
            "adapter_version" => identity.adapter_version.clone().unwrap_or_default(),
            "prompt" => identity.prompt.clone(),
            "device" => identity.device.clone(),
            "dtype" => identity.dtype.clone(),
            "quantization" => identity.quantization.clone(),
        )
        .set(value);
    };
    if let Some(before) = last.take() {
        set(&before, 0.0);
    }
    set(identity, 1.0);
    *last = Some(identity.clone());
}
