//! The checks that `check` and `run` share: settings, model and brokers, with all problems reported at once.

use anyhow::bail;
use tracing::error;

use super::SettingsArgs;
use super::named::{self, Named};
use crate::api::Credentials;
use crate::config::{Config, ConfigDraft, LogConfig, RegistryConfig, StreamConfig};
use crate::fault::{Fault, Faults};
use crate::kafka::properties_faults;
use crate::kafka::topics::{self, TopicFacts, TopicsError};
use crate::ops::announce::START_EXTENSION;
use crate::ops::notify::Notifier;
use crate::registry::{LostRegistry, Pointer};
use crate::serving::records::{self, PendingRecords};
use crate::serving::tracked::{PointerToServe, TrackedRegistry};
use crate::serving::{self, LoadedModel, ModelSource, ServingError};

/// The result of a successful check.
pub(super) struct Checked {
    pub config: Config,
    /// The models that the settings name instead of a folder.
    pub named: Vec<Named>,
    pub model: CheckedModel,
    /// The tokens and certificates of the API.
    pub credentials: Credentials,
    /// `None` if no setting of the stream is set, or if nothing is streamed.
    pub stream: Option<(StreamConfig, TopicFacts)>,
}

/// A loaded model and where it came from.
pub(super) struct CheckedModel {
    pub loaded: LoadedModel,
    pub source: ModelSource,
    /// `None` if `registry.url` is not set.
    pub registry: Option<TrackedRegistry>,
    /// The pointer in effect; `None` if there is no registry or it has no pointers.
    pub pointer: Option<Pointer>,
    /// The loss that `registry.on_missing = "continue"` tolerates.
    pub lost: Option<Box<LostRegistry>>,
}

impl CheckedModel {
    /// Returns the number of the pointer in effect, or 0 if there is none.
    pub fn pointer_sequence(&self) -> u64 {
        self.pointer.as_ref().map_or(0, |pointer| pointer.sequence)
    }
}

/// Whether the settings of the stream are required.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Streaming {
    Required,
    /// Required only if some of them are set: then the deployment is meant to stream.
    IfSet,
    /// Not looked at: nothing is streamed.
    Never,
}

/// What a command does during the check.
pub(super) struct CheckHooks<'a> {
    /// Starts the log.
    pub start_log: fn(&LogConfig),
    /// Receives reports of what takes long, which extend the start timeout.
    pub notifier: &'a Notifier,
    /// Returns whether to query the brokers again, if the only problem is that none answers.
    pub tries_again: &'a dyn Fn(&TopicsError) -> bool,
}

/// Reads the settings, starts the log, calls `prepare`, loads the model and queries the brokers.
///
/// `prepare` is called with valid settings, and its error is reported together with all other problems.
///
/// # Errors
/// Returns [`Faults`] with all problems that were found. If the only problem is that no broker or registry answers,
/// returns that error instead, because retrying may help.
pub(super) fn check(
    args: &SettingsArgs,
    streaming: Streaming,
    prepare: impl FnOnce(&Config) -> anyhow::Result<()>,
    hooks: &CheckHooks<'_>,
) -> anyhow::Result<Checked> {
    let CheckHooks {
        start_log,
        notifier,
        tries_again,
    } = hooks;
    let draft = ConfigDraft::read(&args.sources());
    let (mut model, prompt) = (draft.model.clone(), draft.prompt.clone());
    let registry = draft.registry().cloned();
    if let Some(log) = &draft.log {
        start_log(log);
    }
    let mut config = draft.finish();
    // A name is resolved once, so that all parts of the process use the same commit.
    if let (Err(_), Some(model)) = (&config, &mut model) {
        // Nothing is downloaded for settings that have to be changed first.
        model.download = false;
    }
    let named = model
        .as_mut()
        .map_or_else(|| Ok(Vec::new()), |model| named::resolve(model, notifier));
    if let (Ok(config), Some(model)) = (&mut config, &model) {
        config.model = model.clone();
    }
    let prepared = config.as_ref().map_or(Ok(()), prepare);
    // Check the brokers and the model even if other settings are invalid, so that all problems are reported at once.
    let stream = match &config {
        Ok(_) if streaming == Streaming::Never => None,
        Ok(config) if streaming == Streaming::Required || sets_any_stream_key(config) => Some(
            config
                .require_stream()
                .map_err(StreamCheckError::from)
                .and_then(check_topics),
        ),
        _ => None,
    };
    let model = match (model, prompt) {
        (Some(model), Some(prompt)) if named.is_ok() => {
            notifier.starting("loading the model", START_EXTENSION);
            Some(load(ModelSource::new(model, prompt), registry.as_ref()))
        }
        _ => None,
    };
    let mut faults = Faults::default();
    if let Err(found) = &config {
        faults.extend(found.clone());
    }
    let credentials = config.as_ref().ok().map(|config| Credentials::read(&config.api));
    let credentials = credentials.and_then(|read| faults.collect(read));
    match &stream {
        Some(Err(StreamCheckError::Faults(found))) => faults.extend(found.clone()),
        // The invalid settings may be the cause, so report this together with them.
        Some(Err(StreamCheckError::Unreachable(error))) if !faults.is_empty() => faults.push(Fault::other(error)),
        _ => {}
    }
    let model = match model {
        Some(Err(ServingError::Load(found))) => faults.collect(Err(found)),
        Some(Err(error)) if error.is_transient() && faults.is_empty() => bail!(error),
        Some(Err(error)) => faults.collect(Err(Fault::other(error))),
        Some(Ok(model)) => {
            faults.extend(config.iter().filter_map(|config| budget_fault(config, &model)));
            Some(model)
        }
        None => None,
    };
    let named = match named.map_err(|error| error.downcast::<Faults>()) {
        Ok(named) => named,
        Err(Ok(found)) => {
            faults.extend(found);
            Vec::new()
        }
        Err(Err(error)) if faults.is_empty() => return Err(error),
        Err(Err(error)) => {
            faults.push(Fault::other(format!("{error:#}")));
            Vec::new()
        }
    };
    if let Err(error) = prepared {
        if faults.is_empty() {
            return Err(error);
        }
        faults.push(Fault::other(format!("{error:#}")));
    }
    let (Ok(config), Some(model), Some(credentials), true) = (config, model, credentials, faults.is_empty()) else {
        bail!(faults);
    };
    let mut stream = stream.transpose();
    loop {
        match stream {
            Ok(stream) => {
                return Ok(Checked {
                    config,
                    named,
                    model,
                    credentials,
                    stream,
                });
            }
            Err(StreamCheckError::Faults(faults)) => bail!(faults),
            Err(StreamCheckError::Unreachable(error)) if !tries_again(&error) => bail!(error),
            Err(StreamCheckError::Unreachable(_)) => stream = check_topics(config.require_stream()?).map(Some),
        }
    }
}

