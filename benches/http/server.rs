//! A server in processes of its own, so that its CPU time is its own.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::argument;
use crate::client::{ask_once, request};
use crate::support::cpu_time_of;

/// How long a server may take to load its model and warm up.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// The endpoint for comments, and where a server counts its passes.
struct Form {
    path: &'static str,
    stats: SocketAddr,
    is_peer: bool,
}

/// A server that is killed when it is dropped, even if the benchmark panics.
pub struct Server {
    process: Child,
    pub address: SocketAddr,
    form: Form,
    /// One request for each text.
    pub requests: Arc<Vec<Vec<u8>>>,
    _folder: tempfile::TempDir,
}

/// The passes through the model so far, and their rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Passes {
    pub passes: f64,
    pub rows: f64,
}

impl Server {
    /// Starts `moderatord serve` with settings in TOML.
    pub fn ours(settings: &str, texts: &[String]) -> Self {
        let (address, metrics) = (free_address(), free_address());
        let text = format!(
            "{settings}api.listen = \"{address}\"\nhttp.listen = \"{metrics}\"\nlog.level = \"error\"\n\
             shutdown.grace = \"1s\"\n"
        );
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("moderatord.toml");
        fs::write(&file, text).unwrap();
        let program = argument("daemon").unwrap_or_else(|| env!("CARGO_BIN_EXE_moderatord").to_owned());
        let mut command = Command::new(program);
        command.args(["serve", "--config"]).arg(&file);
        let form = Form {
            path: "/v1/score",
            stats: metrics,
            is_peer: false,
        };
        Self::start(command, address, form, texts, folder)
    }

    /// Starts the server in Python with options, parted by spaces.
    pub fn peer(python: &str, checkpoint: &Path, options: &str, texts: &[String]) -> Self {
        let address = free_address();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/http_server.py");
        let mut command = Command::new(python);
        command.arg(script).arg(checkpoint).args(options.split_whitespace());
        command.args(["--port", &address.port().to_string()]);
        let form = Form {
            path: "/score",
            stats: address,
            is_peer: true,
        };
        Self::start(command, address, form, texts, tempfile::tempdir().unwrap())
    }

    fn start(
        mut command: Command,
        address: SocketAddr,
        form: Form,
        texts: &[String],
        folder: tempfile::TempDir,
    ) -> Self {
        let requests: Vec<Vec<u8>> = texts.iter().map(|text| comment(form.path, text)).collect();
        let process = command.stdout(Stdio::null()).spawn();
        let process = process.unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        let mut server = Self {
            process,
            address,
            form,
            requests: Arc::new(requests),
            _folder: folder,
        };
        let deadline = Instant::now() + START_TIMEOUT;
        while ask_once(address, &server.requests[0]).map_or(true, |(status, _)| status != 200) {
            let ended = server.process.try_wait().unwrap();
            assert!(ended.is_none(), "{command:?} ended; its messages are above");
            assert!(Instant::now() < deadline, "{command:?} is not ready in time");
            std::thread::sleep(Duration::from_millis(200));
        }
        server
    }

    /// Returns the margin of a text.
    pub fn margin(&self, text: &str) -> f64 {
        let (status, body) = ask_once(self.address, &comment(self.form.path, text)).unwrap();
        assert_eq!(status, 200, "{body}");
        let body: Value = serde_json::from_str(&body).unwrap();
        body["margin"].as_f64().unwrap()
    }

    /// Returns the CPU time of all threads of all processes of the server.
    pub fn cpu_time(&self) -> Duration {
        self.processes()
            .iter()
            .map(|process| cpu_time_of(&process.to_string()))
            .sum()
    }

    /// Returns the resident memory of all processes in bytes. Files that they share count once.
    pub fn memory(&self) -> f64 {
        let memory = |process: &i32, name: &str| {
            let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0
        };
        let processes = self.processes();
        let others: f64 = processes[1..].iter().map(|process| memory(process, "RssAnon:")).sum();
        memory(&processes[0], "VmRSS:") + others
    }

    /// Returns the passes through the model so far, unless several processes count them apart from one another.
    pub fn passes(&self) -> Option<Passes> {
        if self.processes().len() > 1 {
            return None;
        }
        let path = if self.form.is_peer { "/stats" } else { "/metrics" };
        let body = metrics(self.form.stats, path);
        if self.form.is_peer {
            let body: Value = serde_json::from_str(&body).unwrap();
            return Some(Passes {
                passes: body["passes"].as_f64()?,
                rows: body["rows"].as_f64()?,
            });
        }
        Some(Passes {
            passes: sample(&body, "moderatord_batch_rows_count")?,
            rows: sample(&body, "moderatord_batch_rows_sum")?,
        })
    }

    /// Returns the versions of the packages of a server in Python.
    pub fn versions(&self) -> Option<Value> {
        let body = self.form.is_peer.then(|| metrics(self.form.stats, "/stats"))?;
        Some(serde_json::from_str::<Value>(&body).unwrap()["versions"].take())
    }

    /// Returns the token budget of moderatord's micro-batches.
    pub fn budget(&self) -> usize {
        sample(&metrics(self.form.stats, "/metrics"), "moderatord_batch_budget_tokens").unwrap() as usize
    }

    /// Returns the ids of the server's process and its children.
    fn processes(&self) -> Vec<i32> {
        let first = self.process.id() as i32;
        let parent = |process: i32| {
            let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
            // The second field after the parenthesised name.
            stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<i32>().ok()
        };
        let names = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let all = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let children = all.filter(|&process| parent(process) == Some(first));
        std::iter::once(first).chain(children).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for process in self.processes() {
            let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
        }
        let _ = self.process.wait();
    }
}

fn comment(path: &str, text: &str) -> Vec<u8> {
    request("POST", path, &json!({ "text": text }).to_string())
}

fn metrics(address: SocketAddr, path: &str) -> String {
    ask_once(address, &request("GET", path, "")).unwrap().1
}

/// Returns the value of a metric without labels.
fn sample(metrics: &str, name: &str) -> Option<f64> {
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line?.parse().ok()
}

/// Returns an address that nobody listens on.
fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap()
}
