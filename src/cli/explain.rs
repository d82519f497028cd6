//! `moderatord explain`: a decision scored again from what it names, and whether it comes out the same.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use sha2::{Digest, Sha256};

use super::{Exit, SettingsArgs};
use crate::config::{Config, ModelConfig, PromptConfig, Quantize};
use crate::hash::hex;
use crate::kafka::snapshot;
use crate::message::{Decision, ModelIdentity, Scoring};
use crate::model::files::checkpoint::Checkpoint;
use crate::ops::log;
use crate::prompt::NORMALIZER_VERSION;
use crate::registry::{AdapterVersion, RecordKind, Registry};
use crate::retrain::judge::measure;
use crate::serving;
use crate::serving::{Loaded, ModelSource};
use crate::stream::decode::decode;

/// Two computations of one margin in f32: other processors round otherwise.
const TOLERANCE: f32 = 1e-3;

/// The same in bf16, whose rounding depends on how a device orders its sums: about 2e-2 in probability.
const BF16_TOLERANCE: f32 = 0.1;

/// The same over weights of eight bits, whose error depends on the kernels of the device.
const QUANTIZED_TOLERANCE: f32 = 0.25;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// The decision, as JSON; `-` is stdin
    #[arg(long, value_name = "FILE")]
    decision: PathBuf,
    /// The comment's text; without it, the source offset is read again
    #[arg(long)]
    text: Option<String>,
}

const AFTER_HELP: &str = "\
Takes base, adapter, prompt, calibration and normaliser by the hashes that the decision names, scores the
text again and says whether the margin is the same, or which piece is missing.

Exit codes: 0 equal, 1 different or a piece is missing, 78 wrong settings.

Example:
  kcat -C -b kafka:9092 -t decisions -o 41 -c 1 | moderatord explain --config moderatord.toml --decision -";

pub(super) fn run(args: &ExplainArgs, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let config = Config::load(&args.settings.sources())?;
    log::start_for_command(&config.log);
    let decision = read(&args.decision)?;
    let Some(scoring) = &decision.scoring else {
        writeln!(out, "the content was deleted: nothing was scored")?;
        return Ok(Exit::Success);
    };
    let text = match &args.text {
        Some(text) => text.clone(),
        None => reread(&decision, &config)?,
    };
    let mut missing = Vec::new();
    let hash = hex(&Sha256::digest(text.as_bytes()));
    if hash != scoring.text_sha256 {
        missing.push(format!(
            "the text: it has sha256 {hash}, the decision's has {}",
            scoring.text_sha256
        ));
    }
    let found = find(&config, &scoring.model, &mut missing)?;
    let (Some((source, registry, version)), true) = (found, missing.is_empty()) else {
        writeln!(out, "cannot be scored again:")?;
        for piece in missing {
            writeln!(out, "  {piece}")?;
        }
        return Ok(Exit::Failure);
    };
    let Loaded {
        mut classifier,
        calibration,
        ..
    } = source.load_version(registry.as_ref(), version.as_ref())?;
    let prompt = classifier.prompter().encode(&text)?;
    let margins = measure::margins(&mut classifier, std::slice::from_ref(&prompt))?;
    let margin = margins[0] as f32;
    let now = classifier.identity();
    if (&now.device, &now.dtype) != (&scoring.model.device, &scoring.model.dtype) {
        writeln!(
            out,
            "computed     on {} in {} now, on {} in {} then",
            now.device, now.dtype, scoring.model.device, scoring.model.dtype
        )?;
    }
    let is_bf16 = [&now.dtype, &scoring.model.dtype]
        .into_iter()
        .any(|dtype| dtype == "bf16");
    let tolerance = match scoring.model.quantization.as_str() {
        "none" if is_bf16 => BF16_TOLERANCE,
        "none" => TOLERANCE,
        _ => QUANTIZED_TOLERANCE,
    };
    let difference = (margin - scoring.margin).abs();
    // Written so that a difference that is no number fails as well.
    let is_equal = difference <= tolerance;
    writeln!(out, "margin       {margin} now, {} then", scoring.margin)?;
    writeln!(
        out,
        "probability  {} now, {} then",
        calibration.probability(margin),
        scoring.probability
    )?;
    thresholds(scoring, out)?;
    let verdict = if is_equal { "equal" } else { "different" };
    writeln!(
        out,
        "{verdict}: the margins differ by {difference:.1e}, expected at most {tolerance:.0e}"
    )?;
    Ok(if is_equal { Exit::Success } else { Exit::Failure })
}

