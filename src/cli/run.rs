//! `moderatord run`: checks the deployment, then serves until a signal or a failure.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use metrics::{counter, gauge};
use tracing::{error, info, warn};

use super::checked::{CheckHooks, Checked, CheckedModel, Streaming, check};
use super::{Exit, SettingsArgs};
use crate::api::{ApiParts, ApiServer, NewestVersion, StatusSources};
use crate::config::{BatchConfig, Config, Sources, StreamConfig};
use crate::decide::CurrentJudge;
use crate::fault::{Fault, Faults};
use crate::kafka::topics::{TopicFacts, TopicsError};
use crate::ops::announce::{Announcer, START_EXTENSION};
use crate::ops::health::{Health, Phase};
use crate::ops::http::{self, ConnectionLimits, HttpServer, HttpState};
use crate::ops::log;
use crate::ops::metrics::{self as names, Exporter};
use crate::ops::notify::Notifier;
use crate::ops::process::{exit_now, raise_open_files_limit};
use crate::ops::signals::Signals;
use crate::registry::RecordKind;
use crate::serving::records::{self, PendingRecords, Record};
use crate::serving::report::ReadReporter;
use crate::serving::watch::{RegistryWatcher, set_model_info};
use crate::serving::{LoadedModel, ModelSource, ReadyModel};
use crate::stream::batch::Limits;
use crate::stream::pipeline::{Model, Pipeline, Settings};
use crate::stream::score::Replacement;

/// The daemon counts as stalled if nothing has been scored for this long. It is enough for the longest batch and
/// several canaries, which are scored when there are no comments.
const STALL_LIMIT: Duration = Duration::from_secs(30);

/// Time after the grace period in which the stages have to end. After that, the process exits without them.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause between two queries while no broker answers at the start. A query itself takes up to ten seconds.
const BROKERS_RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Time between two checks of whether the pipeline has ended.
const TICK: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct RunArgs {
    #[command(flatten)]
    settings: SettingsArgs,
}

const AFTER_HELP: &str = "\
Checks the settings, model and brokers, warms up the model, joins the consumer group and starts to
serve. While no broker answers, it waits. It is ready once the group has settled, whether or not
there are partitions for it.

On SIGTERM or SIGINT, the daemon finishes the comments in flight within `shutdown.grace` and leaves
the group. A second signal ends it immediately. In both cases nothing is lost: unfinished comments
are read again by the daemon that takes over the partition.

On SIGHUP, the daemon reloads the policy from the settings, the tokens and certificates of the API
from their files, and checks the registry for a new version. All other settings require a restart.

Exit codes:
  0   stopped by a signal
  1   failure; a restart may help
  64  invalid command line
  78  the settings, model, registry, topics or committed offsets need attention";

pub(super) fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    serve(&args.settings, Streaming::Required)
}

