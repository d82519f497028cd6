//! Splits the labelled rows into a training, a validation and a test part.

use super::champion::Champion;
use crate::config::RetrainConfig;
use crate::plural::Count;
use crate::registry::{Registry, SplitKey};
use crate::retrain::data::dataset::{Dataset, LabelledRow, SplitConfig};
use crate::retrain::data::feedback::Feedback;
use crate::retrain::data::gather::GatheredFeedback;
use crate::retrain::data::near_duplicates::NearDuplicateIndex;
use crate::retrain::judge::measure;

/// The three parts, with counts of the feedback that they were made from.
pub(super) struct FeedbackSplit {
    pub(super) dataset: Dataset,
    /// Number of rows that the champion was trained on.
    pub(super) champion_rows: usize,
    /// The signatures of these rows.
    pub(super) trained_on: NearDuplicateIndex,
    /// The labelled rows before the split, for other splits of them.
    rows: Vec<Feedback>,
    key: SplitKey,
    shares: SplitConfig,
    /// Number of records or lines read.
    pub(super) records: usize,
    /// Number of records that could not be used.
    pub(super) refused: usize,
    /// Number of labels that a later label for the same content id replaced.
    pub(super) superseded: usize,
    /// Number of labels that a tombstone removed.
    pub(super) forgotten: usize,
    /// Number of records with half of a surrogate pair in their text.
    pub(super) repaired: usize,
}

/// Number of rows in each part of a split.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PartSizes {
    pub(crate) train: usize,
    pub(crate) validation: usize,
    pub(crate) test: usize,
}

impl FeedbackSplit {
    /// Splits the feedback with the registry's split key. Near-duplicates of the rows that the champion was trained on
    /// are left out of the test part.
    pub(super) async fn new(
        gathered: GatheredFeedback,
        champion: &Champion,
        registry: &Registry,
        config: &RetrainConfig,
    ) -> anyhow::Result<Self> {
        let key = registry.split_key().await?;
        let signatures = champion.signatures()?;
        let champion_rows = signatures.len();
        let mut trained_on = NearDuplicateIndex::default();
        signatures
            .into_iter()
            .for_each(|signature| trained_on.insert(signature));
        let split = SplitConfig {
            validation: config.validation,
            test: config.test,
            start: 0.0,
            max_user_share: config.max_user_share,
        };
        Ok(Self {
            refused: gathered.refused.total(),
            dataset: Dataset::split(gathered.rows.clone(), key.as_bytes(), split, &trained_on),
            champion_rows,
            trained_on,
            rows: gathered.rows,
            key,
            shares: split,
            records: gathered.records,
            superseded: gathered.superseded,
            forgotten: gathered.forgotten,
            repaired: gathered.repaired,
        })
    }

    /// Splits the same rows with another test part: a share of `test` of the texts, from `start` on.
    pub(super) fn rotated(&self, start: f64, test: f64) -> Dataset {
        let config = SplitConfig {
            start,
            test,
            ..self.shares
        };
        Dataset::split(
            self.rows.clone(),
            self.key.as_bytes(),
            config,
            &NearDuplicateIndex::default(),
        )
    }

    pub(super) fn sizes(&self) -> PartSizes {
        PartSizes {
            train: self.dataset.train.len(),
            validation: self.dataset.validation.len(),
            test: self.dataset.test.len(),
        }
    }

    /// Returns why there are too few rows to train an adapter, or `None` if there are enough.
    pub(super) fn shortage(&self, min_rows: usize) -> Option<String> {
        let rows = self.dataset.train.len();
        if rows < min_rows {
            // Labels of many copies of a few texts are few labels.
            let near_duplicates = match self.dataset.counts.near_held_out {
                0 => String::new(),
                left_out => format!(" ({left_out} more are near-duplicates of rows that judge, and were left out)"),
            };
            return Some(format!(
                "the training part has {}{near_duplicates}, expected at least {min_rows} (`retrain.min_rows`)",
                Count(rows, "row")
            ));
        }
        let parts = [
            ("training", &self.dataset.train),
            ("validation", &self.dataset.validation),
            ("test", &self.dataset.test),
        ];
        parts.into_iter().find_map(|(part, rows)| single_class(part, rows))
    }
}

/// Describes a part whose rows are all of one class, or that is empty.
pub(super) fn single_class(part: &str, rows: &[LabelledRow]) -> Option<String> {
    let hateful = rows.iter().filter(|row| measure::is_hateful(row)).count();
    let other = rows.len() - hateful;
    (hateful == 0 || other == 0)
        .then(|| format!("the {part} part has {hateful} hateful and {other} other rows, expected at least one of each"))
}
