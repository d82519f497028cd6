//! Reads the settings from the defaults, a file, the environment and flags into a validated [`Config`].
//!
//! All faults are reported at once, each with the key, the value, its origin and what was expected. Settings that only
//! the stream needs are required by [`Config::require_stream`], so that `score` and `check` work without a broker.

mod api;
mod input;
mod kafka;
mod layers;
mod nearest;
mod prompt;
mod published;
mod reader;
mod retrain;
mod sections;
mod training;
mod windows;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use api::{ApiConfig, ApiLimits, CLASSIFIER, TlsConfig};
pub use input::{FieldLocation, FieldLocations, InputConfig, InputFields};
pub use kafka::{Delivery, KafkaConfig, KafkaProperties, OnGap, Start, StreamConfig, Topics, TopicsConfig};
pub use layers::Sources;
pub use prompt::Template;
pub(crate) use retrain::FeedbackTopic;
pub use retrain::{CrossFit, OnMissing, RegistryConfig, RetrainConfig};
pub use training::{Loss, Projection};
pub use windows::{
    CorrectionError, CorrectionPoint, MAX_TOKENS_RANGE, MAX_WINDOWS_RANGE, ModelWindows, WindowCorrection, WindowEdges,
};

use reader::SettingsReader;

use crate::fault::{Fault, Faults};
use crate::message::Thresholds;

/// All settings, validated.
#[derive(Debug, Clone)]
pub struct Config {
    /// Brokers, consumer group and client settings, which [`Config::require_stream`] checks for completeness.
    pub kafka: KafkaConfig,
    /// The names of the topics.
    pub topics: TopicsConfig,
    /// The delivery guarantee for decisions.
    pub delivery: Delivery,
    /// The location of the fields of a comment event, and its maximum size.
    pub input: InputConfig,
    /// The model to load, and how to run it.
    pub model: ModelConfig,
    /// The frame around a comment, and how a comment is cut into windows.
    pub prompt: PromptConfig,
    /// The limits of a micro-batch.
    pub batch: BatchConfig,
    /// The cache of margins.
    pub cache: CacheConfig,
    /// The maximum amount of data in flight.
    pub limits: LimitsConfig,
    /// The thresholds on the probability that a comment is hateful.
    pub policy: PolicyConfig,
    /// The registry of adapter versions.
    pub registry: RegistryConfig,
    /// How `retrain` trains and judges an adapter.
    pub retrain: RetrainConfig,
    /// The address of the HTTP server for metrics and health checks.
    pub http: HttpConfig,
    /// Scoring over HTTP.
    pub api: ApiConfig,
    /// The grace period on shutdown.
    pub shutdown: ShutdownConfig,
    /// The format and level of the log.
    pub log: LogConfig,
}

impl Config {
    /// Reads, merges and validates the settings.
    ///
    /// # Errors
    /// Returns all faults if a source cannot be read, a value is not valid or a key is unknown.
    pub fn load(sources: &Sources) -> Result<Self, Faults> {
        ConfigDraft::read(sources).finish()
    }
}

/// Settings, some sections of which may be faulty.
///
/// `check` uses them to load the model even if other sections are faulty.
#[derive(Debug)]
pub struct ConfigDraft {
    /// The model section, unless it is faulty.
    pub model: Option<ModelConfig>,
    /// The prompt section, unless it is faulty.
    pub prompt: Option<PromptConfig>,
    /// The log section, unless it is faulty, so that faults are reported in its format. If a source cannot be read, it
    /// comes from the other sources.
    pub log: Option<LogConfig>,
    /// All faults, in the order of the sections.
    pub faults: Vec<Fault>,
    other: Option<OtherSections>,
    known_keys: BTreeSet<String>,
}

