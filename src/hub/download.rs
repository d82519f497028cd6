//! Downloads the files of a model into the cache: `blobs` holds each file under its etag, `snapshots` has a folder of
//! links for each commit, and `refs` maps revisions to commits.
//!
//! Weights and other files in Git LFS are written as `<etag>.incomplete`, which a later download continues, and get their
//! name only once their size and SHA-256 are those that the hub states. Of smaller files, the hub states no SHA-256: they
//! are always downloaded from their beginning, and only their size is checked. The reference is written last.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use ureq::http::StatusCode;

use crate::hash::hex;

use super::requests::{Client, ModelInfo, RemoteFile};
use super::{Hub, HubError, Progress, Reference, Snapshot, is_commit, missing_file};

/// The files of a checkpoint or an adapter besides the weights.
const FILES: [&str; 10] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "moderatord.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
];

impl Hub {
    /// Downloads a model or an adapter, unless it is in the cache, and returns its folder.
    ///
    /// # Errors
    /// Returns an error if the hub refuses, if a file is damaged even after another download, or if the cache cannot be
    /// written.
    pub fn fetch(&self, reference: &Reference, progress: &mut dyn FnMut(Progress<'_>)) -> Result<Snapshot, HubError> {
        // A commit never changes.
        if reference.is_commit()
            && let Ok(snapshot) = self.cached(reference)
        {
            return Ok(snapshot);
        }
        let client = Client::new(self);
        let ModelInfo { sha: commit, siblings } = client.model_info(reference, progress)?;
        if !is_commit(&commit) {
            return Err(HubError::Failed(format!(
                "{reference}: the hub answers with the commit `{commit}`"
            )));
        }
        let files: Vec<_> = siblings.into_iter().filter(|file| is_needed(&file.name)).collect();
        let has = |name: &str| files.iter().any(|file| file.name == name);
        if !has("config.json") && !has("adapter_config.json") {
            return Err(HubError::Refused(format!(
                "{reference} has neither config.json nor adapter_config.json, expected a checkpoint in safetensors or a \
                 PEFT adapter"
            )));
        }
        let folder = self.snapshot(reference, &commit);
        for file in &files {
            let blob = self.fetch_file(&client, reference, &commit, file, progress)?;
            link(&blob, &folder.join(&file.name)).map_err(|error| cannot_write(&folder, &error))?;
        }
        if let Some(name) = missing_file(&folder) {
            return Err(HubError::Refused(format!(
                "{reference} has no {name}, expected a checkpoint in safetensors or a PEFT adapter"
            )));
        }
        if !reference.is_commit() {
            let path = self.ref_path(reference);
            write_ref(&path, &commit).map_err(|error| cannot_write(&path, &error))?;
        }
        Ok(Snapshot { folder, commit })
    }

    /// Downloads a file unless its blob is there, and returns the path of the blob.
    fn fetch_file(
        &self,
        client: &Client<'_>,
        reference: &Reference,
        commit: &str,
        file: &RemoteFile,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<PathBuf, HubError> {
        let name = &file.name;
        let (etag, size) = match (&file.lfs, &file.blob_id) {
            (Some(large), _) => (large.sha256.as_str(), Some(large.size)),
            (None, Some(id)) => (id.as_str(), file.size),
            (None, None) => {
                return Err(HubError::Failed(format!(
                    "{reference}: the hub states no hash of {name}"
                )));
            }
        };
        // It becomes the name of a file.
        if etag.is_empty() || !etag.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(HubError::Failed(format!(
                "{reference}: the hub states the hash `{etag}` of {name}"
            )));
        }
        let blob = self.folder(reference).join("blobs").join(etag);
        if blob.exists() {
            return Ok(blob);
        }
        let part = blob.with_extension("incomplete");
        let _lock = self
            .lock(reference, etag)
            .map_err(|error| cannot_write(&blob, &error))?;
        if blob.exists() {
            return Ok(blob);
        }
        if file.lfs.is_none() && part.exists() {
            fs::remove_file(&part).map_err(|error| cannot_write(&part, &error))?;
        }
        let url = format!("{}/{}/resolve/{commit}/{name}", self.endpoint, reference.id);
        let present = present_bytes(&part);
        progress(Progress::File {
            name,
            size: size.unwrap_or_default(),
            present,
        });
        let mut is_again = false;
        loop {
            self.receive(client, reference, &url, &part, size, progress)?;
            let expected = file.lfs.as_ref().map(|large| large.sha256.as_str());
            let found = expected
                .map(|_| sha256(&part))
                .transpose()
                .map_err(|error| cannot_write(&part, &error))?;
            if found.as_deref() == expected {
                break;
            }
            // The beginning may have been left by another download, so everything is downloaded once more.
            fs::remove_file(&part).map_err(|error| cannot_write(&part, &error))?;
            let (found, expected) = (found.unwrap_or_default(), expected.unwrap_or_default());
            let text = format!("{reference}: {name} has the SHA-256 {found}, expected {expected} as the hub states");
            if is_again {
                return Err(HubError::Failed(format!(
                    "{text}; the damaged file was deleted, so try again"
                )));
            }
            progress(Progress::Retry {
                reason: &text,
                pause: std::time::Duration::ZERO,
            });
            is_again = true;
        }
        fs::rename(&part, &blob).map_err(|error| cannot_write(&blob, &error))?;
        Ok(blob)
    }

    /// Downloads what is missing of a file, as often as it breaks off.
    fn receive(
        &self,
        client: &Client<'_>,
        reference: &Reference,
        url: &str,
        part: &Path,
        size: Option<u64>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), HubError> {
        let mut attempt = 0;
        let mut furthest = present_bytes(part);
        loop {
            let mut present = present_bytes(part);
            if size.is_some_and(|size| present > size) {
                present = 0;
            }
            if size == Some(present) && part.exists() {
                return Ok(());
            }
            let mut response = client.get(url, present, reference, progress)?;
            if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
                fs::remove_file(part).map_err(|error| cannot_write(part, &error))?;
                client.pause(
                    &mut attempt,
                    None,
                    &format!("{url}: the hub refuses to continue"),
                    progress,
                )?;
                continue;
            }
            // A server that ignores the range sends the file from its beginning.
            let continues =
                response.status() == StatusCode::PARTIAL_CONTENT && starts_at(&response, present).unwrap_or(false);
            let opened = open(part, continues);
            let mut output = opened.map_err(|error| cannot_write(part, &error))?;
            let mut input = response.body_mut().as_reader();
            let broken = copy(&mut input, &mut output, progress).map_err(|error| cannot_write(part, &error))?;
            output.sync_all().map_err(|error| cannot_write(part, &error))?;
            let received = present_bytes(part);
            let reason = match (broken, size) {
                (Some(reason), _) => reason,
                (None, Some(size)) if received > size => {
                    return Err(HubError::Failed(format!(
                        "{url}: {received} bytes arrived, but the hub states {size}"
                    )));
                }
                (None, Some(size)) if received != size => format!("{received} of {size} bytes arrived"),
                (None, _) => return Ok(()),
            };
            // A slow download may break off often, as long as it gets further than before.
            if received > furthest {
                (attempt, furthest) = (0, received);
            }
            client.pause(&mut attempt, None, &format!("{url} broke off: {reason}"), progress)?;
        }
    }

