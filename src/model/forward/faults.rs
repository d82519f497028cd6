//! Makes the forward pass run out of memory on purpose; compiled for tests only.

use std::cell::Cell;

use candle_core::{Device, Result, bail};

/// A layer that fails, and the own tokens of a pass that it has memory for.
#[derive(Debug, Clone, Copy)]
struct Starved {
    layer: usize,
    max_tokens: usize,
}

thread_local! {
    static STARVED: Cell<Option<Starved>> = const { Cell::new(None) };
}

/// While it lives, passes on this thread with more than `max_tokens` own tokens run out of memory in one layer.
pub(crate) struct OutOfMemory(());

impl OutOfMemory {
    pub(crate) fn in_layer(layer: usize, max_tokens: usize) -> Self {
        STARVED.set(Some(Starved { layer, max_tokens }));
        Self(())
    }
}

impl Drop for OutOfMemory {
    fn drop(&mut self) {
        STARVED.set(None);
    }
}

/// Called at the beginning of each layer.
pub(super) fn check(layer: usize, tokens: usize, device: &Device) -> Result<()> {
    match STARVED.get() {
        Some(starved) if layer == starved.layer && tokens > starved.max_tokens => out_of_memory(device),
        _ => Ok(()),
    }
}

/// On a GPU, the driver's own error: it is asked for more than any card has.
fn out_of_memory(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(card) => {
            #[expect(unsafe_code, reason = "the memory is never read")]
            // SAFETY: as the reason says.
            let asked = unsafe { card.alloc::<u8>(1 << 46) };
            asked.map(|_| ())?;
            bail!("a card with 64 TiB of memory")
        }
        _ => bail!("out of memory"),
    }
}
