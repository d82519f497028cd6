//! `moderatord retrain`: trains a new adapter on labelled feedback, publishes it, and promotes it if it is better.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::bail;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tracing::info;

use super::feedback;
use super::feedback::LabelFile;
use super::{Exit, SettingsArgs};
use crate::classifier::defaults::ModelDefaults;
use crate::classifier::golden::GoldenText;
use crate::config::{Config, ModelConfig, RetrainConfig};
use crate::decide::general_thresholds;
use crate::fault::{Fault, Faults};
use crate::kafka::snapshot;
use crate::model::files::checkpoint::Checkpoint;
use crate::plural::Count;
use crate::registry::Registry;
use crate::retrain::data::feedback::FeedbackRules;
use crate::retrain::data::gather::{FeedbackGatherer, GatheredFeedback};
use crate::retrain::judge::thresholds::{ThresholdDerivation, ThresholdOutcome};
use crate::retrain::session::{PartSizes, Published, REPORT_FILE, RetrainOutcome, Session, SessionProgress};
use crate::retrain::train::trainer::TrainingProgress;
use crate::serving;
use crate::serving::ModelSource;
use crate::serving::tracked::TrackedRegistry;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct RetrainArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// File of labelled comments to use instead of the feedback topic: one JSON object per line, or CSV with the columns
    /// `text` and `label`; may be gzipped, and `-` is stdin
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Publish the new version, but do not put it into service
    #[arg(long)]
    no_promote: bool,
}

const AFTER_HELP: &str = r#"Trains a LoRA adapter on labelled comments, read from the feedback topic (up to its current end) or
from the file given with --input:
  {"content_id": "c1", "text": "see you at the garden", "label": "ok", "source": "moderator"}
The label is "hateful", "ok" or a number from 0 to 1. In a file, ids and sources are optional. The
new adapter is compared with the one in service on texts that neither was trained on, published with
a report, and promoted if it is better. Running daemons swap to it automatically.

Exit codes:
  0   promoted, published without promotion, or skipped for lack of data
  1   failure, or there were labels and none of them could be read
  64  invalid command line
  78  invalid settings, or a registry that has lost the version in service

Examples:
  moderatord retrain --config /etc/moderatord/moderatord.toml
  moderatord retrain --config moderatord.toml --input labels.jsonl --no-promote"#;

/// Refuses a base model with a classification head, because training computes the loss of labels of the vocabulary.
fn require_language_model(model: &ModelConfig) -> Result<(), Faults> {
    match &Checkpoint::from_settings(model)?.config().outputs.classifier {
        None => Ok(()),
        Some(name) => Err(Fault::setting(
            "model.path",
            format!(
                "the model is a `{name}`, whose classification head cannot be retrained, expected a Gemma for causal \
                 language modelling"
            ),
        )
        .into()),
    }
}

