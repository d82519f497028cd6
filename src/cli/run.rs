//! `moderatord run`: checks everything, then serves until it is told to stop.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::{error, info, warn};

use super::checked::{Checked, Streaming, check};
use super::{Exit, SettingsArgs};
use crate::config::{BatchConfig, Config, Sources};
use crate::decide::{Calibration, CurrentJudge, Judge, Policy};
use crate::model::Classifier;
use crate::ops::health::{Health, Phase};
use crate::ops::http::{self, Outside};
use crate::ops::metrics;
use crate::ops::notify::Notifier;
use crate::pipeline::{Model, Pipeline, Settings};
use crate::score::canary;
use crate::score::warm_up::warm_up;
use crate::telemetry;

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
SIGHUP: the policy is read again from the settings; everything else needs a restart.

Exit codes: 0 stopped as told, 1 failed (start it again), 64 wrong usage, 78 settings, model, topics
or committed offsets need a person.";

pub(super) fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    let Checked {
        config,
        classifier,
        stream,
    } = check(&args.settings, Streaming::Required, telemetry::start)?;
    let (stream, partitions) = stream.context("the settings name no stream")?;
    if let Some(warning) = partitions.warning() {
        warn!(warning, "the topics differ in their partitions");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let daemon = runtime.block_on(Daemon::prepare(&config))?;
    announce(&classifier);
    let (model, max_tokens) = serve_with(classifier, &config)?;
    daemon.health.scored(Instant::now());
    let judge = Arc::clone(&model.judge);
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
    let pipeline = Pipeline::start(&settings, model, &daemon.health)?;
    info!(
        group = settings.stream.group,
        topic = settings.stream.topics.comments,
        delivery = ?settings.stream.delivery,
        "serving"
    );
    runtime.block_on(daemon.serve(pipeline, &args.settings.sources(), &judge, config.shutdown.grace))?;
    Ok(Exit::Success)
}

/// A warm model and the size of its micro-batches.
pub(super) fn serve_with(mut classifier: Classifier, config: &Config) -> anyhow::Result<(Model, usize)> {
    let prompter = classifier.prompter();
    let canary = canary::rows(&prompter).context("cannot prompt a known good comment")?;
    let started = Instant::now();
    let wanted = config.batch.max_tokens;
    let max_tokens = warm_up(&mut classifier, &canary, wanted).context("cannot score a known good comment")?;
    info!(max_tokens, seconds = started.elapsed().as_secs_f64(), "model is warm");
    if max_tokens < wanted {
        info!(
            max_tokens,
            wanted, "micro-batches are kept smaller than batch.max_tokens: the device would take over a second"
        );
    }
    let judge = Judge {
        policy: Policy::new(&config.policy),
        calibration: Calibration::Identity,
        model: classifier.identity().clone(),
    };
    let model = Model {
        canary,
        prompter,
        judge: Arc::new(CurrentJudge::new(judge)),
        scorer: Box::new(classifier),
    };
    Ok((model, max_tokens))
}

fn announce(classifier: &Classifier) {
    let identity = classifier.identity();
    let adapter_version = identity.adapter_version.clone().unwrap_or_default();
    ::metrics::gauge!(
        metrics::MODEL_INFO,
        "base" => identity.base.clone(),
        "adapter" => identity.adapter.clone(),
        "adapter_version" => adapter_version,
        "prompt" => identity.prompt.clone(),
        "device" => identity.device.clone(),
        "dtype" => identity.dtype.clone(),
        "quantization" => identity.quantization.clone(),
    )
    .set(1.0);
}

/// What faces the operating system: signals, HTTP, the service manager.
struct Daemon {
    health: Arc<Health>,
    notifier: Notifier,
    listener: TcpListener,
    outside: Outside,
    stop: [Signal; 2],
    reload: Signal,
}

impl Daemon {
    async fn prepare(config: &Config) -> anyhow::Result<Self> {
        let address = config.http.listen;
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address} (http.listen)"))?;
        let health = Arc::new(Health::new(STALL_LIMIT));
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            outside: Outside {
                metrics: metrics::install().context("cannot start the metrics")?,
                health: Arc::clone(&health),
                now: Instant::now,
            },
            health,
            notifier: Notifier::from_environment().context("NOTIFY_SOCKET is no address")?,
            listener,
            stop: [listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?],
            reload: listen(SignalKind::hangup())?,
        })
    }

    /// Until the stream ends, by itself or because a signal says so.
    async fn serve(
        self,
        pipeline: Pipeline,
        sources: &Sources,
        judge: &CurrentJudge,
        grace: Duration,
    ) -> anyhow::Result<()> {
        let Self {
            health,
            notifier,
            listener,
            outside,
            stop: [mut terminate, mut interrupt],
            mut reload,
        } = self;
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
                _ = reload.recv() => {
                    notifier.reloading(monotonic());
                    reload_policy(sources, judge);
                    notifier.ready("serving");
                    false
                }
            };
            let now = Instant::now();
            match deadline {
                None if stop => {
                    deadline = Some(now + grace + PATIENCE);
                    health.enter(Phase::Draining);
                    notifier.stopping("draining");
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
            notifier.stopping("failed");
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
            for fault in faults.faults {
                error!(%fault, "cannot reload the settings; the old ones stay");
            }
            return;
        }
    };
    let (current, policy) = (judge.get(), Policy::new(&config.policy));
    info!(
        policy = policy.content_hash(),
        was = current.policy.content_hash(),
        "policy reloaded"
    );
    judge.set(Judge {
        policy,
        ..Judge::clone(&current)
    });
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
