//! Stores the records that decisions refer to by hash, so that `explain` can find them.
//!
//! A registry that cannot be written to must not keep a version from being served, so records wait until it can be.

use std::collections::{BTreeMap, BTreeSet};

use tracing::{info, warn};

use super::LoadedModel;
use crate::decide::Calibration;
use crate::hash::content_hash;
use crate::registry::{RecordKind, Registry};

/// A record: its kind and its canonical JSON.
pub(crate) type Record = (RecordKind, String);

/// Returns the records of a model: its prompt and its calibration.
pub(crate) fn of_model(loaded: &LoadedModel) -> Vec<Record> {
    let prompt = loaded.classifier.prompter().canonical().to_owned();
    let mut records = vec![(RecordKind::Prompt, prompt)];
    if loaded.calibration != Calibration::Identity {
        records.push((RecordKind::Calibration, loaded.calibration.canonical()));
    }
    records
}

/// Records on their way to the registry.
#[derive(Debug, Default)]
pub(crate) struct PendingRecords {
    /// The records that are not stored yet, by kind and hash.
    waiting: BTreeMap<(RecordKind, String), String>,
    /// The kinds and hashes of the records that are.
    stored: BTreeSet<(RecordKind, String)>,
    is_failing: bool,
}

impl PendingRecords {
    /// Adds a record, unless it is stored already.
    pub(crate) fn add(&mut self, (kind, canonical): Record) {
        let key = (kind, content_hash(canonical.as_bytes()));
        if !self.stored.contains(&key) {
            self.waiting.insert(key, canonical);
        }
    }

    /// Tries to store all waiting records. A failure is logged once, and so is the success after it.
    pub(crate) async fn store(&mut self, registry: &Registry) {
        let mut error = None;
        let waiting = std::mem::take(&mut self.waiting);
        for (key, canonical) in waiting {
            match registry.put_record(key.0, &canonical).await {
                Ok(_) => {
                    self.stored.insert(key);
                }
                Err(found) => {
                    error.get_or_insert(found);
                    self.waiting.insert(key, canonical);
                }
            }
        }
        match error {
            Some(error) if !self.is_failing => {
                warn!(%error, "cannot store the records that decisions refer to; `explain` may not find them");
            }
            None if self.is_failing => info!("stored the records that decisions refer to"),
            _ => {}
        }
        self.is_failing = !self.waiting.is_empty();
    }
}