/// All sections except model, prompt and log.
#[derive(Debug)]
struct OtherSections {
    kafka: KafkaConfig,
    topics: TopicsConfig,
    delivery: Delivery,
    input: InputConfig,
    batch: BatchConfig,
    cache: CacheConfig,
    limits: LimitsConfig,
    policy: PolicyConfig,
    registry: RegistryConfig,
    retrain: RetrainConfig,
    http: HttpConfig,
    api: ApiConfig,
    shutdown: ShutdownConfig,
}

impl ConfigDraft {
    /// Reads and merges all layers, and collects the faults of every section.
    pub fn read(sources: &Sources) -> Self {
        let (root, faults) = sources.merge();
        // Without a layer, settings may seem to be missing, so only the faults of the layers themselves are reported.
        if !faults.is_empty() {
            return Self {
                model: None,
                prompt: None,
                log: sections::log(&mut SettingsReader::new(root, None, Vec::new())),
                faults,
                other: None,
                known_keys: BTreeSet::new(),
            };
        }
        let mut reader = SettingsReader::new(root, sources.file.as_deref(), faults);
        let (kafka, model) = (kafka::read(&mut reader), sections::model(&mut reader));
        let (input, prompt) = (input::read(&mut reader), prompt::prompt(&mut reader));
        let (batch, cache) = (sections::batch(&mut reader), sections::cache(&mut reader));
        let (policy, limits) = (sections::policy(&mut reader), sections::limits(&mut reader));
        let (registry, retrain) = (retrain::registry(&mut reader), retrain::retrain(&mut reader));
        let (http, shutdown) = (sections::http(&mut reader), sections::shutdown(&mut reader));
        let api = api::api(&mut reader);
        let log = sections::log(&mut reader);
        sections::check_across(&mut reader, prompt.as_ref(), batch.as_ref(), shutdown.as_ref());
        let (faults, known_keys) = reader.finish();
        let other = || {
            let (kafka, topics, delivery) = kafka?;
            Some(OtherSections {
                kafka,
                topics,
                delivery,
                input: input?,
                batch: batch?,
                cache: cache?,
                limits: limits?,
                policy: policy?,
                registry: registry?,
                retrain: retrain?,
                http: http?,
                api: api?,
                shutdown: shutdown?,
            })
        };
        Self {
            other: other(),
            model,
            prompt,
            log,
            faults,
            known_keys,
        }
    }

    /// Returns the registry section, unless a section other than model, prompt and log is faulty.
    pub(crate) fn registry(&self) -> Option<&RegistryConfig> {
        self.other.as_ref().map(|other| &other.registry)
    }

    /// Returns all keys that can be set.
    ///
    /// A table whose keys are chosen by the operator, such as `policy.communities`, is listed as a single key.
    pub fn known_keys(&self) -> impl Iterator<Item = &str> {
        self.known_keys.iter().map(String::as_str)
    }

    /// Returns the settings if they have no faults.
    ///
    /// # Errors
    /// Returns all faults if there are any.
    pub fn finish(self) -> Result<Config, Faults> {
        match (self.model, self.prompt, self.log, self.other) {
            (Some(model), Some(prompt), Some(log), Some(other)) if self.faults.is_empty() => Ok(Config {
                model,
                prompt,
                log,
                kafka: other.kafka,
                topics: other.topics,
                delivery: other.delivery,
                input: other.input,
                batch: other.batch,
                cache: other.cache,
                limits: other.limits,
                policy: other.policy,
                registry: other.registry,
                retrain: other.retrain,
                http: other.http,
                api: other.api,
                shutdown: other.shutdown,
            }),
            _ => Err(self.faults.into()),
        }
    }
}

/// The device that the model runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if it can be used; otherwise the CPU, with a warning if the build supports GPUs.
    Auto,
    /// Always the CPU.
    Cpu,
    /// The CUDA device with this ordinal; if it cannot be used, loading the model fails.
    Cuda(usize),
}

