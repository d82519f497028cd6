//! Settings: defaults, then the file, then the environment, then flags, into one validated [`Config`].
//!
//! All faults are found in one reading, each with key, value, origin and what was expected. What the
//! stream alone needs is asked for by [`Config::require_stream`], so that `score` and `check` work
//! without a broker.

mod kafka;
mod layers;
mod nearest;
mod reader;
mod retrain;
mod sections;
mod training;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

pub use kafka::{Delivery, KafkaConfig, KafkaProperties, OnGap, Start, StreamConfig, Topics, TopicsConfig};
pub use layers::Sources;
pub use retrain::{FeedbackTopic, RegistryConfig, RetrainConfig};
pub use training::{Loss, Projection};

use crate::fault::{Fault, Faults};
use crate::message::Thresholds;

/// Everything that an operator can set, validated.
#[derive(Debug, Clone)]
pub struct Config {
    /// How Kafka is reached; complete only where [`Config::require_stream`] says so.
    pub kafka: KafkaConfig,
    /// What is read and written.
    pub topics: TopicsConfig,
    /// What is promised of a decision.
    pub delivery: Delivery,
    /// How a comment event is read.
    pub input: InputConfig,
    /// The model to serve.
    pub model: ModelConfig,
    /// The frame around a comment.
    pub prompt: PromptConfig,
    /// How rows are gathered.
    pub batch: BatchConfig,
    /// How much may be in flight.
    pub limits: LimitsConfig,
    /// From which probability on what happens.
    pub policy: PolicyConfig,
    /// Where adapter versions are kept.
    pub registry: RegistryConfig,
    /// How an adapter is trained and judged.
    pub retrain: RetrainConfig,
    /// Metrics and health.
    pub http: HttpConfig,
    /// The end.
    pub shutdown: ShutdownConfig,
    /// What is written to stderr.
    pub log: LogConfig,
}

impl Config {
    /// Reads, merges and validates.
    ///
    /// # Errors
    /// Every fault in every layer.
    pub fn load(sources: &Sources) -> Result<Self, Faults> {
        ConfigDraft::read(sources).finish()
    }
}

/// The settings section by section, sound or not: `check` goes on with what is sound.
#[derive(Debug)]
pub struct ConfigDraft {
    /// As in [`Config`].
    pub model: Option<ModelConfig>,
    /// As in [`Config`].
    pub prompt: Option<PromptConfig>,
    /// Everything wrong, in the order of the sections.
    pub faults: Vec<Fault>,
    rest: Option<Rest>,
    known: BTreeSet<String>,
}

/// What a draft holds beside model and prompt.
#[derive(Debug)]
struct Rest {
    kafka: KafkaConfig,
    topics: TopicsConfig,
    delivery: Delivery,
    input: InputConfig,
    batch: BatchConfig,
    limits: LimitsConfig,
    policy: PolicyConfig,
    registry: RegistryConfig,
    retrain: RetrainConfig,
    http: HttpConfig,
    shutdown: ShutdownConfig,
    log: LogConfig,
}

impl ConfigDraft {
    /// Reads and merges every layer.
    pub fn read(sources: &Sources) -> Self {
        let (root, faults) = sources.merge();
        // A layer that cannot be read at all leaves holes that are not faults of their own.
        if !faults.is_empty() {
            return Self {
                model: None,
                prompt: None,
                faults,
                rest: None,
                known: BTreeSet::new(),
            };
        }
        let mut reader = reader::SettingsReader::new(root, sources.file.as_deref(), faults);
        let (stream, model) = (kafka::read(&mut reader), sections::model(&mut reader));
        let (input, prompt) = (sections::input(&mut reader), sections::prompt(&mut reader));
        let (batch, policy) = (sections::batch(&mut reader), sections::policy(&mut reader));
        let limits = sections::limits(&mut reader);
        let (registry, retrain) = (retrain::registry(&mut reader), retrain::retrain(&mut reader));
        let (http, shutdown) = (sections::http(&mut reader), sections::shutdown(&mut reader));
        let log = sections::log(&mut reader);
        sections::across(&mut reader, prompt.as_ref(), batch.as_ref(), shutdown.as_ref());
        let (faults, known) = reader.finish();
        let rest = || {
            let (kafka, topics, delivery) = stream?;
            Some(Rest {
                kafka,
                topics,
                delivery,
                input: input?,
                batch: batch?,
                limits: limits?,
                policy: policy?,
                registry: registry?,
                retrain: retrain?,
                http: http?,
                shutdown: shutdown?,
                log: log?,
            })
        };
        Self {
            rest: rest(),
            model,
            prompt,
            faults,
            known,
        }
    }

    /// Where adapter versions are kept, if that much is sound.
    pub fn registry(&self) -> Option<&RegistryConfig> {
        self.rest.as_ref().map(|rest| &rest.registry)
    }

