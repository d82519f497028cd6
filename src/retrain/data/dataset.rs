//! From labelled rows to three parts that do not leak into each other.
//!
//! A text's side is decided by a keyed hash of what it says and by nothing else, so it never changes
//! as data grows: what judged one adapter never trains the next. Training rows that nearly repeat a
//! held-out row are dropped and counted; users' reports train, within a cap, but never judge.

use std::collections::BTreeMap;

use hmac::{Hmac, Mac};
use sha2::Sha256;

use super::feedback::{Feedback, LabelSource};
use super::near_duplicates::{Index, Signature, fold};
use crate::hash::content_hash;

/// Where a text belongs, for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SplitPart {
    /// Fitted.
    Train,
    /// Early stopping, calibration, thresholds.
    Validation,
    /// The gate only.
    Test,
}

/// How data becomes parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SplitConfig {
    /// Share of texts that validate.
    pub validation: f64,
    /// Share of texts that judge.
    pub test: f64,
    /// Highest share of the training weight that users' reports may have.
    pub max_user_share: f64,
}

/// One row of a part.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledRow {
    /// The label as it came.
    pub feedback: Feedback,
    /// Weight in training, after the cap.
    pub weight: f32,
}

/// How many rows there were and where they went. All counted, none dropped silently.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct SplitCounts {
    /// Rows that stood after the latest word on each content.
    pub rows: usize,
    /// Rows left out because their wording stands there already with the same label.
    pub repeated: usize,
    /// Rows left out because the same wording has opposite labels.
    pub contradicting: usize,
    /// Training rows left out because they nearly repeat a held-out row.
    pub near_held_out: usize,
    /// Held-out rows that do not judge because they nearly repeat what the champion was trained on.
    pub near_champion: usize,
    /// Users' reports that would have fallen on a held-out side.
    pub user_held_out: usize,
}

/// The three parts.
#[derive(Debug, Default)]
pub struct Dataset {
    /// Fitted.
    pub train: Vec<LabelledRow>,
    /// Early stopping, calibration, thresholds.
    pub validation: Vec<LabelledRow>,
    /// The gate only.
    pub test: Vec<LabelledRow>,
    /// Where all rows went.
    pub counts: SplitCounts,
}

impl Dataset {
    /// Splits rows; `key` is the registry's split key, `champion` the signatures of what the adapter
    /// in service was trained on.
    pub fn split(rows: Vec<Feedback>, key: &[u8], config: SplitConfig, champion: &Index) -> Self {
        let mut dataset = Self {
            counts: SplitCounts {
                rows: rows.len(),
                ..SplitCounts::default()
            },
            ..Self::default()
        };
        let mut held_out = Index::default();
        let mut training = Vec::new();
        for (folded, row) in dataset.without_repetitions(rows) {
            let side = side(key, &folded, config);
            if side == SplitPart::Train {
                training.push(row);
                continue;
            }
            if row.source == LabelSource::User {
                dataset.counts.user_held_out += 1;
                continue;
            }
            let signature = Signature::new(&row.text);
            if side == SplitPart::Test && champion.has_near(&signature) {
                dataset.counts.near_champion += 1;
                // It still keeps its like out of training.
                held_out.insert(signature);
                continue;
            }
            held_out.insert(signature);
            let part = if side == SplitPart::Test {
                &mut dataset.test
            } else {
                &mut dataset.validation
            };
            part.push(LabelledRow {
                weight: row.weight,
                feedback: row,
            });
        }
        let before = training.len();
        training.retain(|row| !held_out.has_near(&Signature::new(&row.text)));
        dataset.counts.near_held_out = before - training.len();
        dataset.train = capped(training, config.max_user_share);
        dataset
    }

    /// One row for each wording, by its folded text. A wording with labels on both sides of one half
    /// teaches nothing and is left out whole.
    fn without_repetitions(&mut self, rows: Vec<Feedback>) -> Vec<(String, Feedback)> {
        let mut wordings: BTreeMap<String, Vec<Feedback>> = BTreeMap::new();
        for row in rows {
            wordings
                .entry(fold(&row.text).into_iter().collect())
                .or_default()
                .push(row);
        }
        let mut kept = Vec::with_capacity(wordings.len());
        for (folded, mut group) in wordings {
            let hateful = group.iter().filter(|row| row.hateful >= 0.5).count();
            if hateful != 0 && hateful != group.len() {
                self.counts.contradicting += group.len();
                continue;
            }
            // The most trusted label speaks for the wording, the latest among equals.
            group.sort_by_key(|row| (row.source, std::cmp::Reverse(row.position)));
            self.counts.repeated += group.len() - 1;
            kept.push((folded, group.swap_remove(0)));
        }
        kept
    }