/// Returns a fault if a micro-batch has no room for a window of the size that the model sets. A size in the settings was
/// compared when they were read.
fn budget_fault(config: &Config, model: &CheckedModel) -> Option<Fault> {
    let (limit, window) = (
        config.batch.max_tokens,
        model.loaded.classifier.prompter().max_window_tokens(),
    );
    (limit < window).then(|| {
        let text =
            format!("expected at least the {window} tokens of the model's windows; or set prompt.max_window_tokens");
        Fault::setting("batch.max_tokens", text).with_value(Some(limit.to_string()))
    })
}

/// Loads the model in service, for commands that make decisions without the stream, and stores the records that the
/// decisions refer to.
///
/// # Errors
/// Returns [`Faults`] if the model cannot be loaded, or an error if the registry does not answer or the version cannot
/// enter service.
pub(super) fn model(config: &Config) -> anyhow::Result<CheckedModel> {
    let source = ModelSource::new(config.model.clone(), config.prompt.clone());
    let model = match load(source, Some(&config.registry)) {
        Ok(model) => model,
        Err(ServingError::Load(faults)) => bail!(faults),
        Err(error) => bail!(error),
    };
    if let Some(lost) = &model.lost {
        error!(error = %lost, "the registry has lost the version in service");
    } else if let Some(registry) = model.registry.as_ref().and_then(TrackedRegistry::registry) {
        let mut records = PendingRecords::default();
        records::of_model(&model.loaded)
            .into_iter()
            .for_each(|record| records.add(record));
        serving::runtime()?.block_on(records.store(registry));
    }
    Ok(model)
}

/// Loads the version in service, or the adapter of the settings if there is no registry.
fn load(source: ModelSource, config: Option<&RegistryConfig>) -> Result<CheckedModel, ServingError> {
    let runtime = serving::runtime()?;
    let mut registry = None;
    let mut to_serve = PointerToServe::default();
    if let Some(config) = config
        && let Some(url) = &config.url
    {
        let mut tracked = TrackedRegistry::recall(url, config.state.as_deref())?;
        to_serve = runtime.block_on(tracked.pointer_to_serve(config.on_missing))?;
        registry = Some(tracked);
    }
    let PointerToServe { pointer, lost } = to_serve;
    let opened = registry.as_ref().and_then(TrackedRegistry::registry);
    let loaded = runtime.block_on(source.load(opened, pointer.as_ref()))?;
    Ok(CheckedModel {
        loaded,
        source,
        registry,
        pointer,
        lost,
    })
}

/// Why the stream cannot be used.
enum StreamCheckError {
    /// The settings or the topics are invalid.
    Faults(Faults),
    /// No broker answered. The settings may or may not be the cause.
    Unreachable(TopicsError),
}

impl From<Faults> for StreamCheckError {
    fn from(faults: Faults) -> Self {
        Self::Faults(faults)
    }
}

fn check_topics(stream: StreamConfig) -> Result<(StreamConfig, TopicFacts), StreamCheckError> {
    let faults = properties_faults(&stream.properties);
    if !faults.is_empty() {
        return Err(faults.into());
    }
    match topics::check(&stream) {
        Ok(facts) => Ok((stream, facts)),
        Err(TopicsError::Faults(faults)) => Err(faults.into()),
        Err(TopicsError::Client(reason)) => Err(StreamCheckError::Faults(
            Fault::setting("kafka.properties", reason).into(),
        )),
        Err(error) => Err(StreamCheckError::Unreachable(error)),
    }
}

fn sets_any_stream_key(config: &Config) -> bool {
    let topics = [
        &config.topics.comments,
        &config.topics.decisions,
        &config.topics.dead_letters,
    ];
    !config.kafka.brokers.is_empty() || topics.iter().any(|topic| topic.is_some())
}
