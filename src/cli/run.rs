//! `moderatord run`: checks everything, then serves until it is told to stop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use crossbeam_channel::{Receiver, Sender, bounded};
use metrics::gauge;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};

use super::checked::{Checked, CheckedModel, Streaming, check};
use super::{Exit, SettingsArgs};
use crate::config::{BatchConfig, Config, Sources, StreamConfig};
use crate::decide::CurrentJudge;
use crate::kafka::topics::Partitions;
use crate::ops::health::{Health, Phase};
use crate::ops::http;
use crate::ops::http::Outside;
use crate::ops::log;
use crate::ops::metrics as names;
use crate::ops::notify::Notifier;
use crate::registry::{RecordKind, Registry};
use crate::serving::Served;
use crate::serving::watch::{Watch, announce};
use crate::stream::pipeline::{Model, Pipeline, Settings};
use crate::stream::score::Replacement;

/// No scored batch for this long means that nothing works: several canaries and the longest batch.
const STALL_LIMIT: Duration = Duration::from_secs(30);

/// After the grace period, how long a stage may take to notice before the process ends regardless.
const PATIENCE: Duration = Duration::from_secs(10);

/// How soon the end of the stream is noticed.
const TICK: Duration = Duration::from_millis(50);

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct RunArgs {
    #[command(flatten)]
    settings: SettingsArgs,
}

const AFTER_HELP: &str = "\
Checks settings, model and brokers, warms the model up, joins the consumer group and serves.

SIGTERM or SIGINT: what is in flight is finished within `shutdown.grace`, then the group is left. A
second one ends at once. Either way nothing is lost: what is unfinished is read again.
SIGHUP: the policy is read again from the settings, and the registry is looked at; everything else needs
a restart.

Exit codes: 0 stopped as told, 1 failed (start it again), 64 wrong usage, 78 settings, model, topics
or committed offsets need a person.";

pub(super) fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    let checked = check(&args.settings, Streaming::Required, log::start)?;
    let Checked { config, model, stream } = checked;
    let (stream, partitions) = stream.context("the settings name no stream")?;
    if let Some(warning) = partitions.warning() {
        warn!(warning, "the topics differ in their partitions");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let daemon = runtime.block_on(RunningDaemon::prepare(&config))?;
    let registry = model.registry.clone();
    let (serving, mut source) = (model.pointer_sequence(), model.source.clone());
    let (served, max_tokens) = warm(model, &config)?;
    // What is swapped in later computes where this does, or not at all.
    source.model.device = served.classifier.placement().choice();
    announce(&served.judged.identity);
    daemon.health.scored(Instant::now());
    let (replace, swap) = bounded(0);
    let (settings, model) = assemble(served, max_tokens, stream, partitions, &config, swap);
    let judge = Arc::clone(&model.judge);
    let pipeline = Pipeline::start(&settings, model, &daemon.health)?;
    info!(
        group = settings.stream.group,
        topic = settings.stream.topics.comments,
        delivery = ?settings.stream.delivery,
        "serving"
    );
    let (nudge, nudges) = bounded(1);
    if let Some(registry) = registry.clone() {
        let watch = Watch {
            source,
            registry,
            serving,
            max_tokens: settings.batch.max_tokens,
            poll: config.registry.poll,
        };
        // Ends with the process: whatever it is loading then is of no use to anybody.
        std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || watch.run(&nudges, &replace))
            .context("cannot start the registry's watcher")?;
    }
    let reload = Reload {
        sources: args.settings.sources(),
        judge: &judge,
        registry,
        nudge,
    };
    runtime.block_on(reload.keep_policy());
    runtime.block_on(daemon.serve(pipeline, &reload, config.shutdown.grace))?;
    Ok(Exit::Success)
}

/// Makes the model ready; gives the batch budget along.
pub(super) fn warm(model: CheckedModel, config: &Config) -> anyhow::Result<(Served, usize)> {
    let started = Instant::now();
    let limit = config.batch.max_tokens;
    let (served, warm) = model.source.warm_up(model.loaded, limit)?;
    info!(
        batch_budget_tokens = warm.max_tokens,
        limit,
        tokens_per_second = warm.tokens_per_second.round(),
        seconds = started.elapsed().as_secs_f64(),
        "model is warm"
    );
    gauge!(names::BATCH_BUDGET).set(warm.max_tokens as f64);
    Ok((served, warm.max_tokens))
}

/// The pipeline's two halves.
pub(super) fn assemble(
    served: Served,
    max_tokens: usize,
    stream: StreamConfig,
    partitions: Partitions,
    config: &Config,
    swap: Receiver<Replacement>,
) -> (Settings, Model) {
    let settings = Settings {
        stream,
        partitions,
        input: config.input.clone(),
        batch: BatchConfig {
            max_tokens,
            ..config.batch.clone()
        },
        limits: config.limits,
    };
    let model = Model {
        canary: served.canary,
        prompter: served.classifier.prompter(),
        judge: Arc::new(CurrentJudge::new(config.policy.clone(), served.judged)),
        scorer: Box::new(served.classifier),
        swap,
    };
    (settings, model)
}