/// Serves the stream, the API or both until a signal or a failure.
pub(super) fn serve(settings: &SettingsArgs, streaming: Streaming) -> anyhow::Result<Exit> {
    let notifier = Notifier::from_environment().context("NOTIFY_SOCKET is not a valid address")?;
    let signals = Signals::listen().context("cannot listen for signals")?;
    let mut daemon = None;
    // Health and metrics are served while the model is loaded and warmed up and the daemon connects to the brokers.
    let start_daemon = |config: &Config| {
        if streaming == Streaming::Never && config.api.listen.is_none() {
            bail!(Faults::from(Fault::setting(
                "api.listen",
                "expected an address such as \"127.0.0.1:8080\""
            )));
        }
        daemon = Some(RunningDaemon::start(config, signals, notifier.clone())?);
        Ok(())
    };
    let has_warned = Cell::new(false);
    let wait_for_brokers = |error: &TopicsError| {
        if !has_warned.replace(true) {
            warn!(%error, "waiting for the brokers");
        }
        notifier.starting(&format!("waiting for the brokers: {error}"), START_EXTENSION);
        std::thread::sleep(BROKERS_RETRY_PAUSE);
        true
    };
    let hooks = CheckHooks {
        start_log: log::start,
        notifier: &notifier,
        tries_again: &wait_for_brokers,
    };
    let checked = check(settings, streaming, start_daemon, &hooks)?;
    if has_warned.get() {
        info!("the brokers answer");
    }
    let daemon = daemon.context("the daemon was not started")?;
    let Checked {
        config,
        model,
        credentials,
        stream,
        ..
    } = checked;
    for problem in stream
        .iter()
        .flat_map(|(_, topics)| topics.warnings(config.input.max_bytes))
    {
        warn!(problem, "the topics do not fit the settings well");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let (sequence, mut source) = (model.pointer_sequence(), model.source.clone());
    let CheckedModel {
        registry, loaded, lost, ..
    } = model;
    let mut reporter = ReadReporter::default();
    if let Some(lost) = lost {
        reporter.lost(&lost);
    }
    if registry.is_some() && config.registry.state.is_none() {
        warn!(
            "neither registry.state nor $STATE_DIRECTORY is set: after a restart, a lost registry looks like a new one"
        );
    }
    let mut records = PendingRecords::default();
    records::of_model(&loaded)
        .into_iter()
        .for_each(|record| records.add(record));
    notifier.starting("warming up the model", START_EXTENSION);
    let (ready, max_tokens) = warm(&source, loaded, &config)?;
    // Models that are swapped in later must use the same device.
    source.model.device = ready.classifier.placement().choice();
    set_model_info(&ready.judged.identity);
    daemon.health.record_scored(Instant::now());
    let (replace, swap) = bounded(0);
    let model = assemble_model(ready, &config, swap);
    let judge = Arc::clone(&model.judge);
    let api = config.api.listen.is_some().then(|| {
        let parts = ApiParts {
            config: config.api.clone(),
            input: config.input.clone(),
            cache: config.cache,
            batch: Limits {
                max_tokens,
                linger: config.batch.linger,
            },
            prompter: Arc::clone(&model.prompter),
            judge: Arc::clone(&judge),
            status: StatusSources {
                health: Arc::clone(&daemon.health),
                metrics: daemon.metrics.clone(),
                judge: Arc::clone(&judge),
                newest: NewestVersion::new(config.registry.url.clone()),
                configuration: settings.sources().shown(),
            },
            feedback: config.require_feedback().ok(),
            open_files: raise_open_files_limit(),
        };
        ApiServer::start(parts, credentials)
    });
    let (api, requests) = api.transpose()?.unzip();
    let pipeline = match (stream, requests) {
        (Some((stream, topics)), requests) => {
            let settings = stream_settings(stream, topics, max_tokens, &config);
            let pipeline = Pipeline::start_with_requests(&settings, model, &daemon.health, requests)?;
            info!(
                group = settings.stream.group,
                topic = settings.stream.topics.comments,
                delivery = settings.stream.delivery.as_str(),
                "serving"
            );
            pipeline
        }
        (None, Some(requests)) => {
            daemon.health.without_stream();
            info!("serving requests, and no stream");
            Pipeline::start_without_stream(model, &daemon.health, requests)
        }
        (None, None) => bail!("there is neither a stream nor an API to serve"),
    };
    daemon.signals.begin_serving();
    // A reload must not wait for a registry that hangs. There is one message for each signal.
    let (check_registry, check_requests) = unbounded();
    let watches_registry = registry.is_some();
    if let Some(registry) = registry {
        let watcher = RegistryWatcher {
            source,
            registry,
            sequence,
            max_tokens,
            poll: config.registry.poll,
            judge: Arc::clone(&judge),
            records,
            reporter,
        };
        // Not joined: it ends with the process, even in the middle of loading a version.
        std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || watcher.run(&check_requests, &replace))
            .context("cannot start the registry watcher")?;
    }
    let handler = ReloadHandler {
        sources: settings.sources(),
        judge: &judge,
        api: api.as_ref(),
        check_registry: watches_registry.then_some(check_registry),
    };
    runtime.block_on(daemon.serve(pipeline, &handler, config.shutdown.grace))?;
    drop(api);
    Ok(Exit::Success)
}

/// Warms up the model. Returns it with its token budget.
pub(super) fn warm(source: &ModelSource, loaded: LoadedModel, config: &Config) -> anyhow::Result<(ReadyModel, usize)> {
    let started = Instant::now();
    let limit = config.batch.max_tokens;
    let (ready, warm) = source.warm_up(loaded, limit)?;
    info!(
        batch_budget_tokens = warm.max_tokens,
        limit,
        tokens_per_second = warm.tokens_per_second.round(),
        seconds = started.elapsed().as_secs_f64(),
        "warmed up the model"
    );
    gauge!(names::BATCH_BUDGET).set(warm.max_tokens as f64);
    Ok((ready, warm.max_tokens))
}

/// Returns the settings of the pipeline.
pub(super) fn stream_settings(
    stream: StreamConfig,
    topics: TopicFacts,
    max_tokens: usize,
    config: &Config,
) -> Settings {
    Settings {
        stream,
        topics,
        input: config.input.clone(),
        batch: BatchConfig {
            max_tokens,
            ..config.batch.clone()
        },
        cache: config.cache,
        limits: config.limits,
    }
}

/// Returns the model of the pipeline. `swap` delivers its successors.
pub(super) fn assemble_model(ready: ReadyModel, config: &Config, swap: Receiver<Replacement>) -> Model {
    Model {
        canary: ready.canary,
        prompter: ready.classifier.prompter(),
        judge: Arc::new(CurrentJudge::new(config.policy.clone(), ready.judged)),
        scorer: Box::new(ready.classifier),
        swap,
    }
}

/// Reloads the policy and checks the registry on SIGHUP.
struct ReloadHandler<'a> {
    sources: Sources,
    judge: &'a CurrentJudge,
    /// Has tokens and certificates to read again.
    api: Option<&'a ApiServer>,
    /// Makes the registry watcher store the policy and check for a new version; absent without a registry.
    check_registry: Option<Sender<Record>>,
}

