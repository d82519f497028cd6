//! The memory for the bodies of requests and answers, which is limited for all of them together.

use std::sync::Arc;

use axum::body::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The memory for the bodies of all requests that are being read or answered, and of all answers that are being sent.
#[derive(Debug, Clone)]
pub(super) struct BodyMemory(Arc<Semaphore>);

/// The memory of a body that is being read.
#[derive(Debug)]
pub(super) struct GrowingMemory {
    all: Arc<Semaphore>,
    taken: Option<OwnedSemaphorePermit>,
}

/// The memory of a body, which is free for others when the last copy of this is dropped. Each text of a request has one,
/// because it may wait for longer than its caller.
#[derive(Debug, Clone, Default)]
pub(super) struct HeldMemory {
    _taken: Option<Arc<OwnedSemaphorePermit>>,
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
    /// Creates the memory for so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS))))
    }

    /// Returns memory for a body of which nothing has arrived.
    pub fn begin(&self) -> GrowingMemory {
        GrowingMemory {
            all: Arc::clone(&self.0),
            taken: None,
        }
    }
}

impl GrowingMemory {
    /// Takes so many bytes more, and returns whether there were any left.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(more) = Arc::clone(&self.all).try_acquire_many_owned(bytes) else {
            return false;
        };
        match &mut self.taken {
            Some(taken) => taken.merge(more),
            None => self.taken = Some(more),
        }
        true
    }

    /// Holds what was taken.
    pub fn hold(self) -> HeldMemory {
        HeldMemory {
            _taken: self.taken.map(Arc::new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_hold_their_memory_until_the_last_copy_is_gone() {
        let all = BodyMemory::new(10);
        let mut memory = all.begin();
        assert!(memory.grow(4) && memory.grow(4) && !memory.grow(4));
        let bytes = memory.hold().with(b"12345678".to_vec());
        let part = bytes.slice(2..4);
        drop(bytes);
        assert!(&part[..] == b"34" && !all.begin().grow(4));
        drop(part);
        assert!(all.begin().grow(10));
    }
}
