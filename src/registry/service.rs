//! Promotes and rolls back versions, and returns the pointer in effect.

use std::sync::atomic::Ordering;
use std::time::SystemTime;

use object_store::ObjectMeta;

use super::store::CreateOutcome;
use super::{Change, Pointer, Registry, RegistryError, Version, pointer};

/// The target of a rollback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rollback {
    /// The version that was in service before. Repeated rollbacks go back further.
    Previous,
    /// The bare base model.
    Base,
    /// The given version.
    To(Version),
}

impl Registry {
    /// Puts a version into service after verifying its files.
    ///
    /// `after` is the number of the pointer that the caller expects to be in effect, or 0 for none.
    ///
    /// # Errors
    /// Returns [`RegistryError::Conflict`] if another pointer is in effect. Otherwise, fails like [`Registry::read`].
    pub async fn promote(&self, version: &Version, after: u64, now: SystemTime) -> Result<Pointer, RegistryError> {
        self.create_pointer(Some(version), Change::Promote, after, now).await
    }

    /// Returns to an earlier version or to the bare base model.
    ///
    /// # Errors
    /// Returns [`RegistryError::NoEarlierVersion`] if there is nothing to return to, and [`RegistryError::Conflict`] if
    /// another process changed the pointer in the meantime. Otherwise, fails like [`Registry::read`].
    pub async fn rollback(&self, to: &Rollback, now: SystemTime) -> Result<Pointer, RegistryError> {
        let history = self.history().await?;
        let no_earlier = || RegistryError::NoEarlierVersion(self.location().to_owned());
        let after = history.last().ok_or_else(no_earlier)?.sequence;
        let (version, restores) = match to {
            Rollback::Previous => {
                let restores = pointer::rollback_target(&history).ok_or_else(no_earlier)?;
                let pointer = history.iter().find(|pointer| pointer.sequence == restores);
                (pointer.and_then(|pointer| pointer.version.clone()), Some(restores))
            }
            Rollback::Base => (None, Some(0)),
            Rollback::To(version) => {
                let mut newest_first = history.iter().rev();
                let pointer = newest_first.find(|pointer| pointer.version.as_ref() == Some(version));
                (Some(version.clone()), pointer.map(Pointer::effective))
            }
        };
        // A version that was never in service is promoted instead.
        let change = restores.map_or(Change::Promote, |restores| Change::Rollback { restores });
        self.create_pointer(version.as_ref(), change, after, now).await
    }

    /// Returns the pointer in effect. `None` means that there is no pointer, so the bare base model is in service.
    ///
    /// A call lists the pointers from the last one seen and reads one of them, so it is cheap enough to be made every
    /// few seconds.
    ///
    /// # Errors
    /// Returns [`RegistryError::Corrupt`] if the pointer cannot be parsed (an earlier one is not used instead), or
    /// another error if the store fails.
    pub async fn current(&self) -> Result<Option<Pointer>, RegistryError> {
        match self.highest_sequence().await? {
            Some(sequence) => self.pointer(sequence).await.map(Some),
            None => Ok(None),
        }
    }

    /// Returns all pointers, oldest first.
    ///
    /// # Errors
    /// Fails like [`Registry::current`].
    pub async fn history(&self) -> Result<Vec<Pointer>, RegistryError> {
        let objects = self.store.list(&pointer::folder()).await?;
        let mut sequences: Vec<u64> = objects
            .iter()
            .filter_map(|object| pointer::sequence(&object.location))
            .collect();
        sequences.sort_unstable();
        let mut history = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            history.push(self.pointer(sequence).await?);
        }
        Ok(history)
    }

    async fn create_pointer(
        &self,
        version: Option<&Version>,
        change: Change,
        after: u64,
        now: SystemTime,
    ) -> Result<Pointer, RegistryError> {
        let mut manifest_sha256 = None;
        if let Some(version) = version {
            let (_, hash) = self.version_and_hash(version).await?;
            manifest_sha256 = Some(hash);
        }
        let pointer = Pointer {
            sequence: after + 1,
            version: version.cloned(),
            manifest_sha256,
            change,
            at: humantime::format_rfc3339_seconds(now).to_string(),
        };
        let conflict = || RegistryError::Conflict {
            sequence: pointer.sequence,
            location: self.location().to_owned(),
        };
        // Create-if-absent would accept a number that leaves a gap, so compare with the highest number first.
        if self.highest_sequence().await?.unwrap_or(0) != after {
            return Err(conflict());
        }
        let bytes = serde_json::to_vec(&pointer).expect("strings and numbers serialise to JSON");
        match self
            .store
            .create_object(&pointer::path(pointer.sequence), bytes)
            .await?
        {
            CreateOutcome::Created => Ok(pointer),
            CreateOutcome::AlreadyExists => Err(conflict()),
        }
    }

    /// Returns the number of the highest pointer.
    async fn highest_sequence(&self) -> Result<Option<u64>, RegistryError> {
        let highest = |objects: Vec<ObjectMeta>| {
            let sequences = objects.iter().filter_map(|object| pointer::sequence(&object.location));
            sequences.max()
        };
        let last = self.last_sequence.load(Ordering::Relaxed);
        let mut found = None;
        if last > 0 {
            let offset = pointer::path(last - 1);
            found = highest(self.store.list_after(&pointer::folder(), &offset).await?);
        }
        if found.is_none() {
            found = highest(self.store.list(&pointer::folder()).await?);
        }
        self.last_sequence.store(found.unwrap_or(0), Ordering::Relaxed);
        Ok(found)
    }

    async fn pointer(&self, sequence: u64) -> Result<Pointer, RegistryError> {
        let path = pointer::path(sequence);
        let expected = || format!("pointer {sequence}");
        let bytes = self.store.get(&path, pointer::MAX_POINTER_BYTES).await?;
        let bytes = bytes.ok_or_else(|| self.store.corrupt(&path, "missing", expected()))?;
        Pointer::parse(&bytes, sequence).map_err(|found| self.store.corrupt(&path, found, expected()))
    }
}
