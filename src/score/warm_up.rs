//! Before the first comment: the scorer works, and how much it can take at once.

use std::time::{Duration, Instant};

use super::search::call;
use super::{Row, ScoreError, Scorer};

/// A micro-batch should not take longer: it is the least that a comment waits at full load, and what
/// a drain or a stopping device is held up by.
const LONGEST_BATCH: Duration = Duration::from_secs(1);

/// Below this many tokens a batch gains nothing by being smaller.
const SMALLEST_BATCH: usize = 512;

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warm {
    /// Own tokens of a micro-batch: what was asked for, or as many as the scorer runs in a second.
    pub max_tokens: usize,
    /// Own tokens per second, in small batches.
    pub tokens_per_second: f64,
}

/// Scores the canary and a batch of the size that will be used.
///
/// # Errors
/// The scorer fails.
pub fn warm_up(scorer: &mut dyn Scorer, canary: &[Row], max_tokens: usize) -> Result<Warm, ScoreError> {
    call(scorer, canary)?;
    let first = fill(canary, SMALLEST_BATCH.min(max_tokens));
    let start = Instant::now();
    call(scorer, &first)?;
    let seconds = start.elapsed().as_secs_f64().max(1e-6);
    let tokens: usize = first.iter().map(Row::cost).sum();
    let tokens_per_second = tokens as f64 / seconds;
    let in_time = (tokens_per_second * LONGEST_BATCH.as_secs_f64()) as usize;
    let size = in_time.max(SMALLEST_BATCH).min(max_tokens);
    call(scorer, &fill(canary, size))?;
    Ok(Warm {
        max_tokens: size,
        tokens_per_second,
    })
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
        largest: usize,
    }

    impl Scorer for Slow {
        fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
            let tokens: usize = rows.iter().map(Row::cost).sum();
            self.largest = self.largest.max(tokens);
            std::thread::sleep(self.per_token * u32::try_from(tokens).unwrap());
            Ok(vec![0.0; rows.len()])
        }
    }

    #[test]
    fn the_size_is_what_was_tried_and_never_above_the_limit() {
        let canary = [Row {
            tokens: vec![0; 20].into(),
            shared: 10,
        }];
        let run = |per_token, max_tokens| {
            let mut scorer = Slow { per_token, largest: 0 };
            let size = warm_up(&mut scorer, &canary, max_tokens).unwrap().max_tokens;
            assert!(scorer.largest <= size && scorer.largest + 10 > size);
            size
        };
        assert_eq!(run(Duration::ZERO, 4096), 4096);
        assert_eq!(run(Duration::ZERO, 100), 100);
        // 600 tokens a second at most; a loaded machine sleeps longer, never shorter.
        let size = run(Duration::from_micros(1667), 4096);
        assert!((SMALLEST_BATCH..=600).contains(&size), "{size}");
    }
}
