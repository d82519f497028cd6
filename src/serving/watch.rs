//! Follows the registry's pointer while the daemon is serving, and swaps to the version that it names.
//!
//! A version that cannot enter service is refused, logged and counted once per pointer. The previous version stays in
//! service, and the next pointer is tried. It also stays in service while the registry cannot be read or is lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use metrics::{counter, gauge};
use tokio::runtime::Runtime;
use tracing::{error, info};

use super::records::{self, PendingRecords, Record};
use super::report::ReadReporter;
use super::tracked::{RegistryState, TrackedRegistry};
use super::{ModelSource, ReadyModel};
use crate::decide::CurrentJudge;
use crate::message::ModelIdentity;
use crate::ops::metrics as names;
use crate::registry::{Pointer, RecordKind};
use crate::stream::score::Replacement;

/// Watches the registry for pointers to new versions.
pub(crate) struct RegistryWatcher {
    pub source: ModelSource,
    pub registry: TrackedRegistry,
    /// Number of the pointer in effect; 0 for none.
    pub sequence: u64,
    /// Token budget of a micro-batch.
    pub max_tokens: usize,
    /// Time between two checks.
    pub poll: Duration,
    /// Has the policy in force, which is stored in the registry.
    pub judge: Arc<CurrentJudge>,
    /// The records to store, beginning with those of the model in service.
    pub records: PendingRecords,
    pub reporter: ReadReporter,
}

impl RegistryWatcher {
    /// Checks the registry at once, at every interval and on every message from `check_now`, until either channel is
    /// closed.
    ///
    /// A message carries a record to store. The policy of a reload comes this way, because the next reload may replace
    /// it before this thread sees it.
    pub fn run(mut self, check_now: &Receiver<Record>, swap: &Sender<Replacement>) {
        let runtime = match super::runtime() {
            Ok(runtime) => runtime,
            Err(error) => return error!(%error, "cannot watch the registry"),
        };
        let mut refused = 0;
        loop {
            let pointer = runtime.block_on(self.check());
            let is_new = |pointer: &Pointer| pointer.sequence != self.sequence && pointer.sequence != refused;
            if let Some(pointer) = pointer.filter(is_new) {
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
            match check_now.recv_timeout(self.poll) {
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
                Ok(record) => {
                    // On request, a refused version is tried again.
                    refused = 0;
                    self.records.add(record);
                    check_now.try_iter().for_each(|record| self.records.add(record));
                }
            }
        }
    }

    /// Reads the registry and, if it is intact, stores the records that it lacks. Returns its pointer, or `None` if
    /// the version in service has to stay.
    async fn check(&mut self) -> Option<Pointer> {
        let pointer = match self.registry.read().await {
            Ok(RegistryState::Intact(pointer)) => pointer,
            Ok(RegistryState::Lost(lost)) => {
                self.reporter.lost(&lost);
                return None;
            }
            Err(error) => {
                self.reporter.failed(&error);
                return None;
            }
        };
        self.reporter.intact();
        if let Some(pointer) = &pointer {
            self.registry.remember(pointer);
        }
        // A swap changes the policy as well, if thresholds were derived for the version.
        let policy = self.judge.get().policy.canonical().to_owned();
        self.records.add((RecordKind::Policy, policy));
        if let Some(registry) = self.registry.registry() {
            self.records.store(registry).await;
        }
        pointer
    }

    /// Loads the version of `pointer` and hands it to the scorer. Returns whether the scorer received it; otherwise,
    /// the stream has ended.
    fn swap(&mut self, runtime: &Runtime, pointer: &Pointer, swap: &Sender<Replacement>) -> Result<bool, String> {
        let start = Instant::now();
        let loaded = runtime.block_on(self.source.load(self.registry.registry(), Some(pointer)));
        let loaded = loaded.map_err(|error| error.to_string())?;
        let records = records::of_model(&loaded);
        // The token budget is not measured again: the base model is the same, and so is its speed.
        let ready = self.source.verify(loaded, self.max_tokens);
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
        records.into_iter().for_each(|record| self.records.add(record));
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
