//! A queue in which callers take turns, so that a text does not wait behind the whole backlog of another caller.
//!
//! Like the division of the device between the stream and requests (`stream::score::share`), this is start-time fair
//! queueing with a token as the unit of work, here with one flow for each caller. What a caller puts in leaves in its
//! order.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// The items that wait, by caller.
#[derive(Debug)]
pub(super) struct FairQueue<T> {
    /// The callers that have items, and those that still owe something for what was taken.
    flows: BTreeMap<Arc<str>, Flow<T>>,
    /// The number of items of all callers.
    items: usize,
    /// The start tag of the item that was taken last.
    now: u64,
}

/// The items of a caller.
#[derive(Debug)]
struct Flow<T> {
    items: VecDeque<T>,
    /// The virtual time at which what was taken is finished, in tokens.
    finished: u64,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            flows: BTreeMap::new(),
            items: 0,
            now: 0,
        }
    }
}

impl<T> FairQueue<T> {
    /// Puts an item at the end of those of its caller.
    pub fn push(&mut self, caller: &Arc<str>, item: T) {
        if self.items == 0 {
            // Debts end when the queue is empty.
            self.flows.clear();
        }
        self.items += 1;
        let flow = self.flows.entry(Arc::clone(caller)).or_insert_with(|| Flow {
            items: VecDeque::new(),
            finished: 0,
        });
        flow.items.push_back(item);
    }

    /// Takes the first item of the caller whose turn it is.
    pub fn take(&mut self) -> Option<T> {
        let now = self.now;
        // A caller that has been away gains no claim on later time.
        let start = |flow: &Flow<T>| flow.finished.max(now);
        let waiting = self.flows.values_mut().filter(|flow| !flow.items.is_empty());
        let next = waiting.min_by_key(|flow| start(flow))?;
        self.now = start(next);
        // At least one, so that items that cost nothing take turns, too.
        next.finished = self.now + 1;
        self.items -= 1;
        let item = next.items.pop_front();
        // Callers without items or debts are forgotten.
        self.flows
            .retain(|_, flow| !flow.items.is_empty() || flow.finished > self.now);
        item
    }

    /// Charges a caller for the tokens of an item that was taken.
    pub fn charge(&mut self, caller: &str, tokens: usize) {
        if let Some(flow) = self.flows.get_mut(caller) {
            flow.finished += tokens as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn callers() -> [Arc<str>; 3] {
        ["a", "b", "c"].map(Arc::from)
    }

    /// Takes items, which are the names of their callers, at the given costs. Returns the names.
    fn take(queue: &mut FairQueue<Arc<str>>, count: usize, cost: impl Fn(&str) -> usize) -> String {
        let take = |_| {
            let caller = queue.take()?;
            queue.charge(&caller, cost(&caller));
            Some(caller.to_string())
        };
        (0..count).map_while(take).collect()
    }

    fn push(queue: &mut FairQueue<Arc<str>>, caller: &Arc<str>, count: usize) {
        (0..count).for_each(|_| queue.push(caller, Arc::clone(caller)));
    }

    #[test]
    fn the_items_of_a_caller_keep_their_order() {
        let ([a, b, _], mut queue) = (callers(), FairQueue::default());
        for number in 0..3 {
            queue.push(&a, number);
            queue.push(&b, 10 + number);
        }
        let taken: Vec<_> = std::iter::from_fn(|| queue.take()).collect();
        assert_eq!(taken, [0, 10, 1, 11, 2, 12]);
    }

    #[test]
    fn a_caller_with_few_items_does_not_wait_for_the_backlog_of_another() {
        let ([a, b, c], mut queue) = (callers(), FairQueue::default());
        push(&mut queue, &a, 1000);
        assert_eq!(take(&mut queue, 500, |_| 7).len(), 500);
        push(&mut queue, &b, 2);
        push(&mut queue, &c, 1);
        assert_eq!(take(&mut queue, 6, |_| 7), "bcabaa");
    }

    #[test]
    fn turns_are_by_tokens() {
        let ([a, b, _], mut queue) = (callers(), FairQueue::default());
        push(&mut queue, &a, 100);
        push(&mut queue, &b, 1000);
        let cost = |caller: &str| if caller == "a" { 99 } else { 9 };
        let taken = take(&mut queue, 110, cost);
        assert_eq!(taken.matches('a').count(), 10, "{taken}");
    }

    #[test]
    fn items_that_cost_nothing_take_turns() {
        let ([a, b, _], mut queue) = (callers(), FairQueue::default());
        push(&mut queue, &a, 10);
        push(&mut queue, &b, 10);
        assert_eq!(take(&mut queue, 6, |_| 0), "ababab");
    }

    #[test]
    fn going_away_neither_saves_up_time_nor_cancels_a_debt() {
        let ([a, b, _], mut queue) = (callers(), FairQueue::default());
        // While `b` is away, `a` uses all of the time; afterwards they are equal.
        push(&mut queue, &a, 1000);
        take(&mut queue, 500, |_| 9);
        push(&mut queue, &b, 100);
        assert_eq!(take(&mut queue, 6, |_| 9), "bababa");
        // `b` sends one long text at a time, and gets no more than its half by it.
        let ([a, b, _], mut queue) = (callers(), FairQueue::default());
        push(&mut queue, &a, 1000);
        let mut taken = String::new();
        for _ in 0..100 {
            if queue.flows.get(&b).is_none_or(|flow| flow.items.is_empty()) {
                push(&mut queue, &b, 1);
            }
            taken += &take(&mut queue, 1, |caller| if caller == "b" { 39 } else { 9 });
        }
        assert_eq!(taken.matches('b').count(), 20, "{taken}");
    }

    #[test]
    fn no_caller_is_remembered_for_ever() {
        // With and without a backlog of another caller.
        for backlog in [0, 10_000] {
            let ([a, ..], mut queue) = (callers(), FairQueue::default());
            push(&mut queue, &a, backlog);
            for number in 0..1000 {
                push(&mut queue, &number.to_string().into(), 1);
                take(&mut queue, 2, |_| 50);
            }
            assert!(queue.flows.len() <= 3, "{}", queue.flows.len());
        }
    }
}
