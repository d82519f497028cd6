//! One retraining from gathered feedback to a published version: split, train, calibrate, measure, judge.
//!
//! The challenger is measured as it will be served: written, read back, merged. Nothing is published
//! before it is whole, and nothing is promoted that the gate refuses or that was overtaken.

mod page;

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use serde_json::json;
use tracing::{info, warn};

use super::data::dataset::{Dataset, LabelledRow, SplitConfig};
use super::data::gather::Gathered;
use super::data::near_duplicates::{Index, Signature};
use super::judge::calibration::fit;
use super::judge::evaluation::{Bootstrap, Curves, Evaluation, EvaluationConfig, evaluate};
use super::judge::gate::{GateConfig, GateRow, GoldenSet, Prediction, TrainingRows, Verdict, judge};
use super::judge::measure;
use super::judge::thresholds::{Band, Bands, ReviewTarget, Targets};
use super::train::peft;
use super::train::trainer::{FrameIds, Progress, TrainerConfig, train};
use crate::classifier::Classifier;
use crate::classifier::golden;
use crate::classifier::golden::{Arithmetic, GOLDEN_FILE, Question};
use crate::config::{PolicyConfig, Quantize, RetrainConfig};
use crate::decide::{Calibration, DerivedThresholds};
use crate::fault::Faults;
use crate::message::Thresholds;
use crate::model::device::Placement;
use crate::model::files::bundled;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::forward::gemma::Gemma;
use crate::model::forward::linear::LoraMode;
use crate::model::forward::load::LoadOptions;
use crate::prompt::Prompter;
use crate::registry::{
    ADAPTER_FILES, AdapterVersion, Manifest, Pointer, RecordKind, Registry, VersionDraft, VersionFacts,
};
use crate::serving::ModelSource;

/// Name of the file with the training part's signatures, by which the next retraining knows what this
/// version was trained on.
const SIGNATURES_FILE: &str = "signatures.json";

/// Name of the report's file.
pub const REPORT_FILE: &str = "report.html";

/// Resamples of every interval.
const RESAMPLES: usize = 1000;

/// What a retraining starts from.
pub struct Session<'a> {
    /// Base and frame.
    pub source: ModelSource,
    /// How.
    pub config: &'a RetrainConfig,
    /// Thresholds where none are derived.
    pub policy: &'a PolicyConfig,
    /// Where versions are.
    pub registry: &'a Registry,
    /// Cases with a right answer.
    pub questions: Vec<Question>,
    /// Where the feedback came from, for the manifest.
    pub origin: serde_json::Value,
    /// Told after every step and epoch.
    pub progress: &'a mut dyn FnMut(Progress),
}

/// How it ended.
pub enum RetrainOutcome {
    /// Nothing to learn from, in words.
    Skipped(String),
    /// A version was published.
    Published(Box<Published>),
}

/// A published version.
pub struct Published {
    /// It.
    pub manifest: Manifest,
    /// What the gate prediction.
    pub verdict: Verdict,
    /// The pointer that put it into service, if one did.
    pub pointer: Option<Pointer>,
    /// Rows of each part.
    pub parts: [usize; 3],
    /// Epochs that were run.
    pub epochs: usize,
    /// Own tokens trained on, and the time that it took.
    pub training: (usize, Duration),
}

/// One adapter on the held-out parts.
struct MeasuredAdapter {
    calibration: Calibration,
    thresholds: Thresholds,
    test: Vec<f64>,
    evaluation: Evaluation,
    curves: Curves,
}

