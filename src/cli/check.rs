//! `moderatord check`: everything that can be wrong before the first comment, at once.

use std::io::Write;

use anyhow::{Context, bail};
use clap::Args;

use super::{Exit, Faults, SettingsArgs};
use crate::config::{Config, Draft};
use crate::decide::Policy;
use crate::model::{Classifier, oracle};
use crate::score::Scorer;
use crate::telemetry;

/// Harmless texts of different lengths: their scores mean nothing, that they are numbers does.
const SAMPLES: [&str; 3] = [
    "See you at the garden.",
    "Thanks, that was helpful!",
    "I planted two rows of beans on Sunday, and by the end of the week the first leaves had come up already.",
];

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
it found. Every fault is reported, not just the first. What the stream needs (brokers, topics) is
looked at once any of it is set.

Exit codes: 0 nothing is wrong, 78 something is, 1 --oracle differs or cannot compare.";

pub(super) fn run(args: &CheckArgs, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let draft = Draft::read(&args.settings.sources());
    let (model, prompt) = (draft.model.clone(), draft.prompt.clone());
    let config = draft.finish();
    if let Ok(config) = &config {
        telemetry::start_for_command(&config.log);
    }
    // The model is looked at whatever else is wrong, as far as the settings name one.
    let classifier = match (model, prompt) {
        (Some(model), Some(prompt)) => Some(Classifier::load(&model, &prompt)),
        _ => None,
    };
    let mut faults = Faults::default();
    if let Err(error) = &config {
        faults.add(&error.faults);
    }
    if let Ok(config) = &config
        && is_streaming(config)
        && let Err(error) = config.require_stream()
    {
        faults.add(&error.faults);
    }
    if let Some(Err(error)) = &classifier {
        faults.add(&error.problems);
    }
    let (Ok(config), Some(Ok(mut classifier)), true) = (config, classifier, faults.is_empty()) else {
        bail!(faults);
    };
    let margins = sample_margins(&mut classifier)?;
    summary(&config, &classifier, &margins, out)?;
    if args.oracle {
        let report = oracle::compare(&config.model, &config.prompt, &SAMPLES)?;
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

/// Whoever has set any of these means to stream, and wants to know what is still missing.
fn is_streaming(config: &Config) -> bool {
    let topics = [
        &config.topics.comments,
        &config.topics.decisions,
        &config.topics.dead_letters,
    ];
    !config.kafka.brokers.is_empty() || topics.iter().any(|topic| topic.is_some())
}

fn sample_margins(classifier: &mut Classifier) -> anyhow::Result<Vec<f32>> {
    let prompter = classifier.prompter();
    let mut rows = Vec::new();
    for text in SAMPLES {
        rows.extend(prompter.encode(text).context("cannot prompt a sample")?.rows);
    }
    classifier.score(&rows).context("cannot score the samples")
}

fn summary(config: &Config, classifier: &Classifier, margins: &[f32], out: &mut dyn Write) -> std::io::Result<()> {
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
    if !is_streaming(config) {
        writeln!(out, "kafka     not set")?;
    }
    Ok(())
}
