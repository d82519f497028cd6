//! Several daemons of one group, each started again when it ends, as systemd does.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::process::Process;

/// The time after which systemd starts a daemon again; see `RestartSec` in `systemd/moderatord.service`.
const RESTART_DELAY: Duration = Duration::from_secs(2);

/// What a daemon is started with.
#[derive(Clone)]
pub struct DaemonSpec {
    pub instance: &'static str,
    pub settings: String,
    /// Added to the environment.
    pub variables: Vec<(&'static str, String)>,
}

pub struct Daemons {
    folder: PathBuf,
    specs: Vec<DaemonSpec>,
    states: Vec<State>,
    /// One line for each time that a daemon ended without being killed.
    pub exits: Vec<String>,
}

enum State {
    Running(Process),
    RestartAt(Instant),
}

impl Daemons {
    pub fn start(folder: &Path, specs: Vec<DaemonSpec>) -> Self {
        let spawn = |spec| State::Running(spawn(folder, spec));
        Self {
            states: specs.iter().map(spawn).collect(),
            folder: folder.to_owned(),
            specs,
            exits: Vec::new(),
        }
    }

    /// Notes which daemons have ended, and starts those again whose time has come.
    pub fn tend(&mut self) {
        for (spec, state) in self.specs.iter().zip(&mut self.states) {
            match state {
                State::Running(process) => {
                    if process.is_running() {
                        continue;
                    }
                    let log = process.log();
                    let last = log.lines().last().unwrap_or_default();
                    self.exits
                        .push(format!("{}: code {:?}: {last}", spec.instance, process.wait()));
                    *state = State::RestartAt(Instant::now() + RESTART_DELAY);
                }
                State::RestartAt(at) => {
                    if *at <= Instant::now() {
                        *state = State::Running(spawn(&self.folder, spec));
                    }
                }
            }
        }
    }

    /// Returns the id of a daemon's process, or `None` if it is about to be started again.
    pub fn process_id(&self, index: usize) -> Option<u32> {
        match &self.states[index] {
            State::Running(process) => Some(process.id()),
            State::RestartAt(_) => None,
        }
    }

    pub fn signal(&self, index: usize, name: &str) {
        if let State::Running(process) = &self.states[index] {
            process.signal(name);
        }
    }

    /// Kills a daemon, which does not count as an exit of its own.
    pub fn kill(&mut self, index: usize) {
        self.signal(index, "KILL");
        self.states[index] = State::RestartAt(Instant::now() + RESTART_DELAY);
    }

    /// Returns the last lines of each daemon's log.
    pub fn log_tails(&self) -> String {
        let tail = |spec: &DaemonSpec| {
            let log = std::fs::read_to_string(self.folder.join(format!("{}.log", spec.instance))).unwrap();
            let lines: Vec<&str> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(30)..].join("\n");
            format!("\nthe end of the log of {}:\n{tail}", spec.instance)
        };
        self.specs.iter().map(tail).collect()
    }

    /// Stops all daemons that are running, and returns their exit codes.
    pub fn stop(&mut self) -> Vec<Option<i32>> {
        self.tend();
        for index in 0..self.states.len() {
            self.signal(index, "TERM");
        }
        let wait = |state: &mut State| match state {
            State::Running(process) => process.wait(),
            State::RestartAt(_) => None,
        };
        self.states.iter_mut().map(wait).collect()
    }
}

fn spawn(folder: &Path, spec: &DaemonSpec) -> Process {
    Process::spawn(folder, spec.instance, &spec.settings, &spec.variables)
}
