//! Logs and counts the results of reading the registry while serving.
//!
//! Every read is counted, but a result is logged only if it differs from the one before, because the registry is read
//! every few seconds.

use std::time::SystemTime;

use metrics::{counter, gauge};
use tracing::{error, info, warn};

use crate::ops::metrics as names;
use crate::registry::{LostRegistry, RegistryError};

/// Reports what was found in the registry, once per change.
#[derive(Debug, Default)]
pub(crate) struct ReadReporter {
    /// The problem that was reported last; `None` if the last read had none.
    problem: Option<String>,
}

impl ReadReporter {
    /// Reports that the registry was read and has the pointer last seen, or a later one.
    pub(crate) fn intact(&mut self) {
        counter!(names::REGISTRY_READS, "result" => "ok").increment(1);
        gauge!(names::REGISTRY_MISSING).set(0.0);
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        gauge!(names::REGISTRY_LAST_READ).set(since_epoch.unwrap_or_default().as_secs_f64());
        if self.problem.take().is_some() {
            info!("the registry can be read again");
        }
    }

    /// Reports that the registry no longer has the pointer last seen.
    pub(crate) fn lost(&mut self, lost: &LostRegistry) {
        counter!(names::REGISTRY_READS, "result" => "missing").increment(1);
        gauge!(names::REGISTRY_MISSING).set(1.0);
        if self.is_new(lost.to_string()) {
            error!(error = %lost, "the registry has lost the version in service; what is being served stays in service");
        }
    }

    /// Reports that the registry cannot be read, which says nothing about what it has.
    pub(crate) fn failed(&mut self, error: &RegistryError) {
        counter!(names::REGISTRY_READS, "result" => "failed").increment(1);
        if self.is_new(error.to_string()) {
            warn!(%error, "cannot read the registry; the version in service stays");
        }
    }

    fn is_new(&mut self, problem: String) -> bool {
        let is_new = self.problem.as_ref() != Some(&problem);
        self.problem = Some(problem);
        is_new
    }
}