/// What SIGHUP does.
struct Reload<'a> {
    sources: Sources,
    judge: &'a CurrentJudge,
    registry: Option<Registry>,
    /// Has the registry looked at.
    nudge: Sender<()>,
}

impl Reload<'_> {
    /// Reads the policy again, and has the registry looked at. A faulty file changes nothing.
    async fn now(&self) {
        reload_policy(&self.sources, self.judge);
        self.keep_policy().await;
        // One that waits already is as good.
        let _ = self.nudge.try_send(());
    }

    /// Keeps what decisions name by hash, for `explain`.
    async fn keep_policy(&self) {
        let Some(registry) = &self.registry else { return };
        let judge = self.judge.get();
        if let Err(error) = registry.put_record(RecordKind::Policy, judge.policy.canonical()).await {
            warn!(%error, "cannot keep the policy's record; `explain` will miss it");
        }
    }
}

/// What faces the operating system: signals, HTTP, the service manager.
struct RunningDaemon {
    health: Arc<Health>,
    notifier: Notifier,
    listener: TcpListener,
    outside: Outside,
}

impl RunningDaemon {
    async fn prepare(config: &Config) -> anyhow::Result<Self> {
        let address = config.http.listen;
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address} (http.listen)"))?;
        let health = Arc::new(Health::new(STALL_LIMIT));
        Ok(Self {
            outside: Outside {
                metrics: names::install().context("cannot start the metrics")?,
                health: Arc::clone(&health),
                now: Instant::now,
            },
            health,
            notifier: Notifier::from_environment().context("NOTIFY_SOCKET is no address")?,
            listener,
        })
    }

    /// Until the stream ends, by itself or because a signal says so.
    async fn serve(self, pipeline: Pipeline, reload_all: &Reload<'_>, grace: Duration) -> anyhow::Result<()> {
        let Self {
            health,
            notifier,
            listener,
            outside,
        } = self;
        // Only now: until there is something to drain, a signal may end the process as it always does.
        let listen = |kind| signal(kind).context("cannot listen for signals");
        let mut terminate = listen(SignalKind::terminate())?;
        let mut interrupt = listen(SignalKind::interrupt())?;
        let mut reload = listen(SignalKind::hangup())?;
        let address = listener
            .local_addr()
            .context("cannot tell the address of http.listen")?;
        info!(%address, "metrics and health");
        let server = tokio::spawn(http::serve(listener, outside, std::future::pending()));
        let feeder = {
            let (notifier, health) = (notifier.clone(), Arc::clone(&health));
            tokio::spawn(async move { notifier.feed_watchdog(health, Instant::now).await })
        };
        health.enter(Phase::Serving);
        notifier.ready("serving");
        let mut ticks = tokio::time::interval(TICK);
        let mut deadline = None;
        while !pipeline.has_ended() {
            let stop = tokio::select! {
                _ = ticks.tick() => false,
                _ = terminate.recv() => true,
                _ = interrupt.recv() => true,
                // A daemon that drains has nothing to reload for, and is not ready any more.
                _ = reload.recv(), if deadline.is_none() => {
                    notifier.reloading(monotonic());
                    reload_all.now().await;
                    notifier.ready("serving");
                    false
                }
            };
            let now = Instant::now();
            match deadline {
                None if stop => {
                    deadline = Some(now + grace + PATIENCE);
                    health.enter(Phase::Draining);
                    notifier.stopping("draining", grace + PATIENCE);
                    pipeline.drain(now + grace);
                }
                Some(_) if stop => {
                    warn!("told to stop twice: ending at once; what is unfinished will be read again");
                    std::process::exit(1);
                }
                Some(deadline) if now >= deadline => {
                    error!("a stage did not end in time: ending at once; what is unfinished will be read again");
                    std::process::exit(1);
                }
                _ => {}
            }
            if deadline.is_none() && pipeline.is_ending() {
                health.enter(Phase::Failed);
                deadline = Some(now + grace + PATIENCE);
            }
        }
        feeder.abort();
        server.abort();
        if health.phase() == Phase::Failed {
            notifier.stopping("failed", PATIENCE);
        }
        let ended = pipeline.join();
        if ended.is_ok() {
            info!("stopped");
        }
        Ok(ended?)
    }
}

/// The policy is the one setting that changes while comments flow; a faulty file changes nothing.
fn reload_policy(sources: &Sources, judge: &CurrentJudge) {
    let config = match Config::load(sources) {
        Ok(config) => config,
        Err(faults) => {
            for fault in faults {
                error!(%fault, "cannot reload the settings; the old ones stay");
            }
            return;
        }
    };
    let before = judge.get();
    judge.set_policy(config.policy);
    let after = judge.get();
    info!(
        policy = after.policy.content_hash(),
        was = before.policy.content_hash(),
        "policy reloaded"
    );
}

/// As systemd wants it beside RELOADING=1: of CLOCK_MONOTONIC, which on Linux counts from the boot.
fn monotonic() -> Duration {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime
        .split_whitespace()
        .next()
        .and_then(|seconds| seconds.parse().ok());
    Duration::from_secs_f64(seconds.unwrap_or(0.0))
}
