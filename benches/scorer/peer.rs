//! PyTorch as a peer: a process that scores the same comments when it is told to, so that the two sides take turns.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

/// A running `benches/peers/pytorch.py`.
pub struct PyTorch {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Its version.
    pub version: String,
    pub variants: Vec<String>,
}

impl PyTorch {
    /// Starts the peer and waits until it has loaded its models. Returns an error if Python lacks what it needs.
    pub fn start(python: &str, checkpoint: &Path, work: &Path, threads: usize) -> Result<Self, String> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/pytorch.py");
        let mut process = Command::new(python)
            .arg(script)
            .args([checkpoint, work])
            .args(["--threads", &threads.to_string()])
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
            version: String::new(),
            variants: Vec::new(),
        };
        let ready = peer.answer()?;
        peer.version = ready["torch"].as_str().unwrap().to_owned();
        let variants = ready["variants"].as_array().unwrap().iter();
        peer.variants = variants.map(|name| name.as_str().unwrap().to_owned()).collect();
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

impl Drop for PyTorch {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
