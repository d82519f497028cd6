//! What is in service: promotion, rollback, and the watcher's question.

use std::sync::atomic::Ordering;
use std::time::SystemTime;

use object_store::ObjectMeta;

use super::store::Created;
use super::{Change, Pointer, Registry, RegistryError, Version, pointer};

/// Where a rollback goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rollback {
    /// To what was in service before; again, and it goes back further.
    Before,
    /// To the bare base.
    Base,
    /// To a version.
    To(Version),
}

impl Registry {
    /// Puts a version into service, if what was in service still is: `after` is the number of the
    /// pointer that the version was measured against, 0 for none. Every file is proven first.
    ///
    /// # Errors
    /// [`RegistryError::Overtaken`] where the pointer has moved, else as [`Registry::read`].
    pub async fn promote(&self, version: &Version, after: u64, now: SystemTime) -> Result<Pointer, RegistryError> {
        self.point(Some(version), Change::Promote, after, now).await
    }

    /// Puts what was in service before back, or what is asked for.
    ///
    /// # Errors
    /// [`RegistryError::NothingBefore`], [`RegistryError::Overtaken`], else as [`Registry::read`].
    pub async fn rollback(&self, to: &Rollback, now: SystemTime) -> Result<Pointer, RegistryError> {
        let history = self.history().await?;
        let nothing = || RegistryError::NothingBefore(self.place().to_owned());
        let after = history.last().ok_or_else(nothing)?.sequence;
        let named = |version: Option<&Version>| {
            let pointer = history.iter().rev().find(|pointer| pointer.version.as_ref() == version);
            pointer.map(Pointer::effective)
        };
        let (version, restores) = match to {
            Rollback::Before => {
                let restores = pointer::before(&history).ok_or_else(nothing)?;
                let pointer = history.iter().find(|pointer| pointer.sequence == restores);
                (pointer.and_then(|pointer| pointer.version.clone()), Some(restores))
            }
            Rollback::Base => (None, Some(0)),
            Rollback::To(version) => (Some(version.clone()), named(Some(version))),
        };
        // A version that never was in service is no way back.
        let change = restores.map_or(Change::Promote, |restores| Change::Rollback { restores });
        self.point(version.as_ref(), change, after, now).await
    }

    /// What is in service; nothing where no pointer was ever made, which means the bare base. One
    /// listing from the last known pointer on and one small read: to be asked every few seconds.
    ///
    /// # Errors
    /// The store's, and [`RegistryError::Corrupt`]: a broken pointer is told, not skipped.
    pub async fn current(&self) -> Result<Option<Pointer>, RegistryError> {
        match self.highest().await? {
            Some(sequence) => self.pointer(sequence).await.map(Some),
            None => Ok(None),
        }
    }

    /// All that ever was in service, oldest first.
    ///
    /// # Errors
    /// As [`Registry::current`].
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

    async fn point(
        &self,
        version: Option<&Version>,
        change: Change,
        after: u64,
        now: SystemTime,
    ) -> Result<Pointer, RegistryError> {
        let mut manifest_sha256 = None;
        if let Some(version) = version {
            let (_, hash) = self.proven(version).await?;
            manifest_sha256 = Some(hash);
        }
        let pointer = Pointer {
            sequence: after + 1,
            version: version.cloned(),
            manifest_sha256,
            change,
            at: humantime::format_rfc3339_seconds(now).to_string(),
        };
        let overtaken = || RegistryError::Overtaken {
            sequence: pointer.sequence,
            place: self.place().to_owned(),
        };
        // A number that leaves a gap would hide that others were in service meanwhile.
        if self.highest().await?.unwrap_or(0) != after {
            return Err(overtaken());
        }
        let bytes = serde_json::to_vec(&pointer).expect("texts and numbers have a JSON form");
        match self
            .store
            .create_object(&pointer::path(pointer.sequence), bytes)
            .await?
        {
            Created::New => Ok(pointer),
            Created::Existed => Err(overtaken()),
        }
    }

    /// The highest pointer's number.
    async fn highest(&self) -> Result<Option<u64>, RegistryError> {
        let highest = |objects: Vec<ObjectMeta>| {
            let sequences = objects.iter().filter_map(|object| pointer::sequence(&object.location));
            sequences.max()
        };
        let known = self.known.load(Ordering::Relaxed);
        let mut found = None;
        if known > 0 {
            let offset = pointer::path(known - 1);
            found = highest(self.store.list_after(&pointer::folder(), &offset).await?);
        }
        if found.is_none() {
            found = highest(self.store.list(&pointer::folder()).await?);
        }
        self.known.store(found.unwrap_or(0), Ordering::Relaxed);
        Ok(found)
    }

    async fn pointer(&self, sequence: u64) -> Result<Pointer, RegistryError> {
        let path = pointer::path(sequence);
        let expected = || format!("pointer {sequence}");
        let bytes = self.store.get(&path, pointer::MAX_POINTER_BYTES).await?;
        let bytes = bytes.ok_or_else(|| self.store.corrupt(&path, "nothing", expected()))?;
        let pointer: Pointer =
            serde_json::from_slice(&bytes).map_err(|error| self.store.corrupt(&path, error.to_string(), expected()))?;
        if pointer.sequence != sequence {
            let found = format!("pointer {}", pointer.sequence);
            return Err(self.store.corrupt(&path, found, expected()));
        }
        Ok(pointer)
    }
}
