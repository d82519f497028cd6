//! Follows the registry's pointer while the daemon is serving, and swaps to the version that it names.
//!
//! A version that cannot enter service is refused, logged and counted once per pointer. The previous version stays in
//! service, and the next pointer is tried.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use metrics::{counter, gauge};
use tokio::runtime::Runtime;
use tracing::{error, info, warn};

use super::{ModelSource, ReadyModel};
use crate::message::ModelIdentity;
use crate::ops::metrics as names;
use crate::registry::{Pointer, Registry};
use crate::stream::score::Replacement;

/// Watches the registry for pointers to new versions.
pub(crate) struct RegistryWatcher {
    pub source: ModelSource,
    pub registry: Registry,
    /// Number of the pointer in effect; 0 for none.
    pub sequence: u64,
    /// Token budget of a micro-batch.
    pub max_tokens: usize,
    /// Time between two checks.
    pub poll: Duration,
}

impl RegistryWatcher {
    /// Checks the registry at every interval and on every message from `check_now`, until either channel is closed.
    pub fn run(mut self, check_now: &Receiver<()>, swap: &Sender<Replacement>) {
        let runtime = match super::runtime() {
            Ok(runtime) => runtime,
            Err(error) => return error!(%error, "cannot watch the registry"),
        };
        let mut refused = 0;
        loop {
            match check_now.recv_timeout(self.poll) {
                Err(RecvTimeoutError::Disconnected) => return,
                // On request, a refused version is tried again.
                Ok(()) => refused = 0,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let pointer = match runtime.block_on(self.registry.current()) {
                Ok(Some(pointer)) => pointer,
                Ok(None) => continue,
                Err(error) => {
                    warn!(%error, "cannot read the registry");
                    continue;
                }
            };
            if pointer.sequence == self.sequence || pointer.sequence == refused {
                continue;
            }
            match self.swap(&runtime, &pointer, swap) {
                Ok(true) => self.sequence = pointer.sequence,
                Ok(false) => return,
                Err(reason) => {
                    refused = pointer.sequence;
                    counter!(names::ADAPTER_SWAPS, "result" => "refused").increment(1);
                    let version = pointer.version.as_ref().map_or("none", |version| version.as_str());
                    error!(
                        version,
                        pointer = pointer.sequence,
                        reason,
                        "refused a version; the previous one stays in service"
                    );
                }
            }
        }
    }

    /// Loads the version of `pointer` and hands it to the scorer. Returns whether the scorer received it; otherwise,
    /// the stream has ended.
    fn swap(&self, runtime: &Runtime, pointer: &Pointer, swap: &Sender<Replacement>) -> Result<bool, String> {
        let start = Instant::now();
        let loaded = runtime.block_on(self.source.load(Some(&self.registry), Some(pointer)));
        // The token budget is not measured again: the base model is the same, and so is its speed.
        let ready = loaded.and_then(|loaded| self.source.verify(loaded, self.max_tokens));
        let ready = ready.map_err(|error| error.to_string())?;
        let identity = ready.judged.identity.clone();
        let version = identity.adapter_version.clone().unwrap_or_else(|| "none".to_owned());
        let ReadyModel {
            classifier,
            canary,
            judged,
        } = ready;
        let replacement = Replacement {
            scorer: Box::new(classifier),
            canary,
            judged,
        };
        if swap.send(replacement).is_err() {
            return Ok(false);
        }
        counter!(names::ADAPTER_SWAPS, "result" => "swapped").increment(1);
        set_model_info(&identity);
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

/// Sets the model info metric to 1 for the model in service, and to 0 for the previous one.
pub(crate) fn set_model_info(identity: &ModelIdentity) {
    static PREVIOUS: std::sync::Mutex<Option<ModelIdentity>> = std::sync::Mutex::new(None);
    let mut previous = PREVIOUS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
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
    if let Some(identity) = previous.take() {
        set(&identity, 0.0);
    }
    set(identity, 1.0);
    *previous = Some(identity.clone());
}
