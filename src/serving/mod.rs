//! From what the registry says is in service to a scorer that is proven and warm.
//!
//! Used at the start and for every swap: read with every hash proven, loaded beside what serves, the
//! golden set passed, warmed up. Whatever is wrong with a version, it does not enter service.

pub mod watch;

use std::time::Duration;

use crate::classifier::Classifier;
use crate::classifier::canary;
use crate::classifier::golden::{self, Arithmetic, GOLDEN_FILE, GoldenCase};
use crate::classifier::warm_up::{Warm, verify, warm_up};
use crate::config::{ModelConfig, PromptConfig};
use crate::decide::{Calibration, DerivedThresholds, JudgedModel};
use crate::fault::Faults;
use crate::prompt::PromptError;
use crate::registry::{AdapterVersion, Pointer, RecordKind, Registry, RegistryError};
use crate::scorer::{Row, ScoreError};

/// A single row may take this long: well below what the watchdog takes for a stall.
const LONGEST_WINDOW: Duration = Duration::from_secs(10);

/// Why a version cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    /// The registry does not answer, or what stands there is not what was written.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Base, adapter and frame do not fit.
    #[error("{}", .0.on_one_line())]
    Load(Faults),
    /// It says other things than when it was made.
    #[error("version {version} fails its golden set: {reason}")]
    Golden {
        /// The version.
        version: String,
        /// Which case, and how.
        reason: String,
    },
    /// It cannot score what any model can.
    #[error("cannot score a known good comment: {0}")]
    Score(#[from] ScoreError),
    /// The device fails otherwise.
    #[error("the device fails: {0}")]
    Device(String),
    /// Nor prompt it.
    #[error("cannot prompt a known good comment: {0}")]
    Prompt(#[from] PromptError),
    /// One long comment would look like a stall.
    #[error(
        "one window of prompt.max_window_tokens = {window} takes about {seconds:.0} s on this device, expected at \
         most {} s; set it lower",
        LONGEST_WINDOW.as_secs()
    )]
    Slow {
        /// Tokens of a window.
        window: usize,
        /// What it takes.
        seconds: f64,
    },
    /// The system has no room for another thread.
    #[error("cannot start the runtime: {0}")]
    Runtime(#[from] std::io::Error),
}

impl ServingError {
    /// Whether another try may succeed without anybody's help.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Registry(RegistryError::Store { .. }) | Self::Runtime(_))
    }
}

/// What a command needs to talk to a registry.
///
/// # Errors
/// The system's.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

impl From<Faults> for ServingError {
    fn from(faults: Faults) -> Self {
        Self::Load(faults)
    }
}

/// What is loaded, and how.
#[derive(Debug, Clone)]
pub struct ModelSource {
    /// Base, device, quantisation; its adapter counts where there is no registry.
    pub model: ModelConfig,
    /// The frame.
    pub prompt: PromptConfig,
}

/// A scorer that is proven and warm, and what belongs to it.
pub struct Served {
    /// The model.
    pub classifier: Classifier,
    /// Rows that it has scored.
    pub canary: Vec<Row>,
    /// Identity, calibration, derived thresholds.
    pub judged: JudgedModel,
}

/// A loaded model, with the part of its version that deciding needs.
pub struct Loaded {
    /// The model.
    pub classifier: Classifier,
    /// From margin to probability.
    pub calibration: Calibration,
    /// Thresholds that were derived for it.
    pub thresholds: DerivedThresholds,
}

impl ModelSource {
    /// Loads what a pointer names (nothing: the bare base), and proves it.
    ///
    /// # Errors
    /// [`ServingError`].
    pub async fn load(&self, registry: Option<&Registry>, pointer: Option<&Pointer>) -> Result<Loaded, ServingError> {
        let version = match (registry, pointer) {
            (Some(registry), Some(pointer)) => registry.read_current(pointer).await?,
            _ => None,
        };
        let loaded = self.load_version(registry, version.as_ref())?;
        if let Some(registry) = registry {
            Self::keep_records(registry, &loaded).await?;
        }
        Ok(loaded)
    }

