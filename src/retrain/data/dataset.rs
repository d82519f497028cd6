//! Splits labelled rows into a training, a validation and a test part that do not overlap.
//!
//! The part of a text depends only on a keyed hash of its wording. It therefore never changes as feedback accumulates,
//! and a text that one adapter was tested on is never used to train a later one. Training rows that are near-duplicates
//! of a validation or test row are left out. Users' reports are used only for training, with a capped share of the
//! weight. All rows that are left out are counted by reason.

use std::collections::BTreeMap;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::feedback::{Feedback, LabelSource};
use super::near_duplicates::{NearDuplicateIndex, Signature, fold};
use crate::hash::content_hash;

/// The part that a text belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SplitPart {
    Train,
    Validation,
    Test,
}

/// How rows are split into parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitConfig {
    /// Share of the texts in the validation part.
    pub validation: f64,
    /// Share of the texts in the test part.
    pub test: f64,
    /// Where the test part begins, from 0 to 1; 0 in the split that an adapter is trained on. The validation part
    /// follows it and then the training part, which wraps around from 1 to 0. Cross-fitted judging rotates the parts in
    /// this way, so that each text is in the test part of one rotation.
    pub start: f64,
    /// The largest share of the training weight that users' reports may have.
    pub max_user_share: f64,
}

/// A labelled text in one of the parts, with its weight in training.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledRow {
    /// The feedback, with its original weight.
    pub feedback: Feedback,
    /// Weight in training, after users' reports have been scaled down to their share.
    pub weight: f32,
}

/// The number of rows before the split, and how many of them were left out for each reason.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct SplitCounts {
    /// Rows before the split, one for each content id.
    pub rows: usize,
    /// Rows left out because another row has the same wording and class.
    pub repeated: usize,
    /// Rows left out because their wording was labelled both hateful and not hateful.
    pub contradicting: usize,
    /// Training rows left out because they are near-duplicates of a validation or test row.
    pub near_held_out: usize,
    /// Test rows left out because they are near-duplicates of rows that the champion was trained on.
    pub near_champion: usize,
    /// Users' reports left out because their wording belongs to the validation or the test part.
    pub user_held_out: usize,
}

/// The three parts of the labelled rows.
#[derive(Debug, Default)]
pub struct Dataset {
    /// Rows that the adapter is trained on.
    pub train: Vec<LabelledRow>,
    /// Rows for early stopping, calibration and thresholds.
    pub validation: Vec<LabelledRow>,
    /// Rows that only the gate uses, to compare the adapters.
    pub test: Vec<LabelledRow>,
    /// The number of rows, and of those that were left out.
    pub counts: SplitCounts,
}

impl Dataset {
    /// Splits the rows into parts.
    ///
    /// `key` is the registry's split key, and `champion` holds the signatures of the rows that the adapter in service
    /// was trained on.
    pub fn split(rows: Vec<Feedback>, key: &[u8], config: SplitConfig, champion: &NearDuplicateIndex) -> Self {
        let mut dataset = Self {
            counts: SplitCounts {
                rows: rows.len(),
                ..SplitCounts::default()
            },
            ..Self::default()
        };
        let mut held_out = NearDuplicateIndex::default();
        let mut training = Vec::new();
        for (folded, row) in dataset.deduplicate(rows) {
            let part = part_of(key, &folded, config);
            if part == SplitPart::Train {
                training.push(row);
                continue;
            }
            if row.source == LabelSource::User {
                dataset.counts.user_held_out += 1;
                continue;
            }
            let signature = Signature::new(&row.text);
            if part == SplitPart::Test && champion.contains_near_duplicate(&signature) {
                dataset.counts.near_champion += 1;
                // Its near-duplicates are still kept out of training.
                held_out.insert(signature);
                continue;
            }
            held_out.insert(signature);
            let rows = if part == SplitPart::Test {
                &mut dataset.test
            } else {
                &mut dataset.validation
            };
            rows.push(LabelledRow {
                weight: row.weight,
                feedback: row,
            });
        }
        let before = training.len();
        training.retain(|row| !held_out.contains_near_duplicate(&Signature::new(&row.text)));
        dataset.counts.near_held_out = before - training.len();
        dataset.train = cap_user_weight(training, config.max_user_share);
        dataset
    }

    /// Returns one row for each wording, with its folded text. A wording that was labelled both hateful and not hateful
    /// is left out entirely.
    fn deduplicate(&mut self, rows: Vec<Feedback>) -> Vec<(String, Feedback)> {
        let mut wordings: BTreeMap<String, Vec<Feedback>> = BTreeMap::new();
        for row in rows {
            wordings
                .entry(fold(&row.text).into_iter().collect())
                .or_default()
                .push(row);
        }
        let mut unique = Vec::with_capacity(wordings.len());
        for (folded, mut group) in wordings {
            let hateful = group.iter().filter(|row| row.hateful >= 0.5).count();
            if hateful != 0 && hateful != group.len() {
                self.counts.contradicting += group.len();
                continue;
            }
            // The label of the most trusted source is used or, among several, the latest.
            group.sort_by_key(|row| (row.source, std::cmp::Reverse(row.position)));
            self.counts.repeated += group.len() - 1;
            unique.push((folded, group.swap_remove(0)));
        }
        unique
    }

