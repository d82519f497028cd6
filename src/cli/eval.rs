//! `moderatord eval`: evaluates an adapter on labelled comments.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, bail};
use clap::Args;
use tracing::error;

use super::{Exit, SettingsArgs, feedback};
use crate::config::{Config, ModelConfig};
use crate::decide::Calibration;
use crate::plural::Count;
use crate::registry::Registry;
use crate::retrain::data::dataset::LabelledRow;
use crate::retrain::judge::evaluation::{Bootstrap, Curves, Evaluation, EvaluationConfig, evaluate};
use crate::retrain::judge::measure;
use crate::retrain::report::{Fact, Report, ReportSide, render};
use crate::serving;
use crate::serving::tracked::{PointerToServe, TrackedRegistry};
use crate::serving::{LoadedModel, ModelSource};

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct EvalArgs {
    /// Settings file in TOML format
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Checkpoint folder; overrides `model.path`
    #[arg(long, value_name = "FOLDER")]
    model: Option<String>,
    /// File of labelled comments: one JSON object per line, or CSV with the columns `text` and `label`; may be gzipped
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Registry version or a unique prefix of it, adapter folder, or `base` for the bare base model
    /// [default: the version in service]
    #[arg(long, value_name = "V")]
    adapter: Option<String>,
    /// Write an HTML report that compares the adapter with the one in service, or with the bare base model
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Probability at or above which a comment counts as hateful
    #[arg(long, value_name = "P", default_value_t = 0.5)]
    threshold: f64,
    /// Print the evaluation as a single JSON object
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
All metrics are defined as in scikit-learn and have 95 % bootstrap confidence intervals.

Examples:
  moderatord eval --config moderatord.toml --input test.jsonl
  moderatord eval --config moderatord.toml --input test.jsonl --adapter base --json
  moderatord eval --config moderatord.toml --input test.jsonl --adapter 3f0c --report report.html";

pub(super) fn run(args: &EvalArgs, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<Exit> {
    let settings = SettingsArgs {
        config: args.config.clone(),
        model: args.model.clone(),
        adapter: None,
    };
    let config = settings.load()?;
    let file = feedback::read(&args.input, config.retrain.max_bytes)?;
    if let Some(note) = &file.note {
        writeln!(err, "{note}")?;
    }
    let gathered = &file.gathered;
    for line in &gathered.refused.listed {
        writeln!(err, "{line}")?;
    }
    if let Some(note) = gathered.repairs() {
        writeln!(err, "{note}")?;
    }
    file.require_readable()?;
    if gathered.rows.is_empty() {
        bail!("`{}` has no labelled comments", args.input.display());
    }
    let has_refused = !gathered.refused.listed.is_empty();
    let rows: Vec<LabelledRow> = file
        .gathered
        .rows
        .into_iter()
        .map(|feedback| LabelledRow {
            weight: feedback.weight,
            feedback,
        })
        .collect();
    let evaluation = EvaluationConfig {
        threshold: args.threshold,
        bootstrap: Bootstrap {
            resamples: 1000,
            seed: config.retrain.seed,
        },
    };
    let measured = measure(load(args.adapter.as_deref(), &config)?, &rows, evaluation)?;
    if let Some(path) = &args.report {
        let mut champion = measure(load(None, &config)?, &rows, evaluation)?;
        if champion.name == measured.name {
            // A comparison of the version in service with itself would be useless.
            champion = measure(load(Some("base"), &config)?, &rows, evaluation)?;
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
    Ok(if has_refused { Exit::Failure } else { Exit::Success })
}

/// The evaluation of one adapter.
struct EvaluatedAdapter {
    name: String,
    calibration: Calibration,
    evaluation: Evaluation,
    curves: Curves,
}

fn measure(loaded: LoadedModel, rows: &[LabelledRow], config: EvaluationConfig) -> anyhow::Result<EvaluatedAdapter> {
    let LoadedModel {
        mut classifier,
        calibration,
        ..
    } = loaded;
    let prompts = measure::prompts(&classifier.prompter(), rows)?;
    let margins = measure::margins(&mut classifier, &prompts).context("cannot score the comments")?;
    let scored = measure::scored_rows(rows, &margins, calibration);
    let identity = classifier.identity();
    Ok(EvaluatedAdapter {
        name: identity
            .adapter_version
            .clone()
            .unwrap_or_else(|| identity.adapter.clone()),
        calibration,
        evaluation: evaluate(&scored, config)?,
        curves: Curves::new(&scored)?,
    })
}

fn page(champion: &EvaluatedAdapter, challenger: &EvaluatedAdapter, args: &EvalArgs) -> anyhow::Result<String> {
    fn side(measured: &EvaluatedAdapter) -> ReportSide<'_> {
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

/// Loads the given version, folder or `base`, or the version in service if none is given.
fn load(adapter: Option<&str>, config: &Config) -> anyhow::Result<LoadedModel> {
    let source_with = |adapter: Option<PathBuf>| {
        let model = ModelConfig {
            adapter,
            ..config.model.clone()
        };
        ModelSource::new(model, config.prompt.clone())
    };
    match adapter {
        Some("base") => return Ok(source_with(None).load_version(None, None)?),
        Some(folder) if Path::new(folder).is_dir() => {
            return Ok(source_with(Some(PathBuf::from(folder))).load_version(None, None)?);
        }
        _ => {}
    }
    let source = source_with(config.model.adapter.clone());
    let Some(url) = config.registry.url.as_deref() else {
        return match adapter {
            None => Ok(source.load_version(None, None)?),
            Some(version) => {
                bail!("`{version}` is not a folder, and registry.url is not set, so it cannot be a version either")
            }
        };
    };
    serving::runtime()?.block_on(async {
        let Some(prefix) = adapter else {
            let mut registry = TrackedRegistry::recall(url, config.registry.state.as_deref())?;
            let PointerToServe { pointer, lost } = registry.pointer_to_serve(config.registry.on_missing).await?;
            if let Some(lost) = lost {
                error!(error = %lost, "the registry has lost the version in service");
            }
            return Ok(source.load(registry.registry(), pointer.as_ref()).await?);
        };
        let registry = Registry::open(url)?;
        let version = registry.read(&registry.find(prefix).await?).await?;
        Ok(source.load_version(Some(&registry), Some(&version))?)
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
    writeln!(out, "rows      {rows}, {hateful} hateful")?;
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
        "confusion {} true positives, {} false negatives, {} false positives, {} true negatives",
        confusion.true_positives, confusion.false_negatives, confusion.false_positives, confusion.true_negatives
    )?;
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    for one in communities {
        writeln!(
            out,
            "community {}: {}, {} hateful, false positive rate {}, F1 {}",
            one.community.as_deref().unwrap_or("(none)"),
            Count(one.rows, "row"),
            one.hateful,
            number(one.false_positive_rate),
            number(one.f1)
        )?;
    }
    Ok(())
}
