//! The memory of the bodies of requests and answers, which is limited for all of them together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::Bytes;

use super::shares::Shares;

/// The memory for the bodies of all requests that are being read or answered, and of all answers that are being sent.
#[derive(Debug, Clone)]
pub(super) struct BodyMemory(Arc<Mutex<Shares>>);

/// The memory of a caller's body that is being read, which is free for others when this is dropped.
#[derive(Debug)]
pub(super) struct GrowingMemory {
    all: BodyMemory,
    caller: Arc<str>,
    taken: usize,
}

/// The memory of a body, which is free for others when the last copy of this is dropped. Each text of a request has one,
/// because it may wait for longer than its caller.
#[derive(Debug, Clone, Default)]
pub(super) struct HeldMemory {
    _taken: Option<Arc<GrowingMemory>>,
}

/// Bytes with the memory that they count against, until the last copy of them is dropped.
#[derive(Debug)]
struct HeldBytes {
    bytes: Vec<u8>,
    _memory: HeldMemory,
}

impl AsRef<[u8]> for HeldBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl HeldMemory {
    /// Returns bytes that hold this memory.
    pub fn with(self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(HeldBytes { bytes, _memory: self })
    }
}

impl BodyMemory {
    /// Creates the memory of which one caller may take this many bytes, and all callers together twice as many.
    pub fn new(bytes: usize) -> Self {
        let shares = Shares::new(bytes).with_limit(bytes.saturating_mul(2));
        Self(Arc::new(Mutex::new(shares)))
    }

    /// Returns memory for a body of a caller of which nothing has arrived.
    pub fn begin(&self, caller: &Arc<str>) -> GrowingMemory {
        GrowingMemory {
            all: self.clone(),
            caller: Arc::clone(caller),
            taken: 0,
        }
    }

    /// Takes memory for an answer, whatever the caller's share: its request was taken, and the work is done. Returns `None`
    /// if the memory for all callers is used up.
    pub fn answer(&self, caller: &Arc<str>, bytes: usize) -> Option<HeldMemory> {
        let mut memory = self.begin(caller);
        if !self.shares().take_beyond_share(caller, bytes) {
            return None;
        }
        memory.taken = bytes;
        Some(memory.hold())
    }

    fn shares(&self) -> MutexGuard<'_, Shares> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GrowingMemory {
    /// Takes so many bytes more, and returns whether the caller may have them.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let is_taken = self.all.shares().take_more(&self.caller, self.taken, bytes);
        if is_taken {
            self.taken += bytes;
        }
        is_taken
    }

    /// Holds what was taken.
    pub fn hold(self) -> HeldMemory {
        HeldMemory {
            _taken: Some(Arc::new(self)),
        }
    }
}

impl Drop for GrowingMemory {
    fn drop(&mut self) {
        self.all.shares().give_back(&self.caller, self.taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_hold_their_memory_until_the_last_copy_is_gone() {
        let (all, caller) = (BodyMemory::new(10), Arc::from("forum"));
        let mut memory = all.begin(&caller);
        assert!(memory.grow(4) && memory.grow(4) && !all.begin(&caller).grow(4));
        let bytes = memory.hold().with(b"12345678".to_vec());
        let part = bytes.slice(2..4);
        drop(bytes);
        assert!(&part[..] == b"34" && !all.begin(&caller).grow(4));
        drop(part);
        assert!(all.begin(&caller).grow(10));
    }

    #[test]
    fn a_caller_that_has_taken_all_that_it_may_leaves_memory_for_others() {
        let all = BodyMemory::new(10);
        let begin = |caller: &str| all.begin(&caller.into());
        let (mut first, mut second) = (begin("forum"), begin("forum"));
        assert!(first.grow(5) && second.grow(5) && !second.grow(1) && !begin("forum").grow(1));
        let mut game = begin("game");
        assert!(game.grow(5) && !begin("game").grow(1));
        // The only body of a caller may be larger than its share, but there is never more than the limit.
        let mut wiki = begin("wiki");
        assert!(wiki.grow(2) && wiki.grow(2) && !wiki.grow(2) && wiki.grow(1));
        assert!(all.answer(&"wiki".into(), 1).is_none());
        drop(first);
        // An answer does not depend on the share.
        assert!(!begin("game").grow(1) && all.answer(&"game".into(), 1).is_some());
    }
}
