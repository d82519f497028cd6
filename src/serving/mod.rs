//! Loads the model in service and makes it ready to score, at startup and for every swap.
//!
//! A version enters service only if its hashes are correct, it fits the base model and the prompt, it reproduces its
//! golden set, and it can score. For a swap, it is loaded next to the model in service, which continues to score.

pub(crate) mod records;
pub(crate) mod report;
pub(crate) mod tracked;
pub(crate) mod watch;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::Deserialize;

use crate::classifier::canary;
use crate::classifier::defaults;
use crate::classifier::golden::{self, Arithmetic, GOLDEN_FILE, GoldenCase};
use crate::classifier::warm_up::{MeasuredBudget, check_budget, warm_up};
use crate::classifier::{Base, Classifier};
use crate::config::{ModelConfig, PromptConfig};
use crate::decide::{Calibration, DerivedThresholds, JudgedModel};
use crate::fault::{Fault, Faults};
use crate::model::files::bundled;
use crate::prompt::{PromptError, settings_of_text_rules};
use crate::registry::{AdapterVersion, LostRegistry, Pointer, Registry, RegistryError};
use crate::scorer::{Row, ScoreError};

/// Upper limit on the time to score one window. It is well below the time after which the daemon counts as stalled.
const MAX_WINDOW_TIME: Duration = Duration::from_secs(10);

/// Why a model cannot enter service.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    /// The registry is unavailable or damaged.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The registry no longer has the pointer last seen in it.
    #[error("{0}; with registry.on_missing = \"continue\", what it has is served, or else the bare base model")]
    Lost(Box<LostRegistry>),
    /// The base model, adapter or prompt cannot be loaded, or they do not fit together.
    #[error("{}", .0.on_one_line())]
    Load(Faults),
    /// The version does not fit the prompt, or does not reproduce its golden set.
    #[error("version {version} cannot be verified: {reason}")]
    Golden {
        /// The version that failed.
        version: String,
        /// What differs.
        reason: String,
    },
    /// The model cannot score the canary.
    #[error("cannot score the canary comments: {0}")]
    Score(#[from] ScoreError),
    /// The device failed for another reason.
    #[error("the device failed: {0}")]
    Device(String),
    /// The canary cannot be turned into prompts.
    #[error("cannot encode the canary comments: {0}")]
    Prompt(#[from] PromptError),
    /// The device is so slow that a long comment would look like a stall.
    #[error(
        "one window of prompt.max_window_tokens = {window} takes about {seconds:.0} s on this device, expected at \
         most {} s; lower the setting",
        MAX_WINDOW_TIME.as_secs()
    )]
    TooSlow {
        /// Maximum number of comment tokens in a window.
        window: usize,
        /// Estimated time for one window.
        seconds: f64,
    },
    /// The async runtime cannot be started.
    #[error("cannot start the runtime: {0}")]
    Runtime(#[from] std::io::Error),
}

impl ServingError {
    /// Returns whether retrying may succeed without intervention.
    pub(crate) fn is_transient(&self) -> bool {
        use RegistryError::{Folder, NoFolder, Store};
        matches!(
            self,
            Self::Registry(Store { .. } | Folder { .. } | NoFolder { .. }) | Self::Runtime(_)
        )
    }
}

/// Builds the single-threaded runtime on which registry calls run.
///
/// # Errors
/// Returns an error if the operating system lacks the resources.
pub(crate) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

impl From<Fault> for ServingError {
    fn from(fault: Fault) -> Self {
        Self::Load(fault.into())
    }
}

impl From<Faults> for ServingError {
    fn from(faults: Faults) -> Self {
        Self::Load(faults)
    }
}

/// The settings from which a model is loaded.
#[derive(Clone)]
pub struct ModelSource {
    /// Base model, device and quantisation. The adapter is used only if there is no registry.
    pub model: ModelConfig,
    /// The prompt template and its labels.
    pub prompt: PromptConfig,
    /// The base model, which the versions of a registry share.
    base: Arc<OnceLock<Base>>,
}

/// A model that has been verified and warmed up, so that it can enter service.
pub struct ReadyModel {
    /// The classifier.
    pub classifier: Classifier,
    /// Rows of the canary comments, which it has scored.
    pub canary: Vec<Row>,
    /// Its identity, calibration and derived thresholds.
    pub judged: JudgedModel,
}

/// A loaded model, with the parts of its version that decisions need.
pub struct LoadedModel {
    /// The classifier.
    pub classifier: Classifier,
    /// Maps margins to probabilities.
    pub calibration: Calibration,
    /// Thresholds that were derived for the version.
    pub thresholds: DerivedThresholds,
}

impl ModelSource {
    /// Describes a model to load.
    pub fn new(model: ModelConfig, prompt: PromptConfig) -> Self {
        Self {
            model,
            prompt,
            base: Arc::default(),
        }
    }

    /// Frees the base model, once no classifier uses it any more.
    pub(crate) fn release_base(&mut self) {
        self.base = Arc::default();
    }

    /// Loads the version that a pointer names, or the bare base model if there is none, and verifies it.
    ///
    /// # Errors
    /// Returns an error if the registry fails, or if the version cannot enter service.
    pub(crate) async fn load(
        &self,
        registry: Option<&Registry>,
        pointer: Option<&Pointer>,
    ) -> Result<LoadedModel, ServingError> {
        let version = match (registry, pointer) {
            (Some(registry), Some(pointer)) => registry.read_current(pointer).await?,
            _ => None,
        };
        self.load_version(registry, version.as_ref())
    }

