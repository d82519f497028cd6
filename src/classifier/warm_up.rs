//! Before the first comment: the scorer works, and how much it can take at once.

use std::time::{Duration, Instant};

use tracing::{debug, warn};

use crate::scorer::call;
use crate::scorer::{Row, ScoreError, Scorer};

/// A micro-batch should not take longer: it is the least that a comment waits at full load, and what
/// a drain or a stopping device is held up by.
const LONGEST_BATCH: Duration = Duration::from_secs(1);

/// Own tokens of the first micro-batch that is tried: no smaller one is fast on any device.
const SMALLEST_BATCH: usize = 512;

/// What may be given up of the best rate, so that comments wait for fewer others.
const GOOD_ENOUGH: f64 = 0.95;

/// A micro-batch of a size that was tried.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Tried {
    max_tokens: usize,
    tokens_per_second: f64,
    took: Duration,
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warm {
    /// Own tokens of a micro-batch, the batch budget.
    pub max_tokens: usize,
    /// Own tokens per second at that size.
    pub tokens_per_second: f64,
    /// The same in the smallest micro-batch that was tried.
    pub slowest: f64,
}

/// Scores the canary, and then batches of growing size: up to `limit` own tokens, what the device's memory has
/// room for, and what takes a second; the smallest may take longer. The budget is the smallest that is about as fast
/// as the fastest.
///
/// # Errors
/// The scorer fails on the canary or on the smallest batch.
pub fn warm_up(scorer: &mut dyn Scorer, canary: &[Row], limit: usize) -> Result<Warm, ScoreError> {
    call(scorer, canary)?;
    let mut tried = vec![measure(scorer, canary, SMALLEST_BATCH.min(limit))?];
    let limit = scorer.room().map_or(limit, |room| room.min(limit));
    while let Some(size) = next(&tried, limit) {
        match measure(scorer, canary, size) {
            Ok(batch) => tried.push(batch),
            Err(error) => {
                warn!(max_tokens = size, %error, "no micro-batch of this size can be scored: keeping to smaller ones");
                break;
            }
        }
    }
    debug!(?tried, "micro-batches tried");
    let chosen = choose(&tried);
    Ok(Warm {
        max_tokens: chosen.max_tokens,
        tokens_per_second: chosen.tokens_per_second,
        slowest: tried[0].tokens_per_second,
    })
}

/// Scores the canary and one batch of `max_tokens` own tokens, or of what there is room for: beside it another
/// model may still be served.
///
/// # Errors
/// The scorer fails.
pub fn verify(scorer: &mut dyn Scorer, canary: &[Row], max_tokens: usize) -> Result<(), ScoreError> {
    call(scorer, canary)?;
    let max_tokens = scorer.room().map_or(max_tokens, |room| room.min(max_tokens));
    call(scorer, &fill(canary, max_tokens))?;
    Ok(())
}

/// One batch timed, a second time unless that takes long: the first makes room, and loads and chooses kernels.
fn measure(scorer: &mut dyn Scorer, canary: &[Row], max_tokens: usize) -> Result<Tried, ScoreError> {
    let rows = fill(canary, max_tokens);
    let mut time = || {
        let start = Instant::now();
        call(scorer, &rows)?;
        Ok(start.elapsed())
    };
    let mut took = time()?;
    if took < 3 * LONGEST_BATCH {
        took = took.min(time()?);
    }
    let tokens: usize = rows.iter().map(Row::cost).sum();
    Ok(Tried {
        max_tokens,
        tokens_per_second: tokens as f64 / took.as_secs_f64().max(1e-6),
        took,
    })
}

/// The size to try next: twice the last, unless that would take too long, is too much, or two doublings in a row
/// have brought nothing.
fn next(tried: &[Tried], limit: usize) -> Option<usize> {
    let last = tried.last()?;
    let size = (2 * last.max_tokens).min(limit);
    let brings_nothing = match tried {
        [.., before, middle, last] => {
            let best = middle.tokens_per_second.max(last.tokens_per_second);
            best * GOOD_ENOUGH < before.tokens_per_second
        }
        _ => false,
    };
    (size > last.max_tokens && 2 * last.took <= LONGEST_BATCH && !brings_nothing).then_some(size)
}

