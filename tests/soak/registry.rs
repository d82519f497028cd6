//! A registry with two versions, which can be swapped, moved away and made unreadable.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::common::labels::label;
use crate::common::process::Start;
use crate::common::registry::create_with_fixed_split;
use crate::common::without_settings;

pub struct SharedRegistry {
    folder: PathBuf,
    settings: PathBuf,
    versions: Vec<String>,
    promoted: usize,
}

impl SharedRegistry {
    /// Returns what a daemon's settings need besides the model, so that it serves from the registry in a folder.
    pub fn settings(folder: &Path) -> String {
        format!(
            "[registry]\nurl = \"file://{}/registry\"\npoll = \"1s\"\n\
             [retrain]\nlearning_rate = 0.01\nepochs = 1\nbatch = 4\nrank = 4\ntest = 0.5\ncross_fit = \"never\"\nmin_rows = 20\n",
            folder.display()
        )
    }

    /// Trains two adapters with the settings of a daemon, and puts the first into service.
    pub fn create(folder: &Path, daemon_settings: &str) -> Self {
        let mut registry = Self {
            folder: folder.join("registry"),
            settings: folder.join("registry.toml"),
            versions: Vec::new(),
            promoted: 0,
        };
        create_with_fixed_split(&registry.folder);
        std::fs::write(&registry.settings, daemon_settings).unwrap();
        let rows = folder.join("rows.jsonl");
        let text: String = (0..200).map(|row| label(row).1 + "\n").collect();
        std::fs::write(&rows, text).unwrap();
        registry.versions = ["1", "2"]
            .map(|seed| {
                let arguments = ["retrain", "--no-promote", "--input", rows.to_str().unwrap()];
                let printed = registry.command(&arguments, seed);
                let line = printed.lines().find_map(|line| line.strip_prefix("version "));
                line.unwrap_or_else(|| panic!("no version in {printed}"))
                    .trim()
                    .to_owned()
            })
            .to_vec();
        registry.swap();
        registry
    }

    /// Puts the other version into service.
    pub fn swap(&mut self) {
        self.promoted = (self.promoted + 1) % self.versions.len();
        self.command(&["adapters", "promote", &self.versions[self.promoted]], "1");
    }

    /// Moves the registry away, as if its volume were not mounted.
    pub fn take_away(&self) {
        std::fs::rename(&self.folder, self.hidden()).unwrap();
    }

    /// Makes every access to the registry fail. Permissions would not keep root out, but a link to itself does.
    pub fn make_unreadable(&self) {
        self.take_away();
        symlink(&self.folder, &self.folder).unwrap();
    }

    /// Ends [`Self::take_away`] and [`Self::make_unreadable`].
    pub fn bring_back(&self) {
        if self.folder.is_symlink() {
            std::fs::remove_file(&self.folder).unwrap();
        }
        assert!(
            !self.folder.exists(),
            "a daemon created a registry while it was serving"
        );
        std::fs::rename(self.hidden(), &self.folder).unwrap();
    }

    fn hidden(&self) -> PathBuf {
        self.folder.with_extension("away")
    }

    fn command(&self, arguments: &[&str], seed: &str) -> String {
        let (first, rest) = arguments.split_first().unwrap();
        let output = without_settings(env!("CARGO_BIN_EXE_moderatord"))
            .arg(first)
            .arg("--config")
            .arg(&self.settings)
            .args(rest)
            .env("MODERATORD__RETRAIN__SEED", seed)
            .finish()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {text}{errors}");
        text
    }
}