impl Session<'_> {
    /// Runs it.
    ///
    /// # Errors
    /// Whatever keeps it from its end; nothing is in service then that was not before.
    pub async fn run(mut self, gathered: Gathered, promote: bool) -> anyhow::Result<RetrainOutcome> {
        let pointer = self.registry.current().await?;
        let champion = self.champion(pointer.as_ref()).await?;
        let key = self.registry.split_key().await?;
        let signatures = champion.as_ref().map(signatures).transpose()?.unwrap_or_default();
        let mut trained_on = Index::default();
        signatures
            .iter()
            .cloned()
            .for_each(|signature| trained_on.insert(signature));
        let (records, refused) = (gathered.records, gathered.refused.total());
        let split = SplitConfig {
            validation: self.config.validation,
            test: self.config.test,
            max_user_share: self.config.max_user_share,
        };
        let dataset = Dataset::split(gathered.rows, key.as_bytes(), split, &trained_on);
        if let Some(reason) = too_little(&dataset, self.config.min_rows) {
            return Ok(RetrainOutcome::Skipped(reason));
        }
        let parts = [dataset.train.len(), dataset.validation.len(), dataset.test.len()];
        info!(train = parts[0], validation = parts[1], test = parts[2], "split");

        // The champion first: two models need not be held at once.
        let mut loaded = self
            .source
            .load_version(champion.as_ref().map(|_| self.registry), champion.as_ref())?;
        // All that is compared is computed in one place.
        self.source.model.device = loaded.classifier.placement().choice();
        let prompter = loaded.classifier.prompter();
        let test_prompts = measure::prompts(&prompter, &dataset.test)?;
        let champion_test = measure::margins(&mut loaded.classifier, &test_prompts)?;
        let champion_measured = self.measured(&dataset, champion_test, loaded.calibration, loaded.thresholds)?;
        drop(loaded);

        let start = Instant::now();
        let config = self.trainer();
        let (files, base, trained) = self.train(&prompter, &dataset, &config)?;
        let took = start.elapsed();

        let mut challenger = self.read_back(&files)?;
        let validation_prompts = measure::prompts(&prompter, &dataset.validation)?;
        let validation = measure::margins(&mut challenger, &validation_prompts)?;
        let fitted = fit(&measure::calibration_rows(&dataset.validation, &validation))?;
        let bands = Bands::derive(
            &measure::threshold_rows(&dataset.validation, &validation, fitted.calibration),
            self.targets(),
        )?;
        let test = measure::margins(&mut challenger, &test_prompts)?;
        let derived = derived(&bands);
        let measured = self.measured(&dataset, test, fitted.calibration, derived)?;
        let mut questions = golden::own_questions();
        questions.append(&mut self.questions);
        let arithmetic = Arithmetic::of(challenger.identity());
        let cases = golden::ask(&mut challenger, &prompter, questions, arithmetic).map_err(anyhow::Error::msg)?;
        let verdict = self.verdict(&dataset, &champion_measured, &measured, signatures.len(), &cases);

        let adapter = crate::hash::adapter_hash(&files.config, &files.weights);
        let facts = VersionFacts {
            created_at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            parent: champion.as_ref().map(|champion| champion.manifest.version.clone()),
            base,
            prompt: prompter.content_hash().to_owned(),
            normalizer: prompter.normalizer().to_owned(),
            calibration: fitted.calibration,
            thresholds: derived,
            seed: self.config.seed,
            hyperparameters: json!(page::hyperparameters(&config).into_iter().collect::<BTreeMap<_, _>>()),
            data: json!({
                "hash": dataset.content_hash(),
                "origin": self.origin,
                "records": records,
                "refused": refused,
                "superseded": gathered.superseded,
                "forgotten": gathered.forgotten,
                "counts": dataset.counts,
                "train": parts[0],
                "validation": parts[1],
                "test": parts[2],
            }),
            metrics: serde_json::to_value(&measured.evaluation)?,
            gate: serde_json::to_value(&verdict)?,
        };
        let champion_name = champion.as_ref().map_or_else(
            || "the bare base".to_owned(),
            |champion| champion.manifest.version.to_string(),
        );
        let report = self.report(
            &facts,
            &adapter,
            &champion_name,
            &champion_measured,
            &measured,
            &verdict,
            &fitted,
            &bands,
        )?;
        let signatures: Vec<Vec<u32>> = dataset
            .training_signatures()
            .iter()
            .map(|signature| signature.as_numbers().to_vec())
            .collect();
        let [config_name, weights_name] = ADAPTER_FILES;
        let mut records_of = BTreeMap::from([(RecordKind::Prompt, prompter.canonical().to_owned())]);
        if fitted.calibration != Calibration::Identity {
            records_of.insert(RecordKind::Calibration, fitted.calibration.canonical());
        }
        let draft = VersionDraft {
            facts,
            files: BTreeMap::from([
                (config_name.to_owned(), files.config),
                (weights_name.to_owned(), files.weights),
                (GOLDEN_FILE.to_owned(), serde_json::to_vec_pretty(&cases)?),
                (SIGNATURES_FILE.to_owned(), serde_json::to_vec(&signatures)?),
                (REPORT_FILE.to_owned(), report.into_bytes()),
            ]),
            records: records_of,
        };
        let manifest = self
            .registry
            .publish(draft)
            .await
            .context("cannot publish the version")?;
        let mut promoted = None;
        if verdict.promote && promote {
            let after = pointer.map_or(0, |pointer| pointer.sequence);
            promoted = Some(
                self.registry
                    .promote(&manifest.version, after, SystemTime::now())
                    .await?,
            );
        }
        Ok(RetrainOutcome::Published(Box::new(Published {
            manifest,
            verdict,
            pointer: promoted,
            parts,
            epochs: trained.0,
            training: (trained.1, took),
        })))
    }

    /// What is in service, unless it was made for another base or frame: then it can serve nobody, and
    /// the bare base is what there is to beat.
    async fn champion(&self, pointer: Option<&Pointer>) -> anyhow::Result<Option<AdapterVersion>> {
        let Some(pointer) = pointer else { return Ok(None) };
        let Some(version) = self.registry.read_current(pointer).await? else {
            return Ok(None);
        };
        let base = Checkpoint::of(&self.source.model)?.fingerprint();
        let (found, facts) = (&version.manifest.version, &version.manifest.facts);
        if facts.base != base {
            warn!(version = %found, base, made_for = facts.base, "what is in service was made for another base");
            return Ok(None);
        }
        Ok(Some(version))
    }

    fn trainer(&self) -> TrainerConfig {
        let config = self.config;
        TrainerConfig {
            loss: config.loss,
            targets: config.targets.clone(),
            rank: config.rank,
            alpha: config.alpha,
            use_rslora: config.rslora,
            learning_rate: config.learning_rate,
            epochs: config.epochs,
            batch_rows: config.batch,
            patience: config.patience,
            seed: config.seed,
            ..TrainerConfig::default()
        }
    }

    /// The adapter's files, the base's fingerprint, epochs and tokens.
    fn train(
        &mut self,
        prompter: &Prompter,
        dataset: &Dataset,
        config: &TrainerConfig,
    ) -> anyhow::Result<(peft::AdapterFiles, String, (usize, usize))> {
        let checkpoint = Checkpoint::of(&self.source.model)?;
        let base = checkpoint.fingerprint();
        let options = LoadOptions {
            lora: LoraMode::Unmerged,
            quantize: Quantize::None,
            placement: Placement::for_checkpoint(&self.source.model, &checkpoint).map_err(Faults::from)?,
        };
        let model = Gemma::load(&checkpoint, None, options)?;
        let Some(eos) = prompter.eos_id() else {
            bail!("the vocabulary has no `<eos>`, expected one to train with");
        };
        let ids = FrameIds {
            prefix: prompter.prefix(),
            labels: prompter.label_ids(),
            eos,
        };
        let rows = |part: &[LabelledRow]| -> anyhow::Result<_> {
            Ok(measure::training_rows(part, &measure::prompts(prompter, part)?))
        };
        let (training, validation) = (rows(&dataset.train)?, rows(&dataset.validation)?);
        let trained = train(model, ids, config, &training, &validation, self.progress)?;
        // For PEFT, which looks for the base under this name; ours is known by its hash, in the manifest.
        let name = match &self.source.model.path {
            Some(path) => path.display().to_string(),
            None => bundled::NAME.to_owned(),
        };
        let files = peft::write(trained.trainable.variables(), config, &name)?;
        Ok((files, base, (trained.epochs, trained.tokens)))
    }

    /// The challenger as it will be served.
    fn read_back(&self, files: &peft::AdapterFiles) -> anyhow::Result<Classifier> {
        let folder = tempfile::tempdir().context("cannot make a folder for the adapter")?;
        let [config, weights] = ADAPTER_FILES.map(|name| folder.path().join(name));
        std::fs::write(&config, &files.config).context("cannot write the adapter")?;
        std::fs::write(&weights, &files.weights).context("cannot write the adapter")?;
        let model = crate::config::ModelConfig {
            adapter: Some(folder.path().to_path_buf()),
            ..self.source.model.clone()
        };
        Ok(Classifier::load(&model, &self.source.prompt)?)
    }

    fn targets(&self) -> Targets {
        let review = match self.config.review_share {
            Some(share) => ReviewTarget::Share(share),
            None => ReviewTarget::Recall(self.config.review_recall),
        };
        Targets {
            block_precision: self.config.block_precision,
            review,
        }
    }

    fn bootstrap(&self) -> Bootstrap {
        Bootstrap {
            resamples: RESAMPLES,
            seed: self.config.seed,
        }
    }

    fn measured(
        &self,
        dataset: &Dataset,
        test: Vec<f64>,
        calibration: Calibration,
        derived: DerivedThresholds,
    ) -> anyhow::Result<MeasuredAdapter> {
        let scored = measure::scored_rows(&dataset.test, &test, calibration);
        let block = derived.block.unwrap_or(self.policy.thresholds.block);
        let review = derived.review.unwrap_or(self.policy.thresholds.review).min(block);
        let config = EvaluationConfig {
            threshold: 0.5,
            bootstrap: self.bootstrap(),
        };
        Ok(MeasuredAdapter {
            calibration,
            thresholds: Thresholds { review, block },
            test,
            evaluation: evaluate(&scored, config)?,
            curves: Curves::new(&scored)?,
        })
    }

    fn verdict(
        &self,
        dataset: &Dataset,
        champion: &MeasuredAdapter,
        challenger: &MeasuredAdapter,
        champion_rows: usize,
        cases: &[golden::GoldenCase],
    ) -> Verdict {
        let prediction = |measured: &MeasuredAdapter, row: usize| {
            let margin = measured.test[row];
            Prediction {
                margin,
                called: measured.calibration.probability(margin as f32) >= measured.thresholds.review,
            }
        };
        let rows: Vec<GateRow> = dataset
            .test
            .iter()
            .enumerate()
            .map(|(number, row)| GateRow {
                hateful: measure::is_hateful(row),
                weight: measure::traffic_weight(row),
                community: row.feedback.community_id.clone(),
                champion: prediction(champion, number),
                challenger: prediction(challenger, number),
            })
            .collect();
        let training_rows = TrainingRows {
            champion: champion_rows,
            challenger: dataset.train.len(),
        };
        let golden = GoldenSet {
            cases: cases.len(),
            failed: golden::wrong(cases),
        };
        let config = GateConfig {
            bootstrap: self.bootstrap(),
            min_growth: self.config.min_growth,
        };
        judge(&rows, training_rows, golden, config)
    }
}