/// How frozen weights are stored in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantize {
    /// In the data type of the arithmetic.
    None,
    /// As 8-bit integers with a scale for each output; inputs are quantised row by row.
    Int8,
    /// Those of the MLP in FP8 (e4m3) with a scale for each output, on a GPU; inputs are quantised row by row.
    Fp8,
}

/// The data type of the arithmetic in linear layers; all other arithmetic uses f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtypeChoice {
    /// bf16 on a GPU, f32 on the CPU.
    Auto,
    /// f32 on every device.
    F32,
    /// bf16, which requires a GPU.
    Bf16,
}

/// The model to load, and how to run it.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// The folder of a checkpoint in Hugging Face layout (`config.json`, `tokenizer.json`, safetensors), or its name on
    /// the hub (`hf://`); if it is not set, the bundled model is used.
    pub path: Option<PathBuf>,
    /// The folder of an adapter in PEFT layout, or its name on the hub; if it is not set, the base model is used without an adapter.
    pub adapter: Option<PathBuf>,
    /// Whether a model that is set by name may be downloaded.
    pub download: bool,
    /// The device that the model runs on.
    pub device: DeviceChoice,
    /// The data type of the arithmetic in linear layers.
    pub dtype: DtypeChoice,
    /// How frozen weights are stored in memory.
    pub quantize: Quantize,
}

/// The markup language in which comments and labelled texts are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Markup {
    /// None: what is received is what a reader sees.
    #[default]
    None,
    /// HTML, or a part of it.
    Html,
    /// CommonMark with tables and strikethrough.
    Markdown,
}

/// The rules by which a comment is normalised before it is tokenised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Normalize {
    /// None: what is received is tokenised.
    None,
    /// Invisible characters are removed, the text is composed (NFC), and literal separators are broken up.
    Nfc,
    /// Also, what hides a text from the model and not from a reader is undone, such as look-alikes and letters set apart.
    #[default]
    Full,
}

/// The frame around a comment, and how a comment is cut into windows.
#[derive(Debug, Clone)]
pub struct PromptConfig {
    /// The two labels, in the order in which the prompt lists them.
    pub labels: [String; 2],
    /// The label that means hateful.
    pub hateful_label: String,
    /// The text before the first separator; `{labels}` is replaced by the labels, joined by a comma.
    pub instructions: String,
    /// The text between the parts of the prompt. With a template, it is a part of it that comments must not imitate, or
    /// empty.
    pub separator: String,
    /// The whole prompt; if it is set, `instructions` is not used.
    pub template: Option<Template>,
    /// The markup of comments, which is decoded before they are normalised (`input.markup`).
    pub markup: Markup,
    /// How comments are normalised before they are tokenised.
    pub normalize: Normalize,
    /// The maximum number of comment tokens in a window; if it is not set, the model's file decides.
    pub max_window_tokens: Option<usize>,
    /// The maximum number of windows that are scored per comment; a comment with more is at least reviewed. If it is not
    /// set, the model's file decides.
    pub max_windows: Option<usize>,
    /// What the model says about windows; `None` if its file has not been read yet.
    pub windows: Option<ModelWindows>,
}

impl PromptConfig {
    /// Returns these settings with what the model says about windows, unless that is known already, as for the prompt of
    /// an earlier decision.
    pub fn with_windows_of(&self, model: &ModelWindows) -> Self {
        Self {
            windows: Some(self.windows.clone().unwrap_or_else(|| model.clone())),
            ..self.clone()
        }
    }

    /// Returns the rules of windows: the numbers in the settings, and otherwise those of the model.
    pub fn window_rules(&self) -> WindowRules {
        let model = self.windows.clone().unwrap_or_default();
        WindowRules {
            max_tokens: self.max_window_tokens.unwrap_or_else(|| model.max_tokens()),
            max_windows: self.max_windows.unwrap_or_else(|| model.max_windows()),
            edges: model.edges,
            correction: model.correction,
        }
    }
}