    /// Loads a version that was read from the registry, every hash proven.
    ///
    /// # Errors
    /// [`ServingError`].
    pub fn load_version(
        &self,
        registry: Option<&Registry>,
        version: Option<&AdapterVersion>,
    ) -> Result<Loaded, ServingError> {
        let folder = registry
            .zip(version)
            .and_then(|(registry, version)| registry.version_folder(&version.manifest.version));
        let model = ModelConfig {
            adapter: folder.or_else(|| self.model.adapter.clone().filter(|_| registry.is_none())),
            ..self.model.clone()
        };
        let mut classifier = Classifier::load(&model, &self.prompt)?;
        let Some(AdapterVersion { manifest, files }) = version else {
            return Ok(Loaded {
                classifier,
                calibration: Calibration::Identity,
                thresholds: DerivedThresholds::default(),
            });
        };
        let failed = |reason: String| ServingError::Golden {
            version: manifest.version.to_string(),
            reason,
        };
        let identity = classifier.identity();
        for (what, found, expected) in [
            ("adapter", &identity.adapter, &manifest.adapter),
            ("prompt", &identity.prompt, &manifest.facts.prompt),
            ("normalizer", &identity.normalizer, &manifest.facts.normalizer),
        ] {
            if found != expected {
                return Err(failed(format!("the {what} is {found}, expected {expected}")));
            }
        }
        if let Some(json) = files.get(GOLDEN_FILE) {
            let cases: Vec<GoldenCase> =
                serde_json::from_slice(json).map_err(|error| failed(format!("cannot read {GOLDEN_FILE}: {error}")))?;
            let arithmetic = Arithmetic::of(identity);
            let prompter = classifier.prompter();
            golden::verify(&mut classifier, &prompter, &cases, arithmetic).map_err(failed)?;
        }
        Ok(Loaded {
            classifier,
            calibration: manifest.facts.calibration,
            thresholds: manifest.facts.thresholds,
        })
    }

    /// Makes a loaded model ready and finds its batch budget, of `limit` tokens at most.
    ///
    /// # Errors
    /// [`ServingError`].
    pub fn warm_up(&self, mut loaded: Loaded, limit: usize) -> Result<(Served, Warm), ServingError> {
        let canary = canary::rows(&loaded.classifier.prompter())?;
        let warm = warm_up(&mut loaded.classifier, &canary, limit)?;
        let window = self.prompt.max_window_tokens;
        let seconds = window as f64 / warm.slowest;
        if seconds > LONGEST_WINDOW.as_secs_f64() {
            return Err(ServingError::Slow { window, seconds });
        }
        let kept = loaded.classifier.keep_memory_for(warm.max_tokens);
        kept.map_err(|error| ServingError::Device(error.to_string()))?;
        Ok((Served::new(loaded, canary), warm))
    }

    /// Makes a loaded model ready to take the place of one that was served in micro-batches of `max_tokens`.
    ///
    /// # Errors
    /// [`ServingError`].
    pub fn verify(&self, mut loaded: Loaded, max_tokens: usize) -> Result<Served, ServingError> {
        let canary = canary::rows(&loaded.classifier.prompter())?;
        verify(&mut loaded.classifier, &canary, max_tokens)?;
        Ok(Served::new(loaded, canary))
    }

    /// Puts what decisions name by hash where `explain` finds it.
    async fn keep_records(registry: &Registry, loaded: &Loaded) -> Result<(), RegistryError> {
        let (prompter, calibration) = (loaded.classifier.prompter(), loaded.calibration);
        registry.put_record(RecordKind::Prompt, prompter.canonical()).await?;
        if calibration != Calibration::Identity {
            registry
                .put_record(RecordKind::Calibration, &calibration.canonical())
                .await?;
        }
        Ok(())
    }
}

impl Served {
    fn new(loaded: Loaded, canary: Vec<Row>) -> Self {
        let Loaded {
            classifier,
            calibration,
            thresholds,
        } = loaded;
        let judged = JudgedModel {
            identity: classifier.identity().clone(),
            calibration,
            derived: thresholds,
        };
        Self {
            classifier,
            canary,
            judged,
        }
    }
}
