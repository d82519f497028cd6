//! The judge in service, whose policy and model are replaced while the daemon runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::policy::effective_policy;
use super::{Calibration, DerivedThresholds, Judge};
use crate::classifier::defaults::ModelDefaults;
use crate::config::PolicyConfig;
use crate::message::ModelIdentity;

/// The judge in service. Each batch is decided by the judge that was current when the batch was scored.
///
/// The policy and the model are replaced independently, and neither replacement undoes the other.
#[derive(Debug)]
pub struct CurrentJudge(Mutex<JudgeState>);

#[derive(Debug)]
struct JudgeState {
    policy: PolicyConfig,
    defaults: ModelDefaults,
    derived: DerivedThresholds,
    judge: Arc<Judge>,
}

/// The properties of a model that decisions depend on.
#[derive(Debug, Clone)]
pub struct JudgedModel {
    /// The identity of the model.
    pub identity: ModelIdentity,
    /// The calibration that turns its margins into probabilities.
    pub calibration: Calibration,
    /// The thresholds that were derived for it.
    pub derived: DerivedThresholds,
    /// The defaults that its base model brings.
    pub defaults: ModelDefaults,
}

impl CurrentJudge {
    /// Creates the judge of a policy and a model.
    pub fn new(policy: PolicyConfig, model: JudgedModel) -> Self {
        let effective = effective_policy(&policy, &model.defaults, model.derived);
        let judge = Judge::new(effective, model.calibration, model.identity);
        Self(Mutex::new(JudgeState {
            policy,
            defaults: model.defaults,
            derived: model.derived,
            judge: Arc::new(judge),
        }))
    }

    /// Returns the judge in service.
    pub fn get(&self) -> Arc<Judge> {
        Arc::clone(&self.lock().judge)
    }

    /// Replaces the policy, starting with the next batch.
    pub fn set_policy(&self, policy: PolicyConfig) {
        let mut state = self.lock();
        let (calibration, identity) = (state.judge.calibration, state.judge.model.clone());
        let effective = effective_policy(&policy, &state.defaults, state.derived);
        state.judge = Arc::new(Judge::new(effective, calibration, identity));
        state.policy = policy;
    }

    /// Replaces the model, starting with the next batch.
    pub fn set_model(&self, model: JudgedModel) {
        let mut state = self.lock();
        state.derived = model.derived;
        state.defaults = model.defaults;
        let effective = effective_policy(&state.policy, &state.defaults, model.derived);
        state.judge = Arc::new(Judge::new(effective, model.calibration, model.identity));
    }

    fn lock(&self) -> MutexGuard<'_, JudgeState> {
        // A thread that panics while it holds the lock leaves a judge that is still usable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