pub(super) fn run(args: &RetrainArgs, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<Exit> {
    let config = args.settings.load()?;
    let mut tracked = TrackedRegistry::recall(config.require_registry()?, config.registry.state.as_deref())?;
    // A new adapter must not be compared with the bare base model because the registry is not mounted.
    let registry = serving::runtime()?.block_on(tracked.require_intact_or_create())?;
    // Held until the end: otherwise, two concurrent runs could both compare with a version that the other replaces.
    let _lock = registry.lock(SystemTime::now())?;
    let (file, origin) = gather(args.input.as_deref(), &config)?;
    if let Some(note) = &file.note {
        writeln!(err, "{note}")?;
    }
    print_feedback(&file.gathered, out, err)?;
    file.require_readable()?;
    let gathered = file.gathered;
    require_language_model(&config.model)?;
    let golden_texts = read_golden_texts(&config.retrain)?;
    let display = ProgressDisplay::new();
    let mut progress = |progress: SessionProgress| display.update(progress);
    let source = ModelSource::new(config.model.clone(), config.prompt.clone());
    let session = Session {
        source,
        config: &config.retrain,
        policy: general_thresholds(&config.policy, &ModelDefaults::of_model(&config.model)?),
        registry: &registry,
        golden_texts,
        origin,
        progress: &mut progress,
    };
    let outcome = serving::runtime()?.block_on(session.run(gathered, !args.no_promote));
    display.bar.finish_and_clear();
    match outcome? {
        RetrainOutcome::Skipped(reason) => writeln!(out, "skipped: {reason}")?,
        RetrainOutcome::Published(published) => {
            if let Some(pointer) = &published.pointer {
                tracked.remember(pointer);
            }
            print_published(&published, args.no_promote, &registry, out)?;
        }
    }
    Ok(Exit::Success)
}

fn gather(input: Option<&Path>, config: &Config) -> anyhow::Result<(LabelFile, serde_json::Value)> {
    let max_bytes = config.retrain.max_bytes;
    if let Some(path) = input {
        let gathered = feedback::read(path, max_bytes)?;
        return Ok((gathered, json!({ "file": path.display().to_string() })));
    }
    let topic = config.require_feedback()?;
    let mut gatherer = FeedbackGatherer::new(FeedbackRules {
        max_bytes,
        lenient: false,
    });
    let ends = snapshot::read(&topic, |record| {
        let location = || format!("partition {} offset {}", record.partition, record.offset);
        let position = u64::try_from(record.offset).unwrap_or_default();
        gatherer.add_record(location, position, record.key, record.value);
    })?;
    let ends: serde_json::Map<_, _> = ends
        .into_iter()
        .map(|(partition, end)| (partition.to_string(), end.into()))
        .collect();
    let labels = LabelFile::of_topic(gatherer.finish(), &topic.topic);
    Ok((labels, json!({ "topic": topic.topic, "ends": ends })))
}

fn print_feedback(gathered: &GatheredFeedback, out: &mut dyn Write, err: &mut dyn Write) -> std::io::Result<()> {
    let refused = &gathered.refused;
    writeln!(
        out,
        "feedback  {}, {}, {} superseded, {} forgotten, {} refused",
        Count(gathered.records, "record"),
        Count(gathered.rows.len(), "content id"),
        gathered.superseded,
        gathered.forgotten,
        refused.total()
    )?;
    if let Some(note) = gathered.repairs() {
        writeln!(out, "repaired  {note}")?;
    }
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

fn read_golden_texts(config: &RetrainConfig) -> anyhow::Result<Vec<GoldenText>> {
    let Some(path) = &config.golden else {
        return Ok(Vec::new());
    };
    let gathered = feedback::read(path, config.max_bytes)?.gathered;
    if let Some(fault) = gathered.refused.listed.first() {
        bail!("cannot read the golden set `{}`: {fault}", path.display());
    }
    let golden_text = |row: crate::retrain::data::feedback::Feedback| GoldenText {
        id: row.content_id,
        text: row.text,
        hateful: Some(row.hateful >= 0.5),
    };
    Ok(gathered.rows.into_iter().map(golden_text).collect())
}

fn print_published(
    published: &Published,
    no_promote: bool,
    registry: &Registry,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let PartSizes {
        train,
        validation,
        test,
    } = published.parts;
    let tokens = published.tokens;
    let rate = tokens as f64 / published.training_time.as_secs_f64().max(1e-9);
    writeln!(
        out,
        "parts     {train} training, {validation} validation and {}",
        Count(test, "test row")
    )?;
    writeln!(
        out,
        "training  {}, {tokens} tokens, {rate:.0} tokens per second, peak memory {} MiB",
        Count(published.epochs, "epoch"),
        peak_memory_mib()
    )?;
    let verdict = &published.verdict;
    match &published.cross_fitted {
        Some((adapters, elapsed)) => writeln!(
            out,
            "judging   {} in {}, for which {} {} trained in {:.0} seconds",
            Count(verdict.rows, "row"),
            Count(verdict.folds, "fold"),
            Count(*adapters, "more adapter"),
            if *adapters == 1 { "was" } else { "were" },
            elapsed.as_secs_f64()
        )?,
        None => writeln!(out, "judging   {}", Count(verdict.rows, "test row"))?,
    }
    if let Some(power) = &verdict.power {
        writeln!(out, "power     {power}")?;
    }
    print_thresholds(&published.thresholds, out)?;
    let version = &published.manifest.version;
    writeln!(out, "version   {version}")?;
    if let Some(folder) = registry.version_folder(version) {
        writeln!(out, "report    {}", folder.join(REPORT_FILE).display())?;
    }
    writeln!(out, "verdict   {verdict}")?;
    match &published.pointer {
        Some(pointer) => writeln!(out, "promoted  pointer {}", pointer.sequence)?,
        None if published.verdict.promote && no_promote => writeln!(out, "kept      not promoted (--no-promote)")?,
        None => writeln!(out, "kept      not promoted")?,
    }
    Ok(())
}

/// Prints each threshold with the precision and recall that are expected of it, or why there is none.
fn print_thresholds(derivation: &ThresholdDerivation, out: &mut dyn Write) -> std::io::Result<()> {
    let scope = if derivation.is_representative() {
        "of the traffic"
    } else {
        "of the labelled comments, not representative"
    };
    for (name, outcome) in [("block", &derivation.block), ("review", &derivation.review)] {
        match outcome {
            ThresholdOutcome::Derived {
                value,
                figures,
                provisional,
                ..
            } => {
                let provisional = if *provisional { ", provisional" } else { "" };
                let precision = with_interval(Some(figures.precision), figures.precision_interval);
                let recall = with_interval(figures.recall, figures.recall_interval);
                writeln!(
                    out,
                    "{name:<9} from {value:.4}{provisional}: precision {precision}, recall {recall}, share {:.1} % \
                     {scope}",
                    100.0 * figures.share
                )?;
            }
            ThresholdOutcome::None { reason } => writeln!(out, "{name:<9} no threshold: {reason}")?,
        }
    }
    Ok(())
}

/// Formats the 90 % interval of a share, and the share that was observed.
fn with_interval(share: Option<f64>, interval: Option<[f64; 2]>) -> String {
    let share = share.map_or_else(|| "unknown".to_owned(), |share| format!("{share:.3}"));
    match interval {
        Some([low, high]) => format!("{low:.3} to {high:.3} (observed {share})"),
        None => share,
    }
}

/// Returns the peak resident memory of this process as reported by Linux, or 0 if it is not available.
fn peak_memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() / 1024
}

/// A progress bar if stderr is a terminal, and log lines otherwise.
struct ProgressDisplay {
    bar: ProgressBar,
    last_logged: std::cell::Cell<Instant>,
}

/// Time between two log lines about training steps.
const LOG_INTERVAL: Duration = Duration::from_secs(30);

impl ProgressDisplay {
    fn new() -> Self {
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{wide_bar} step {pos}/{len} {eta} {msg}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        } else {
            ProgressBar::hidden()
        };
        Self {
            bar,
            last_logged: std::cell::Cell::new(Instant::now()),
        }
    }

    fn update(&self, progress: SessionProgress) {
        let SessionProgress {
            adapter,
            adapters,
            training,
        } = progress;
        match training {
            TrainingProgress::Step { step, total, loss, .. } => {
                self.bar.set_length(total as u64);
                self.bar.set_position(step as u64);
                let which = if adapters > 1 {
                    format!("adapter {adapter} of {adapters}, ")
                } else {
                    String::new()
                };
                self.bar.set_message(format!("{which}loss {loss:.4}"));
                if self.last_logged.get().elapsed() >= LOG_INTERVAL {
                    self.last_logged.set(Instant::now());
                    info!(adapter, adapters, step, total, loss, "training step");
                }
            }
            TrainingProgress::Epoch {
                epoch,
                training,
                validation,
                best,
            } => info!(adapter, adapters, epoch, training, validation, best, "training epoch"),
        }
    }
}
