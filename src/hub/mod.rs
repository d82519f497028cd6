//! Models by name: `hf://owner/name@revision` is a folder in the cache of the Hugging Face hub, which Python's
//! `huggingface_hub` shares.
//!
//! [`Hub::cached`] looks a name up without the network. [`Hub::fetch`] downloads what a model or an adapter needs, and
//! makes the folder complete before the name refers to it. A revision is resolved to a commit, and the folder's path
//! contains that commit. The token is sent to the hub's own host only, and no error shows it.

mod download;
mod requests;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::fault::Fault;

/// What the path of a model on the hub begins with.
pub const SCHEME: &str = "hf://";

const ENDPOINT: &str = "https://huggingface.co";

/// Returns whether a path in the settings names a model on the hub.
pub fn is_reference(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.starts_with(SCHEME))
}

/// The name of a model or an adapter on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// `owner/name`.
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl Reference {
    /// Parses `hf://owner/name`, with `@revision` behind it for another branch, tag or commit than `main`.
    ///
    /// # Errors
    /// Returns what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let expected =
            || format!("`{text}` is not the name of a model, expected hf://owner/name or hf://owner/name@revision");
        let rest = text.strip_prefix(SCHEME).ok_or_else(expected)?;
        let (id, revision) = rest.split_once('@').unwrap_or((rest, "main"));
        let is_part = |part: &str| {
            let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            !part.is_empty() && part.bytes().all(is_allowed) && !part.starts_with('.') && !part.contains("..")
        };
        let is_id = id
            .split_once('/')
            .is_some_and(|(owner, name)| is_part(owner) && is_part(name));
        if !is_id || !revision.split('/').all(is_part) {
            return Err(expected());
        }
        Ok(Self {
            id: id.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// Returns whether the revision is a commit, which needs no look-up.
    fn is_commit(&self) -> bool {
        is_commit(&self.revision)
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{SCHEME}{}@{}", self.id, self.revision)
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40
        && text
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Why a model was not found or not downloaded.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The operator has to do something: the name, the licence, the token or the disk.
    #[error("{0}")]
    Refused(String),
    /// The hub or the network failed, so trying again later may help.
    #[error("{0}")]
    Failed(String),
}

impl HubError {
    /// Returns a fault if trying again cannot help.
    pub fn fault(&self, key: &str) -> Option<Fault> {
        match self {
            Self::Refused(text) => Some(Fault::setting(key, text)),
            Self::Failed(_) => None,
        }
    }
}

/// A folder in the cache with all files of a model or an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The folder, whose name is the commit.
    pub folder: PathBuf,
    /// The commit.
    pub commit: String,
}

/// The progress of a download.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// A file begins, of which some bytes are already here.
    File {
        /// The name of the file.
        name: &'a str,
        /// The size of the file in bytes.
        size: u64,
        /// The number of bytes that an earlier download has left.
        present: u64,
    },
    /// So many more bytes have arrived.
    Bytes(u64),
    /// A request failed and is sent again after a pause.
    Retry {
        /// Why it failed.
        reason: &'a str,
        /// How long the pause is.
        pause: Duration,
    },
}

/// The hub and its cache on this machine.
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    /// The longest pause before a request is sent again.
    longest_pause: Duration,
}

impl Hub {
    /// Reads the environment variables of Python's `huggingface_hub`: `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`,
    /// `XDG_CACHE_HOME`, `HF_TOKEN` and `HF_TOKEN_PATH`.
    ///
    /// # Errors
    /// Returns an error if no variable says where the cache is, or if the file of the token cannot be read.
    pub fn from_environment() -> Result<Self, HubError> {
        Self::from_variables(|name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        })
    }

    fn from_variables(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<Self, HubError> {
        let home = variable("HF_HOME")
            .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(variable("HOME")?.join(".cache/huggingface")));
        let in_home = |name: &str| home.as_ref().map(|home| home.join(name));
        let cache = variable("HF_HUB_CACHE").or_else(|| in_home("hub")).ok_or_else(|| {
            HubError::Refused(
                "cannot tell where models are cached, because there is no home folder: set HF_HOME or HF_HUB_CACHE"
                    .to_owned(),
            )
        })?;
        let text = |path: PathBuf| path.to_string_lossy().trim().to_owned();
        let token = match (variable("HF_TOKEN"), variable("HF_TOKEN_PATH")) {
            (Some(token), _) => Some(text(token)),
            (None, Some(path)) => Some(read_token(&path)?),
            (None, None) => match in_home("token") {
                Some(path) if path.exists() => Some(read_token(&path)?),
                _ => None,
            },
        };
        let endpoint = variable("HF_ENDPOINT").map_or_else(|| ENDPOINT.to_owned(), text);
        Ok(Self::new(endpoint.trim_end_matches('/'), &cache, token))
    }

    /// Creates a hub with an address, a cache and a token.
    pub fn new(endpoint: &str, cache: &Path, token: Option<String>) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            cache: cache.to_owned(),
            token: token.filter(|token| !token.is_empty()),
            longest_pause: Duration::from_secs(300),
        }
    }

    /// Limits the pauses before a request is sent again.
    #[must_use]
    pub fn with_longest_pause(self, longest_pause: Duration) -> Self {
        Self { longest_pause, ..self }
    }

    /// Returns the folder of a model or an adapter that has been downloaded completely.
    ///
    /// # Errors
    /// Returns an error that names the command that downloads it.
    pub fn cached(&self, reference: &Reference) -> Result<Snapshot, HubError> {
        let refused = |reason: &str| {
            HubError::Refused(format!(
                "{reference} {reason} the cache {}; download it with `moderatord fetch {reference}`, or set \
                 model.download = true",
                self.cache.display()
            ))
        };
        let commit = if reference.is_commit() {
            reference.revision.clone()
        } else {
            let path = self.ref_path(reference);
            match std::fs::read_to_string(&path) {
                Ok(commit) => commit.trim().to_owned(),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(refused("is not in")),
                Err(error) => {
                    return Err(HubError::Refused(format!(
                        "{reference}: cannot read {}: {error}",
                        path.display()
                    )));
                }
            }
        };
        let folder = self.snapshot(reference, &commit);
        if !is_commit(&commit) || !folder.is_dir() {
            return Err(refused("is not in"));
        }
        match missing_file(&folder) {
            None => Ok(Snapshot { folder, commit }),
            Some(name) => Err(refused(&format!("has no {name} in"))),
        }
    }

    /// Returns the name of a model's folder, in the cache and for locks.
    fn folder_name(reference: &Reference) -> String {
        format!("models--{}", reference.id.replace('/', "--"))
    }

    /// Returns the folder of all revisions of a model.
    fn folder(&self, reference: &Reference) -> PathBuf {
        self.cache.join(Self::folder_name(reference))
    }

    /// Returns the folder of a commit, with links to blobs.
    fn snapshot(&self, reference: &Reference, commit: &str) -> PathBuf {
        self.folder(reference).join("snapshots").join(commit)
    }

    /// Returns the file that holds the commit of a branch or tag.
    fn ref_path(&self, reference: &Reference) -> PathBuf {
        self.folder(reference).join("refs").join(&reference.revision)
    }
}