    /// Loads a version that was read from the registry, and checks that it fits and reproduces its golden set.
    ///
    /// Without a version, loads the bare base model, with the adapter of the settings if there is no registry.
    ///
    /// # Errors
    /// Returns an error if the model cannot be loaded, or if the version cannot enter service.
    pub fn load_version(
        &self,
        registry: Option<&Registry>,
        version: Option<&AdapterVersion>,
    ) -> Result<LoadedModel, ServingError> {
        let folder = registry
            .zip(version)
            .and_then(|(registry, version)| registry.version_folder(&version.manifest.version));
        let mut classifier = match registry {
            Some(_) => self.load_with_adapter(folder.as_deref())?,
            None => Classifier::load(&self.model, &self.prompt)?,
        };
        let Some(AdapterVersion { manifest, files }) = version else {
            return Ok(LoadedModel {
                calibration: self.base_calibration(&classifier)?,
                classifier,
                thresholds: DerivedThresholds::default(),
            });
        };
        let failed = |reason: String| ServingError::Golden {
            version: manifest.version.to_string(),
            reason,
        };
        let identity = classifier.identity();
        let is_prompt_served = classifier.prompter().serves(&manifest.facts.prompt);
        for (what, found, expected) in [
            ("adapter", &identity.adapter, &manifest.adapter),
            ("prompt", &identity.prompt, &manifest.facts.prompt),
            ("normaliser", &identity.normalizer, &manifest.facts.normalizer),
        ] {
            if found != expected && !(what == "prompt" && is_prompt_served) {
                let settings = Some(expected).filter(|_| what == "normaliser");
                let hint = settings.and_then(|rules| settings_of_text_rules(rules.as_str()));
                let hint = hint.map_or_else(String::new, |settings| {
                    format!(": it was trained with these rules; set {settings} to serve it")
                });
                return Err(failed(format!("the {what} is {found}, expected {expected}{hint}")));
            }
        }
        if let Some(json) = files.get(GOLDEN_FILE) {
            let cases: Vec<GoldenCase> =
                serde_json::from_slice(json).map_err(|error| failed(format!("cannot read {GOLDEN_FILE}: {error}")))?;
            let arithmetic = Arithmetic::of(identity);
            let prompter = classifier.prompter();
            golden::verify(&mut classifier, &prompter, &cases, arithmetic)
                .map_err(|reason| failed(format!("golden set: {reason}")))?;
        }
        Ok(LoadedModel {
            classifier,
            calibration: manifest.facts.calibration,
            thresholds: manifest.facts.thresholds,
        })
    }

    /// Returns the calibration that the base model brings for itself. With an adapter, its margins are others.
    fn base_calibration(&self, classifier: &Classifier) -> Result<Calibration, Fault> {
        match &classifier.defaults().calibration {
            Some(json) if classifier.identity().adapter == "none" => Calibration::deserialize(json).map_err(|error| {
                let folder = self.model.path.clone().unwrap_or_else(|| PathBuf::from(bundled::NAME));
                Fault::file(&folder.join(defaults::FILE), format!("`calibration`: {error}"))
            }),
            _ => Ok(Calibration::Identity),
        }
    }

    /// Loads the model with the adapter in a folder, or without one, as it is served from a registry.
    ///
    /// The base model is loaded once, and a version costs the memory and time of its adapter only.
    ///
    /// # Errors
    /// Returns every fault of the base model, the adapter and the prompt.
    pub(crate) fn load_with_adapter(&self, adapter: Option<&Path>) -> Result<Classifier, Faults> {
        if let Some(base) = self.base.get() {
            return base.classifier(adapter);
        }
        let base = Base::load(&self.model, &self.prompt)?;
        self.base.get_or_init(|| base).classifier(adapter)
    }

    /// Warms up a loaded model and chooses its token budget, which is at most `limit` own tokens.
    ///
    /// # Errors
    /// Returns an error if the model cannot score the canary, or if the device is too slow.
    pub fn warm_up(&self, mut loaded: LoadedModel, limit: usize) -> Result<(ReadyModel, MeasuredBudget), ServingError> {
        let canary = canary::rows(&loaded.classifier.prompter())?;
        let budget = warm_up(&mut loaded.classifier, &canary, limit)?;
        let window = loaded.classifier.prompter().max_window_tokens();
        let seconds = window as f64 / budget.smallest_batch_tokens_per_second;
        if seconds > MAX_WINDOW_TIME.as_secs_f64() {
            return Err(ServingError::TooSlow { window, seconds });
        }
        let reserved = loaded.classifier.limit_reserved_memory(budget.max_tokens);
        reserved.map_err(|error| ServingError::Device(error.to_string()))?;
        Ok((ReadyModel::new(loaded, canary), budget))
    }

    /// Prepares a loaded model to replace one that is scored with a token budget of `max_tokens`.
    ///
    /// # Errors
    /// Returns an error if the model cannot score the canary or a full micro-batch.
    pub(crate) fn verify(&self, mut loaded: LoadedModel, max_tokens: usize) -> Result<ReadyModel, ServingError> {
        let canary = canary::rows(&loaded.classifier.prompter())?;
        check_budget(&mut loaded.classifier, &canary, max_tokens)?;
        Ok(ReadyModel::new(loaded, canary))
    }
}

impl ReadyModel {
    fn new(loaded: LoadedModel, canary: Vec<Row>) -> Self {
        let LoadedModel {
            classifier,
            calibration,
            thresholds,
        } = loaded;
        let judged = JudgedModel {
            identity: classifier.identity().clone(),
            calibration,
            derived: thresholds,
            defaults: classifier.defaults().clone(),
        };
        Self {
            classifier,
            canary,
            judged,
        }
    }
}
