//! Checks before the first comment that the scorer works, and finds the token budget of its micro-batches.

use std::time::{Duration, Instant};

use tracing::{debug, warn};

use crate::scorer::{Row, ScoreError, Scorer, score_checked};

/// The longest time that scoring one micro-batch should take. At full load a comment waits at least this long, and a
/// drain or a stop has to wait for the current micro-batch.
const LONGEST_BATCH: Duration = Duration::from_secs(1);

/// A micro-batch that takes less is run once more when it is measured.
const SHORT_BATCH: Duration = Duration::from_millis(50);

/// The size in own tokens of the first micro-batch that is measured. Smaller ones are slow on every device.
const SMALLEST_BATCH: usize = 512;

/// A size is fast enough if it reaches this share of the best rate. The smallest such size is chosen, so that a comment
/// waits for as few others as possible.
const GOOD_ENOUGH: f64 = 0.95;

/// The measurement of micro-batches of one size.
#[derive(Debug, Clone, Copy, PartialEq)]
struct MeasuredSize {
    max_tokens: usize,
    tokens_per_second: f64,
    took: Duration,
}

/// The token budget that was chosen, with measured rates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeasuredBudget {
    /// The token budget: the largest number of own tokens in a micro-batch.
    pub max_tokens: usize,
    /// The rate at that size, in own tokens per second.
    pub tokens_per_second: f64,
    /// The rate of the smallest micro-batch that was measured, in own tokens per second.
    pub smallest_batch_tokens_per_second: f64,
}

/// Scores the canary, then measures micro-batches of growing size, and chooses the token budget.
///
/// Sizes grow up to `limit` own tokens, to what the device has memory for, and to what takes a second; the smallest
/// size may take longer. The budget is the smallest size that is nearly as fast as the fastest.
///
/// # Errors
/// Returns an error if the canary or the smallest micro-batch cannot be scored.
pub fn warm_up(scorer: &mut dyn Scorer, canary: &[Row], limit: usize) -> Result<MeasuredBudget, ScoreError> {
    score_checked(scorer, canary)?;
    let mut measured = vec![measure(scorer, canary, SMALLEST_BATCH.min(limit))?];
    let limit = scorer.token_capacity().map_or(limit, |capacity| capacity.min(limit));
    while let Some(size) = next_size(&measured, limit) {
        match measure(scorer, canary, size) {
            Ok(batch) => measured.push(batch),
            Err(error) => {
                warn!(max_tokens = size, %error, "cannot score a micro-batch of this size, using a smaller one");
                break;
            }
        }
    }
    for size in &measured {
        debug!(
            max_tokens = size.max_tokens,
            tokens_per_second = size.tokens_per_second.round(),
            "measured a micro-batch"
        );
    }
    let chosen = choose(&measured);
    Ok(MeasuredBudget {
        max_tokens: chosen.max_tokens,
        tokens_per_second: chosen.tokens_per_second,
        smallest_batch_tokens_per_second: measured[0].tokens_per_second,
    })
}

/// Scores the canary and one micro-batch of `max_tokens` own tokens, or of fewer if the device has no memory for that
/// many, since another model may still be in service beside this one.
///
/// # Errors
/// Returns an error if either cannot be scored.
pub fn check_budget(scorer: &mut dyn Scorer, canary: &[Row], max_tokens: usize) -> Result<(), ScoreError> {
    score_checked(scorer, canary)?;
    let capacity = scorer.token_capacity().unwrap_or(max_tokens);
    score_checked(scorer, &fill(canary, max_tokens.min(capacity)))?;
    Ok(())
}

/// Measures one micro-batch, three times unless a run takes long: the first run also allocates memory, and loads and
/// selects kernels, and the second one may prepare what makes later ones of this size fast.
fn measure(scorer: &mut dyn Scorer, canary: &[Row], max_tokens: usize) -> Result<MeasuredSize, ScoreError> {
    let rows = fill(canary, max_tokens);
    let mut time = || {
        let start = Instant::now();
        score_checked(scorer, &rows)?;
        Ok(start.elapsed())
    };
    let mut took = time()?;
    if took < 3 * LONGEST_BATCH {
        took = took.min(time()?);
    }
    if took < SHORT_BATCH {
        took = took.min(time()?);
    }
    let tokens: usize = rows.iter().map(Row::own_tokens).sum();
    Ok(MeasuredSize {
        max_tokens,
        tokens_per_second: tokens as f64 / took.as_secs_f64().max(1e-6),
        took,
    })
}

/// Returns the size to measure next: twice the last, but at most `limit`.
///
/// Returns `None` if that is not larger, if it would take too long, or if neither of the last two sizes was clearly
/// faster than the one before them.
fn next_size(measured: &[MeasuredSize], limit: usize) -> Option<usize> {
    let last = measured.last()?;
    let size = (2 * last.max_tokens).min(limit);
    let no_gain = match measured {
        [.., before, middle, last] => {
            let best = middle.tokens_per_second.max(last.tokens_per_second);
            best * GOOD_ENOUGH < before.tokens_per_second
        }
        _ => false,
    };
    (size > last.max_tokens && 2 * last.took <= LONGEST_BATCH && !no_gain).then_some(size)
}

