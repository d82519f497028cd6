//! `moderatord eval`: an adapter against labelled rows.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, bail};
use clap::Args;

use super::{Exit, SettingsArgs, feedback};
use crate::config::{Config, ModelConfig};
use crate::decide::Calibration;
use crate::ops::log;
use crate::registry::Registry;
use crate::retrain::data::dataset::LabelledRow;
use crate::retrain::judge::evaluation::{Bootstrap, Curves, Evaluation, EvaluationConfig, evaluate};
use crate::retrain::judge::measure;
use crate::retrain::report::{Fact, Report, ReportSide, render};
use crate::serving;
use crate::serving::{Loaded, ModelSource};

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct EvalArgs {
    /// Settings file, in TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of the checkpoint, instead of the setting `model.path`
    #[arg(long, value_name = "FOLDER")]
    model: Option<String>,
    /// Labelled JSON objects, one a line
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// A version of the registry or the beginning of one, the folder of an adapter, or `base`; without
    /// it, what is in service
    #[arg(long, value_name = "V")]
    adapter: Option<String>,
    /// Write a page that compares it with what is in service, or with the bare base
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
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
  moderatord eval --config moderatord.toml --input test.jsonl --adapter base --json
  moderatord eval --config moderatord.toml --input test.jsonl --adapter 3f0c2a9d --report report.html";

pub(super) fn run(args: &EvalArgs, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<Exit> {
    let settings = SettingsArgs {
        config: args.config.clone(),
        model: args.model.clone(),
        adapter: None,
    };
    let config = Config::load(&settings.sources())?;
    log::start_for_command(&config.log);
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
    let how = EvaluationConfig {
        threshold: args.threshold,
        bootstrap: Bootstrap {
            resamples: 1000,
            seed: config.retrain.seed,
        },
    };
    let measured = measure(load(args.adapter.as_deref(), &config)?, &rows, how)?;
    if let Some(path) = &args.report {
        let mut champion = measure(load(None, &config)?, &rows, how)?;
        if champion.name == measured.name {
            // What is in service beside itself would say nothing.
            champion = measure(load(Some("base"), &config)?, &rows, how)?;
        }
        let page = page(&champion, &measured, args)?;
        std::fs::write(path, page).with_context(|| format!("cannot write `{}`", path.display()))?;
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&measured.evaluation)?)?;
    } else {
        writeln!(
            out,
            "adapter   {}, calibration {}",
            measured.name,
            measured.calibration.name()
        )?;
        print(&measured.evaluation, out)?;
    }
    Ok(if gathered.refused.listed.is_empty() {
        Exit::Success
    } else {
        Exit::Failure
    })
}

/// One adapter on the rows.
struct MeasuredRows {
    name: String,
    calibration: Calibration,
    evaluation: Evaluation,
    curves: Curves,
}

fn measure(loaded: Loaded, rows: &[LabelledRow], how: EvaluationConfig) -> anyhow::Result<MeasuredRows> {
    let Loaded {
        mut classifier,
        calibration,
        ..
    } = loaded;
    let prompts = measure::prompts(&classifier.prompter(), rows)?;
    let margins = measure::margins(&mut classifier, &prompts).context("cannot score the rows")?;
    let scored = measure::scored_rows(rows, &margins, calibration);
    let identity = classifier.identity();
    Ok(MeasuredRows {
        name: identity
            .adapter_version
            .clone()
            .unwrap_or_else(|| identity.adapter.clone()),
        calibration,
        evaluation: evaluate(&scored, how)?,
        curves: Curves::new(&scored)?,
    })
}

fn page(champion: &MeasuredRows, challenger: &MeasuredRows, args: &EvalArgs) -> anyhow::Result<String> {
    fn side(measured: &MeasuredRows) -> ReportSide<'_> {
        ReportSide {
            name: &measured.name,
            evaluation: &measured.evaluation,
            curves: &measured.curves,
        }
    }
    let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let report = Report {
        created_at: &now,
        champion: side(champion),
        challenger: side(challenger),
        judgement: None,
        data: vec![Fact::new("file", args.input.display())],
        hyperparameters: Vec::new(),
        identities: vec![
            Fact::new("champion's calibration", champion.calibration.name()),
            Fact::new("challenger's calibration", challenger.calibration.name()),
        ],
    };
    Ok(render(&report)?)
}

/// What is in service, or the adapter asked for.
fn load(which: Option<&str>, config: &Config) -> anyhow::Result<Loaded> {
    let with = |adapter: Option<PathBuf>| ModelSource {
        model: ModelConfig {
            adapter,
            ..config.model.clone()
        },
        prompt: config.prompt.clone(),
    };
    match which {
        Some("base") => return Ok(with(None).load_version(None, None)?),
        Some(folder) if Path::new(folder).is_dir() => {
            return Ok(with(Some(PathBuf::from(folder))).load_version(None, None)?);
        }
        _ => {}
    }
    let source = with(config.model.adapter.clone());
    let registry = config.registry.url.as_deref().map(Registry::open).transpose()?;
    let Some(registry) = registry else {
        return match which {
            None => Ok(source.load_version(None, None)?),
            Some(version) => {
                bail!("`{version}` is no folder, and there is no registry (registry.url) to look it up in")
            }
        };
    };
    serving::runtime()?.block_on(async {
        let version = match which {
            None => match registry.current().await? {
                Some(pointer) => registry.read_current(&pointer).await?,
                None => None,
            },
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
    writeln!(
        out,
        "hateful   {} called so, {} missed; not hateful {} called so, {} let be",
        confusion.true_positives, confusion.false_negatives, confusion.false_positives, confusion.true_negatives
    )?;
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    for one in communities {
        writeln!(
            out,
            "community {}: {} rows, {} hateful, false positive rate {}, F1 {}",
            one.community.as_deref().unwrap_or("(none)"),
            one.rows,
            one.hateful,
            number(one.false_positive_rate),
            number(one.f1)
        )?;
    }
    Ok(())
}
