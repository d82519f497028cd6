//! An Apache Kafka cluster of a test's own, whose nodes it can kill, stop and pause.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::broker::{Broker, script};
use crate::common::process::Start;

/// A cluster that `tests/kafka/broker` runs. Its nodes are numbered from 1, and killed when the test ends.
pub struct Cluster {
    folder: tempfile::TempDir,
    variables: String,
}

impl Cluster {
    /// Starts a cluster of one node or three.
    pub fn start(nodes: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let variables = script(
            "broker",
            &["start", folder.path().to_str().unwrap(), &nodes.to_string()],
        );
        Self { folder, variables }
    }

    pub fn broker(&self) -> Broker {
        Broker::Apache(self.variable("BROKERS"))
    }

    /// Returns the value of a variable that the script exports for this cluster.
    pub fn variable(&self, name: &str) -> String {
        let prefix = format!("export MODERATORD_TEST_{name}=");
        let mut lines = self.variables.lines();
        lines.find_map(|line| line.strip_prefix(&prefix)).unwrap().to_owned()
    }

    /// Applies a command to a node, and waits until it is done.
    pub fn command(&self, command: &str, node: usize) {
        script(
            "broker",
            &[command, self.folder.path().to_str().unwrap(), &node.to_string()],
        );
    }

    /// Begins to restart a node. The process that is returned ends when the node serves.
    pub fn begin_restart(&self, node: usize) -> Child {
        Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kafka/broker"))
            .arg("restart")
            .arg(self.folder.path())
            .arg(node.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .start()
            .unwrap()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Not a check of the result: a second panic would hide the reason for the first.
        let broker = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kafka/broker");
        let _ = Command::new(broker).arg("kill").arg(self.folder.path()).finish();
    }
}
