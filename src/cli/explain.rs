//! `moderatord explain`: scores the comment of a decision again with the same model, and compares the margins.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use sha2::{Digest, Sha256};

use super::{Exit, SettingsArgs};
use crate::classifier::defaults::ModelDefaults;
use crate::classifier::tolerance::{EXPLAIN_BF16, EXPLAIN_F32, EXPLAIN_QUANTISED};
use crate::config::{Config, ModelConfig, ModelWindows, PromptConfig, Quantize};
use crate::hash::hex;
use crate::kafka::snapshot;
use crate::message::{Competence, Decision, ModelIdentity, Scoring};
use crate::model::files::checkpoint::Checkpoint;
use crate::prompt::{NFC_VERSION, NORMALIZER_VERSION};
use crate::registry::{AdapterVersion, RecordKind, Registry};
use crate::retrain::judge::measure;
use crate::serving;
use crate::serving::{LoadedModel, ModelSource};
use crate::stream::decode::decode;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// File that contains the decision as JSON, or `-` for stdin
    #[arg(long, value_name = "FILE")]
    decision: PathBuf,
    /// Text of the comment [default: read again from the source topic of the decision]
    #[arg(long)]
    text: Option<String>,
}

const AFTER_HELP: &str = "\
Finds the base model, adapter, prompt, calibration and normaliser that the decision records, scores
the text again, and reports whether the margin is the same or which of these is missing.

Exit codes:
  0   the margin is the same
  1   the margin differs, or something is missing
  78  invalid settings

Example:
  kcat -C -b kafka:9092 -t decisions -o 41 -c 1 |
    moderatord explain --config moderatord.toml --decision -";

pub(super) fn run(args: &ExplainArgs, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let config = args.settings.load()?;
    let decision = read_decision(&args.decision)?;
    let Some(scoring) = &decision.scoring else {
        writeln!(out, "nothing was scored: the decision is about a deletion")?;
        return Ok(Exit::Success);
    };
    let text = match &args.text {
        Some(text) => text.clone(),
        None => read_source_text(&decision, &config)?,
    };
    let mut missing = Vec::new();
    let hash = hex(&Sha256::digest(text.as_bytes()));
    if hash != scoring.text_sha256 {
        missing.push(format!(
            "the text: it has sha256 {hash}, expected {}",
            scoring.text_sha256
        ));
    }
    let found = find_model(&config, &scoring.model, &mut missing)?;
    let (Some((source, registry, version)), true) = (found, missing.is_empty()) else {
        writeln!(out, "cannot score the comment again, because the following is missing:")?;
        for piece in missing {
            writeln!(out, "  {piece}")?;
        }
        return Ok(Exit::Failure);
    };
    let LoadedModel {
        mut classifier,
        calibration,
        ..
    } = source.load_version(registry.as_ref(), version.as_ref())?;
    let prompt = classifier.prompter().encode(&text)?;
    let margins = measure::margins(&mut classifier, std::slice::from_ref(&prompt))?;
    let competence = prompt.competence;
    let margin = margins[0] as f32;
    let now = classifier.identity();
    if (&now.device, &now.dtype) != (&scoring.model.device, &scoring.model.dtype) {
        writeln!(
            out,
            "device       {} with {} now, {} with {} in the decision",
            now.device, now.dtype, scoring.model.device, scoring.model.dtype
        )?;
    }
    if now.prompt != scoring.model.prompt {
        writeln!(
            out,
            "prompt       {} now, {} in the decision; only windows of very long texts differ",
            now.prompt, scoring.model.prompt
        )?;
    }
    let is_bf16 = [&now.dtype, &scoring.model.dtype]
        .into_iter()
        .any(|dtype| dtype == "bf16");
    let tolerance = match scoring.model.quantization.as_str() {
        "none" if is_bf16 => EXPLAIN_BF16,
        "none" => EXPLAIN_F32,
        _ => EXPLAIN_QUANTISED,
    };
    let difference = (margin - scoring.margin).abs();
    // A comparison with NaN is false, so a difference of NaN fails too.
    let is_equal = difference <= tolerance;
    // Decisions of a model without languages, and earlier ones, have no competence.
    let is_same_scope = scoring.competence.is_none() || scoring.competence == competence;
    writeln!(out, "margin       {margin} now, {} in the decision", scoring.margin)?;
    writeln!(
        out,
        "probability  {} now, {} in the decision",
        calibration.probability(margin),
        scoring.probability
    )?;
    if let Some(then) = scoring.competence {
        let now = competence.map_or("not known", Competence::as_str);
        writeln!(out, "competence   {now} now, {} in the decision", then.as_str())?;
    }
    print_thresholds(scoring, out)?;
    if !is_same_scope {
        writeln!(
            out,
            "different: the competence differs; the languages of the model are part of the policy's hash"
        )?;
    }
    let verdict = if is_equal { "equal" } else { "different" };
    writeln!(
        out,
        "{verdict}: the margins differ by {difference:.1e}, expected at most {tolerance:.0e}"
    )?;
    Ok(if is_equal && is_same_scope {
        Exit::Success
    } else {
        Exit::Failure
    })
}