    /// Waits for other downloads of a file, also by Python, and keeps them out until the result is dropped.
    fn lock(&self, reference: &Reference, etag: &str) -> std::io::Result<File> {
        let folder = self.cache.join(".locks").join(Self::folder_name(reference));
        fs::create_dir_all(&folder)?;
        fs::create_dir_all(self.folder(reference).join("blobs"))?;
        let options = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(folder.join(format!("{etag}.lock")))?;
        options.lock()?;
        Ok(options)
    }
}

/// Replaces the commit of a branch or tag, whose name may have several parts.
fn write_ref(path: &Path, commit: &str) -> std::io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|found| found == commit) {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    // As readable as the other files of the cache: a service may run as another user than `moderatord fetch`.
    let readable = fs::Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new().permissions(readable).tempfile_in(folder)?;
    file.write_all(commit.as_bytes())?;
    file.persist(path)?;
    Ok(())
}

fn is_needed(name: &str) -> bool {
    let is_weights =
        name.starts_with("model") && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"));
    !name.contains('/') && (is_weights || FILES.contains(&name))
}

fn present_bytes(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn open(part: &Path, continues: bool) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true);
    if continues {
        options.append(true)
    } else {
        options.write(true).truncate(true)
    };
    options.open(part)
}

/// Returns whether a partial answer begins at this offset.
fn starts_at(response: &ureq::http::Response<ureq::Body>, offset: u64) -> Option<bool> {
    let range = response.headers().get("Content-Range")?.to_str().ok()?;
    let start: u64 = range.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()?;
    Some(start == offset)
}

/// Copies a body to a file. Returns why the body broke off, if it did, and an error if the file cannot be written.
fn copy(
    input: &mut impl Read,
    output: &mut File,
    progress: &mut dyn FnMut(Progress<'_>),
) -> std::io::Result<Option<String>> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok(None),
            Ok(bytes) => {
                output.write_all(&buffer[..bytes])?;
                progress(Progress::Bytes(bytes as u64));
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Ok(Some(error.to_string())),
        }
    }
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut hasher)?;
    Ok(hex(&hasher.finalize()))
}

/// Makes a relative link to a blob, as Python does, so that the cache can be moved.
fn link(blob: &Path, pointer: &Path) -> std::io::Result<()> {
    let (Some(folder), Some(name)) = (pointer.parent(), blob.file_name()) else {
        return Err(std::io::Error::other(format!(
            "{} is not in a folder",
            pointer.display()
        )));
    };
    fs::create_dir_all(folder)?;
    let target = Path::new("../../blobs").join(name);
    if fs::read_link(pointer).is_ok_and(|found| found == target) {
        return Ok(());
    }
    // Several containers, in which processes have the same ids, may share a cache.
    let temporary = tempfile::Builder::new().make_in(folder, |path| std::os::unix::fs::symlink(&target, path))?;
    temporary.into_temp_path().persist(pointer)?;
    Ok(())
}

fn cannot_write(path: &Path, error: &std::io::Error) -> HubError {
    HubError::Failed(format!(
        "cannot write {} in the cache of models: {error}",
        path.display()
    ))
}