    /// Every key that can be set; a key whose names are the operator's own stands for those below it.
    pub fn known_keys(&self) -> impl Iterator<Item = &str> {
        self.known.iter().map(String::as_str)
    }

    /// The settings, if nothing is wrong with them.
    ///
    /// # Errors
    /// Everything that is.
    pub fn finish(self) -> Result<Config, Faults> {
        match (self.model, self.prompt, self.rest) {
            (Some(model), Some(prompt), Some(rest)) if self.faults.is_empty() => Ok(Config {
                model,
                prompt,
                kafka: rest.kafka,
                topics: rest.topics,
                delivery: rest.delivery,
                input: rest.input,
                batch: rest.batch,
                limits: rest.limits,
                policy: rest.policy,
                registry: rest.registry,
                retrain: rest.retrain,
                http: rest.http,
                shutdown: rest.shutdown,
                log: rest.log,
            }),
            _ => Err(self.faults.into()),
        }
    }
}

/// How a comment event is read.
#[derive(Debug, Clone)]
pub struct InputConfig {
    /// Where its fields stand.
    pub fields: InputFields,
    /// Bytes of one event; a longer one is refused unread.
    pub max_bytes: usize,
}

/// JSON pointers (RFC 6901) to the fields of a comment event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFields {
    /// The event's id.
    pub event_id: String,
    /// The content's id.
    pub content_id: String,
    /// The content's revision.
    pub revision: String,
    /// What happened: create, edit or delete.
    pub op: String,
    /// The community.
    pub community_id: String,
    /// The text.
    pub text: String,
}

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU where the build and the machine have one, else the CPU, said loudly.
    Auto,
    /// The CPU.
    Cpu,
    /// This CUDA device or an error.
    Cuda(usize),
}

/// How frozen weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantize {
    /// As they are computed with.
    None,
    /// Blocks of 32 eight-bit integers with one scale.
    Q8_0,
}

/// What linear layers compute in; all else is f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtypeChoice {
    /// bf16 on a GPU, f32 on the CPU.
    Auto,
    /// Everywhere.
    F32,
    /// On GPUs.
    Bf16,
}

/// The model to serve.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Folder in Hugging Face layout: `config.json`, `tokenizer.json`, safetensors; or the bundled model.
    pub path: Option<PathBuf>,
    /// Folder in PEFT layout, or the bare base.
    pub adapter: Option<PathBuf>,
    /// Where it runs.
    pub device: DeviceChoice,
    /// What linear layers compute in.
    pub dtype: DtypeChoice,
    /// How frozen weights are held.
    pub quantize: Quantize,
}

/// The frame around a comment.
#[derive(Debug, Clone)]
pub struct PromptConfig {
    /// The two labels, in the order in which the instructions list them.
    pub labels: [String; 2],
    /// Which of the two means hateful.
    pub hateful_label: String,
    /// What stands before the first separator; `{labels}` becomes the labels, joined by a comma.
    pub instructions: String,
    /// Stands between the parts of the frame.
    pub separator: String,
    /// Normalise comments before they are tokenised.
    pub normalize: bool,
    /// Tokens of comment text in one window.
    pub max_window_tokens: usize,
    /// Windows scored of one comment; a longer one is forced to at least review.
    pub max_windows: usize,
}

/// How rows are gathered into micro-batches.
#[derive(Debug, Clone)]
pub struct BatchConfig {
    /// Own tokens of the rows of one micro-batch; a longer row stands alone.
    pub max_tokens: usize,
    /// How long a comment may wait for company.
    pub linger: Duration,
}

/// How much may be in flight: read, and not yet committed.
#[derive(Debug, Clone, Copy)]
pub struct LimitsConfig {
    /// Events; reading stops there.
    pub events: usize,
    /// Bytes of their keys, values and headers; reading stops there.
    pub bytes: usize,
}

/// Band thresholds.
#[derive(Debug, Clone)]
pub struct PolicyConfig {
    /// Where the adapter in service has thresholds of its own, they take the place of the general ones.
    pub from_adapter: bool,
    /// Where no community says otherwise.
    pub thresholds: Thresholds,
    /// By community id; what a community does not set is inherited already.
    pub communities: BTreeMap<String, Thresholds>,
}

/// The daemon's own HTTP surface.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// Where metrics and health are served.
    pub listen: SocketAddr,
}

/// The end of a run.
#[derive(Debug, Clone)]
pub struct ShutdownConfig {
    /// How long what is in flight may take to finish.
    pub grace: Duration,
}

/// What is written to stderr.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// For people or for machines.
    pub format: LogFormat,
    /// The least severe level that is written.
    pub level: LogLevel,
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Human,
    /// One JSON object a line.
    Json,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// Someone must act.
    Error,
    /// Unexpected, recovered.
    Warn,
    /// Lifecycle.
    Info,
    /// Per batch.
    Debug,
    /// Per message.
    Trace,
}
