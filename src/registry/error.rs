//! Errors of the registry. Each one names the registry or the file, what was found and what was expected.

use super::Version;

/// Why an operation on the registry failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The setting `registry.url` is not a usable URL.
    #[error("registry.url {found}, expected {expected}")]
    Url {
        /// What is wrong with the value, without credentials.
        found: String,
        /// The form of a valid value.
        expected: &'static str,
    },
    /// The store does not answer, or refuses the operation. Retrying may help.
    #[error("cannot {action} `{path}` in the registry at {location}: {source}")]
    Store {
        /// The operation that failed: `open`, `read`, `write`, `list` or `delete`.
        action: &'static str,
        /// Path of the object within the registry.
        path: String,
        /// Location of the registry.
        location: String,
        /// The error of the store.
        source: Box<object_store::Error>,
    },
    /// The folder of the registry, the lock file in it or the memory of its pointer cannot be used.
    #[error("cannot {action} `{path}`: {source}")]
    Folder {
        /// The operation that failed.
        action: &'static str,
        /// The file or folder.
        path: String,
        /// The error of the operating system.
        source: std::io::Error,
    },
    /// The folder of the registry does not exist. Mounting it may help.
    #[error("cannot {action} the registry: the folder `{path}` does not exist")]
    NoFolder {
        /// The operation that failed.
        action: &'static str,
        /// The folder.
        path: String,
    },
    /// An object is missing, or its content does not match its hash or format.
    #[error("`{path}` in the registry at {location}: {found}, expected {expected}")]
    Corrupt {
        /// Path of the object within the registry.
        path: String,
        /// Location of the registry.
        location: String,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// The version does not exist, or no longer exists.
    #[error("version `{version}` is not in the registry at {location}")]
    NoVersion {
        /// The version or prefix that was asked for.
        version: String,
        /// Location of the registry.
        location: String,
    },
    /// Several versions begin with the given prefix.
    #[error("version `{prefix}` is ambiguous: {}", versions.iter().map(Version::as_str).collect::<Vec<_>>().join(", "))]
    Ambiguous {
        /// The prefix that was asked for.
        prefix: String,
        /// The versions that begin with it.
        versions: Vec<Version>,
    },
    /// The version in service has changed since the caller looked at it.
    #[error(
        "cannot create pointer {sequence} in the registry at {location}: the version in service has changed in the \
         meantime"
    )]
    Conflict {
        /// Number of the pointer that was to be created.
        sequence: u64,
        /// Location of the registry.
        location: String,
    },
    /// A rollback was requested, but nothing was in service before.
    #[error("cannot roll back in the registry at {0}: nothing was in service before")]
    NoEarlierVersion(String),
    /// A draft has invalid or missing files, or a manifest that is too large.
    #[error("cannot publish: {0}")]
    InvalidDraft(String),
    /// Another process on this host holds the registry's lock.
    #[error("the registry lock `{path}` is held by {holder}")]
    Locked {
        /// Path of the lock file.
        path: String,
        /// The process that holds the lock and the time at which it took it, if the file records them.
        holder: String,
    },
}
