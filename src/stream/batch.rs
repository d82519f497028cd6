//! The micro-batcher: rows in, micro-batches out, bounded by tokens and age.
//!
//! Pure: `now` is an argument. Rows leave in the order in which they came. An item's rows may be
//! spread over several micro-batches; since order holds, only the last item of a micro-batch can be
//! unfinished, and its other rows lead the next one.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::scorer::Row;

/// What a micro-batch is bounded by.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Own tokens of all rows; a single longer row stands alone.
    pub max_tokens: usize,
    /// How long an item may wait for company.
    pub linger: Duration,
}

/// Gathers items until they are worth a pass through the model.
#[derive(Debug)]
pub struct Batcher<T> {
    limits: Limits,
    rows: VecDeque<Row>,
    /// Items whose last row still waits, and how many of their rows do.
    items: VecDeque<Waiting<T>>,
    tokens: usize,
}

#[derive(Debug)]
struct Waiting<T> {
    item: T,
    rows: usize,
    since: Instant,
}

/// Rows to score in one go.
#[derive(Debug)]
pub struct MicroBatch<T> {
    /// In order of arrival.
    pub rows: Vec<Row>,
    /// The items that are complete with these rows, and how many of the rows are theirs, in order.
    /// Rows beyond belong to an item that a later micro-batch completes.
    pub items: Vec<(T, usize)>,
}

impl<T> MicroBatch<T> {
    /// Own tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(Row::cost).sum()
    }
}

impl<T> Batcher<T> {
    /// An empty one.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            rows: VecDeque::new(),
            items: VecDeque::new(),
            tokens: 0,
        }
    }

    /// Adds an item with its rows, of which there is at least one.
    pub fn push(&mut self, item: T, rows: Vec<Row>, now: Instant) {
        debug_assert!(!rows.is_empty(), "an item without rows would never be completed");
        self.tokens += rows.iter().map(Row::cost).sum::<usize>();
        self.items.push_back(Waiting {
            item,
            rows: rows.len(),
            since: now,
        });
        self.rows.extend(rows);
    }

    /// Whether a whole micro-batch waits; nothing more should be added before it is taken.
    pub fn is_full(&self) -> bool {
        self.tokens >= self.limits.max_tokens
    }

    /// When the oldest item has waited long enough.
    pub fn due(&self) -> Option<Instant> {
        self.items.front().map(|oldest| oldest.since + self.limits.linger)
    }

    /// Whether a micro-batch should be taken now.
    pub fn is_due(&self, now: Instant) -> bool {
        self.is_full() || self.due().is_some_and(|due| due <= now)
    }

    /// Items, and tokens, that wait.
    pub fn waiting(&self) -> (usize, usize) {
        (self.items.len(), self.tokens)
    }

    /// The next micro-batch, due or not; nothing when nothing waits.
    pub fn take(&mut self) -> Option<MicroBatch<T>> {
        let mut tokens = 0;
        let fits = |row: &&Row| {
            tokens += row.cost();
            tokens <= self.limits.max_tokens
        };
        let count = self.rows.iter().take_while(fits).count().max(1).min(self.rows.len());
        let rows: Vec<Row> = self.rows.drain(..count).collect();
        self.tokens -= rows.iter().map(Row::cost).sum::<usize>();
        let mut left = rows.len();
        let mut items = Vec::new();
        while left > 0 {
            // Rows and items are added together, so while rows are left there is an item.
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
    fn full_or_old_enough_is_due() {
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
        // Longer than any micro-batch may be: alone.
        assert_eq!(take(&mut batcher), (30, vec![(1, 1)]));
        // What is left keeps the age of its item.
        assert_eq!(batcher.due(), Some(start + LINGER));
        assert_eq!(take(&mut batcher), (2, vec![(2, 1)]));
    }

    proptest! {
        /// Nothing is lost, doubled or reordered; no bound is exceeded; nothing due is left behind.
        #[test]
        fn every_row_leaves_once_in_order_and_in_time(
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
                prop_assert!(batcher.due().is_none_or(|due| due > now), "outwaited its linger");
                prop_assert!(batcher.waiting().1 < max_tokens);
                expected_rows.extend(costs);
                batcher.push(id, costs.iter().map(|&cost| row(cost)).collect(), now);
            }
            batches.extend(std::iter::from_fn(|| batcher.take()));
            prop_assert_eq!(batcher.waiting(), (0, 0));
            for batch in batches {
                prop_assert!(batch.tokens() <= max_tokens || batch.rows.len() == 1);
                rows.extend(batch.rows.iter().map(Row::cost));
                pending += batch.rows.len();
                for (id, count) in batch.items {
                    completed.push(id);
                    pending -= count;
                }
                // What is left over belongs to the one item that comes next.
                prop_assert!(pending == 0 || pending < items[completed.len()].0.len());
                // The rows counted for an item are those of this batch alone.
                pending = 0;
            }
            prop_assert_eq!(rows, expected_rows);
            prop_assert_eq!(completed, (0..items.len()).collect::<Vec<_>>());
        }
    }
}