fn read_token(path: &Path) -> Result<String, HubError> {
    let token = std::fs::read_to_string(path)
        .map_err(|error| HubError::Refused(format!("cannot read the token in {}: {error}", path.display())))?;
    Ok(token.trim().to_owned())
}

/// The part of a shard index that names the shards.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: std::collections::BTreeMap<String, String>,
}

/// Returns a file that is missing from the folder of a checkpoint or an adapter.
fn missing_file(folder: &Path) -> Option<String> {
    let lacks = |name: &str| !folder.join(name).exists();
    if !lacks("adapter_config.json") {
        return lacks("adapter_model.safetensors").then(|| "adapter_model.safetensors".to_owned());
    }
    if lacks("config.json") {
        return Some("config.json".to_owned());
    }
    if lacks("tokenizer.json") && lacks("tokenizer.model") {
        return Some("tokenizer.json".to_owned());
    }
    let index = std::fs::read(folder.join("model.safetensors.index.json")).ok();
    let index = index.and_then(|text| serde_json::from_slice::<ShardIndex>(&text).ok());
    match index {
        Some(index) => index.weight_map.into_values().find(|name| lacks(name)),
        None => lacks("model.safetensors").then(|| "model.safetensors".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_or_refused() {
        let check = |text: &str, expected: Option<(&str, &str)>| {
            let found = Reference::parse(text);
            let found = found
                .as_ref()
                .ok()
                .map(|found| (found.id.as_str(), found.revision.as_str()));
            assert_eq!(found, expected, "{text}");
        };
        check("hf://google/gemma-3-270m-it", Some(("google/gemma-3-270m-it", "main")));
        check("hf://a/b.c@refs/pr/1", Some(("a/b.c", "refs/pr/1")));
        for text in [
            "google/gemma",
            "hf://gemma",
            "hf://a/b/c",
            "hf://a/../b",
            "hf://a/..",
            "hf://a/b@",
            "hf://a/b@../x",
            "hf://a /b",
        ] {
            check(text, None);
        }
    }

    #[test]
    fn the_environment_is_read_as_in_python() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "from file\n").unwrap();
        let home = folder.path().to_str().unwrap();
        let hub = |variables: &[(&str, &str)]| {
            let find = |name: &str| {
                variables
                    .iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| PathBuf::from(value))
            };
            Hub::from_variables(find).map(|hub| (hub.endpoint, hub.cache.display().to_string(), hub.token))
        };
        let expected = |endpoint: &str, cache: &str, token: Option<&str>| {
            (endpoint.to_owned(), cache.to_owned(), token.map(str::to_owned))
        };
        assert_eq!(
            hub(&[("HOME", "/h")]).unwrap(),
            expected(ENDPOINT, "/h/.cache/huggingface/hub", None)
        );
        assert_eq!(
            hub(&[
                ("HOME", "/h"),
                ("XDG_CACHE_HOME", "/x"),
                ("HF_TOKEN", " t\n"),
                ("HF_ENDPOINT", "http://m/")
            ])
            .unwrap(),
            expected("http://m", "/x/huggingface/hub", Some("t"))
        );
        assert_eq!(
            hub(&[("HF_HOME", home)]).unwrap(),
            expected(ENDPOINT, &format!("{home}/hub"), Some("from file"))
        );
        let path = file.to_str().unwrap();
        assert_eq!(
            hub(&[("HF_HUB_CACHE", "/c"), ("HF_TOKEN_PATH", path)]).unwrap(),
            expected(ENDPOINT, "/c", Some("from file"))
        );
        assert!(
            hub(&[("HF_HUB_CACHE", "/c"), ("HF_TOKEN_PATH", "/nowhere")])
                .unwrap_err()
                .to_string()
                .contains("/nowhere")
        );
        assert!(hub(&[]).unwrap_err().to_string().contains("set HF_HOME"));
    }
}
