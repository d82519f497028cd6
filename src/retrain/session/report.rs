//! Fills in the report of a retraining from the results of its steps.

use super::judge::Judged;
use super::measurement::MeasuredAdapter;
use crate::registry::VersionFacts;
use crate::retrain::report::{Fact, Judgement, Report, ReportSide, render};
use crate::retrain::train::trainer::TrainerConfig;

/// The results that the report shows.
pub(super) struct ReportInputs<'a> {
    pub(super) facts: &'a VersionFacts,
    /// Content hash of the challenger's adapter. It is used instead of the version, which is the hash of a manifest
    /// that covers the report.
    pub(super) adapter: &'a str,
    pub(super) champion_name: &'a str,
    pub(super) champion: &'a MeasuredAdapter,
    pub(super) judged: &'a Judged,
    pub(super) config: &'a TrainerConfig,
}

impl ReportInputs<'_> {
    pub(super) fn render(&self) -> anyhow::Result<String> {
        let report = Report {
            created_at: &self.facts.created_at,
            champion: side(self.champion_name, self.champion),
            challenger: side(self.adapter, &self.judged.challenger),
            judgement: Some(Judgement {
                verdict: &self.judged.verdict,
                calibration: &self.judged.calibration,
                thresholds: &self.judged.thresholds,
            }),
            data: self.data(),
            hyperparameters: hyperparameters(self.config)
                .into_iter()
                .map(|(name, value)| Fact::new(name.replace('_', " "), value))
                .collect(),
            identities: vec![
                Fact::new("Base model", &self.facts.base),
                Fact::new("Adapter", self.adapter),
                // The version is a hash of the manifest, which covers this report.
                Fact::new("Version", "named beside the adapter by `moderatord adapters list`"),
                Fact::new("Prompt", &self.facts.prompt),
                Fact::new("Normaliser", &self.facts.normalizer),
                Fact::new("Calibration", self.facts.calibration.name()),
            ],
        };
        Ok(render(&report)?)
    }

    /// Returns the numbers of the manifest about the feedback, and its counts of rows that were left out.
    fn data(&self) -> Vec<Fact> {
        let data = self.facts.data.as_object().into_iter().flatten();
        let data = data.filter(|(_, value)| !value.is_object());
        let counts = self.facts.data["counts"].as_object().into_iter().flatten();
        data.chain(counts)
            .map(|(key, value)| {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                Fact::new(in_words(key), value)
            })
            .collect()
    }
}

/// Describes a key of the manifest's `data` for readers.
fn in_words(key: &str) -> String {
    match key {
        "hash" => "Content hash of the labelled rows",
        "records" => "Records or lines read",
        "refused" => "Records that could not be used",
        "superseded" => "Labels replaced by a later label",
        "forgotten" => "Labels removed by a deletion record",
        "repaired" => "Records with half of a surrogate pair in the text, read as U+FFFD",
        "train" => "Rows in the training part",
        "validation" => "Rows in the validation part",
        "test" => "Rows in the test part",
        "judged" => "Rows that judged, in all folds",
        "near_champion_not_judged" => "Not judging: near-duplicate of a training row of the champion",
        "near_judged" => "Not judging: near-duplicate of another row that judges",
        "rows" => "Labelled content ids",
        "repeated" => "Left out: same text as another row",
        "contradicting" => "Left out: same text, opposite labels",
        "near_held_out" => "Left out of training: near-duplicate of a held-out row",
        "near_champion" => "Left out of the test part: near-duplicate of a training row of the champion",
        "user_held_out" => "Left out: user reports that fell into a held-out part",
        _ => return key.replace('_', " "),
    }
    .to_owned()
}

fn side<'a>(name: &'a str, measured: &'a MeasuredAdapter) -> ReportSide<'a> {
    ReportSide {
        name,
        evaluation: &measured.evaluation,
        curves: &measured.curves,
    }
}

/// Returns the hyperparameters by the names of their settings.
pub(super) fn hyperparameters(config: &TrainerConfig) -> Vec<(String, String)> {
    let targets: Vec<&str> = config.targets.iter().map(|target| target.name()).collect();
    [
        ("loss", format!("{:?}", config.loss).to_lowercase()),
        ("targets", targets.join(", ")),
        ("rank", config.rank.to_string()),
        ("alpha", config.alpha.to_string()),
        ("rslora", config.use_rslora.to_string()),
        ("learning_rate", config.learning_rate.to_string()),
        ("warmup", config.warmup.to_string()),
        ("epochs", config.epochs.to_string()),
        ("batch", config.batch_rows.to_string()),
        ("max_gradient_norm", config.max_gradient_norm.to_string()),
        ("patience", config.patience.to_string()),
        ("seed", config.seed.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}
