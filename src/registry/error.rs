//! What can go wrong with a registry: the place, the thing, what was found and what was expected.

use super::Version;

/// Why the registry did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The setting names no registry that we can use.
    #[error("registry.url {found}, expected {expected}")]
    Url {
        /// What it is, without credentials.
        found: String,
        /// What would do.
        expected: &'static str,
    },
    /// The store does not answer, or refuses. Worth another try.
    #[error("cannot {action} `{path}` in the registry at {place}: {source}")]
    Store {
        /// Read, write, list or delete.
        action: &'static str,
        /// Within the registry.
        path: String,
        /// Where the registry is.
        place: String,
        /// What the store says.
        source: Box<object_store::Error>,
    },
    /// The registry's folder cannot be used.
    #[error("cannot {action} `{path}`: {source}")]
    Folder {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// What stands there is not what was written.
    #[error("`{path}` in the registry at {place}: {found}, expected {expected}")]
    Corrupt {
        /// Within the registry.
        path: String,
        /// Where the registry is.
        place: String,
        /// What was found.
        found: String,
        /// What was expected.
        expected: String,
    },
    /// A version that is not there, or not any more.
    #[error("version `{version}` is not in the registry at {place}")]
    NoVersion {
        /// As asked for.
        version: String,
        /// Where the registry is.
        place: String,
    },
    /// An abbreviation that fits several versions.
    #[error("version `{prefix}` is ambiguous: {}", versions.iter().map(Version::as_str).collect::<Vec<_>>().join(", "))]
    Ambiguous {
        /// As asked for.
        prefix: String,
        /// What it fits.
        versions: Vec<Version>,
    },
    /// Somebody else moved the pointer first.
    #[error("pointer {sequence} of the registry at {place} is there already: what is in service changed meanwhile")]
    Overtaken {
        /// The pointer that was to be made.
        sequence: u64,
        /// Where the registry is.
        place: String,
    },
    /// There is nothing to go back to.
    #[error("the registry at {0} has nothing in service to roll back from")]
    NothingBefore(String),
    /// A version that nobody could load.
    #[error("cannot publish: {0}")]
    Unpublishable(String),
    /// Another process of this host is at work in the registry.
    #[error("the registry's lock `{path}` is held by {holder}")]
    Locked {
        /// The lock file.
        path: String,
        /// Its process id and since when, as far as it says so.
        holder: String,
    },
}