impl ReloadHandler<'_> {
    fn reload(&self) {
        let result = match reload_policy(&self.sources, self.judge) {
            Ok(()) => "ok",
            Err(faults) => {
                for fault in faults {
                    error!(%fault, "cannot reload the settings; the old ones stay in force");
                }
                "refused"
            }
        };
        let result = match self.api {
            Some(api) if !api.reload() => "refused",
            _ => result,
        };
        counter!(names::RELOADS, "result" => result).increment(1);
        if let Some(check_registry) = &self.check_registry {
            let policy = self.judge.get().policy.canonical().to_owned();
            // Fails only if the watcher has ended, which it logs.
            let _ = check_registry.send((RecordKind::Policy, policy));
        }
    }
}

/// The connections of the daemon to the operating system: signals, HTTP and the service manager.
struct RunningDaemon {
    health: Arc<Health>,
    notifier: Notifier,
    signals: Signals,
    metrics: Exporter,
    /// Answers requests until it is dropped.
    _http: HttpServer,
}

impl RunningDaemon {
    fn start(config: &Config, signals: Signals, notifier: Notifier) -> anyhow::Result<Self> {
        let address = config.http.listen;
        let health = Arc::new(Health::new(STALL_LIMIT));
        let metrics = names::install().context("cannot start the metrics")?;
        let state = HttpState {
            metrics: metrics.clone(),
            health: Arc::clone(&health),
            now: Instant::now,
        };
        let limits = ConnectionLimits::new(raise_open_files_limit());
        let http =
            http::start(address, state, limits).with_context(|| format!("cannot listen on {address} (http.listen)"))?;
        info!(address = %http.address(), "listening for requests for metrics and health");
        Ok(Self {
            health,
            notifier,
            signals,
            metrics,
            _http: http,
        })
    }

    /// Serves until the pipeline ends, either on a signal or because of a failure.
    async fn serve(self, pipeline: Pipeline, handler: &ReloadHandler<'_>, grace: Duration) -> anyhow::Result<()> {
        let Self {
            health,
            notifier,
            mut signals,
            metrics: _,
            _http,
        } = self;
        let feeder = {
            let (notifier, health) = (notifier.clone(), Arc::clone(&health));
            tokio::spawn(async move { notifier.feed_watchdog(health, Instant::now).await })
        };
        health.enter(Phase::Serving);
        let mut announcer = Announcer::new(notifier.clone(), Arc::clone(&health));
        let mut ticks = tokio::time::interval(TICK);
        let mut deadline = None;
        while !pipeline.has_ended() {
            let stop = tokio::select! {
                _ = ticks.tick() => false,
                Some(()) = signals.stops.recv() => true,
                // Kept until the daemon is ready, and ignored while draining: the end of a reload reports it as ready.
                Some(()) = signals.reloads.recv(), if deadline.is_none() && announcer.has_been_ready() => {
                    notifier.reloading(monotonic());
                    handler.reload();
                    notifier.ready("serving");
                    false
                }
            };
            let now = Instant::now();
            if deadline.is_none() && !pipeline.is_ending() {
                announcer.update(now);
            }
            match deadline {
                None if stop => {
                    deadline = Some(now + grace + EXIT_TIMEOUT);
                    health.enter(Phase::Draining);
                    notifier.stopping("draining", grace + EXIT_TIMEOUT);
                    if let Some(api) = handler.api {
                        // The scorer must not end before the requests that it has are answered.
                        tokio::select! {
                            () = api.drain() => {}
                            () = tokio::time::sleep(grace) => {}
                            Some(()) = signals.stops.recv() => exit_without_draining(),
                        }
                        api.close();
                    }
                    pipeline.drain(now + grace);
                }
                Some(_) if stop => exit_without_draining(),
                Some(deadline) if now >= deadline => {
                    error!("a stage did not end in time: exiting now; unfinished comments will be read again");
                    exit_now(1);
                }
                _ => {}
            }
            if deadline.is_none() && pipeline.is_ending() {
                health.enter(Phase::Failed);
                deadline = Some(now + grace + EXIT_TIMEOUT);
            }
        }
        feeder.abort();
        if health.phase() == Phase::Failed {
            notifier.stopping("failed", EXIT_TIMEOUT);
        }
        let ended = pipeline.join();
        if ended.is_ok() {
            info!("stopped");
        }
        Ok(ended?)
    }
}

fn exit_without_draining() -> ! {
    warn!("received a second signal: exiting now; unfinished comments will be read again");
    exit_now(1)
}

/// Reloads the policy, the only section of the settings that can change while the daemon is serving.
///
/// # Errors
/// Returns all faults if the settings are invalid. The old policy then stays in force.
fn reload_policy(sources: &Sources, judge: &CurrentJudge) -> Result<(), Faults> {
    let config = Config::load(sources)?;
    let previous = judge.get();
    judge.set_policy(config.policy);
    let current = judge.get();
    info!(
        policy = current.policy.content_hash(),
        was = previous.policy.content_hash(),
        "policy reloaded"
    );
    Ok(())
}

/// Returns the time of CLOCK_MONOTONIC, which systemd requires with RELOADING=1. On Linux, this clock starts at boot.
fn monotonic() -> Duration {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime
        .split_whitespace()
        .next()
        .and_then(|seconds| seconds.parse().ok());
    Duration::from_secs_f64(seconds.unwrap_or(0.0))
}
