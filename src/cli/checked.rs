//! What `check` and `run` have in common: settings, model and brokers, with everything that is wrong
//! at once.

use anyhow::bail;

use super::SettingsArgs;
use crate::config::{Config, ConfigDraft, LogConfig, StreamConfig};
use crate::fault::{Fault, Faults};
use crate::kafka::properties_faults;
use crate::kafka::topics::{self, Partitions, TopicsError};
use crate::registry::{Pointer, Registry};
use crate::serving::{self, Loaded, ModelSource, ServingError};

/// Everything that was found to be in order.
pub(super) struct Checked {
    pub config: Config,
    pub model: CheckedModel,
    /// Absent where nothing of the stream is set.
    pub stream: Option<(StreamConfig, Partitions)>,
}

/// A loaded model and where it came from.
pub(super) struct CheckedModel {
    pub loaded: Loaded,
    pub source: ModelSource,
    /// Absent where the settings name none.
    pub registry: Option<Registry>,
    /// What the registry says is in service.
    pub pointer: Option<Pointer>,
}

impl CheckedModel {
    /// The pointer's number; 0 where there is none.
    pub fn pointer_sequence(&self) -> u64 {
        self.pointer.as_ref().map_or(0, |pointer| pointer.sequence)
    }
}

/// Whether settings of the stream must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Streaming {
    Required,
    /// Whoever has set any means to stream, and wants to know what is still missing.
    IfSet,
}

/// Reads the settings, starts the log, loads the model and asks the brokers.
///
/// # Errors
/// [`Faults`] with all that is wrong; where nothing is but no broker answers, that.
pub(super) fn check(args: &SettingsArgs, streaming: Streaming, log: fn(&LogConfig)) -> anyhow::Result<Checked> {
    let draft = ConfigDraft::read(&args.sources());
    let (model, prompt) = (draft.model.clone(), draft.prompt.clone());
    let registry = draft.registry().cloned();
    let config = draft.finish();
    if let Ok(config) = &config {
        log(&config.log);
    }
    // The brokers and the model are looked at whatever else is wrong, as far as the settings name them.
    let stream = match &config {
        Ok(config) if streaming == Streaming::Required || is_streaming(config) => Some(
            config
                .require_stream()
                .map_err(StreamProblem::from)
                .and_then(with_topics),
        ),
        _ => None,
    };
    let model = match (model, prompt) {
        (Some(model), Some(prompt)) => Some(load(
            ModelSource { model, prompt },
            registry.and_then(|found| found.url),
        )),
        _ => None,
    };
    let mut faults = Faults::default();
    if let Err(found) = &config {
        faults.extend(found.clone());
    }
    match &stream {
        Some(Err(StreamProblem::Faults(found))) => faults.extend(found.clone()),
        // The settings may be the cause, so it is reported with the other faults.
        Some(Err(StreamProblem::Unreachable(error))) if !faults.is_empty() => faults.push(Fault::other(error)),
        _ => {}
    }
    let model = match model {
        Some(Err(ServingError::Load(found))) => faults.keep(Err(found)),
        Some(Err(error)) if error.is_passing() && faults.is_empty() => bail!(error),
        Some(Err(error)) => faults.keep(Err(Fault::other(error))),
        Some(Ok(model)) => Some(model),
        None => None,
    };
    let (Ok(config), Some(model), true) = (config, model, faults.is_empty()) else {
        bail!(faults);
    };
    let stream = match stream.transpose() {
        Ok(stream) => stream,
        Err(StreamProblem::Unreachable(error)) => bail!(error),
        Err(StreamProblem::Faults(faults)) => bail!(faults),
    };
    Ok(Checked { config, model, stream })
}

/// The model that the settings name, for a command that needs nothing else.
///
/// # Errors
/// [`Faults`], or a registry that does not answer.
pub(super) fn model(config: &Config) -> anyhow::Result<CheckedModel> {
    let source = ModelSource {
        model: config.model.clone(),
        prompt: config.prompt.clone(),
    };
    match load(source, config.registry.url.clone()) {
        Ok(model) => Ok(model),
        Err(ServingError::Load(faults)) => bail!(faults),
        Err(error) => bail!(error),
    }
}

/// Loads what the registry says is in service, or what the settings name where there is none.
fn load(source: ModelSource, registry: Option<String>) -> Result<CheckedModel, ServingError> {
    let registry = registry.as_deref().map(Registry::open).transpose()?;
    let runtime = serving::runtime()?;
    let pointer = match &registry {
        Some(registry) => runtime.block_on(registry.current())?,
        None => None,
    };
    let loaded = runtime.block_on(source.load(registry.as_ref(), pointer.as_ref()))?;
    Ok(CheckedModel {
        loaded,
        source,
        registry,
        pointer,
    })
}

/// Why the settings of the stream cannot be used.
enum StreamProblem {
    /// The settings or the topics are wrong.
    Faults(Faults),
    /// The brokers did not answer, which may or may not be the settings' fault.
    Unreachable(TopicsError),
}

impl From<Faults> for StreamProblem {
    fn from(faults: Faults) -> Self {
        Self::Faults(faults)
    }
}

fn with_topics(stream: StreamConfig) -> Result<(StreamConfig, Partitions), StreamProblem> {
    let faults = properties_faults(&stream.properties);
    if !faults.is_empty() {
        return Err(faults.into());
    }
    match topics::ask(&stream) {
        Ok(partitions) => Ok((stream, partitions)),
        Err(TopicsError::Faults(faults)) => Err(faults.into()),
        Err(TopicsError::Client(reason)) => {
            Err(StreamProblem::Faults(Fault::setting("kafka.properties", reason).into()))
        }
        Err(error) => Err(StreamProblem::Unreachable(error)),
    }
}

fn is_streaming(config: &Config) -> bool {
    let topics = [
        &config.topics.comments,
        &config.topics.decisions,
        &config.topics.dead_letters,
    ];
    !config.kafka.brokers.is_empty() || topics.iter().any(|topic| topic.is_some())
}
