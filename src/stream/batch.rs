//! Gathers rows into micro-batches that are limited by tokens and by waiting time.
//!
//! This module reads no clock: `now` is an argument. Rows leave in the order in which they were added. The rows of an
//! item may be spread over several micro-batches; because the order is kept, only the last item of a micro-batch can be
//! incomplete, and its remaining rows come first in the next one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::scorer::Row;

/// The limits of a micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The token budget: own tokens of all rows together. A longer row forms a micro-batch by itself.
    pub max_tokens: usize,
    /// How long an item may wait for others to share a micro-batch with.
    pub linger: Duration,
}

/// Gathers items and their rows until a micro-batch is full or its oldest item has waited long enough.
#[derive(Debug)]
pub struct Batcher<T> {
    limits: Limits,
    rows: VecDeque<Row>,
    /// The items that the waiting rows belong to, each with its number of waiting rows.
    items: VecDeque<Waiting<T>>,
    tokens: usize,
}

#[derive(Debug)]
struct Waiting<T> {
    item: T,
    rows: usize,
    since: Instant,
}

/// Rows that are scored in one pass through the model.
#[derive(Debug)]
pub struct MicroBatch<T> {
    /// The rows, in the order in which they were added.
    pub rows: Vec<Row>,
    /// The items that these rows complete, in order, each with its number of rows in this micro-batch.
    ///
    /// Any further rows belong to an item that a later micro-batch completes.
    pub items: Vec<(T, usize)>,
}

impl<T> MicroBatch<T> {
    /// Returns the own tokens of all rows together.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(Row::own_tokens).sum()
    }
}