fn thresholds(scoring: &Scoring, out: &mut dyn Write) -> std::io::Result<()> {
    let bands = scoring.thresholds;
    writeln!(
        out,
        "thresholds   review from {}, block from {} ({})",
        bands.review, bands.block, scoring.policy
    )
}

fn read(path: &Path) -> anyhow::Result<Decision> {
    let mut json = String::new();
    if path == Path::new("-") {
        std::io::stdin()
            .read_to_string(&mut json)
            .context("cannot read stdin")?;
    } else {
        json = std::fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    }
    serde_json::from_str(&json).with_context(|| format!("`{}` is no decision", path.display()))
}

/// The text from the record that the decision is about.
fn reread(decision: &Decision, config: &Config) -> anyhow::Result<String> {
    let Some(source) = &decision.source else {
        bail!("the decision names no source; give the text with --text");
    };
    let stream = config.require_stream()?;
    let value = snapshot::record_at(&stream.brokers, &stream.properties, source)?;
    let comment = decode(&value, &config.input.fields, config.input.max_bytes)
        .with_context(|| format!("the record at offset {} is no comment", source.offset))?;
    Ok(comment.text)
}

type FoundText = (ModelSource, Option<Registry>, Option<AdapterVersion>);

/// Every piece by its hash; what cannot be found is named.
fn find(config: &Config, identity: &ModelIdentity, missing: &mut Vec<String>) -> anyhow::Result<Option<FoundText>> {
    let base = Checkpoint::of(&config.model)?.fingerprint();
    if base != identity.base {
        missing.push(format!("the base {}: model.path has {base}", identity.base));
    }
    let registry = config.registry.url.as_deref().map(Registry::open).transpose()?;
    let runtime = serving::runtime()?;
    let prompt = match runtime.block_on(prompt(config, identity, registry.as_ref()))? {
        Some(prompt) => prompt,
        None => {
            missing.push(format!("the prompt {}", identity.prompt));
            return Ok(None);
        }
    };
    if !["none", NORMALIZER_VERSION].contains(&identity.normalizer.as_str()) {
        missing.push(format!(
            "the normaliser {}: this build has {NORMALIZER_VERSION}",
            identity.normalizer
        ));
    }
    let mut version = None;
    if let Some(registry) = &registry
        && identity.adapter != "none"
    {
        let listing = runtime.block_on(registry.list())?;
        let named = listing
            .versions
            .iter()
            .find(|manifest| manifest.adapter == identity.adapter);
        match named {
            Some(manifest) => version = Some(runtime.block_on(registry.read(&manifest.version))?),
            None => missing.push(format!("the adapter {}", identity.adapter)),
        }
    }
    let quantize = if identity.quantization == "q8_0" {
        Quantize::Q8_0
    } else {
        Quantize::None
    };
    let source = ModelSource {
        model: ModelConfig {
            adapter: config.model.adapter.clone().filter(|_| identity.adapter != "none"),
            quantize,
            ..config.model.clone()
        },
        prompt: PromptConfig {
            normalize: identity.normalizer != "none",
            ..prompt
        },
    };
    Ok(Some((source, registry, version)))
}

/// The settings' frame where it is the one; else the registry's record of it.
async fn prompt(
    config: &Config,
    identity: &ModelIdentity,
    registry: Option<&Registry>,
) -> anyhow::Result<Option<PromptConfig>> {
    if config.prompt.content_hash() == identity.prompt {
        return Ok(Some(config.prompt.clone()));
    }
    let Some(registry) = registry else { return Ok(None) };
    let record = registry.record(RecordKind::Prompt, &identity.prompt).await?;
    record
        .map(|canonical| PromptConfig::from_canonical(&canonical).context("cannot read the prompt's record"))
        .transpose()
}