fn print_thresholds(scoring: &Scoring, out: &mut dyn Write) -> std::io::Result<()> {
    let thresholds = scoring.thresholds;
    writeln!(
        out,
        "thresholds   review from {}, block from {} ({})",
        thresholds.review, thresholds.block, scoring.policy
    )
}

fn read_decision(path: &Path) -> anyhow::Result<Decision> {
    let mut json = String::new();
    if path == Path::new("-") {
        std::io::stdin()
            .read_to_string(&mut json)
            .context("cannot read stdin")?;
    } else {
        json = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    }
    serde_json::from_str(&json).with_context(|| format!("`{}` is not a decision", path.display()))
}

/// Reads the text from the record that the decision is about.
fn read_source_text(decision: &Decision, config: &Config) -> anyhow::Result<String> {
    let Some(source) = &decision.source else {
        bail!("the decision records no source; pass the text with --text");
    };
    let stream = config.require_stream()?;
    let value = snapshot::record_at(&stream.brokers, &stream.properties, source)?;
    // A decision with a score is not about a deletion, so no header is needed to find the text.
    let comment = decode(&value, &[], &config.input.fields, config.input.max_bytes)
        .with_context(|| format!("the record at offset {} is not a comment event", source.offset))?;
    Ok(comment.text)
}

type RecordedModel = (ModelSource, Option<Registry>, Option<AdapterVersion>);

/// Finds the model that the decision records. Adds to `missing` what cannot be found under its hash.
fn find_model(
    config: &Config,
    identity: &ModelIdentity,
    missing: &mut Vec<String>,
) -> anyhow::Result<Option<RecordedModel>> {
    let base = Checkpoint::from_settings(&config.model)?.fingerprint();
    let in_settings = config
        .prompt
        .with_windows_of(&ModelDefaults::of_model(&config.model)?.windows);
    if base != identity.base {
        missing.push(format!("the base model {}: model.path has {base}", identity.base));
    }
    let registry = config.registry.url.as_deref().map(Registry::open).transpose()?;
    let runtime = serving::runtime()?;
    let prompt = match runtime.block_on(prompt(in_settings, identity, registry.as_ref()))? {
        Some(prompt) => prompt,
        None => {
            missing.push(format!("the prompt {}", identity.prompt));
            return Ok(None);
        }
    };
    let Some(prompt) = prompt.with_text_rules(&identity.normalizer) else {
        missing.push(format!(
            "the normaliser {}: this build has {NORMALIZER_VERSION} and {NFC_VERSION}",
            identity.normalizer
        ));
        return Ok(None);
    };
    let mut version = None;
    if let Some(registry) = &registry
        && identity.adapter != "none"
    {
        let listing = runtime.block_on(registry.list())?;
        let published = listing
            .versions
            .iter()
            .find(|manifest| manifest.adapter == identity.adapter);
        match published {
            Some(manifest) => version = Some(runtime.block_on(registry.read(&manifest.version))?),
            None => missing.push(format!("the adapter {}", identity.adapter)),
        }
    }
    let quantize = match identity.quantization.as_str() {
        "none" => Quantize::None,
        "int8" => Quantize::Int8,
        "fp8" => Quantize::Fp8,
        other => {
            missing.push(format!("the quantisation {other}, which this build does not have"));
            return Ok(None);
        }
    };
    let model = ModelConfig {
        adapter: config.model.adapter.clone().filter(|_| identity.adapter != "none"),
        quantize,
        ..config.model.clone()
    };
    Ok(Some((ModelSource::new(model, prompt), registry, version)))
}

/// Returns the prompt with the recorded hash, from the settings or else from the registry.
async fn prompt(
    settings: PromptConfig,
    identity: &ModelIdentity,
    registry: Option<&Registry>,
) -> anyhow::Result<Option<PromptConfig>> {
    // Before the model had a moderatord.json, its windows were those of a model without one.
    let without_defaults = PromptConfig {
        windows: Some(ModelWindows::default()),
        ..settings.clone()
    };
    for settings in [settings, without_defaults] {
        let hashes = [
            settings.content_hash(),
            settings.earlier_hash(),
            settings.unframed_hash(),
        ];
        if hashes.contains(&identity.prompt) {
            return Ok(Some(settings));
        }
    }
    let Some(registry) = registry else { return Ok(None) };
    let record = registry.record(RecordKind::Prompt, &identity.prompt).await?;
    record
        .map(|canonical| PromptConfig::from_canonical(&canonical).context("cannot parse the record of the prompt"))
        .transpose()
}