    /// Returns the signatures of the training rows, which are published with the version.
    pub fn training_signatures(&self) -> Vec<Signature> {
        self.train
            .iter()
            .map(|row| Signature::new(&row.feedback.text))
            .collect()
    }

    /// Returns a hash that identifies the rows of all parts, with their labels and weights.
    pub fn content_hash(&self) -> String {
        let mut lines = Vec::new();
        for (name, part) in [
            ("train", &self.train),
            ("validation", &self.validation),
            ("test", &self.test),
        ] {
            lines.extend(part.iter().map(|row| {
                let LabelledRow { feedback, weight } = row;
                format!(
                    "{name} {} {} {weight}\n",
                    content_hash(feedback.text.as_bytes()),
                    feedback.hateful
                )
            }));
        }
        lines.sort_unstable();
        content_hash(lines.concat().as_bytes())
    }
}

/// Returns the part that a text belongs to.
///
/// The HMAC-SHA256 of the folded text under the split key is read as a number from 0 to 1 and compared with the shares
/// of the parts.
fn part_of(key: &[u8], folded: &str, config: SplitConfig) -> SplitPart {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(folded.as_bytes());
    let bytes = mac.finalize().into_bytes();
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    let fraction = (u64::from_be_bytes(first) as f64 / u64::MAX as f64 - config.start).rem_euclid(1.0);
    if fraction < config.test {
        SplitPart::Test
    } else if fraction < config.test + config.validation {
        SplitPart::Validation
    } else {
        SplitPart::Train
    }
}

