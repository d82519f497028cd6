//! The newest version in the registry, and what the promotion gate said of it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::registry::{Manifest, Registry, RegistryError};

/// How long the version is remembered, so that a page that asks often does not burden the registry.
const MAX_AGE: Duration = Duration::from_secs(60);

/// How long the registry may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Finds the newest version in the registry.
pub(crate) struct NewestVersion {
    /// The registry's location; `None` without one.
    url: Option<String>,
    /// What was found, and when.
    found: Mutex<Option<(Instant, Value)>>,
}

impl NewestVersion {
    pub(crate) fn new(url: Option<String>) -> Self {
        Self {
            url,
            found: Mutex::default(),
        }
    }

    /// Describes the newest version; null if there is none, and `{"error"}` if the registry cannot be read.
    pub(super) async fn describe(&self) -> Value {
        let Some(url) = &self.url else { return Value::Null };
        let mut found = self.found.lock().await;
        if let Some((at, version)) = &*found
            && at.elapsed() < MAX_AGE
        {
            return version.clone();
        }
        let version = match tokio::time::timeout(PATIENCE, read(url)).await {
            Ok(Ok(newest)) => newest.as_ref().map_or(Value::Null, describe),
            Ok(Err(error)) => json!({"error": error.to_string()}),
            Err(_) => json!({"error": "the registry does not answer"}),
        };
        *found = Some((Instant::now(), version.clone()));
        version
    }
}

async fn read(url: &str) -> Result<Option<Manifest>, RegistryError> {
    let listing = Registry::open(url)?.list().await?;
    Ok(listing.versions.into_iter().next())
}

fn describe(manifest: &Manifest) -> Value {
    let facts = &manifest.facts;
    json!({
        "version": manifest.version.as_str(),
        "created_at": facts.created_at,
        "promote": facts.gate["promote"],
        "verdict": facts.gate["sentence"],
    })
}
