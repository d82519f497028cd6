//! `moderatord check`: reports everything that would keep the daemon from starting.

use std::io::Write;

use anyhow::{Context, bail};
use clap::Args;

use super::checked;
use super::checked::{CheckHooks, Checked, CheckedModel, Streaming};
use super::named::Named;
use super::{Exit, SettingsArgs};
use crate::classifier::canary;
use crate::classifier::tolerance::ORACLE_F32;
use crate::classifier::{Classifier, oracle};
use crate::config::{Config, Delivery, InputConfig, NotInScope, PromptConfig, StreamConfig};
use crate::decide::Policy;
use crate::kafka::client;
use crate::kafka::topics::TopicFacts;
use crate::ops::log;
use crate::ops::notify::Notifier;
use crate::plural::Count;
use crate::scorer::Scorer;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Compare the base model's logits on sample texts with those of candle-transformers
    #[arg(long)]
    oracle: bool,
    /// Print the prompt around a text, exactly as it is tokenised, and its token ids
    #[arg(long)]
    show_prompt: bool,
    /// Text for --show-prompt
    #[arg(long, value_name = "TEXT", requires = "show_prompt", default_value = canary::TEXTS[0])]
    text: String,
}

const AFTER_HELP: &str = "\
Loads the settings, the checkpoint, the adapter and the prompt, scores sample texts, and prints a
summary. All problems are reported, not only the first. If brokers or topics are set, this command
also checks that the brokers answer, that the topics exist, and that moderatord may read or write
them. It writes nothing and creates nothing.

Exit codes:
  0   no problems
  1   no broker answers, or --oracle finds a difference or cannot compare
  78  problems were found";

pub(super) fn run(args: &CheckArgs, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Checked {
        config,
        named,
        credentials: _,
        mut model,
        stream,
    } = checked::check(
        &args.settings,
        Streaming::IfSet,
        |_| Ok(()),
        &CheckHooks {
            start_log: log::start_for_command,
            notifier: &Notifier::default(),
            tries_again: &|_| false,
        },
    )?;
    let margins = sample_margins(&mut model.loaded.classifier)?;
    for Named { reference, commit } in &named {
        writeln!(out, "source    {reference}, commit {commit}")?;
    }
    summary(&config, &model, &margins, out)?;
    stream_summary(stream.as_ref(), &config.input, out)?;
    if args.show_prompt {
        show_prompt(&model.loaded.classifier, &config.prompt, &args.text, out)?;
    }
    if args.oracle {
        let report = oracle::compare(&config.model, &config.prompt, &canary::TEXTS)?;
        let (difference, texts) = (report.max_difference, report.texts);
        // A comparison with NaN is false, so a difference of NaN fails too.
        let agrees = difference <= ORACLE_F32;
        writeln!(
            out,
            "oracle    {texts} texts, largest difference between logits {difference:.1e}, expected at most \
             {ORACLE_F32:.0e}"
        )?;
        if !agrees {
            bail!("the logits of the base model differ from those of candle-transformers by {difference}");
        }
    }
    Ok(Exit::Success)
}

fn sample_margins(classifier: &mut Classifier) -> anyhow::Result<Vec<f32>> {
    let rows = canary::rows(&classifier.prompter()).context("cannot encode the sample texts")?;
    classifier.score(&rows).context("cannot score the sample texts")
}

