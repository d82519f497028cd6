//! Makes forward passes run out of memory on purpose, for tests of how that is handled.

use std::cell::Cell;

use candle_core::{Device, Result, bail};

thread_local! {
    /// The layer that fails, and the number of own tokens that it has memory for.
    static LIMIT: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
}

/// While this value exists, passes on this thread with more than `max_tokens` own tokens run out of memory in one
/// layer.
pub(crate) struct MemoryLimit(());

impl MemoryLimit {
    pub(crate) fn in_layer(layer: usize, max_tokens: usize) -> Self {
        LIMIT.set(Some((layer, max_tokens)));
        Self(())
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        LIMIT.set(None);
    }
}

/// Fails if a limit is set for this layer and exceeded. Called at the beginning of each layer.
pub(super) fn check(layer: usize, tokens: usize, device: &Device) -> Result<()> {
    match LIMIT.get() {
        Some((limited, max_tokens)) if layer == limited && tokens > max_tokens => out_of_memory(device),
        _ => Ok(()),
    }
}

/// Returns the error of a failed allocation. On a GPU, this is the driver's own error for a request larger than any
/// memory.
fn out_of_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => {
            #[expect(unsafe_code, reason = "the memory is never read")]
            // SAFETY: the memory is uninitialised, but nothing reads it.
            let allocated = unsafe { gpu.alloc::<u8>(1 << 46) };
            allocated.map(|_| ())?;
            bail!("the GPU has allocated 64 TiB of memory, expected a failure")
        }
        _ => bail!("out of memory"),
    }
}