/// How a text is cut into windows, and how their margins become that of the comment.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowRules {
    /// The maximum number of comment tokens in a window.
    pub max_tokens: usize,
    /// The maximum number of windows that are scored per comment.
    pub max_windows: usize,
    /// Where windows begin and end.
    pub edges: WindowEdges,
    /// What is subtracted from the largest margin.
    pub correction: WindowCorrection,
}

/// The limits of a micro-batch.
#[derive(Debug, Clone)]
pub struct BatchConfig {
    /// The maximum number of own tokens in a micro-batch; a longer row forms a micro-batch by itself.
    pub max_tokens: usize,
    /// How long a comment may wait for others to fill its micro-batch.
    pub linger: Duration,
}

/// The cache of margins, through which identical comments are scored once.
#[derive(Debug, Clone, Copy)]
pub struct CacheConfig {
    /// The maximum number of texts whose margins are remembered; 0 turns the cache off.
    pub entries: usize,
}

/// The maximum amount of data in flight, that is, read but not yet committed.
///
/// The daemon stops reading when either limit is reached.
#[derive(Debug, Clone, Copy)]
pub struct LimitsConfig {
    /// The maximum number of events.
    pub events: usize,
    /// The maximum total size of their keys, values and headers in bytes.
    pub bytes: usize,
}

/// The thresholds on the probability that a comment is hateful.
#[derive(Debug, Clone)]
pub struct PolicyConfig {
    /// Whether the thresholds that were derived for the adapter in service, if any, replace the general ones.
    pub from_adapter: bool,
    /// What becomes of comments that are not in the scope of the model.
    pub not_in_scope: NotInScope,
    /// The general thresholds, for communities that have none of their own.
    pub thresholds: ThresholdSettings,
    /// Thresholds by community id; a threshold that only the general ones set is already filled in.
    pub communities: BTreeMap<String, ThresholdSettings>,
}

/// What becomes of comments that are not in the scope of the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NotInScope {
    /// They are reviewed, unless they are blocked.
    #[default]
    Review,
    /// They are decided like all others.
    Decide,
}

/// The thresholds that settings set. Those that they leave out are the model's or those of [`DEFAULT_THRESHOLDS`].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ThresholdSettings {
    /// The probability at or above which a comment is reviewed.
    pub review: Option<f64>,
    /// The probability at or above which a comment is blocked.
    pub block: Option<f64>,
}

/// The thresholds if neither the settings nor the model set any.
pub const DEFAULT_THRESHOLDS: Thresholds = Thresholds {
    review: 0.5,
    block: 0.9,
};

impl ThresholdSettings {
    /// Returns the thresholds with `defaults` in place of those that are not set.
    ///
    /// If only one is set, the other gives way: review never begins above block.
    pub fn or(self, defaults: Thresholds) -> Thresholds {
        match (self.review, self.block) {
            (Some(review), Some(block)) => Thresholds { review, block },
            (None, Some(block)) => Thresholds {
                review: defaults.review.min(block),
                block,
            },
            (Some(review), None) => Thresholds {
                review,
                block: defaults.block.max(review),
            },
            (None, None) => defaults,
        }
    }
}

/// The HTTP server for metrics and health checks.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// The address to listen on.
    pub listen: SocketAddr,
}

/// How the daemon shuts down.
#[derive(Debug, Clone)]
pub struct ShutdownConfig {
    /// The grace period: how long the data in flight may take to finish.
    pub grace: Duration,
}

/// The log on stderr.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// The form of a log line.
    pub format: LogFormat,
    /// The least severe level that is logged.
    pub level: LogLevel,
}

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people to read.
    Human,
    /// One JSON object per line.
    Json,
}

/// The severity of log messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Failures that someone must act on.
    Error,
    /// Unexpected events from which the daemon recovered.
    Warn,
    /// Events in the life of the daemon, such as start and shutdown.
    Info,
    /// Details of each micro-batch.
    Debug,
    /// Details of each record.
    Trace,
}