fn summary(config: &Config, model: &CheckedModel, margins: &[f32], out: &mut dyn Write) -> std::io::Result<()> {
    let classifier = &model.loaded.classifier;
    let identity = classifier.identity();
    let policy = Policy::new(&config.policy, classifier.defaults());
    let thresholds = policy.thresholds(None);
    let communities = match config.policy.communities.len() {
        0 => String::new(),
        1 => ", 1 community with its own thresholds".to_owned(),
        count => format!(", {count} communities with their own thresholds"),
    };
    let margins: Vec<String> = margins.iter().map(|margin| format!("{margin:.3}")).collect();
    let hateful = &config.prompt.hateful_label;
    writeln!(out, "model     {}", classifier.description())?;
    for note in classifier.notes() {
        writeln!(out, "note      {note}")?;
    }
    writeln!(out, "base      {}", identity.base)?;
    writeln!(out, "adapter   {}", identity.adapter)?;
    if let Some(registry) = &model.registry {
        let version = identity.adapter_version.as_deref().unwrap_or("none");
        let pointer = model.pointer_sequence();
        writeln!(
            out,
            "registry  {}, pointer {pointer}, version {version}",
            registry.location()
        )?;
    }
    if let Some(lost) = &model.lost {
        writeln!(out, "warning   {lost}")?;
    }
    writeln!(out, "prompt    {}", identity.prompt)?;
    let labels = match classifier.head() {
        Some(head) => format!("head      {head}, text without a frame"),
        None => format!(
            "labels    {}, hateful label {hateful}",
            config.prompt.labels.join(" and ")
        ),
    };
    writeln!(out, "{labels}, normaliser {}", identity.normalizer)?;
    writeln!(
        out,
        "policy    review from {}, block from {}{communities}; {}",
        thresholds.review,
        thresholds.block,
        policy.content_hash()
    )?;
    if let Some(scope) = &classifier.defaults().scope {
        let others = match config.policy.not_in_scope {
            NotInScope::Review => "reviewed",
            NotInScope::Decide => "decided like all others",
        };
        writeln!(
            out,
            "languages {}; comments in others are {others}",
            scope.codes().join(", ")
        )?;
    }
    writeln!(out, "samples   margins {}", margins.join(", "))?;
    Ok(())
}

/// Prints each prompt that a text becomes, as a JSON string, so that white space is seen, with the ids that are scored.
fn show_prompt(classifier: &Classifier, config: &PromptConfig, text: &str, out: &mut dyn Write) -> anyhow::Result<()> {
    let prompter = classifier.prompter();
    for (string, row) in prompter.prompts(text).context("cannot encode the text")? {
        writeln!(out, "string    {}", serde_json::to_string(&string)?)?;
        writeln!(out, "ids       {:?}", row.tokens)?;
    }
    // A classification head has outputs instead of tokens for its labels.
    if classifier.head().is_some() {
        return Ok(());
    }
    let [hateful, other] = prompter.label_ids();
    let other_label = config.labels.iter().find(|label| **label != config.hateful_label);
    writeln!(
        out,
        "answers   {} {hateful} (hateful), {} {other}",
        config.hateful_label,
        other_label.map_or("", String::as_str)
    )?;
    Ok(())
}

fn stream_summary(
    stream: Option<&(StreamConfig, TopicFacts)>,
    input: &InputConfig,
    out: &mut dyn Write,
) -> std::io::Result<()> {
    let Some((stream, facts)) = stream else {
        return writeln!(out, "kafka     not set");
    };
    let (topics, delivery) = (&stream.topics, stream.delivery);
    writeln!(
        out,
        "kafka     {}, group {}, instance {}, {}",
        stream.brokers.join(", "),
        stream.group,
        stream.instance,
        delivery.as_str().replace('_', " "),
    )?;
    writeln!(
        out,
        "topics    {} ({}) to {} ({}) and {} ({})",
        topics.comments,
        Count(usize::try_from(facts.comments).unwrap_or(0), "partition"),
        topics.decisions,
        facts.decisions,
        topics.dead_letters,
        facts.dead_letters
    )?;
    for warning in facts.warnings(input.max_bytes) {
        writeln!(out, "warning   {warning}")?;
    }
    if delivery == Delivery::ExactlyOnce {
        // Testing this permission would fence a running daemon with the same transactional id.
        writeln!(
            out,
            "untested  permission to write with transactional id {}",
            client::transactional_id(stream)
        )?;
    }
    Ok(())
}
