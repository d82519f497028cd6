//! Publishes the challenger as a version of the registry, with its manifest, files and report, and promotes it.

use std::collections::BTreeMap;
use std::time::SystemTime;

use anyhow::Context;
use serde_json::{Value, json};

use super::champion::{Champion, MeasuredChampion};
use super::cross_fit::{CrossFitPlan, CrossFitted};
use super::judge::Judged;
use super::report::{ReportInputs, hyperparameters};
use super::split::{FeedbackSplit, PartSizes};
use super::train::Challenger;
use super::{Published, REPORT_FILE};
use crate::classifier::golden::GOLDEN_FILE;
use crate::decide::Calibration;
use crate::registry::{ADAPTER_FILES, Manifest, Pointer, RecordKind, Registry, VersionDraft, VersionFacts};

/// Name of the file with the signatures of the training part. The next retraining uses them to keep near-duplicates of
/// these rows out of its test part.
pub(super) const SIGNATURES_FILE: &str = "signatures.json";

/// The results of the earlier steps that make up a version.
pub(super) struct FinishedChallenger<'a> {
    pub(super) champion: &'a Champion,
    pub(super) measured_champion: &'a MeasuredChampion,
    pub(super) split: &'a FeedbackSplit,
    pub(super) challenger: Challenger,
    pub(super) judged: Judged,
    /// The folds of cross-fitted judging and their results; absent if the test part alone judged.
    pub(super) cross_fit: Option<(&'a CrossFitPlan, &'a CrossFitted)>,
    /// The source of the feedback, for the manifest.
    pub(super) origin: serde_json::Value,
}

impl FinishedChallenger<'_> {
    /// Publishes the challenger without putting it into service.
    pub(super) async fn publish(self, registry: &Registry) -> anyhow::Result<Published> {
        let adapter = crate::hash::adapter_hash(&self.challenger.files.config, &self.challenger.files.weights);
        let facts = self.facts()?;
        let report = ReportInputs {
            facts: &facts,
            adapter: &adapter,
            champion_name: &self.champion.name(),
            champion: &self.measured_champion.measured,
            judged: &self.judged,
            config: &self.challenger.config,
        }
        .render()?;
        let signatures: Vec<Vec<u32>> = self
            .split
            .dataset
            .training_signatures()
            .iter()
            .map(|signature| signature.as_numbers().to_vec())
            .collect();
        let [config_name, weights_name] = ADAPTER_FILES;
        let draft = VersionDraft {
            facts,
            records: self.records(),
            files: BTreeMap::from([
                (config_name.to_owned(), self.challenger.files.config),
                (weights_name.to_owned(), self.challenger.files.weights),
                (GOLDEN_FILE.to_owned(), serde_json::to_vec_pretty(&self.judged.golden)?),
                (SIGNATURES_FILE.to_owned(), serde_json::to_vec(&signatures)?),
                (REPORT_FILE.to_owned(), report.into_bytes()),
            ]),
        };
        let manifest = registry.publish(draft).await.context("cannot publish the version")?;
        Ok(Published {
            manifest,
            verdict: self.judged.verdict,
            pointer: None,
            parts: self.split.sizes(),
            epochs: self.challenger.epochs,
            tokens: self.challenger.tokens,
            training_time: self.challenger.elapsed,
            thresholds: self.judged.thresholds,
            cross_fitted: self.cross_fit.map(|(plan, fitted)| (plan.adapters(), fitted.elapsed)),
        })
    }

    fn facts(&self) -> anyhow::Result<VersionFacts> {
        let prompter = &self.measured_champion.prompter;
        let config = &self.challenger.config;
        let parent = self.champion.version.as_ref();
        Ok(VersionFacts {
            created_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            parent: parent.map(|version| version.manifest.version.clone()),
            base: self.challenger.base.clone(),
            prompt: prompter.content_hash().to_owned(),
            normalizer: prompter.normalizer().to_owned(),
            calibration: self.judged.calibration.calibration,
            thresholds: self.judged.thresholds.derived(),
            threshold_derivation: serde_json::to_value(&self.judged.thresholds)?,
            seed: config.seed,
            hyperparameters: json!(hyperparameters(config).into_iter().collect::<BTreeMap<_, _>>()),
            data: self.data(),
            metrics: serde_json::to_value(&self.judged.challenger.evaluation)?,
            gate: self.gate()?,
        })
    }

    /// Returns the verdict of the gate, also as a sentence for readers that know nothing of its fields.
    fn gate(&self) -> serde_json::Result<Value> {
        let mut gate = serde_json::to_value(&self.judged.verdict)?;
        gate["sentence"] = self.judged.verdict.to_string().into();
        Ok(gate)
    }

    /// Describes the feedback, and how much of it was used for what.
    fn data(&self) -> Value {
        let split = self.split;
        let PartSizes {
            train,
            validation,
            test,
        } = split.sizes();
        let mut data = json!({
                "hash": split.dataset.content_hash(),
                "origin": self.origin,
                "records": split.records,
                "refused": split.refused,
                "superseded": split.superseded,
                "forgotten": split.forgotten,
                "repaired": split.repaired,
                "counts": split.dataset.counts,
                "train": train,
                "validation": validation,
                "test": test,
        });
        if let Some((plan, _)) = self.cross_fit {
            data["judged"] = self.judged.verdict.rows.into();
            data["near_champion_not_judged"] = plan.near_champion.into();
            data["near_judged"] = plan.near_judged.into();
        }
        data
    }

    /// Returns the records that are needed to explain a decision later: the prompt, and the calibration if one was
    /// fitted.
    fn records(&self) -> BTreeMap<RecordKind, String> {
        let prompt = self.measured_champion.prompter.canonical().to_owned();
        let mut records = BTreeMap::from([(RecordKind::Prompt, prompt)]);
        let calibration = self.judged.calibration.calibration;
        if calibration != Calibration::Identity {
            records.insert(RecordKind::Calibration, calibration.canonical());
        }
        records
    }
}

/// Puts a published version into service instead of the champion. Fails if a pointer was added since the champion was
/// read.
pub(super) async fn promote(registry: &Registry, manifest: &Manifest, champion: &Champion) -> anyhow::Result<Pointer> {
    let after = champion.pointer.as_ref().map_or(0, |pointer| pointer.sequence);
    Ok(registry.promote(&manifest.version, after, SystemTime::now()).await?)
}
