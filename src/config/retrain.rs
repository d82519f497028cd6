//! What retraining and the registry are set to.

use std::path::PathBuf;
use std::time::Duration;

use super::Config;
use super::kafka::KafkaProperties;
use super::reader::SettingsReader;
use super::{Loss, Projection};
use crate::fault::{Fault, Faults};

/// Where adapter versions are kept.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// A `file://` URL; without one there is no registry.
    pub url: Option<String>,
    /// Versions that gc keeps, beside what is in service.
    pub keep: usize,
    /// How often a daemon looks for a new pointer.
    pub poll: Duration,
}

/// How an adapter is trained and judged.
#[derive(Debug, Clone)]
pub struct RetrainConfig {
    /// What is fitted.
    pub loss: Loss,
    /// Linear layers that get a delta.
    pub targets: Vec<Projection>,
    /// Rank of the deltas.
    pub rank: usize,
    /// Scale: `alpha / rank`.
    pub alpha: f64,
    /// Scale by `alpha / sqrt(rank)` instead.
    pub rslora: bool,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Passes over the training part, at most.
    pub epochs: usize,
    /// Rows of a batch.
    pub batch: usize,
    /// Epochs without a better validation loss after which training stops.
    pub patience: usize,
    /// Of shuffling, initial weights and resampling.
    pub seed: u64,
    /// Rows of the training part below which nothing is trained.
    pub min_rows: usize,
    /// Share of texts that validate.
    pub validation: f64,
    /// Share of texts that judge.
    pub test: f64,
    /// Highest share of the training weight that users' reports may have.
    pub max_user_share: f64,
    /// Bytes of one feedback record.
    pub max_bytes: usize,
    /// So many more training rows than the champion's earn a tolerance at the gate.
    pub min_growth: usize,
    /// Least precision of what is blocked.
    pub block_precision: f64,
    /// Share of hateful comments that a moderator should get to see.
    pub review_recall: f64,
    /// Share of all comments that a moderator gets to see, instead of the recall.
    pub review_share: Option<f64>,
    /// Cases that every adapter must get right, one labelled JSON object a line.
    pub golden: Option<PathBuf>,
}

/// Where feedback is read from.
#[derive(Debug, Clone)]
pub struct FeedbackTopic {
    /// `host:port` each.
    pub brokers: Vec<String>,
    /// librdkafka's settings, the password among them.
    pub properties: KafkaProperties,
    /// The topic.
    pub topic: String,
}

impl Config {
    /// The feedback topic, for a retraining that reads no file.
    ///
    /// # Errors
    /// Every setting that is missing, and a password file that cannot be read.
    pub fn require_feedback(&self) -> Result<FeedbackTopic, Faults> {
        let mut faults = Vec::new();
        let mut missing = |key: &str, expected: &str| {
            faults.push(Fault::setting(
                key,
                format!("not set, expected {expected}; or give the feedback with --input"),
            ));
        };
        if self.kafka.brokers.is_empty() {
            missing("kafka.brokers", "at least one host:port");
        }
        if self.topics.feedback.is_none() {
            missing("topics.feedback", "a topic");
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

    /// The registry's URL.
    ///
    /// # Errors
    /// It is not set.
    pub fn require_registry(&self) -> Result<&str, Faults> {
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
    if url.is_some() && reader.is_set("model.adapter") {
        reader.fault(
            "model.adapter",
            "is set beside registry.url, which says what is in service; expected one of the two",
        );
    }
    Some(RegistryConfig {
        url,
        keep: keep?,
        poll: poll?,
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
    let max_user_share = reader.number("retrain.max_user_share", 0.0..=1.0);
    let max_bytes = reader.integer("retrain.max_bytes", 1024..=64 << 20);
    let min_growth = reader.integer("retrain.min_growth", 1..=1_000_000_000);
    let block_precision = reader.number("retrain.block_precision", 0.5..=1.0);
    let review_recall = reader.number("retrain.review_recall", 0.0..=1.0);
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
                "expected at most {:.2}, so that a fifth is left to train on",
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
        max_user_share: max_user_share?,
        max_bytes: max_bytes?,
        min_growth: min_growth?,
        block_precision: block_precision?,
        review_recall: review_recall?,
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
            reader.fault("retrain.targets", format!("expected some of {names}"));
            None
        }
    }
}
