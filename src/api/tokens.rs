//! The tokens of the callers.
//!
//! A file has one line for each token: a name, which appears in metrics and logs, and the token itself. Two tokens of one
//! name let a caller change its token without an interruption. Only hashes of the tokens are kept.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::fault::{Fault, Faults};

/// The fewest characters of a token: those of 96 random bits in base64.
const MIN_CHARACTERS: usize = 16;

/// The most bytes of the file, so that a wrong path to a huge file does not exhaust the memory.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The most names, because each is a value of a metric's label.
const MAX_NAMES: usize = 1000;

/// The name of every caller if there is no file of tokens.
pub(super) const LOCAL: &str = "local";

/// The callers that may use the API.
#[derive(Debug)]
pub(crate) struct Callers {
    /// `None` if every caller may use it, because only this host can reach it.
    file: Option<PathBuf>,
    tokens: RwLock<Arc<Vec<Token>>>,
}

#[derive(Debug)]
struct Token {
    caller: Arc<str>,
    hash: [u8; 32],
}

impl Callers {
    /// Reads the file of tokens.
    ///
    /// # Errors
    /// Returns all faults of the file.
    pub(crate) fn read(file: Option<&Path>) -> Result<Self, Faults> {
        let tokens = file.map(read).transpose()?.unwrap_or_default();
        Ok(Self {
            file: file.map(Path::to_path_buf),
            tokens: RwLock::new(Arc::new(tokens)),
        })
    }

    /// Reads the file again. From then on, only the tokens that it has now are accepted.
    ///
    /// # Errors
    /// Returns all faults of the file. The old tokens then stay in force.
    pub(crate) fn reload(&self) -> Result<(), Faults> {
        if let Some(file) = &self.file {
            let tokens = Arc::new(read(file)?);
            *self.tokens.write().unwrap_or_else(PoisonError::into_inner) = tokens;
        }
        Ok(())
    }

    /// Returns the name of the caller that has this token, or `None` if nobody has it.
    ///
    /// The time that this takes depends on the number of tokens only.
    pub(super) fn caller(&self, token: Option<&str>) -> Option<Arc<str>> {
        if self.file.is_none() {
            return Some(LOCAL.into());
        }
        let hash: [u8; 32] = Sha256::digest(token?.as_bytes()).into();
        let tokens = Arc::clone(&self.tokens.read().unwrap_or_else(PoisonError::into_inner));
        let mut found = None;
        for token in tokens.iter() {
            if bool::from(token.hash.ct_eq(&hash)) {
                found = Some(Arc::clone(&token.caller));
            }
        }
        found
    }
}

fn read(path: &Path) -> Result<Vec<Token>, Faults> {
    let unreadable = |error: std::io::Error| Fault::file(path, format!("cannot read the tokens: {error}"));
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > MAX_FILE_BYTES {
        let text = format!("has {size} bytes, expected a file of tokens with at most {MAX_FILE_BYTES}");
        return Err(Fault::file(path, text).into());
    }
    parse(path, &std::fs::read_to_string(path).map_err(unreadable)?)
}

/// Reads the lines of a file of tokens. No fault quotes a line, because it may hold a token.
fn parse(path: &Path, text: &str) -> Result<Vec<Token>, Faults> {
    let (mut tokens, mut faults) = (Vec::<Token>::new(), Faults::default());
    let mut names = std::collections::BTreeSet::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut fault = |expected: &str| {
            faults.push(Fault::file(path, format!("line {}: expected {expected}", index + 1)));
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, token] = words[..] else {
            fault("a name and a token, separated by a space");
            continue;
        };
        if !name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            || name.len() > 64
        {
            fault("a name of at most 64 ASCII letters, digits, `-`, `_` and `.`");
            continue;
        }
        if token.len() < MIN_CHARACTERS || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            fault(&format!(
                "a token of at least {MIN_CHARACTERS} ASCII characters, such as `openssl rand -hex 24` prints"
            ));
            continue;
        }
        let hash = Sha256::digest(token.as_bytes()).into();
        if tokens.iter().any(|other| other.hash == hash) {
            fault("a token that no other line has");
            continue;
        }
        names.insert(name);
        tokens.push(Token {
            caller: name.into(),
            hash,
        });
    }
    if faults.is_empty() && tokens.is_empty() {
        faults.push(Fault::file(
            path,
            "has no token, expected lines with a name and a token".to_owned(),
        ));
    }
    if names.len() > MAX_NAMES {
        let text = format!("has {} names, expected at most {MAX_NAMES}", names.len());
        faults.push(Fault::file(path, text));
    }
    if faults.is_empty() { Ok(tokens) } else { Err(faults) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORUM: &str = "forum-token-0123456789";
    const GAME: &str = "game-token-0123456789";

    #[test]
    fn each_token_names_its_caller_and_a_reload_replaces_them_all() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("# callers\n\nforum {FORUM}\n  game\t{GAME}\n")).unwrap();
        let callers = Callers::read(Some(file.path())).unwrap();
        let caller = |token: Option<&str>| callers.caller(token).map(|name| name.to_string());
        assert_eq!(caller(Some(FORUM)).as_deref(), Some("forum"));
        assert_eq!(caller(Some(GAME)).as_deref(), Some("game"));
        for wrong in [
            None,
            Some(""),
            Some("forum"),
            Some("game-token-0123456788"),
            Some("forum-token-01234567890"),
        ] {
            assert_eq!(caller(wrong), None, "{wrong:?}");
        }
        std::fs::write(file.path(), format!("game {FORUM}\n")).unwrap();
        callers.reload().unwrap();
        assert_eq!(
            (caller(Some(FORUM)).as_deref(), caller(Some(GAME))),
            (Some("game"), None)
        );
        // A file with a fault changes nothing.
        std::fs::write(file.path(), "game short\n").unwrap();
        assert!(callers.reload().is_err());
        assert_eq!(caller(Some(FORUM)).as_deref(), Some("game"));
    }

    #[test]
    fn without_a_file_every_caller_is_local() {
        let callers = Callers::read(None).unwrap();
        assert_eq!(callers.caller(None).as_deref(), Some(LOCAL));
    }

    #[test]
    fn faults_name_the_line_and_no_token() {
        let path = Path::new("tokens");
        let faults = parse(
            path,
            &format!("forum\nforum {FORUM} x\n!? {FORUM}\nforum secret\na {FORUM}\nb {FORUM}\n"),
        );
        let faults = faults.unwrap_err().to_string();
        for line in [1, 2, 3, 4, 6] {
            assert!(faults.contains(&format!("line {line}: ")), "{line}: {faults}");
        }
        assert!(!faults.contains("secret") && !faults.contains(FORUM), "{faults}");
        let empty = parse(path, "# nothing\n").unwrap_err().to_string();
        assert!(empty.contains("has no token"), "{empty}");
    }
}