impl<T> Batcher<T> {
    /// Creates an empty batcher.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            rows: VecDeque::new(),
            items: VecDeque::new(),
            tokens: 0,
        }
    }

    /// Adds an item with its rows, of which there must be at least one.
    pub fn push(&mut self, item: T, rows: Vec<Row>, now: Instant) {
        debug_assert!(!rows.is_empty(), "an item without rows would never be completed");
        self.tokens += rows.iter().map(Row::own_tokens).sum::<usize>();
        self.items.push_back(Waiting {
            item,
            rows: rows.len(),
            since: now,
        });
        self.rows.extend(rows);
    }

    /// Returns whether the token budget is reached; a micro-batch should then be taken before more is added.
    pub fn is_full(&self) -> bool {
        self.tokens >= self.limits.max_tokens
    }

    /// Returns when the oldest item will have waited long enough, or `None` if no item waits.
    pub fn due(&self) -> Option<Instant> {
        self.items.front().map(|oldest| oldest.since + self.limits.linger)
    }

    /// Returns whether a micro-batch should be taken now, because it is full or its oldest item has waited enough.
    pub fn is_due(&self, now: Instant) -> bool {
        self.is_full() || self.due().is_some_and(|due| due <= now)
    }

    /// Returns the number of waiting items and of their own tokens.
    pub fn waiting(&self) -> (usize, usize) {
        (self.items.len(), self.tokens)
    }

    /// Takes the next micro-batch, whether it is due or not; returns `None` if no row waits.
    pub fn take(&mut self) -> Option<MicroBatch<T>> {
        let mut tokens = 0;
        let fits = |row: &&Row| {
            tokens += row.own_tokens();
            tokens <= self.limits.max_tokens
        };
        let count = self.rows.iter().take_while(fits).count().max(1).min(self.rows.len());
        let rows: Vec<Row> = self.rows.drain(..count).collect();
        self.tokens -= rows.iter().map(Row::own_tokens).sum::<usize>();
        let mut left = rows.len();
        let mut items = Vec::new();
        while left > 0 {
            // Every row belongs to an item, so there is an item as long as rows are left.
            let Some(mut first) = self.items.pop_front() else { break };
            if first.rows > left {
                first.rows -= left;
                self.items.push_front(first);
                break;
            }
            left -= first.rows;
            items.push((first.item, first.rows));
        }
        (!rows.is_empty()).then_some(MicroBatch { rows, items })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINGER: Duration = Duration::from_millis(20);

    fn row(tokens: usize) -> Row {
        Row {
            tokens: vec![0; tokens + 3].into(),
            shared: 3,
        }
    }

    fn batcher(max_tokens: usize) -> Batcher<usize> {
        Batcher::new(Limits {
            max_tokens,
            linger: LINGER,
        })
    }

    #[test]
    fn a_batch_is_due_when_full_or_old_enough() {
        let (mut batcher, start) = (batcher(10), Instant::now());
        assert!(!batcher.is_due(start) && batcher.due().is_none() && batcher.take().is_none());
        batcher.push(1, vec![row(4)], start);
        assert!(!batcher.is_due(start) && !batcher.is_full());
        assert_eq!(batcher.due(), Some(start + LINGER));
        assert!(batcher.is_due(start + LINGER));
        batcher.push(2, vec![row(6)], start + LINGER / 2);
        assert!(batcher.is_full() && batcher.is_due(start));
        let batch = batcher.take().unwrap();
        assert_eq!(
            (batch.rows.len(), batch.tokens(), batch.items),
            (2, 10, vec![(1, 1), (2, 1)])
        );
        assert_eq!(batcher.waiting(), (0, 0));
    }

    #[test]
    fn an_item_is_complete_with_its_last_row() {
        let (mut batcher, start) = (batcher(10), Instant::now());
        batcher.push(1, vec![row(6), row(6), row(30)], start);
        batcher.push(2, vec![row(2)], start);
        let take = |batcher: &mut Batcher<usize>| {
            let batch = batcher.take().unwrap();
            (batch.tokens(), batch.items)
        };
        assert_eq!(take(&mut batcher), (6, vec![]));
        assert_eq!(take(&mut batcher), (6, vec![]));
        // A row longer than the budget forms a micro-batch by itself.
        assert_eq!(take(&mut batcher), (30, vec![(1, 1)]));
        // The item left in the batcher is as old as before.
        assert_eq!(batcher.due(), Some(start + LINGER));
        assert_eq!(take(&mut batcher), (2, vec![(2, 1)]));
    }

    proptest! {
        /// No row is lost, duplicated or reordered, no limit is exceeded, and no item waits longer than its linger.
        #[test]
        fn every_row_is_taken_once_in_order_and_in_time(
            items in prop::collection::vec((prop::collection::vec(1usize..15, 1..5), 0u64..8), 0..40),
            max_tokens in 5usize..30,
        ) {
            let (mut batcher, mut now) = (batcher(max_tokens), Instant::now());
            let mut expected_rows: Vec<usize> = Vec::new();
            let (mut rows, mut completed, mut pending) = (Vec::new(), Vec::new(), 0usize);
            let mut batches = Vec::new();
            for (id, (costs, wait)) in items.iter().enumerate() {
                now += Duration::from_millis(*wait);
                while batcher.is_due(now) {
                    batches.push(batcher.take().unwrap());
                }
                prop_assert!(batcher.due().is_none_or(|due| due > now), "waited longer than its linger");
                prop_assert!(batcher.waiting().1 < max_tokens);
                expected_rows.extend(costs);
                batcher.push(id, costs.iter().map(|&cost| row(cost)).collect(), now);
            }
            batches.extend(std::iter::from_fn(|| batcher.take()));
            prop_assert_eq!(batcher.waiting(), (0, 0));
            for batch in batches {
                prop_assert!(batch.tokens() <= max_tokens || batch.rows.len() == 1);
                rows.extend(batch.rows.iter().map(Row::own_tokens));
                pending += batch.rows.len();
                for (id, count) in batch.items {
                    completed.push(id);
                    pending -= count;
                }
                // The remaining rows belong to the next item alone.
                prop_assert!(pending == 0 || pending < items[completed.len()].0.len());
                // The count of an item's rows covers only the batch that completes it.
                pending = 0;
            }
            prop_assert_eq!(rows, expected_rows);
            prop_assert_eq!(completed, (0..items.len()).collect::<Vec<_>>());
        }
    }
}
