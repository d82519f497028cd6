//! A registry whose last pointer is remembered, so that the loss of its versions is noticed.
//!
//! The pointer last seen is remembered by this process and, if `registry.state` is set, in a file. A registry that
//! falls behind it is lost: nothing is written to it, and it is not taken for a registry without versions.

use std::path::Path;

use tracing::{error, warn};

use super::ServingError;
use crate::config::OnMissing;
use crate::registry::{LostRegistry, Pointer, PointerMemory, Registry, RegistryError, RegistryLoss};

/// A registry together with the pointer last seen in it.
#[derive(Debug)]
pub(crate) struct TrackedRegistry {
    url: String,
    /// Opened when the folder is first seen.
    registry: Option<Registry>,
    memory: Option<PointerMemory>,
    last_seen: Option<Pointer>,
    /// Whether the memory has `last_seen`.
    is_recorded: bool,
    /// The error of the last attempt to write the memory; a repeated one is not logged again.
    memory_error: Option<String>,
}

/// What was found in a registry.
#[derive(Debug)]
pub(crate) enum RegistryState {
    /// The registry has the pointer last seen, or a later one. It has none if none was ever seen.
    Intact(Option<Pointer>),
    /// The registry no longer has the pointer last seen.
    Lost(Box<LostRegistry>),
}

/// The pointer to serve, and the loss that was tolerated to get it.
#[derive(Debug, Default)]
pub(crate) struct PointerToServe {
    /// `None` for the bare base model.
    pub pointer: Option<Pointer>,
    /// The loss that `registry.on_missing = "continue"` tolerates.
    pub lost: Option<Box<LostRegistry>>,
}

impl TrackedRegistry {
    /// Recalls the pointer last seen in the registry at `url` from the folder `state`, if there is one.
    ///
    /// A memory that cannot be read is logged, and otherwise treated as if there were none.
    ///
    /// # Errors
    /// Returns [`RegistryError::Url`] if the URL is not usable.
    pub(crate) fn recall(url: &str, state: Option<&Path>) -> Result<Self, RegistryError> {
        let memory = state.map(|state| PointerMemory::new(state, url)).transpose()?;
        let recalled = memory.as_ref().map_or(Ok(None), PointerMemory::recall);
        let last_seen = recalled.unwrap_or_else(|error| {
            error!(%error, "cannot tell whether the registry has lost its version in service");
            None
        });
        Ok(Self {
            url: url.to_owned(),
            registry: None,
            memory,
            is_recorded: last_seen.is_some(),
            last_seen,
            memory_error: None,
        })
    }

    /// Returns the location of the registry, as it appears in errors.
    pub(crate) fn location(&self) -> &str {
        &self.url
    }

    /// Returns the registry if its folder has been seen.
    pub(crate) fn registry(&self) -> Option<&Registry> {
        self.registry.as_ref()
    }

    /// Reads the pointer in effect and compares it with the one last seen.
    ///
    /// # Errors
    /// Returns an error if the registry cannot be read, or if its folder does not exist and no pointer was ever seen
    /// in it.
    pub(crate) async fn read(&mut self) -> Result<RegistryState, RegistryError> {
        let exists = Registry::exists(&self.url)?;
        if !exists && self.last_seen.is_some() {
            return Ok(self.state(None, Some(RegistryLoss::NoFolder)));
        }
        let registry = match self.registry.take() {
            Some(registry) if exists => registry,
            // If the folder does not exist, this is an error that names it.
            _ => Registry::open(&self.url)?,
        };
        let found = self.registry.insert(registry).current().await?;
        let seen = self.last_seen.as_ref();
        let loss = seen.and_then(|seen| RegistryLoss::find(seen, found.as_ref()));
        Ok(self.state(found, loss))
    }

    fn state(&self, found: Option<Pointer>, loss: Option<RegistryLoss>) -> RegistryState {
        match (loss, &self.last_seen) {
            (Some(loss), Some(seen)) => RegistryState::Lost(Box::new(LostRegistry {
                location: self.url.clone(),
                loss,
                seen: seen.clone(),
                memory: self.memory.as_ref().map(|memory| memory.file().to_owned()),
            })),
            _ => RegistryState::Intact(found),
        }
    }

    /// Remembers the pointer of an intact registry. A memory that cannot be written is logged once.
    pub(crate) fn remember(&mut self, pointer: &Pointer) {
        if self.last_seen.as_ref() == Some(pointer) && self.is_recorded {
            return;
        }
        self.last_seen = Some(pointer.clone());
        let recorded = self.memory.as_ref().map_or(Ok(()), |memory| memory.record(pointer));
        self.is_recorded = recorded.is_ok();
        let error = recorded.err().map(|error| error.to_string());
        if error != self.memory_error
            && let Some(error) = &error
        {
            warn!(error, "after a restart, the loss of this version would not be noticed");
        }
        self.memory_error = error;
    }

    /// Returns the pointer to serve.
    ///
    /// # Errors
    /// Returns [`ServingError::Lost`] if the registry is lost and `on_missing` does not tolerate that, and
    /// [`ServingError::Registry`] if it cannot be read.
    pub(crate) async fn pointer_to_serve(&mut self, on_missing: OnMissing) -> Result<PointerToServe, ServingError> {
        match (self.read().await?, on_missing) {
            (RegistryState::Intact(pointer), _) => Ok(PointerToServe { pointer, lost: None }),
            (RegistryState::Lost(lost), OnMissing::Stop) => Err(ServingError::Lost(lost)),
            (RegistryState::Lost(lost), OnMissing::Continue) => {
                let pointer = match &lost.loss {
                    RegistryLoss::OtherPointer(found) => Some(found.clone()),
                    RegistryLoss::NoFolder | RegistryLoss::NoPointers => None,
                };
                let lost = Some(lost);
                Ok(PointerToServe { pointer, lost })
            }
        }
    }

    /// Returns the registry if it is intact, for a command that changes it.
    ///
    /// # Errors
    /// Returns [`LostRegistry`] as an error if the registry is lost, whatever `registry.on_missing` is, and an error of
    /// the registry if it cannot be read.
    pub(crate) async fn require_intact(&mut self) -> anyhow::Result<Registry> {
        match self.read().await? {
            RegistryState::Lost(lost) => Err(anyhow::Error::new(*lost)),
            RegistryState::Intact(pointer) => {
                if let Some(pointer) = &pointer {
                    self.remember(pointer);
                }
                Ok(Registry::open(&self.url)?)
            }
        }
    }

    /// Returns the registry for a command that changes it, and creates its folder unless a pointer was seen in it
    /// before.
    ///
    /// # Errors
    /// Fails like [`TrackedRegistry::require_intact`], or if the folder cannot be created.
    pub(crate) async fn require_intact_or_create(&mut self) -> anyhow::Result<Registry> {
        if self.last_seen.is_none() {
            Registry::create(&self.url)?;
        }
        self.require_intact().await
    }
}
