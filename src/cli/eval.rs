//! `moderatord eval`: an adapter against labelled rows.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;

use super::{Exit, Faults, SettingsArgs, feedback};
use crate::config::{Config, ModelConfig};
use crate::decide::Calibration;
use crate::registry::Registry;
use crate::retrain::dataset::LabelledRow;
use crate::retrain::evaluation::{Bootstrap, Evaluation, EvaluationConfig, evaluate};
use crate::retrain::measure;
use crate::serving::{self, Loaded, Source};
use crate::telemetry;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    settings: SettingsArgs,
    /// Labelled JSON objects, one a line
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// A version of the registry, or the beginning of one, or `base`; without it, what is in service
    #[arg(long = "version", value_name = "V")]
    which: Option<String>,
    /// Probability from which on a row counts as called hateful
    #[arg(long, value_name = "P", default_value_t = 0.5)]
    threshold: f64,
    /// Print the evaluation as one JSON object
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Figures are defined as in scikit-learn, with 95 % bootstrap intervals.

Examples:
  moderatord eval --config moderatord.toml --input test.jsonl
  moderatord eval --config moderatord.toml --input test.jsonl --version base --json";

pub(super) fn run(args: &EvalArgs, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<Exit> {
    let config = Config::load(&args.settings.sources()).map_err(Faults::from)?;
    telemetry::start_for_command(&config.log);
    let gathered = feedback::read(&args.input, config.retrain.max_bytes)?;
    for line in &gathered.refused.listed {
        writeln!(err, "{line}")?;
    }
    if gathered.rows.is_empty() {
        bail!("`{}` has no labelled rows", args.input.display());
    }
    let rows: Vec<LabelledRow> = gathered
        .rows
        .into_iter()
        .map(|feedback| LabelledRow {
            weight: feedback.weight,
            feedback,
        })
        .collect();
    let Loaded {
        mut classifier,
        calibration,
        ..
    } = load(args.which.as_deref(), &config)?;
    let prompts = measure::prompts(&classifier.prompter(), &rows)?;
    let margins = measure::margins(&mut classifier, &prompts).context("cannot score the rows")?;
    let evaluation = evaluate(
        &measure::scored_rows(&rows, &margins, calibration),
        EvaluationConfig {
            threshold: args.threshold,
            bootstrap: Bootstrap {
                resamples: 1000,
                seed: config.retrain.seed,
            },
        },
    )?;
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&evaluation)?)?;
    } else {
        let adapter = &classifier.identity().adapter;
        writeln!(out, "adapter   {adapter}, calibration {}", name(calibration))?;
        print(&evaluation, out)?;
    }
    Ok(if gathered.refused.listed.is_empty() {
        Exit::Success
    } else {
        Exit::Failure
    })
}

fn name(calibration: Calibration) -> String {
    calibration.name().into_owned()
}

/// What is in service, or the version asked for.
fn load(which: Option<&str>, config: &Config) -> anyhow::Result<Loaded> {
    let source = Source {
        model: config.model.clone(),
        prompt: config.prompt.clone(),
    };
    let bare = || {
        let model = ModelConfig {
            adapter: None,
            ..config.model.clone()
        };
        Source {
            model,
            ..source.clone()
        }
    };
    let Some(url) = config.registry.url.as_deref() else {
        return match which {
            None => Ok(source.load_version(None, None)?),
            Some("base") => Ok(bare().load_version(None, None)?),
            Some(version) => bail!("--version {version} needs a registry, but registry.url is not set"),
        };
    };
    let registry = Registry::open(url)?;
    serving::runtime()?.block_on(async {
        let version = match which {
            None => match registry.current().await? {
                Some(pointer) => registry.read_current(&pointer).await?,
                None => None,
            },
            Some("base") => None,
            Some(prefix) => Some(registry.read(&registry.find(prefix).await?).await?),
        };
        Ok(source.load_version(Some(&registry), version.as_ref())?)
    })
}

fn print(evaluation: &Evaluation, out: &mut dyn Write) -> std::io::Result<()> {
    let Evaluation {
        rows,
        hateful,
        figures,
        confusion,
        communities,
        ..
    } = evaluation;
    writeln!(out, "rows      {rows}, {hateful} of them hateful")?;
    for (name, estimate) in figures.iter() {
        let value = estimate
            .value
            .map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
        let interval = estimate
            .interval
            .map_or_else(String::new, |[low, high]| format!("  ({low:.4} to {high:.4})"));
        writeln!(out, "{name:<10}{value}{interval}")?;
    }
    writeln!(out, "confusion {confusion:?}")?;
    for community in communities {
        writeln!(out, "community {community:?}")?;
    }
    Ok(())
}
