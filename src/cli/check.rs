//! `moderatord check`: everything that can be wrong before the first comment, at once.

use std::io::Write;

use anyhow::{Context, bail};
use clap::Args;

use super::checked;
use super::checked::{Checked, CheckedModel, Streaming};
use super::{Exit, SettingsArgs};
use crate::classifier::canary;
use crate::classifier::{Classifier, oracle};
use crate::config::{Config, Delivery, StreamConfig};
use crate::decide::Policy;
use crate::kafka::client;
use crate::kafka::topics::Partitions;
use crate::ops::log;
use crate::scorer::Scorer;

/// Two correct f32 implementations differ by about 3e-5 in a logit of the reference checkpoints; a
/// wrong one by far more than this.
const ORACLE_TOLERANCE: f32 = 1e-2;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Compare the base's scores with candle-transformers' own Gemma, on sample texts
    #[arg(long)]
    oracle: bool,
}

const AFTER_HELP: &str = "\
Loads the settings, the checkpoint, the adapter and the frame, scores sample texts, and prints what
it found. Every fault is reported, not just the first. Once anything of the stream is set, the brokers
are asked too: whether they answer, the topics are there, and we may read and write them. Nothing is
written and nothing is created.

Exit codes: 0 nothing is wrong, 78 something is, 1 no broker answers, --oracle differs or cannot compare.";

pub(super) fn run(args: &CheckArgs, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Checked {
        config,
        mut model,
        stream,
    } = checked::check(&args.settings, Streaming::IfSet, log::start_for_command)?;
    let margins = sample_margins(&mut model.loaded.classifier)?;
    summary(&config, &model, &margins, out)?;
    stream_summary(stream.as_ref(), out)?;
    if args.oracle {
        let report = oracle::compare(&config.model, &config.prompt, &canary::TEXTS)?;
        let (difference, texts) = (report.max_difference, report.texts);
        // Written so that a difference that is no number fails as well.
        let agrees = difference <= ORACLE_TOLERANCE;
        writeln!(
            out,
            "oracle    {texts} texts, largest difference of a logit {difference:.1e}, expected at most {ORACLE_TOLERANCE:.0e}"
        )?;
        if !agrees {
            bail!("the base's logits differ from candle-transformers' by {difference}");
        }
    }
    Ok(Exit::Success)
}

fn sample_margins(classifier: &mut Classifier) -> anyhow::Result<Vec<f32>> {
    let rows = canary::rows(&classifier.prompter()).context("cannot prompt a sample")?;
    classifier.score(&rows).context("cannot score the samples")
}

fn summary(config: &Config, model: &CheckedModel, margins: &[f32], out: &mut dyn Write) -> std::io::Result<()> {
    let classifier = &model.loaded.classifier;
    let identity = classifier.identity();
    let policy = Policy::new(&config.policy);
    let thresholds = config.policy.thresholds;
    let communities = match config.policy.communities.len() {
        0 => String::new(),
        1 => ", 1 community of its own".to_owned(),
        count => format!(", {count} communities of their own"),
    };
    let margins: Vec<String> = margins.iter().map(|margin| format!("{margin:.3}")).collect();
    let hateful = &config.prompt.hateful_label;
    writeln!(out, "model     {}", classifier.description())?;
    writeln!(out, "base      {}", identity.base)?;
    writeln!(out, "adapter   {}", identity.adapter)?;
    if let Some(registry) = &model.registry {
        let version = identity.adapter_version.as_deref().unwrap_or("none, the bare base");
        let pointer = model.pointer_sequence();
        writeln!(
            out,
            "registry  {}, pointer {pointer}, version {version}",
            registry.place()
        )?;
    }
    writeln!(out, "prompt    {}", identity.prompt)?;
    writeln!(
        out,
        "labels    {}, hateful is {hateful}, normaliser {}",
        config.prompt.labels.join(" and "),
        identity.normalizer
    )?;
    writeln!(
        out,
        "policy    review from {}, block from {}{communities}; {}",
        thresholds.review,
        thresholds.block,
        policy.content_hash()
    )?;
    writeln!(out, "samples   margins {}", margins.join(", "))?;
    Ok(())
}

fn stream_summary(stream: Option<&(StreamConfig, Partitions)>, out: &mut dyn Write) -> std::io::Result<()> {
    let Some((stream, partitions)) = stream else {
        return writeln!(out, "kafka     not set");
    };
    let (topics, delivery) = (&stream.topics, stream.delivery);
    writeln!(
        out,
        "kafka     {}, group {}, instance {}, {}",
        stream.brokers.join(", "),
        stream.group,
        stream.instance,
        match delivery {
            Delivery::ExactlyOnce => "exactly once",
            Delivery::AtLeastOnce => "at least once",
        }
    )?;
    writeln!(
        out,
        "topics    {} ({} partitions) to {} ({}) and {} ({})",
        topics.comments,
        partitions.comments,
        topics.decisions,
        partitions.decisions,
        topics.dead_letters,
        partitions.dead_letters
    )?;
    if let Some(warning) = partitions.warning() {
        writeln!(out, "warning   {warning}")?;
    }
    if delivery == Delivery::ExactlyOnce {
        // Trying it would fence a running daemon of the same name.
        writeln!(
            out,
            "not tried the permission to write as transactional id {}",
            client::transactional_id(stream)
        )?;
    }
    Ok(())
}
