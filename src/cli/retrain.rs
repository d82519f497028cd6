//! `moderatord retrain`: a new adapter from labelled feedback, published, and promoted when it is better.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::bail;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tracing::info;

use super::feedback;
use super::{Exit, SettingsArgs};
use crate::classifier::golden::Question;
use crate::config::{Config, RetrainConfig};
use crate::kafka::snapshot;
use crate::ops::log;
use crate::registry::Registry;
use crate::retrain::data::feedback::Rules;
use crate::retrain::data::gather::{Gathered, Gatherer};
use crate::retrain::session::{Published, REPORT_FILE, RetrainOutcome, Session};
use crate::retrain::train::trainer::Progress;
use crate::serving;
use crate::serving::ModelSource;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct RetrainArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Labelled JSON objects, one a line, instead of the feedback topic
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Publish, but leave what is in service as it is
    #[arg(long)]
    no_promote: bool,
}

const AFTER_HELP: &str = r#"Reads the feedback topic up to its end as it stands, or --input, and trains a LoRA adapter on it:
  {"content_id": "c1", "text": "see you at the garden", "label": "ok", "source": "moderator"}
Labels are "hateful", "ok" or a number from 0 to 1; in a file, ids and sources may be left out. The adapter is
measured against the one in service on texts that neither was trained on, published with a report, and
promoted when it is better. Running daemons swap to it by themselves.

Exit codes: 0 promoted, kept for a look, or skipped for lack of data; 1 failed; 64 wrong usage; 78 wrong settings.

Examples:
  moderatord retrain --config /etc/moderatord/moderatord.toml
  moderatord retrain --config moderatord.toml --input labels.jsonl --no-promote"#;

pub(super) fn run(args: &RetrainArgs, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<Exit> {
    let config = Config::load(&args.settings.sources())?;
    log::start_for_command(&config.log);
    let url = config.require_registry()?;
    let registry = Registry::create(url)?;
    // Held to the end: two retrainings of one host would judge against what the other replaces.
    let _lock = registry.lock(SystemTime::now())?;
    let (gathered, origin) = gather(args.input.as_deref(), &config)?;
    describe(&gathered, out, err)?;
    let questions = questions(&config.retrain)?;
    let bar = Bar::new();
    let mut progress = |progress: Progress| bar.tell(progress);
    let source = ModelSource {
        model: config.model.clone(),
        prompt: config.prompt.clone(),
    };
    let session = Session {
        source,
        config: &config.retrain,
        policy: &config.policy,
        registry: &registry,
        questions,
        origin,
        progress: &mut progress,
    };
    let outcome = serving::runtime()?.block_on(session.run(gathered, !args.no_promote));
    bar.bar.finish_and_clear();
    match outcome? {
        RetrainOutcome::Skipped(reason) => writeln!(out, "skipped: {reason}")?,
        RetrainOutcome::Published(published) => conclude(&published, args.no_promote, &registry, out)?,
    }
    Ok(Exit::Success)
}

fn gather(input: Option<&Path>, config: &Config) -> anyhow::Result<(Gathered, serde_json::Value)> {
    let max_bytes = config.retrain.max_bytes;
    if let Some(path) = input {
        let gathered = feedback::read(path, max_bytes)?;
        return Ok((gathered, json!({ "file": path.display().to_string() })));
    }
    let topic = config.require_feedback()?;
    let mut gatherer = Gatherer::new(Rules {
        max_bytes,
        lenient: false,
    });
    let ends = snapshot::read(&topic, |record| {
        let place = || format!("partition {} offset {}", record.partition, record.offset);
        let position = u64::try_from(record.offset).unwrap_or_default();
        gatherer.record(place, position, record.key, record.value);
    })?;
    let ends: serde_json::Map<_, _> = ends
        .into_iter()
        .map(|(partition, end)| (partition.to_string(), end.into()))
        .collect();
    Ok((gatherer.finish(), json!({ "topic": topic.topic, "ends": ends })))
}

fn describe(gathered: &Gathered, out: &mut dyn Write, err: &mut dyn Write) -> std::io::Result<()> {
    let refused = &gathered.refused;
    writeln!(
        out,
        "feedback  {} records, {} contents, {} superseded, {} forgotten, {} refused",
        gathered.records,
        gathered.rows.len(),
        gathered.superseded,
        gathered.forgotten,
        refused.total()
    )?;
    for line in &refused.listed {
        writeln!(err, "{line}")?;
    }
    let unlisted = refused.total() - refused.listed.len();
    if unlisted > 0 {
        writeln!(err, "and {unlisted} more")?;
    }
    for (reason, count) in &refused.counts {
        writeln!(out, "refused   {reason} {count}")?;
    }
    Ok(())
}

fn questions(config: &RetrainConfig) -> anyhow::Result<Vec<Question>> {
    let Some(path) = &config.golden else {
        return Ok(Vec::new());
    };
    let gathered = feedback::read(path, config.max_bytes)?;
    if let Some(fault) = gathered.refused.listed.first() {
        bail!("cannot read the golden set `{}`: {fault}", path.display());
    }
    let question = |row: crate::retrain::data::feedback::Feedback| Question {
        id: row.content_id,
        text: row.text,
        hateful: Some(row.hateful >= 0.5),
    };
    Ok(gathered.rows.into_iter().map(question).collect())
}

fn conclude(published: &Published, no_promote: bool, registry: &Registry, out: &mut dyn Write) -> anyhow::Result<()> {
    let [train, validation, test] = published.parts;
    let (tokens, took) = published.training;
    let rate = tokens as f64 / took.as_secs_f64().max(1e-9);
    writeln!(out, "parts     {train} train, {validation} validate, {test} judge")?;
    writeln!(
        out,
        "training  {} epochs, {tokens} tokens, {rate:.0} tokens per second, peak memory {} MiB",
        published.epochs,
        peak_memory_mib()
    )?;
    let version = &published.manifest.version;
    writeln!(out, "version   {version}")?;
    if let Some(folder) = registry.version_folder(version) {
        writeln!(out, "report    {}", folder.join(REPORT_FILE).display())?;
    }
    writeln!(out, "verdict   {}", published.verdict)?;
    match &published.pointer {
        Some(pointer) => writeln!(out, "promoted  pointer {}", pointer.sequence)?,
        None if published.verdict.promote && no_promote => writeln!(out, "kept      --no-promote")?,
        None => writeln!(out, "kept      not promoted")?,
    }
    Ok(())
}

/// The most that this process ever held, as Linux counts it.
fn peak_memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() / 1024
}

/// A bar where somebody watches, log lines elsewhere.
struct Bar {
    bar: ProgressBar,
    logged: std::cell::Cell<Instant>,
}

/// How often steps are logged.
const LOG_EVERY: Duration = Duration::from_secs(30);

impl Bar {
    fn new() -> Self {
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{wide_bar} step {pos}/{len} {eta} {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        } else {
            ProgressBar::hidden()
        };
        Self {
            bar,
            logged: std::cell::Cell::new(Instant::now()),
        }
    }

    fn tell(&self, progress: Progress) {
        match progress {
            Progress::Step { step, total, loss, .. } => {
                self.bar.set_length(total as u64);
                self.bar.set_position(step as u64);
                self.bar.set_message(format!("loss {loss:.4}"));
                if self.logged.get().elapsed() >= LOG_EVERY {
                    self.logged.set(Instant::now());
                    info!(step, total, loss, "training");
                }
            }
            Progress::Epoch {
                epoch,
                training,
                validation,
                best,
            } => info!(epoch, training, validation, best, "epoch"),
        }
    }
}