fn derived(bands: &Bands) -> DerivedThresholds {
    let value = |band: &Band| match band {
        Band::Derived { value, .. } => Some(*value),
        Band::None { .. } => None,
    };
    DerivedThresholds {
        review: value(&bands.review),
        block: value(&bands.block),
        representative: bands.representative(),
    }
}

fn signatures(version: &AdapterVersion) -> anyhow::Result<Vec<Signature>> {
    let Some(json) = version.files.get(SIGNATURES_FILE) else {
        return Ok(Vec::new());
    };
    let numbers: Vec<Vec<u32>> = serde_json::from_slice(json).context("cannot read the champion's signatures")?;
    let signatures = numbers.iter().map(|numbers| Signature::from_numbers(numbers));
    signatures
        .collect::<Option<_>>()
        .context("the champion's signatures have another length")
}

/// Why nothing can be learnt, if so.
fn too_little(dataset: &Dataset, min_rows: usize) -> Option<String> {
    let classes = |rows: &[LabelledRow]| {
        let hateful = rows.iter().filter(|row| measure::is_hateful(row)).count();
        [hateful, rows.len() - hateful]
    };
    if dataset.train.len() < min_rows {
        let rows = dataset.train.len();
        return Some(format!(
            "{rows} rows to train on, expected at least {min_rows} (retrain.min_rows)"
        ));
    }
    for (part, rows) in [
        ("training", &dataset.train),
        ("validation", &dataset.validation),
        ("test", &dataset.test),
    ] {
        let [hateful, ok] = classes(rows);
        if hateful == 0 || ok == 0 {
            return Some(format!(
                "the {part} part has {hateful} hateful and {ok} other rows, expected both"
            ));
        }
    }
    None
}
