//! The report of a retraining: what it found, laid out for people.

use super::{MeasuredAdapter, Session};
use crate::registry::VersionFacts;
use crate::retrain::judge::calibration::Fitted;
use crate::retrain::judge::gate::Verdict;
use crate::retrain::judge::thresholds::Bands;
use crate::retrain::report::{Fact, Judgement, Report, ReportSide, render};
use crate::retrain::train::trainer::TrainerConfig;

impl Session<'_> {
    #[expect(clippy::too_many_arguments, reason = "a page about all of them, called once")]
    pub(super) fn report(
        &self,
        facts: &VersionFacts,
        adapter: &str,
        champion_name: &str,
        champion: &MeasuredAdapter,
        challenger: &MeasuredAdapter,
        verdict: &Verdict,
        fitted: &Fitted,
        bands: &Bands,
    ) -> anyhow::Result<String> {
        let data = facts.data.as_object().into_iter().flatten();
        let data = data.filter(|(_, value)| !value.is_object()).map(|(name, value)| {
            Fact::new(
                name.clone(),
                value.as_str().map_or_else(|| value.to_string(), str::to_owned),
            )
        });
        let counts = facts.data["counts"].as_object().into_iter().flatten();
        let counts = counts.map(|(name, value)| Fact::new(name.replace('_', " "), value));
        let report = Report {
            created_at: &facts.created_at,
            champion: ReportSide {
                name: champion_name,
                evaluation: &champion.evaluation,
                curves: &champion.curves,
            },
            challenger: ReportSide {
                name: adapter,
                evaluation: &challenger.evaluation,
                curves: &challenger.curves,
            },
            judgement: Some(Judgement {
                verdict,
                calibration: fitted,
                bands,
            }),
            data: data.chain(counts).collect(),
            hyperparameters: hyperparameters(&self.trainer())
                .into_iter()
                .map(|(name, value)| Fact::new(name.replace('_', " "), value))
                .collect(),
            identities: vec![
                Fact::new("base", &facts.base),
                Fact::new("adapter", adapter),
                Fact::new("prompt", &facts.prompt),
                Fact::new("normaliser", &facts.normalizer),
                Fact::new("calibration", facts.calibration.name()),
            ],
        };
        Ok(render(&report)?)
    }
}

/// How an adapter was trained, by the names of the settings.
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
