//! Divides places between the callers that hold some.
//!
//! While nobody else holds a place, a caller may take them all. If they are all taken, a caller that holds less than
//! its share can still take more, so that it does not depend on what the others do. The share is an equal part for each
//! caller that holds a place.
//!
//! The places that are taken can therefore exceed the maximum: each further caller adds at most its share, or one request
//! if that is more. Without such requests, `n` callers take at most the maximum times 1 + 1/2 + 1/3 + ... + 1/n. The
//! number of callers is limited, and so is this. The excess ends as the places are given back, because a caller above its
//! share gets no more of them until then.

use std::collections::BTreeMap;
use std::sync::Arc;

/// The places that each caller holds.
#[derive(Debug)]
pub(super) struct Shares {
    max: usize,
    /// The maximum including the excess.
    limit: usize,
    taken: usize,
    /// Only callers that hold a place.
    by_caller: BTreeMap<Arc<str>, usize>,
}

impl Shares {
    /// Creates so many places.
    pub fn new(max: usize) -> Self {
        Self {
            max,
            limit: usize::MAX,
            taken: 0,
            by_caller: BTreeMap::new(),
        }
    }

    /// Sets the maximum including the excess.
    pub fn with_limit(self, limit: usize) -> Self {
        Self { limit, ..self }
    }

    /// Takes this many places for a caller's request, or none. Returns whether it did.
    pub fn take(&mut self, caller: &Arc<str>, count: usize) -> bool {
        self.take_more(caller, 0, count)
    }

    /// Takes this many places, or none, for a request that holds `held` already. Returns whether it did.
    pub fn take_more(&mut self, caller: &Arc<str>, held: usize, count: usize) -> bool {
        let own = self.by_caller.get(caller).copied().unwrap_or(0);
        let callers = self.by_caller.len() + usize::from(own == 0);
        let is_free = self.taken.saturating_add(count) <= self.max;
        // The only request of a caller must not wait for all others to end if it is larger than the share.
        let is_below_share = own == held || own + count <= self.max / callers;
        (count == 0 || is_free || is_below_share) && self.take_beyond_share(caller, count)
    }

    /// Takes this many places, or none, whatever the caller's share. Returns whether it did.
    pub fn take_beyond_share(&mut self, caller: &Arc<str>, count: usize) -> bool {
        let taken = self.taken.saturating_add(count);
        if taken > self.limit {
            return false;
        }
        if count > 0 {
            self.taken = taken;
            *self.by_caller.entry(Arc::clone(caller)).or_default() += count;
        }
        true
    }

    /// Gives back this many of the places that a caller holds.
    pub fn give_back(&mut self, caller: &str, count: usize) {
        self.taken -= count;
        if let Some(own) = self.by_caller.get_mut(caller) {
            *own -= count;
            if *own == 0 {
                self.by_caller.remove(caller);
            }
        }
    }

    /// Returns how many places are taken.
    pub fn taken(&self) -> usize {
        self.taken
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn callers() -> [Arc<str>; 3] {
        ["a", "b", "c"].map(Arc::from)
    }

    #[test]
    fn a_caller_alone_may_take_everything_and_no_more() {
        let ([a, ..], mut shares) = (callers(), Shares::new(10));
        assert!(shares.take(&a, 4) && shares.take(&a, 6));
        assert!(!shares.take(&a, 1) && shares.take(&a, 0));
        shares.give_back("a", 3);
        assert!(!shares.take(&a, 4) && shares.take(&a, 3));
        assert_eq!(shares.taken(), 10);
    }

    #[test]
    fn others_get_their_share_of_what_one_caller_has_filled() {
        let ([a, b, c], mut shares) = (callers(), Shares::new(12));
        assert!(shares.take(&a, 12));
        assert!(shares.take(&b, 6) && !shares.take(&b, 1));
        assert!(shares.take(&c, 4) && !shares.take(&c, 1));
        // The caller above its share is refused until it is back at it, or there is room.
        for _ in 0..8 {
            shares.give_back("a", 1);
            assert!(!shares.take(&a, 1));
        }
        shares.give_back("a", 1);
        assert!(shares.take(&a, 1) && !shares.take(&a, 1));
        // Once the others hold nothing, it may have everything again.
        shares.give_back("b", 6);
        shares.give_back("c", 4);
        assert!(shares.take(&a, 8) && !shares.take(&a, 1));
    }

    #[test]
    fn a_caller_that_holds_nothing_gets_in_with_a_request_above_its_share() {
        let ([a, b, c], mut shares) = (callers(), Shares::new(12));
        assert!(shares.take(&a, 12) && shares.take(&b, 6));
        assert!(shares.take(&c, 10) && !shares.take(&c, 1));
    }

    proptest! {
        /// The counts are right, a caller below its share is never refused, and the bound in the description holds, for
        /// requests that are not above any share.
        #[test]
        fn nobody_below_its_share_is_refused_and_the_excess_is_bounded(
            steps in prop::collection::vec((0usize..3, 1usize..5, any::<bool>()), 0..200),
        ) {
            const MAX: usize = 12;
            let (callers, mut shares, mut held) = (callers(), Shares::new(MAX), [0usize; 3]);
            for (caller, count, takes) in steps {
                if !takes {
                    let count = count.min(held[caller]);
                    held[caller] -= count;
                    shares.give_back(&callers[caller], count);
                    continue;
                }
                let others = held.iter().enumerate().filter(|&(other, &held)| other != caller && held > 0).count();
                let is_free = held.iter().sum::<usize>() + count <= MAX;
                let is_taken = shares.take(&callers[caller], count);
                prop_assert_eq!(is_taken, is_free || held[caller] == 0 || held[caller] + count <= MAX / (others + 1));
                held[caller] += if is_taken { count } else { 0 };
                prop_assert_eq!(shares.taken(), held.iter().sum::<usize>());
                prop_assert!(shares.taken() <= MAX + MAX / 2 + MAX / 3);
            }
            prop_assert_eq!(shares.by_caller.len(), held.iter().filter(|&&held| held > 0).count());
        }
    }
}