    /// Signatures of the training part, for the version's manifest.
    pub fn training_signatures(&self) -> Vec<Signature> {
        self.train
            .iter()
            .map(|row| Signature::new(&row.feedback.text))
            .collect()
    }

    /// Hash of what was trained on and judged by: the identity of this data.
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

/// A text's side: HMAC-SHA256 of its folded wording under the split key, as a fraction of one.
fn side(key: &[u8], folded: &str, config: SplitConfig) -> SplitPart {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(folded.as_bytes());
    let bytes = mac.finalize().into_bytes();
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    let fraction = u64::from_be_bytes(first) as f64 / u64::MAX as f64;
    if fraction < config.test {
        SplitPart::Test
    } else if fraction < config.test + config.validation {
        SplitPart::Validation
    } else {
        SplitPart::Train
    }
}

/// Scales users' reports down so that they have at most this share of the weight.
fn capped(rows: Vec<Feedback>, max_user_share: f64) -> Vec<LabelledRow> {
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
        }
    }

    /// Sentences that share no shingles: words of random letters.
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
        Dataset::split(rows, KEY, CONFIG, &Index::default())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// However the data grows, and in whatever order it comes, a text stays where it was.
        #[test]
        fn a_text_never_changes_sides(first in 1usize..150, more in 0usize..150, turn in 0usize..300) {
            let all = sentences(300);
            let rows = |texts: &[String]| texts.iter().map(|text| row(text, 1.0, LabelSource::Moderator)).collect::<Vec<_>>();
            let small = split(rows(&all[..first]));
            let mut grown = rows(&all[..first + more]);
            let turn = turn % grown.len();
            grown.rotate_left(turn);
            let grown = split(grown);
            for (small, grown) in [(&small.train, &grown.train), (&small.validation, &grown.validation), (&small.test, &grown.test)] {
                prop_assert!(texts(small).is_subset(&texts(grown)));
            }
        }
    }

    #[test]
    fn shares_are_about_as_asked_and_depend_on_the_key() {
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
        let other = Dataset::split(rows, b"another key", CONFIG, &Index::default());
        assert_ne!(texts(&dataset.test), texts(&other.test));
    }

    #[test]
    fn training_keeps_clear_of_what_judges() {
        let all = sentences(300);
        let moderated: Vec<_> = all.iter().map(|text| row(text, 1.0, LabelSource::Moderator)).collect();
        let held_out = split(moderated.clone());
        // A near copy of every text: those of held-out rows may land on either side.
        let copies = all
            .iter()
            .map(|text| row(&format!("{text} indeed"), 1.0, LabelSource::Moderator));
        let both = split(moderated.into_iter().chain(copies).collect());
        assert!(both.counts.near_held_out > 0);
        let held: Vec<Signature> = both
            .test
            .iter()
            .chain(&both.validation)
            .map(|row| Signature::new(&row.feedback.text))
            .collect();
        let mut index = Index::default();
        held.into_iter().for_each(|signature| index.insert(signature));
        assert!(
            both.train
                .iter()
                .all(|row| !index.has_near(&Signature::new(&row.feedback.text)))
        );
        assert!(texts(&held_out.test).is_subset(&texts(&both.test)));
    }

    #[test]
    fn what_the_champion_was_trained_on_does_not_judge() {
        let rows: Vec<_> = sentences(100)
            .iter()
            .map(|text| row(text, 1.0, LabelSource::Moderator))
            .collect();
        let plain = split(rows.clone());
        let mut champion = Index::default();
        plain
            .test
            .iter()
            .take(3)
            .for_each(|row| champion.insert(Signature::new(&row.feedback.text)));
        let judged = Dataset::split(rows, KEY, CONFIG, &champion);
        assert_eq!(
            (judged.test.len(), judged.counts.near_champion),
            (plain.test.len() - 3, 3)
        );
        assert_eq!(judged.train.len(), plain.train.len());
    }

    #[test]
    fn users_train_within_the_cap_and_never_judge() {
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
    fn one_wording_counts_once_and_contradictions_not_at_all() {
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