fn choose(measured: &[MeasuredSize]) -> MeasuredSize {
    let in_time = || measured.iter().filter(|batch| batch.took <= LONGEST_BATCH);
    let best = in_time().map(|batch| batch.tokens_per_second).fold(0.0, f64::max);
    let fast = |batch: &&MeasuredSize| batch.tokens_per_second >= GOOD_ENOUGH * best;
    // On a slow device, even the smallest size may take too long.
    *in_time().find(fast).unwrap_or(&measured[0])
}

/// Repeats the rows of the canary as long as they fit into `tokens` own tokens.
fn fill(canary: &[Row], tokens: usize) -> Vec<Row> {
    let mut total = 0;
    let fits = |row: &&Row| {
        total += row.own_tokens();
        total <= tokens
    };
    canary.iter().cycle().take_while(fits).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a fixed time for each token.
    struct SlowScorer {
        per_token: Duration,
        capacity: Option<usize>,
        largest: usize,
    }

    impl Scorer for SlowScorer {
        fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
            let tokens: usize = rows.iter().map(Row::own_tokens).sum();
            self.largest = self.largest.max(tokens);
            std::thread::sleep(self.per_token * u32::try_from(tokens).unwrap());
            Ok(vec![0.0; rows.len()])
        }

        fn token_capacity(&self) -> Option<usize> {
            self.capacity
        }
    }

    #[test]
    fn a_batch_exceeds_neither_the_limit_nor_memory_nor_a_second() {
        let canary = [Row {
            tokens: vec![0; 20].into(),
            shared: 10,
        }];
        let run = |per_token, limit, capacity| {
            let mut scorer = SlowScorer {
                per_token,
                capacity,
                largest: 0,
            };
            let budget = warm_up(&mut scorer, &canary, limit).unwrap();
            assert!(budget.max_tokens <= scorer.largest + 10 && scorer.largest <= limit);
            scorer.largest
        };
        assert_eq!(run(Duration::ZERO, 100, None), 100);
        assert!(run(Duration::ZERO, 4096, Some(1500)) <= 1500);
        // At most 600 tokens per second: on a loaded machine, a sleep can only take longer.
        assert_eq!(run(Duration::from_micros(1667), 4096, None), 510);
    }

    #[test]
    fn a_size_that_cannot_be_scored_is_not_chosen() {
        struct LittleMemory;
        impl Scorer for LittleMemory {
            fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
                std::thread::sleep(Duration::from_millis(5));
                if rows.len() > 100 {
                    let reason = "out of memory".to_owned();
                    return Err(ScoreError::Failed {
                        rows: rows.len(),
                        reason,
                    });
                }
                Ok(vec![0.0; rows.len()])
            }
        }
        let canary = [Row {
            tokens: vec![0; 10].into(),
            shared: 0,
        }];
        // A call takes the same time for every size, so a larger batch has a higher rate. A batch of 1024 tokens fails.
        assert_eq!(warm_up(&mut LittleMemory, &canary, 4096).unwrap().max_tokens, 512);
    }

    fn measured(sizes: &[(usize, f64)]) -> Vec<MeasuredSize> {
        let batch = |&(max_tokens, tokens_per_second): &(usize, f64)| MeasuredSize {
            max_tokens,
            tokens_per_second,
            took: Duration::from_secs_f64(max_tokens as f64 / tokens_per_second),
        };
        sizes.iter().map(batch).collect()
    }

    #[test]
    fn the_smallest_of_nearly_the_fastest_sizes_is_chosen() {
        let check = |sizes: &[(usize, f64)], expected: usize| {
            assert_eq!(choose(&measured(sizes)).max_tokens, expected, "{sizes:?}");
        };
        check(&[(512, 1000.0)], 512);
        check(&[(512, 1000.0), (1024, 1040.0)], 512);
        check(&[(512, 1e4), (1024, 1.9e4), (2048, 2e4)], 1024);
        check(&[(512, 1e4), (1024, 9e3), (2048, 1.1e4)], 2048);
        // A size that takes longer than a second is chosen only if all do.
        check(&[(512, 600.0), (1024, 900.0)], 512);
        check(&[(512, 100.0)], 512);
    }

    #[test]
    fn sizes_double_until_that_no_longer_helps_or_a_bound_is_reached() {
        let check = |sizes: &[(usize, f64)], limit: usize, expected: Option<usize>| {
            assert_eq!(next_size(&measured(sizes), limit), expected, "{sizes:?}");
        };
        check(&[(512, 1e5)], 4096, Some(1024));
        check(&[(512, 1e5)], 600, Some(600));
        check(&[(512, 1e5)], 512, None);
        check(&[(512, 600.0)], 4096, None);
        check(&[(512, 1e5), (1024, 1e5)], 4096, Some(2048));
        check(&[(512, 1e5), (1024, 1e5), (2048, 1.1e5)], 8192, Some(4096));
        check(&[(512, 1e5), (1024, 9e4), (2048, 9.9e4)], 8192, None);
    }
}
