//! Reads the settings of the registry and of `retrain`.

use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::Config;
use super::kafka::KafkaProperties;
use super::reader::SettingsReader;
use super::{Loss, Projection};
use crate::fault::{Fault, Faults};

/// The registry of adapter versions.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// The `file://` URL of the registry; if it is not set, there is no registry.
    pub url: Option<String>,
    /// The number of recent versions that `adapters gc` keeps, besides those that are or recently were in service.
    pub keep: usize,
    /// How often a daemon checks for a new pointer.
    pub poll: Duration,
    /// The folder, outside the registry, that remembers the pointer last seen in it.
    pub state: Option<PathBuf>,
    /// What to do at startup if the registry no longer has the pointer last seen in it.
    pub on_missing: OnMissing,
}

/// What to do at startup if the registry no longer has the pointer last seen in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnMissing {
    /// Do not start.
    Stop,
    /// Serve what there is, which is the bare base model if the registry is empty.
    Continue,
}

/// When judging is cross-fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrossFit {
    /// If the test part has few rows.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How `retrain` trains and judges an adapter.
#[derive(Debug, Clone)]
pub struct RetrainConfig {
    /// The loss function.
    pub loss: Loss,
    /// The linear layers to adapt; there is at least one.
    pub targets: Vec<Projection>,
    /// The rank of the adapter.
    pub rank: usize,
    /// The numerator of the adapter's scale, `alpha / rank`.
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(rank)` instead (rsLoRA).
    pub rslora: bool,
    /// The peak learning rate.
    pub learning_rate: f64,
    /// The maximum number of passes over the training part.
    pub epochs: usize,
    /// The number of rows in a training batch.
    pub batch: usize,
    /// The number of epochs without a lower validation loss after which training stops.
    pub patience: usize,
    /// The seed for shuffling, initial weights and resampling.
    pub seed: u64,
    /// The minimum number of rows in the training part; with fewer, nothing is trained.
    pub min_rows: usize,
    /// The share of the texts used for validation.
    pub validation: f64,
    /// The share of the texts used to compare the new adapter with the one in service.
    pub test: f64,
    /// Whether all labelled comments judge the new adapter, by cross-fitting, or only those of `test`.
    pub cross_fit: CrossFit,
    /// The maximum number of folds of cross-fitted judging.
    pub folds: usize,
    /// The maximum share of user reports in the total training weight.
    pub max_user_share: f64,
    /// The maximum size of a feedback record in bytes.
    pub max_bytes: usize,
    /// The gate allows a tolerance if the challenger has at least this many more training rows than the champion.
    pub min_growth: usize,
    /// The minimum precision of the block threshold.
    pub block_precision: f64,
    /// The share of hateful comments that should be reviewed or blocked.
    pub review_recall: f64,
    /// Whether thresholds are estimated if there are too few labels to be sure of them.
    pub provisional_thresholds: bool,
    /// The maximum share of all comments to be reviewed or blocked; if set, it is used instead of `review_recall`.
    pub review_share: Option<f64>,
    /// The file of comments that every new adapter must classify correctly, one labelled JSON object per line.
    pub golden: Option<PathBuf>,
}

/// The settings needed to read the feedback topic.
#[derive(Debug, Clone)]
pub(crate) struct FeedbackTopic {
    /// The bootstrap brokers, as `host:port`; there is at least one.
    pub brokers: Vec<String>,
    /// Further settings of librdkafka, including the password.
    pub properties: KafkaProperties,
    pub topic: String,
}

impl Config {
    /// Returns the settings needed to read the feedback topic.
    ///
    /// # Errors
    /// Returns all faults if a required setting is missing or the password file cannot be read.
    pub(crate) fn require_feedback(&self) -> Result<FeedbackTopic, Faults> {
        let mut faults = Vec::new();
        let mut missing = |key: &str, expected: &str| {
            faults.push(Fault::setting(
                key,
                format!("not set, expected {expected}; alternatively, pass a file with --input"),
            ));
        };
        if self.kafka.brokers.is_empty() {
            missing("kafka.brokers", "at least one host:port");
        }
        if self.topics.feedback.is_none() {
            missing("topics.feedback", "a topic name");
        }
        let properties = match self.kafka.properties_with_password() {
            Ok(properties) => properties,
            Err(fault) => {
                faults.push(fault);
                KafkaProperties::default()
            }
        };
        match &self.topics.feedback {
            Some(topic) if faults.is_empty() => Ok(FeedbackTopic {
                brokers: self.kafka.brokers.clone(),
                properties,
                topic: topic.clone(),
            }),
            _ => Err(Faults::from(faults)),
        }
    }

    /// Returns the URL of the registry.
    ///
    /// # Errors
    /// Returns a fault if `registry.url` is not set.
    pub(crate) fn require_registry(&self) -> Result<&str, Faults> {
        self.registry.url.as_deref().ok_or_else(|| {
            Fault::setting(
                "registry.url",
                "not set, expected a URL such as \"file:///var/lib/moderatord/registry\"",
            )
            .into()
        })
    }
}

pub(super) fn registry(reader: &mut SettingsReader) -> Option<RegistryConfig> {
    let url = reader.optional_string("registry.url");
    let keep = reader.integer("registry.keep", 1..=10_000);
    let poll = reader.duration("registry.poll", Duration::from_millis(100)..=Duration::from_secs(3600));
    let state = reader.optional_path("registry.state");
    let choices = [("stop", OnMissing::Stop), ("continue", OnMissing::Continue)];
    let on_missing = reader.choice("registry.on_missing", &choices);
    let folder = url.as_deref().and_then(|url| Url::parse(url).ok()?.to_file_path().ok());
    if let (Some(folder), Some(state)) = (folder, &state)
        && state.starts_with(folder)
    {
        let expected =
            "expected a folder outside the registry, because what is remembered there must not be lost with it";
        reader.fault("registry.state", expected);
    }
    if url.is_some() && reader.is_set("model.adapter") {
        reader.fault(
            "model.adapter",
            "registry.url is set as well, and the registry determines the adapter in service; expected one of the two",
        );
    }
    Some(RegistryConfig {
        url,
        keep: keep?,
        poll: poll?,
        state,
        on_missing: on_missing?,
    })
}

pub(super) fn retrain(reader: &mut SettingsReader) -> Option<RetrainConfig> {
    let losses = [
        ("label", Loss::Label),
        ("pair", Loss::Pair),
        ("sequence", Loss::Sequence),
    ];
    let loss = reader.choice("retrain.loss", &losses);
    let targets = targets(reader);
    let rank = reader.integer("retrain.rank", 1..=1024);
    let alpha = reader.number("retrain.alpha", 1e-3..=1e4);
    let rslora = reader.bool("retrain.rslora");
    let learning_rate = reader.number("retrain.learning_rate", 1e-8..=1.0);
    let epochs = reader.integer("retrain.epochs", 1..=1000);
    let batch = reader.integer("retrain.batch", 1..=1024);
    let patience = reader.integer("retrain.patience", 1..=1000);
    let seed = reader.integer("retrain.seed", 0..=u32::MAX as usize);
    let min_rows = reader.integer("retrain.min_rows", 2..=1_000_000_000);
    let validation = reader.number("retrain.validation", 0.01..=0.5);
    let test = reader.number("retrain.test", 0.01..=0.5);
    let choices = [
        ("auto", CrossFit::Auto),
        ("always", CrossFit::Always),
        ("never", CrossFit::Never),
    ];
    let cross_fit = reader.choice("retrain.cross_fit", &choices);
    let folds = reader.integer("retrain.folds", 2..=20);
    let max_user_share = reader.number("retrain.max_user_share", 0.0..=1.0);
    let max_bytes = reader.integer("retrain.max_bytes", 1024..=64 << 20);
    let min_growth = reader.integer("retrain.min_growth", 1..=1_000_000_000);
    let block_precision = reader.number("retrain.block_precision", 0.5..=1.0);
    let review_recall = reader.number("retrain.review_recall", 0.0..=1.0);
    let provisional_thresholds = reader.bool("retrain.provisional_thresholds");
    let review_share = reader
        .find("retrain.review_share")
        .and_then(|_| reader.number("retrain.review_share", 0.0..=1.0));
    let golden = reader.optional_path("retrain.golden");
    if let (Some(validation), Some(test)) = (validation, test)
        && validation + test > 0.8
    {
        reader.fault(
            "retrain.test",
            format!(
                "expected at most {:.2}, so that at least a fifth of the texts is left for training",
                0.8 - validation
            ),
        );
    }
    Some(RetrainConfig {
        loss: loss?,
        targets: targets?,
        rank: rank?,
        alpha: alpha?,
        rslora: rslora?,
        learning_rate: learning_rate?,
        epochs: epochs?,
        batch: batch?,
        patience: patience?,
        seed: seed? as u64,
        min_rows: min_rows?,
        validation: validation?,
        test: test?,
        cross_fit: cross_fit?,
        folds: folds?,
        max_user_share: max_user_share?,
        max_bytes: max_bytes?,
        min_growth: min_growth?,
        block_precision: block_precision?,
        review_recall: review_recall?,
        provisional_thresholds: provisional_thresholds?,
        review_share,
        golden,
    })
}

fn targets(reader: &mut SettingsReader) -> Option<Vec<Projection>> {
    let names = reader.strings("retrain.targets")?;
    let find = |name: &String| Projection::ALL.into_iter().find(|projection| projection.name() == name);
    let targets: Option<Vec<Projection>> = names.iter().map(find).collect();
    match targets {
        Some(targets) if !targets.is_empty() => Some(targets),
        _ => {
            let names = Projection::ALL.map(Projection::name).join(", ");
            reader.fault("retrain.targets", format!("expected one or more of {names}"));
            None
        }
    }
}
