//! Runs one retraining, from gathered feedback to a published version.
//!
//! [`Session::run`] lists the steps; each has its own file and takes the results of earlier ones. The challenger is
//! measured as it will be served: written to disk, read back and merged into the base model. A version is published
//! only when it is complete, and promoted only if the gate accepts it and the champion is still in service.

mod measurement;
mod champion;
mod split;
mod train;
mod cross_fit;
mod calibrate;
mod judge;
mod report;
mod publish;

use std::time::Duration;

use tracing::info;

use super::data::gather::GatheredFeedback;
use super::judge::gate::Verdict;
use super::judge::thresholds::ThresholdDerivation;
use super::train::trainer::TrainingProgress;
use crate::classifier::golden::GoldenText;
use crate::config::RetrainConfig;
use crate::message::Thresholds;
use crate::registry::{Manifest, Pointer, Registry};
use crate::serving::ModelSource;

pub(crate) use split::PartSizes;

use calibrate::CalibratedChallenger;
use champion::Champion;
use cross_fit::CrossFitPlan;
use judge::Judged;
use measurement::TestSettings;
use publish::{FinishedChallenger, promote};
use split::FeedbackSplit;
use train::Challenger;

/// Name of the file with the report, beside the other files of a version.
pub(crate) const REPORT_FILE: &str = "report.html";

/// The inputs of a retraining.
pub(crate) struct Session<'a> {
    /// The base model and the prompt that the adapter is trained for.
    pub(crate) source: ModelSource,
    pub(crate) config: &'a RetrainConfig,
    /// The thresholds that apply if none are derived.
    pub(crate) policy: Thresholds,
    pub(crate) registry: &'a Registry,
    /// The operator's golden texts, which every challenger must classify correctly.
    pub(crate) golden_texts: Vec<GoldenText>,
    /// The source of the feedback, for the manifest.
    pub(crate) origin: serde_json::Value,
    /// Called after every training step and every epoch.
    pub(crate) progress: &'a mut dyn FnMut(SessionProgress),
}

/// The progress of a retraining.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SessionProgress {
    /// Number of the adapter that is trained, from 1, which is the challenger.
    pub(crate) adapter: usize,
    /// Number of adapters that are trained in all.
    pub(crate) adapters: usize,
    pub(crate) training: TrainingProgress,
}

/// Which of the adapters is trained.
#[derive(Clone, Copy)]
struct ProgressOf {
    adapter: usize,
    adapters: usize,
}

impl ProgressOf {
    /// Returns a function that passes the progress of this adapter on.
    fn reporter(self, progress: &mut dyn FnMut(SessionProgress)) -> impl FnMut(TrainingProgress) {
        let Self { adapter, adapters } = self;
        move |training| {
            progress(SessionProgress {
                adapter,
                adapters,
                training,
            });
        }
    }
}

/// How a retraining ended.
pub(crate) enum RetrainOutcome {
    /// There was too little feedback to train an adapter, for the reason given.
    Skipped(String),
    /// A version was published.
    Published(Box<Published>),
}

/// A published version, and how it was made.
pub(crate) struct Published {
    pub(crate) manifest: Manifest,
    pub(crate) verdict: Verdict,
    /// The pointer that put the version into service, if it was promoted.
    pub(crate) pointer: Option<Pointer>,
    pub(crate) parts: PartSizes,
    /// Number of epochs run.
    pub(crate) epochs: usize,
    /// Own tokens trained on, over all epochs.
    pub(crate) tokens: usize,
    pub(crate) training_time: Duration,
    pub(crate) thresholds: ThresholdDerivation,
    /// If judging was cross-fitted: how many more adapters were trained for it, and how long that took.
    pub(crate) cross_fitted: Option<(usize, Duration)>,
}

impl Session<'_> {
    /// Trains an adapter, publishes it, and promotes it if the gate accepts it and `may_promote` is set.
    ///
    /// # Errors
    /// Returns an error if any step fails. The version in service is then unchanged.
    pub(crate) async fn run(self, gathered: GatheredFeedback, may_promote: bool) -> anyhow::Result<RetrainOutcome> {
        let Self {
            mut source,
            config,
            policy,
            registry,
            golden_texts,
            origin,
            progress,
        } = self;
        let settings = TestSettings::new(config, policy);

        let champion = Champion::read(registry, &source.model).await?;
        let split = FeedbackSplit::new(gathered, &champion, registry, config).await?;
        if let Some(reason) = split.shortage(config.min_rows) {
            return Ok(RetrainOutcome::Skipped(reason));
        }
        let PartSizes {
            train,
            validation,
            test,
        } = split.sizes();
        info!(train, validation, test, "split the labelled rows");

        let plan = CrossFitPlan::new(&split, config);
        let folds = plan.as_ref().map_or_else(Vec::new, CrossFitPlan::judging_rows);
        let adapters = 1 + plan.as_ref().map_or(0, CrossFitPlan::adapters);
        if adapters > 1 {
            info!(
                adapters,
                rows = test + folds.len(),
                "judging is cross-fitted, so several adapters are trained"
            );
        }

        // The champion is measured and released before training, so that two models are never in memory at once.
        let measured_champion = champion.measure(&mut source, registry, &split.dataset.test, &folds, &settings)?;
        let prompter = &measured_champion.prompter;
        let mut report = ProgressOf { adapter: 1, adapters }.reporter(progress);
        let challenger = Challenger::train(&source.model, prompter, &split.dataset, config, &mut report)?;
        drop(report);
        let cross_fitted = match &plan {
            Some(plan) => Some(plan.run(&mut source, prompter, config, progress)?),
            None => None,
        };
        let cross_fitted = cross_fitted.as_ref();
        let files = &challenger.files;
        let calibrated = CalibratedChallenger::new(files, &source, &measured_champion, &split, cross_fitted, config)?;
        let judged = Judged::new(
            calibrated,
            &measured_champion,
            &split,
            cross_fitted,
            golden_texts,
            &settings,
        )?;

        let finished = FinishedChallenger {
            champion: &champion,
            measured_champion: &measured_champion,
            split: &split,
            challenger,
            judged,
            cross_fit: plan.as_ref().zip(cross_fitted),
            origin,
        };
        let mut published = finished.publish(registry).await?;
        if may_promote && published.verdict.promote {
            published.pointer = Some(promote(registry, &published.manifest, &champion).await?);
        }
        Ok(RetrainOutcome::Published(Box::new(published)))
    }
}
