//! Models by name: finds `hf://` paths of the settings in the cache, or downloads them if the settings allow it.

use std::time::{Duration, Instant};

use anyhow::bail;
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use tracing::{info, warn};

use crate::config::ModelConfig;
use crate::fault::{Fault, Faults};
use crate::hub::{self, Hub, HubError, Progress, Reference, Snapshot};
use crate::ops::notify::Notifier;

/// A model or an adapter that a setting names.
pub(super) struct Named {
    pub reference: Reference,
    pub commit: String,
}

/// Replaces each name in the settings with the folder of its commit in the cache. Downloads it only with
/// `model.download`, and reports the progress through `notifier`.
///
/// # Errors
/// Returns [`Faults`] if a name is not valid, is not in the cache, or is refused by the hub, and another error if the hub
/// or the network fails.
pub(super) fn resolve(model: &mut ModelConfig, notifier: &Notifier) -> anyhow::Result<Vec<Named>> {
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
        match find(&reference, download, notifier) {
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

fn find(reference: &Reference, download: bool, notifier: &Notifier) -> Result<Snapshot, HubError> {
    let mut hub = Hub::from_environment()?;
    let cached = hub.cached(reference);
    if !download {
        return cached;
    }
    if cached.is_ok() {
        hub = hub.with_longest_pause(LONGEST_PAUSE);
    }
    notifier.starting(&format!("asking the hub for {reference}"), DOWNLOAD_EXTENSION);
    let mut reporter = DownloadReporter::new(reference, notifier);
    let mut progress = |progress: Progress<'_>| {
        match progress {
            Progress::File { name, size, present } => {
                info!(model = %reference, file = name, size, present, "downloading");
            }
            Progress::Retry { reason, pause } => warn!(reason, pause_s = pause.as_secs(), "retrying the download"),
            Progress::Bytes(_) => {}
        }
        reporter.update(progress, Instant::now());
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

/// The shortest time between two reports of a download.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// How much time to start each report of a download requests. The hub gives up sooner: six attempts of at most a minute
/// and half a minute of pauses between them. The rest is for hashing a file.
const DOWNLOAD_EXTENSION: Duration = Duration::from_secs(600);

/// Reports the progress of a download to the service manager, which extends the start timeout each time.
///
/// A download that makes no progress ends by itself, because the number of attempts is limited. It must not run into the
/// timeout before that, or a model in the cache would not be used. Only a pause that the hub asks for can take longer than
/// the last report has requested, so a retry requests time as well.
struct DownloadReporter<'a> {
    reference: &'a Reference,
    notifier: &'a Notifier,
    file: String,
    size: u64,
    received: u64,
    last_report: Option<Instant>,
}

impl<'a> DownloadReporter<'a> {
    fn new(reference: &'a Reference, notifier: &'a Notifier) -> Self {
        Self {
            reference,
            notifier,
            file: String::new(),
            size: 0,
            received: 0,
            last_report: None,
        }
    }

    fn update(&mut self, progress: Progress<'_>, now: Instant) {
        match progress {
            Progress::File { name, size, present } => {
                name.clone_into(&mut self.file);
                (self.size, self.received) = (size, present);
            }
            Progress::Bytes(bytes) => self.received += bytes,
            Progress::Retry { pause, .. } => {
                let status = format!("waiting for the hub to send {}", self.reference);
                self.notifier.starting(&status, DOWNLOAD_EXTENSION + pause);
                return;
            }
        }
        let is_due = |last: Instant| now.saturating_duration_since(last) >= REPORT_INTERVAL;
        if !self.last_report.is_none_or(is_due) {
            return;
        }
        self.last_report = Some(now);
        // A file that is downloaded again from its beginning is counted twice.
        let (received, size) = (DecimalBytes(self.received.min(self.size)), DecimalBytes(self.size));
        let status = format!("downloading {}: {received} of {size} of {}", self.reference, self.file);
        self.notifier.starting(&status, DOWNLOAD_EXTENSION);
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_download_extends_the_start_while_bytes_arrive_and_for_each_retry() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        let notifier = Notifier::new(Some(path.as_os_str()), None).unwrap();
        let reference = Reference::parse("hf://garden/tiny-gemma").unwrap();
        let (mut reporter, start) = (DownloadReporter::new(&reference, &notifier), Instant::now());
        let mut received = |millis, progress| {
            reporter.update(progress, start + Duration::from_millis(millis));
            let mut buffer = [0; 512];
            let length = socket.recv(&mut buffer).ok()?;
            Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
        };
        let waiting = "EXTEND_TIMEOUT_USEC=630000000\nSTATUS=waiting for the hub to send hf://garden/tiny-gemma@main";
        let mut check = |millis, progress, expected: Option<&str>| {
            let expected = expected.map(|text| match text {
                "" => waiting.to_owned(),
                text => {
                    format!("EXTEND_TIMEOUT_USEC=600000000\nSTATUS=downloading hf://garden/tiny-gemma@main: {text}")
                }
            });
            assert_eq!(received(millis, progress), expected, "after {millis} ms");
        };
        let file = |name, size, present| Progress::File { name, size, present };
        let retry = Progress::Retry {
            reason: "silence",
            pause: Duration::from_secs(30),
        };
        check(0, file("config.json", 700, 0), Some("0 B of 700 B of config.json"));
        check(10, Progress::Bytes(700), None);
        check(20, file("model.safetensors", 4_000_000, 1_000_000), None);
        check(900, Progress::Bytes(500_000), None);
        check(
            1000,
            Progress::Bytes(500_000),
            Some("2.00 MB of 4.00 MB of model.safetensors"),
        );
        check(90_000, retry, Some(""));
        check(180_000, retry, Some(""));
        check(
            181_000,
            Progress::Bytes(9),
            Some("2.00 MB of 4.00 MB of model.safetensors"),
        );
        check(
            182_000,
            Progress::Bytes(4_000_000),
            Some("4.00 MB of 4.00 MB of model.safetensors"),
        );
    }
}
