//! Several daemons of one group, each started again when it ends, as systemd does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::process::Process;

/// The time after which systemd starts a daemon again; see `RestartSec` in `systemd/moderatord.service`.
const RESTART_DELAY: Duration = Duration::from_secs(2);

pub struct Daemons {
    folder: PathBuf,
    settings: Vec<(String, String)>,
    variables: Vec<(&'static str, String)>,
    processes: Vec<Slot>,
    /// One line for each time that a daemon ended without being killed.
    pub exits: Vec<String>,
}

enum Slot {
    Running(Process),
    RestartAt(Instant),
}

impl Daemons {
    /// Starts one daemon for each pair of an instance name and its settings.
    pub fn start(folder: &Path, settings: Vec<(String, String)>, variables: Vec<(&'static str, String)>) -> Self {
        let mut daemons = Self {
            folder: folder.to_owned(),
            settings,
            variables,
            processes: Vec::new(),
            exits: Vec::new(),
        };
        for index in 0..daemons.settings.len() {
            let process = daemons.spawn(index);
            daemons.processes.push(Slot::Running(process));
        }
        daemons
    }

    fn spawn(&self, index: usize) -> Process {
        let (instance, settings) = &self.settings[index];
        Process::spawn(&self.folder, instance, settings, &self.variables)
    }

    /// Notes which daemons have ended, and starts those again whose time has come.
    pub fn tend(&mut self) {
        for index in 0..self.processes.len() {
            match &mut self.processes[index] {
                Slot::Running(process) => {
                    if process.is_running() {
                        continue;
                    }
                    let log = process.log();
                    let last = log.lines().last().unwrap_or_default();
                    let code = process.wait();
                    self.exits
                        .push(format!("{}: code {code:?}: {last}", self.settings[index].0));
                    self.processes[index] = Slot::RestartAt(Instant::now() + RESTART_DELAY);
                }
                Slot::RestartAt(at) => {
                    if *at <= Instant::now() {
                        self.processes[index] = Slot::Running(self.spawn(index));
                    }
                }
            }
        }
    }

    /// Tends the daemons for that long.
    pub fn tend_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        self.tend_until(|| Instant::now() >= end);
    }

    /// Tends the daemons until a condition holds.
    pub fn tend_until(&mut self, mut holds: impl FnMut() -> bool) {
        while !holds() {
            self.tend();
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns the logs of all daemons, each from its first start on.
    pub fn logs(&self) -> impl Iterator<Item = String> {
        self.settings
            .iter()
            .map(|(instance, _)| std::fs::read_to_string(self.folder.join(format!("{instance}.log"))).unwrap())
    }

    /// Stops all daemons that are running, and returns their exit codes.
    pub fn stop(&mut self) -> Vec<Option<i32>> {
        self.tend();
        let mut codes = Vec::new();
        for slot in &self.processes {
            if let Slot::Running(process) = slot {
                process.signal("TERM");
            }
        }
        for slot in &mut self.processes {
            if let Slot::Running(process) = slot {
                codes.push(process.wait());
            }
        }
        codes
    }
}
