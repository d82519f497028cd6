//! Distinguishes a device fault from a bad comment when a micro-batch cannot be scored.
//!
//! The canary decides, because its rows are known to be good. If it fails too, the device is at fault, and nothing can
//! be concluded about any comment. If it succeeds, the batch is halved repeatedly until the rows that cannot be scored
//! are isolated. A batch that is too large for the device's memory succeeds once its parts are small enough.

use crate::scorer::{Row, ScoreError, Scorer, score_checked};

/// The scorer failed on the canary.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DeviceFault(pub ScoreError);

/// Searches a micro-batch for the rows that cannot be scored.
pub struct FailureSearch<'a> {
    pub scorer: &'a mut dyn Scorer,
    /// Rows that are known to be good.
    pub canary: &'a [Row],
    /// The number of calls that failed although the canary succeeded.
    pub failures: u64,
}

impl FailureSearch<'_> {
    /// Returns the margin of each row, or the reason why that row cannot be scored, given the result of the first
    /// attempt to score them together.
    ///
    /// # Errors
    /// Returns an error if the canary cannot be scored.
    pub fn resolve(
        &mut self,
        rows: &[Row],
        first_attempt: Result<Vec<f32>, ScoreError>,
    ) -> Result<Vec<Result<f32, ScoreError>>, DeviceFault> {
        let error = match first_attempt {
            Ok(margins) => return Ok(margins.into_iter().map(Ok).collect()),
            Err(error) => error,
        };
        score_checked(self.scorer, self.canary).map_err(DeviceFault)?;
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
        let first_attempt = score_checked(self.scorer, rows);
        self.resolve(rows, first_attempt)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns the first token of each row as its margin. Fails on poison rows and on more rows than fit.
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
        let mut search = FailureSearch {
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
    fn a_panic_counts_as_a_failure_of_its_row() {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        let found = search(&mut scripted(&[], 10), &[1, 99, 3]);
        std::panic::set_hook(hook);
        assert_eq!(found, Ok(vec![Some(1.0), None, Some(3.0)]));
    }

    #[test]
    fn a_device_fault_is_not_attributed_to_comments() {
        let failing_canary = scripted(&[1, 2, 1000], 10);
        assert_eq!(
            search(&mut { failing_canary }, &[1, 2]),
            Err("row 0 has margin NaN, expected a finite number".to_owned())
        );
        // The device may also fail in the middle of the search.
        let mut failing = PoisonedScorer {
            calls_left: 4,
            ..scripted(&[2], 10)
        };
        assert_eq!(
            search(&mut failing, &[1, 2, 3, 4]),
            Err("cannot score 1 row: device lost".to_owned())
        );
    }

    proptest! {
        /// Only the poison rows fail, however many rows fit at once.
        #[test]
        fn only_poison_rows_are_isolated(
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
