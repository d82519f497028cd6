//! Remembers the margins of recent texts, so that identical comments are scored once.
//!
//! Floods consist of identical comments. A margin depends on nothing but the normalised text and the model (batch
//! invariance), so a comment whose text was scored lately is finished with the margin from then, and one whose text is
//! being scored waits for that margin. Both are decided like every other comment: by the policy in force, for their own
//! community, with the id and the hash of their own event.
//!
//! All entries belong to the model in service: [`ScoreCache::replace_model`] forgets them in the same step in which it
//! replaces the model. Failures are not remembered.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::record::{CommentRecord, Finished};
use super::text_key::TextKey;
use crate::decide::{CurrentJudge, Judge, JudgedModel};
use crate::message::CommentMargin;

/// What becomes of a comment whose text was looked up.
#[derive(Debug)]
pub enum Lookup {
    /// The margin is known, so the comment is finished.
    Known(Finished),
    /// The comment waits for the margin of the first one with its text.
    Waits,
    /// The comment is the first in flight with its text, and must be scored. Whoever finishes it calls
    /// [`ScoreCache::finish`].
    First(CommentRecord),
}

/// The margins of recent texts, and the comments that wait for one. Shared by the encode stage, which looks texts up, and
/// the score stage, which finishes them.
#[derive(Debug)]
pub struct ScoreCache {
    judge: Arc<CurrentJudge>,
    is_on: bool,
    state: Mutex<CacheState>,
}

#[derive(Debug)]
struct CacheState {
    recent: RecentMargins,
    /// The texts in flight that are not scored yet. Each comment that waits counts as a record in flight.
    waiting: HashMap<TextKey, Vec<CommentRecord>>,
}

impl ScoreCache {
    /// Creates an empty cache for at most so many texts; it is off if that is 0.
    pub fn new(max_texts: usize, judge: Arc<CurrentJudge>) -> Self {
        Self {
            judge,
            is_on: max_texts > 0,
            state: Mutex::new(CacheState {
                recent: RecentMargins::new(max_texts),
                waiting: HashMap::new(),
            }),
        }
    }

    /// Returns whether texts are looked up at all.
    pub fn is_on(&self) -> bool {
        self.is_on
    }

    /// Returns the number of texts whose margins are remembered.
    pub fn len(&self) -> usize {
        self.lock().recent.len()
    }

    /// Looks up a text at `now`. If its margin is not known, the comment waits for it, or is the first that does.
    pub fn look_up(&self, key: TextKey, comment: CommentRecord, now: SystemTime) -> Lookup {
        let mut state = self.lock();
        if let Some(margin) = state.recent.get(key) {
            // The model cannot be replaced before the judge that belongs to the margin is taken.
            let judge = self.judge.get();
            return Lookup::Known(comment.scored(margin, judge, now));
        }
        if let Some(waiting) = state.waiting.get_mut(&key) {
            waiting.push(comment);
            return Lookup::Waits;
        }
        state.waiting.insert(key, Vec::new());
        Lookup::First(comment)
    }

    /// Returns the margin of a text for a request from outside the stream, if it is known, with the judge that belongs
    /// to it.
    pub fn known(&self, key: TextKey) -> Option<(CommentMargin, Arc<Judge>)> {
        let mut state = self.lock();
        let margin = state.recent.get(key)?;
        // The model cannot be replaced before the judge that belongs to the margin is taken.
        Some((margin, self.judge.get()))
    }

    /// Remembers the margin of a text that no comment of the stream waits for. It must come from the model in service.
    pub fn remember(&self, key: TextKey, margin: CommentMargin) {
        self.lock().recent.insert(key, margin);
    }

    /// Ends the wait for a text, and remembers its margin if there is one. Returns the comments that have waited.
    ///
    /// The margin must come from the model in service.
    pub fn finish(&self, key: TextKey, margin: Option<CommentMargin>) -> Vec<CommentRecord> {
        let mut state = self.lock();
        if let Some(margin) = margin {
            state.recent.insert(key, margin);
        }
        state.waiting.remove(&key).unwrap_or_default()
    }

    /// Replaces the model, and forgets every margin of the one before. Comments that wait for a text get its margin from
    /// the model that scores it.
    pub fn replace_model(&self, model: JudgedModel) {
        let mut state = self.lock();
        state.recent.clear();
        self.judge.set_model(model);
    }

    fn lock(&self) -> MutexGuard<'_, CacheState> {
        // A poisoned state is still consistent: a text that is missing is scored again.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The margins of the texts that were used last, in two generations: texts enter the young one, which becomes the old one
/// when it holds half of all texts that may be remembered. An old text that is used again becomes young. Whatever is old
/// when a generation ends is forgotten.
///
/// Every operation takes constant time, apart from the end of a generation, and no list of the order is needed.
#[derive(Debug)]
struct RecentMargins {
    max_young: usize,
    young: HashMap<TextKey, CommentMargin>,
    old: HashMap<TextKey, CommentMargin>,
}

impl RecentMargins {
    fn new(max_texts: usize) -> Self {
        Self {
            max_young: max_texts / 2,
            young: HashMap::new(),
            old: HashMap::new(),
        }
    }

    fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    fn get(&mut self, key: TextKey) -> Option<CommentMargin> {
        if let Some(&margin) = self.young.get(&key) {
            return Some(margin);
        }
        let margin = self.old.remove(&key)?;
        self.insert(key, margin);
        Some(margin)
    }