/// Scales the weights of users' reports down so that their share of the total weight is at most `max_user_share`. Rows
/// whose weight becomes 0 are left out.
fn cap_user_weight(rows: Vec<Feedback>, max_user_share: f64) -> Vec<LabelledRow> {
    let sum = |user: bool| -> f64 {
        let rows = rows.iter().filter(|row| (row.source == LabelSource::User) == user);
        rows.map(|row| f64::from(row.weight)).sum()
    };
    let (users, others) = (sum(true), sum(false));
    let allowed = if max_user_share >= 1.0 {
        users
    } else {
        others * max_user_share / (1.0 - max_user_share)
    };
    let factor = if users > allowed { (allowed / users) as f32 } else { 1.0 };
    let weight = |row: &Feedback| {
        if row.source == LabelSource::User {
            row.weight * factor
        } else {
            row.weight
        }
    };
    let rows = rows.into_iter().map(|row| LabelledRow {
        weight: weight(&row),
        feedback: row,
    });
    rows.filter(|row| row.weight > 0.0).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const CONFIG: SplitConfig = SplitConfig {
        validation: 0.2,
        test: 0.2,
        start: 0.0,
        max_user_share: 0.3,
    };
    const KEY: &[u8] = b"a key of the registry";

    fn row(text: &str, hateful: f32, source: LabelSource) -> Feedback {
        Feedback {
            feedback_id: None,
            content_id: text.into(),
            text: text.into(),
            hateful,
            source,
            supersedes: None,
            weight: 1.0,
            inclusion: None,
            community_id: None,
            position: 0,
            replaced_surrogates: 0,
        }
    }

    /// Returns texts of random letters, which have hardly any shingles in common.
    fn sentences(count: usize) -> Vec<String> {
        let mut state = 1u64;
        let mut letter = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            char::from(b'a' + (state >> 40) as u8 % 26)
        };
        (0..count).map(|_| (0..40).map(|_| letter()).collect()).collect()
    }

    fn texts(part: &[LabelledRow]) -> BTreeSet<String> {
        part.iter().map(|row| row.feedback.text.clone()).collect()
    }

    fn split(rows: Vec<Feedback>) -> Dataset {
        Dataset::split(rows, KEY, CONFIG, &NearDuplicateIndex::default())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// A text stays in its part when rows are added, whatever the order of the rows.
        #[test]
        fn a_text_never_changes_its_part(first in 1usize..150, more in 0usize..150, rotation in 0usize..300) {
            let all = sentences(300);
            let moderated = |text: &String| row(text, 1.0, LabelSource::Moderator);
            let rows = |texts: &[String]| texts.iter().map(moderated).collect::<Vec<_>>();
            let small = split(rows(&all[..first]));
            let mut grown = rows(&all[..first + more]);
            let rotation = rotation % grown.len();
            grown.rotate_left(rotation);
            let grown = split(grown);
            let parts = [
                (&small.train, &grown.train),
                (&small.validation, &grown.validation),
                (&small.test, &grown.test),
            ];
            for (small, grown) in parts {
                prop_assert!(texts(small).is_subset(&texts(grown)));
            }
        }
    }

    #[test]
    fn parts_have_the_configured_shares_and_depend_on_the_key() {
        let rows: Vec<_> = sentences(2000)
            .iter()
            .map(|text| row(text, 1.0, LabelSource::Moderator))
            .collect();
        let dataset = split(rows.clone());
        for (part, expected) in [(&dataset.train, 1200), (&dataset.validation, 400), (&dataset.test, 400)] {
            assert!(
                part.len().abs_diff(expected) < 80,
                "{}, expected about {expected}",
                part.len()
            );
        }
        let other = Dataset::split(rows, b"another key", CONFIG, &NearDuplicateIndex::default());
        assert_ne!(texts(&dataset.test), texts(&other.test));
    }

    #[test]
    fn rotations_put_each_text_into_one_test_part() {
        let rows: Vec<_> = sentences(500)
            .iter()
            .map(|text| row(text, 1.0, LabelSource::Moderator))
            .collect();
        let mut tested = Vec::new();
        for rotation in 0..5 {
            let config = SplitConfig {
                start: 0.2 * f64::from(rotation),
                ..CONFIG
            };
            let dataset = Dataset::split(rows.clone(), KEY, config, &NearDuplicateIndex::default());
            assert!(dataset.train.len().abs_diff(300) < 50 && dataset.validation.len().abs_diff(100) < 40);
            let held_out = texts(&dataset.test);
            assert!(held_out.is_disjoint(&texts(&dataset.train)) && held_out.is_disjoint(&texts(&dataset.validation)));
            tested.extend(held_out);
        }
        assert_eq!((tested.len(), tested.iter().collect::<BTreeSet<_>>().len()), (500, 500));
    }

    #[test]
    fn near_duplicates_of_held_out_rows_are_not_trained_on() {
        let all = sentences(300);
        let moderated: Vec<_> = all.iter().map(|text| row(text, 1.0, LabelSource::Moderator)).collect();
        let held_out = split(moderated.clone());
        // Each text gets a near-duplicate, whose hash may assign it to another part.
        let copies = all
            .iter()
            .map(|text| row(&format!("{text} indeed"), 1.0, LabelSource::Moderator));
        let both = split(moderated.into_iter().chain(copies).collect());
        assert!(both.counts.near_held_out > 0);
        let signatures: Vec<Signature> = both
            .test
            .iter()
            .chain(&both.validation)
            .map(|row| Signature::new(&row.feedback.text))
            .collect();
        let mut index = NearDuplicateIndex::default();
        signatures.into_iter().for_each(|signature| index.insert(signature));
        assert!(
            both.train
                .iter()
                .all(|row| !index.contains_near_duplicate(&Signature::new(&row.feedback.text)))
        );
        assert!(texts(&held_out.test).is_subset(&texts(&both.test)));
    }

    #[test]
    fn near_duplicates_of_the_champions_training_rows_are_not_tested_on() {
        let rows: Vec<_> = sentences(100)
            .iter()
            .map(|text| row(text, 1.0, LabelSource::Moderator))
            .collect();
        let plain = split(rows.clone());
        let mut champion = NearDuplicateIndex::default();
        plain
            .test
            .iter()
            .take(3)
            .for_each(|row| champion.insert(Signature::new(&row.feedback.text)));
        let filtered = Dataset::split(rows, KEY, CONFIG, &champion);
        assert_eq!(
            (filtered.test.len(), filtered.counts.near_champion),
            (plain.test.len() - 3, 3)
        );
        assert_eq!(filtered.train.len(), plain.train.len());
    }

    #[test]
    fn user_reports_are_capped_in_training_and_never_held_out() {
        let all = sentences(200);
        let rows = all.iter().enumerate().map(|(index, text)| {
            row(
                text,
                1.0,
                if index % 2 == 0 {
                    LabelSource::User
                } else {
                    LabelSource::Moderator
                },
            )
        });
        let dataset = split(rows.collect());
        let users = |part: &[LabelledRow]| -> f32 {
            part.iter()
                .filter(|row| row.feedback.source == LabelSource::User)
                .map(|row| row.weight)
                .sum()
        };
        assert_eq!(users(&dataset.test) + users(&dataset.validation), 0.0);
        assert!(dataset.counts.user_held_out > 0);
        let total: f32 = dataset.train.iter().map(|row| row.weight).sum();
        assert!((users(&dataset.train) / total - 0.3).abs() < 1e-3);
    }

    #[test]
    fn a_repeated_wording_is_used_once_and_a_contradictory_one_never() {
        let moderator = |text, hateful| row(text, hateful, LabelSource::Moderator);
        let dataset = split(vec![
            moderator("A fine day", 0.0),
            row("a  fine day!", 0.0, LabelSource::User),
            moderator("what a game", 1.0),
            moderator("What a game...", 0.0),
        ]);
        let parts = [&dataset.train, &dataset.validation, &dataset.test];
        let all: BTreeSet<String> = parts.into_iter().flat_map(|part| texts(part)).collect();
        assert_eq!(all, BTreeSet::from(["A fine day".to_owned()]));
        assert_eq!(
            (
                dataset.counts.rows,
                dataset.counts.repeated,
                dataset.counts.contradicting
            ),
            (4, 1, 2)
        );
    }
}
