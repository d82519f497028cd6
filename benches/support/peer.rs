//! A peer in Python: a process that does one round of work when it is told to, so that the two sides take turns.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

/// A running script of `benches/peers`.
pub struct Peer {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// What it said once it was ready.
    pub ready: Value,
}

impl Peer {
    /// Starts a script and waits until it is ready. Returns an error if Python lacks what it needs.
    pub fn start(python: &str, script: &str, checkpoint: &Path, work: &Path, options: &[&str]) -> Result<Self, String> {
        let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers");
        let mut process = Command::new(python)
            .arg(peers.join(script))
            .args([checkpoint, work])
            .args(options)
            .env("TRANSFORMERS_VERBOSITY", "error")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot run `{python}`: {error}"))?;
        let input = process.stdin.take().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut peer = Self {
            process,
            input,
            output,
            ready: Value::Null,
        };
        peer.ready = peer.answer()?;
        Ok(peer)
    }

    /// Returns the answer to a line of input.
    pub fn ask(&mut self, line: &str) -> Value {
        writeln!(self.input, "{line}").unwrap();
        self.answer().unwrap()
    }

    fn answer(&mut self) -> Result<Value, String> {
        let mut line = String::new();
        match self.output.read_line(&mut line) {
            Ok(bytes) if bytes > 0 => serde_json::from_str(&line).map_err(|error| format!("{error} in `{line}`")),
            _ => Err("the process ended; its messages are above".to_owned()),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
