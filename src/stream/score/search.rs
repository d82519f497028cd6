//! When a micro-batch cannot be scored: is it the device, or a comment?
//!
//! A canary, rows that are known to be good, tells. If it fails too, it is the device, and nothing can
//! be said of any comment. If it passes, the rows are halved until those that cannot be scored stand
//! alone. A batch that was too large for the memory succeeds in halves.

use crate::scorer::{Row, ScoreError, Scorer, call};

/// The scorer fails on the canary.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DeviceFault(pub ScoreError);

/// A scorer, and rows that it has scored before.
pub struct Search<'a> {
    /// The scorer.
    pub scorer: &'a mut dyn Scorer,
    /// Known to be good.
    pub canary: &'a [Row],
    /// Calls that failed although the canary passed.
    pub failures: u64,
}

impl Search<'_> {
    /// The margin of each row, or why it alone has none, given how the first try to score them ended.
    ///
    /// # Errors
    /// The canary fails.
    pub fn resolve(
        &mut self,
        rows: &[Row],
        tried: Result<Vec<f32>, ScoreError>,
    ) -> Result<Vec<Result<f32, ScoreError>>, DeviceFault> {
        let error = match tried {
            Ok(margins) => return Ok(margins.into_iter().map(Ok).collect()),
            Err(error) => error,
        };
        call(self.scorer, self.canary).map_err(DeviceFault)?;
        self.failures += 1;
        if rows.len() <= 1 {
            return Ok(rows.iter().map(|_| error.clone()).map(Err).collect());
        }
        let (first, second) = rows.split_at(rows.len() / 2);
        let mut margins = self.score(first)?;
        margins.extend(self.score(second)?);
        Ok(margins)
    }

    fn score(&mut self, rows: &[Row]) -> Result<Vec<Result<f32, ScoreError>>, DeviceFault> {
        let tried = call(self.scorer, rows);
        self.resolve(rows, tried)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Gives each row its own cost as margin; fails on poison and on more rows than fit.
    struct PoisonedScorer {
        poison: Vec<u32>,
        max_rows: usize,
        calls_left: usize,
    }

    impl Scorer for PoisonedScorer {
        fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
            let failed = |reason: &str| ScoreError::Failed {
                rows: rows.len(),
                reason: reason.into(),
            };
            self.calls_left = self.calls_left.checked_sub(1).ok_or_else(|| failed("device lost"))?;
            if rows.len() > self.max_rows {
                return Err(failed("out of memory"));
            }
            assert!(!rows.iter().any(|row| row.tokens[0] == 99), "a bug");
            match rows.iter().position(|row| self.poison.contains(&row.tokens[0])) {
                Some(row) => Err(ScoreError::NotFinite { row, margin: f32::NAN }),
                None => Ok(rows.iter().map(|row| row.tokens[0] as f32).collect()),
            }
        }
    }

    fn row(id: u32) -> Row {
        Row {
            tokens: vec![id].into(),
            shared: 0,
        }
    }

    fn search(scorer: &mut PoisonedScorer, ids: &[u32]) -> Result<Vec<Option<f32>>, String> {
        let rows: Vec<Row> = ids.iter().map(|&id| row(id)).collect();
        let canary = [row(1000)];
        let mut search = Search {
            scorer,
            canary: &canary,
            failures: 0,
        };
        let margins = search.score(&rows).map_err(|error| error.to_string())?;
        Ok(margins.into_iter().map(Result::ok).collect())
    }

    fn scripted(poison: &[u32], max_rows: usize) -> PoisonedScorer {
        PoisonedScorer {
            poison: poison.to_vec(),
            max_rows,
            calls_left: usize::MAX,
        }
    }

    #[test]
    fn a_panic_is_a_failure_of_its_row() {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        let found = search(&mut scripted(&[], 10), &[1, 99, 3]);
        std::panic::set_hook(hook);
        assert_eq!(found, Ok(vec![Some(1.0), None, Some(3.0)]));
    }

    #[test]
    fn a_device_that_fails_is_not_the_comments_fault() {
        let all = scripted(&[1, 2, 1000], 10);
        assert_eq!(
            search(&mut { all }, &[1, 2]),
            Err("row 0 has margin NaN, expected a finite number".to_owned())
        );
        // It may also go away in the middle of the search.
        let mut dying = PoisonedScorer {
            calls_left: 4,
            ..scripted(&[2], 10)
        };
        assert_eq!(
            search(&mut dying, &[1, 2, 3, 4]),
            Err("cannot score 1 rows: device lost".to_owned())
        );
    }

    proptest! {
        /// Exactly the poison fails, whatever fits at once.
        #[test]
        fn exactly_the_poison_stands_alone(
            ids in prop::collection::vec(0u32..30, 0..40),
            poison in prop::collection::vec(0u32..30, 0..4),
            max_rows in 1usize..50,
        ) {
            let found = search(&mut scripted(&poison, max_rows), &ids).unwrap();
            let expected: Vec<Option<f32>> = ids
                .iter()
                .map(|id| (!poison.contains(id)).then_some(*id as f32))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
