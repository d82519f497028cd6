//! Failures of the scorer, and the margins of comments with several windows.

use crossbeam_channel::{bounded, never};

use super::super::cache::Lookup;
use super::super::cache::tests::current_judge;
use super::super::ownership::Ownership;
use super::super::record::Outcome;
use super::super::record::tests::comment;
use super::super::text_key::TextKey;
use super::*;

/// A scorer that fails as often as it is told to, except for the canary, whose row is empty.
struct Failing {
    failures: usize,
}

impl Scorer for Failing {
    fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
        let is_canary = rows.iter().all(|row| row.tokens.is_empty());
        if !is_canary && self.failures > 0 {
            self.failures -= 1;
            return Err(ScoreError::NotFinite {
                row: 0,
                margin: f32::NAN,
            });
        }
        Ok(vec![2.5; rows.len()])
    }
}

/// Scores a comment for which three others wait. Returns how many of them are decided, with that margin, and how many
/// are rejected.
fn decided_and_rejected(failures: usize) -> (usize, usize) {
    let (ownership, judge) = (Ownership::default(), Arc::new(current_judge("base")));
    let cache = Arc::new(ScoreCache::new(10, Arc::clone(&judge)));
    let (epoch, key) = (ownership.assign(0), TextKey::of("one"));
    let row = Row {
        tokens: vec![1].into(),
        shared: 0,
    };
    let look_up = |sequence| cache.look_up(key, comment(0, epoch, sequence, "one"), SystemTime::now());
    let Lookup::First(source) = look_up(0) else {
        panic!("the first is not the first");
    };
    (1..4).for_each(|sequence| assert!(matches!(look_up(sequence), Lookup::Waits)));
    let pending = Pending {
        source,
        first: Some(FirstOfText {
            key,
            rows: vec![row.clone()],
        }),
        facts: TextFacts {
            windows: 1,
            truncated: false,
            correction: 0.0,
            competence: None,
        },
    };
    let (batch, batches) = bounded(1);
    let (finished, all) = bounded(10);
    let stage = ScoreStage {
        lanes: Lanes::of_stream(batches, None),
        finished,
        scorer: Box::new(Failing { failures }),
        canary: vec![Row {
            tokens: Vec::new().into(),
            shared: 0,
        }],
        judge,
        cache,
        swap: never(),
        health: Arc::new(Health::new(Duration::from_secs(60))),
        control: Arc::default(),
    };
    let one = MicroBatch {
        rows: vec![row],
        items: vec![(pending, 1)],
    };
    batch.send(one).unwrap();
    drop(batch);
    stage.run().unwrap();
    let outcomes = all.iter().flatten().map(|one| one.outcome);
    let (decided, rejected): (Vec<_>, Vec<_>) =
        outcomes.partition(|outcome| matches!(outcome, Outcome::Scored { scored, .. } if scored.margin == 2.5));
    (decided.len(), rejected.len())
}

#[test]
fn a_failure_rejects_only_comments_that_were_scored_themselves() {
    assert_eq!(decided_and_rejected(0), (4, 0));
    assert_eq!(decided_and_rejected(1), (3, 1));
    assert_eq!(decided_and_rejected(3), (1, 3));
    assert_eq!(decided_and_rejected(100), (0, 4));
}

#[test]
fn the_largest_margin_is_used_unless_one_is_missing() {
    let error = || ScoreError::NotFinite {
        row: 0,
        margin: f32::NAN,
    };
    let check = |carried: CarriedMargin, margins: Vec<Result<f32, ScoreError>>, expected: Option<f32>| {
        let found = with_carried(carried, margins.into_iter());
        assert_eq!(found.and_then(Result::ok), expected);
    };
    check(None, vec![Ok(-1.0), Ok(2.0), Ok(1.0)], Some(2.0));
    check(Some(Ok(3.0)), vec![Ok(2.0)], Some(3.0));
    check(Some(Ok(3.0)), vec![], Some(3.0));
    check(Some(Err(error())), vec![Ok(2.0)], None);
    check(None, vec![Ok(2.0), Err(error()), Ok(3.0)], None);
}

#[test]
fn a_comment_that_fails_takes_its_own_margins_and_no_others() {
    let error = || ScoreError::NotFinite {
        row: 0,
        margin: f32::NAN,
    };
    for carried in [None, Some(Ok(1.0)), Some(Err(error()))] {
        let mut margins = [Err(error()), Ok(9.0), Ok(-1.0), Ok(-2.0)].into_iter();
        assert!(with_carried(carried, margins.by_ref().take(2)).is_some_and(|margin| margin.is_err()));
        let next = with_carried(None, margins.by_ref().take(1));
        assert_eq!(next.and_then(Result::ok), Some(-1.0));
        assert_eq!(margins.len(), 1);
    }
}