fn choose(tried: &[Tried]) -> Tried {
    let in_time = || tried.iter().filter(|batch| batch.took <= LONGEST_BATCH);
    let best = in_time().map(|batch| batch.tokens_per_second).fold(0.0, f64::max);
    let fast = |batch: &&Tried| batch.tokens_per_second >= GOOD_ENOUGH * best;
    // On a slow device even the smallest may take too long.
    *in_time().find(fast).unwrap_or(&tried[0])
}

/// Rows of the canary over and over, up to `tokens`.
fn fill(canary: &[Row], tokens: usize) -> Vec<Row> {
    let mut total = 0;
    let fits = |row: &&Row| {
        total += row.cost();
        total <= tokens
    };
    canary.iter().cycle().take_while(fits).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a fixed time a token.
    struct Slow {
        per_token: Duration,
        room: Option<usize>,
        largest: usize,
    }

    impl Scorer for Slow {
        fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
            let tokens: usize = rows.iter().map(Row::cost).sum();
            self.largest = self.largest.max(tokens);
            std::thread::sleep(self.per_token * u32::try_from(tokens).unwrap());
            Ok(vec![0.0; rows.len()])
        }

        fn room(&self) -> Option<usize> {
            self.room
        }
    }

    #[test]
    fn no_batch_is_larger_than_the_limit_the_room_and_a_second() {
        let canary = [Row {
            tokens: vec![0; 20].into(),
            shared: 10,
        }];
        let run = |per_token, limit, room| {
            let mut scorer = Slow {
                per_token,
                room,
                largest: 0,
            };
            let warm = warm_up(&mut scorer, &canary, limit).unwrap();
            assert!(warm.max_tokens <= scorer.largest + 10 && scorer.largest <= limit);
            scorer.largest
        };
        assert_eq!(run(Duration::ZERO, 100, None), 100);
        assert!(run(Duration::ZERO, 4096, Some(1500)) <= 1500);
        // 600 tokens a second at most; a loaded machine sleeps longer, never shorter.
        assert_eq!(run(Duration::from_micros(1667), 4096, None), 510);
    }

    /// Memory that ends at some size: the sizes below serve.
    #[test]
    fn a_size_that_fails_is_not_served() {
        struct Small;
        impl Scorer for Small {
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
        // One call costs the same whatever its size, so the larger, the faster: 512, 1024 fails.
        assert_eq!(warm_up(&mut Small, &canary, 4096).unwrap().max_tokens, 512);
    }

    fn tried(sizes: &[(usize, f64)]) -> Vec<Tried> {
        let batch = |&(max_tokens, tokens_per_second): &(usize, f64)| Tried {
            max_tokens,
            tokens_per_second,
            took: Duration::from_secs_f64(max_tokens as f64 / tokens_per_second),
        };
        sizes.iter().map(batch).collect()
    }

    #[test]
    fn the_smallest_that_is_about_as_fast_is_chosen() {
        let check = |sizes: &[(usize, f64)], expected: usize| {
            assert_eq!(choose(&tried(sizes)).max_tokens, expected, "{sizes:?}");
        };
        check(&[(512, 1000.0)], 512);
        check(&[(512, 1000.0), (1024, 1040.0)], 512);
        check(&[(512, 1e4), (1024, 1.9e4), (2048, 2e4)], 1024);
        check(&[(512, 1e4), (1024, 9e3), (2048, 1.1e4)], 2048);
        // Of those that take no longer than a second.
        check(&[(512, 600.0), (1024, 900.0)], 512);
        check(&[(512, 100.0)], 512);
    }

    #[test]
    fn sizes_double_while_it_helps() {
        let check = |sizes: &[(usize, f64)], limit: usize, expected: Option<usize>| {
            assert_eq!(next(&tried(sizes), limit), expected, "{sizes:?}");
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