    fn insert(&mut self, key: TextKey, margin: CommentMargin) {
        if self.young.len() >= self.max_young {
            std::mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        if self.max_young > 0 {
            self.young.insert(key, margin);
        }
    }

    fn clear(&mut self) {
        self.young.clear();
        self.old.clear();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::super::ownership::Ownership;
    use super::super::record::Outcome;
    use super::super::record::tests::comment;
    use super::*;
    use crate::config::PolicyConfig;
    use crate::decide::Calibration;
    use crate::message::{Competence, ModelIdentity};

    /// Returns a judge of a model with the given base model.
    pub fn current_judge(base: &str) -> CurrentJudge {
        let policy = PolicyConfig {
            from_adapter: false,
            not_in_scope: Default::default(),
            thresholds: Default::default(),
            communities: Default::default(),
        };
        CurrentJudge::new(policy, judged(base))
    }

    fn judged(base: &str) -> JudgedModel {
        let none = || "none".to_owned();
        JudgedModel {
            identity: ModelIdentity {
                base: base.into(),
                adapter: none(),
                adapter_version: None,
                prompt: none(),
                calibration: none(),
                normalizer: none(),
                device: none(),
                dtype: none(),
                quantization: none(),
            },
            calibration: Calibration::Identity,
            derived: Default::default(),
            defaults: Default::default(),
        }
    }

    fn margin(margin: f32) -> CommentMargin {
        CommentMargin {
            margin,
            windows: 2,
            truncated: true,
            competence: Some(Competence::Unsure),
        }
    }

    struct Setup {
        ownership: Ownership,
        cache: ScoreCache,
        sequence: u64,
    }

    impl Setup {
        fn new(max_texts: usize) -> Self {
            Self {
                ownership: Ownership::default(),
                cache: ScoreCache::new(max_texts, Arc::new(current_judge("old"))),
                sequence: 0,
            }
        }

        fn look_up(&mut self, text: &str) -> Lookup {
            self.sequence += 1;
            let comment = comment(0, self.ownership.assign(0), self.sequence, text);
            self.cache.look_up(TextKey::of(text), comment, SystemTime::now())
        }

        /// Returns the base model and the margin of a text that is known.
        fn known(&mut self, text: &str) -> Option<(String, CommentMargin)> {
            match self.look_up(text) {
                Lookup::Known(Finished {
                    outcome: Outcome::Scored { scored, judge, .. },
                    ..
                }) => Some((judge.model.base.clone(), scored)),
                _ => None,
            }
        }
    }

    #[test]
    fn comments_with_a_text_in_flight_wait_for_its_margin() {
        let mut setup = Setup::new(100);
        let key = TextKey::of("one");
        assert!(matches!(setup.look_up("one"), Lookup::First(_)));
        assert!(matches!(setup.look_up("two"), Lookup::First(_)));
        assert!(matches!(setup.look_up("one"), Lookup::Waits));
        assert!(matches!(setup.look_up("one"), Lookup::Waits));
        let waited = setup.cache.finish(key, Some(margin(3.0)));
        let sequences: Vec<u64> = waited.iter().map(|one| one.record.position.sequence).collect();
        assert_eq!(sequences, [3, 4]);
        assert_eq!(setup.known("one"), Some(("old".to_owned(), margin(3.0))));
        assert!(matches!(setup.look_up("two"), Lookup::Waits));
    }

    #[test]
    fn a_failure_is_not_remembered() {
        let mut setup = Setup::new(100);
        assert!(matches!(setup.look_up("one"), Lookup::First(_)));
        assert!(matches!(setup.look_up("one"), Lookup::Waits));
        assert_eq!(setup.cache.finish(TextKey::of("one"), None).len(), 1);
        assert_eq!(setup.cache.len(), 0);
        assert!(matches!(setup.look_up("one"), Lookup::First(_)));
    }

    #[test]
    fn another_model_uses_no_earlier_margin() {
        let mut setup = Setup::new(100);
        for text in ["one", "two"] {
            assert!(matches!(setup.look_up(text), Lookup::First(_)));
        }
        assert!(matches!(setup.look_up("two"), Lookup::Waits));
        setup.cache.finish(TextKey::of("one"), Some(margin(1.0)));
        setup.cache.replace_model(judged("new"));
        assert!(matches!(setup.look_up("one"), Lookup::First(_)));
        // A text that is in flight is scored by the new model, also for those that wait.
        assert_eq!(setup.cache.finish(TextKey::of("two"), Some(margin(2.0))).len(), 1);
        assert_eq!(setup.known("two"), Some(("new".to_owned(), margin(2.0))));
    }

    #[test]
    fn a_cache_that_is_off_remembers_nothing() {
        let cache = Setup::new(0).cache;
        assert!(!cache.is_on());
        cache.finish(TextKey::of("one"), Some(margin(1.0)));
        assert_eq!(cache.len(), 0);
    }

    proptest! {
        /// The margin of a text is always that of its last insertion. Half of the texts that may be remembered, those
        /// used last, always are; and never more than all of them.
        #[test]
        fn the_texts_used_last_are_remembered(
            max_texts in 1usize..12,
            uses in prop::collection::vec(0u8..16, 0..200),
        ) {
            let mut recent = RecentMargins::new(max_texts);
            let (mut inserted, mut order) = (HashMap::new(), Vec::new());
            for (number, text) in uses.into_iter().enumerate() {
                let key = TextKey::of(&text.to_string());
                match recent.get(key) {
                    Some(found) => prop_assert_eq!(Some(&found), inserted.get(&text)),
                    None => {
                        inserted.insert(text, margin(number as f32));
                        recent.insert(key, margin(number as f32));
                    }
                }
                order.retain(|&other| other != text);
                order.push(text);
                prop_assert!(recent.len() <= max_texts);
                let mut copy = RecentMargins {
                    max_young: recent.max_young,
                    young: recent.young.clone(),
                    old: recent.old.clone(),
                };
                for text in order.iter().rev().take(max_texts / 2) {
                    prop_assert!(copy.get(TextKey::of(&text.to_string())).is_some());
                }
            }
        }
    }
}
