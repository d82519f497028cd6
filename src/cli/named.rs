//! Models by name: finds `hf://` paths of the settings in the cache, or downloads them if the settings allow it.

use std::time::Duration;

use anyhow::bail;
use indicatif::{ProgressBar, ProgressStyle};
use tracing::{info, warn};

use crate::config::ModelConfig;
use crate::fault::{Fault, Faults};
use crate::hub::{self, Hub, HubError, Progress, Reference, Snapshot};

/// A model or an adapter that a setting names.
pub(super) struct Named {
    pub reference: Reference,
    pub commit: String,
}

/// Replaces each name in the settings with the folder of its commit in the cache. Downloads it only with
/// `model.download`.
///
/// # Errors
/// Returns [`Faults`] if a name is not valid, is not in the cache, or is refused by the hub, and another error if the hub
/// or the network fails.
pub(super) fn resolve(model: &mut ModelConfig) -> anyhow::Result<Vec<Named>> {
    let download = model.download;
    let (mut named, mut faults) = (Vec::new(), Faults::default());
    for (key, path) in [("model.path", &mut model.path), ("model.adapter", &mut model.adapter)] {
        let Some(text) = path.as_ref().filter(|path| hub::is_reference(path)) else {
            continue;
        };
        let reference = match Reference::parse(&text.to_string_lossy()) {
            Ok(reference) => reference,
            Err(text) => {
                faults.push(Fault::setting(key, text));
                continue;
            }
        };
        match find(&reference, download) {
            Ok(Snapshot { folder, commit }) => {
                info!(setting = key, model = %reference, commit, "found the model by name");
                *path = Some(folder);
                named.push(Named { reference, commit });
            }
            Err(error) => match error.fault(key) {
                Some(fault) => faults.push(fault),
                None => bail!(error),
            },
        }
    }
    if faults.is_empty() { Ok(named) } else { bail!(faults) }
}

/// The longest pause before another attempt if the cache has a model, so that a start is not held up.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

fn find(reference: &Reference, download: bool) -> Result<Snapshot, HubError> {
    let mut hub = Hub::from_environment()?;
    let cached = hub.cached(reference);
    if !download {
        return cached;
    }
    if cached.is_ok() {
        hub = hub.with_longest_pause(LONGEST_PAUSE);
    }
    let mut progress = |progress: Progress<'_>| match progress {
        Progress::File { name, size, present } => info!(model = %reference, file = name, size, present, "downloading"),
        Progress::Retry { reason, pause } => warn!(reason, pause_s = pause.as_secs(), "retrying the download"),
        Progress::Bytes(_) => {}
    };
    match (hub.fetch(reference, &mut progress), cached) {
        // A service that could start yesterday starts today, whether the hub fails, the token has expired or the disk is
        // full.
        (Err(error), Ok(snapshot)) => {
            warn!(
                model = %reference,
                %error,
                commit = snapshot.commit,
                "cannot ask the hub for a newer commit: using the one in the cache"
            );
            Ok(snapshot)
        }
        (fetched, _) => fetched,
    }
}

/// Downloads a model with a progress bar on stderr, which appears only on a terminal, and returns its folder.
///
/// # Errors
/// Returns [`Faults`] if the hub refuses, and another error if it or the network fails.
pub(super) fn fetch(reference: &Reference) -> anyhow::Result<Snapshot> {
    let hub = Hub::from_environment().map_err(as_faults)?;
    let style = ProgressStyle::with_template("{msg:<32} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar = ProgressBar::no_length().with_style(style.expect("the template is valid"));
    let mut progress = |progress: Progress<'_>| match progress {
        Progress::File { name, size, present } => {
            bar.set_length(size);
            bar.set_position(present);
            bar.set_message(name.to_owned());
            bar.reset_eta();
        }
        Progress::Bytes(bytes) => bar.inc(bytes),
        Progress::Retry { reason, pause } => {
            bar.suspend(|| warn!(reason, pause_s = pause.as_secs(), "retrying the download"));
        }
    };
    let fetched = hub.fetch(reference, &mut progress);
    bar.finish_and_clear();
    fetched.map_err(as_faults)
}

fn as_faults(error: HubError) -> anyhow::Error {
    match error {
        HubError::Refused(text) => Faults::from(Fault::other(text)).into(),
        HubError::Failed(_) => error.into(),
    }
}
