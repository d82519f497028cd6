//! Passes of small batches as CUDA graphs.
//!
//! Queueing the kernels of a small pass one by one takes the host longer than running them takes the GPU. A graph
//! queues them all in one call. It repeats the same kernels with the same sizes and addresses, so passes are filled up
//! with rows of their own to a few sizes, inputs are copied to a fixed place, and results come from one.
//!
//! A graph is captured when a size comes for the second time, on a stream of its own: what other threads queue
//! meanwhile on the device's stream must not become part of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphExec, CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaStream, result};
use candle_core::{CudaDevice, Result};

use super::workspace::Buffers;
use crate::model::forward::packing::PackedRow;
use crate::model::transfer::cuda_tensor::Address;

/// The most tokens of a pass that becomes a graph. Larger ones take the GPU longer than the host.
pub(super) const MOST_TOKENS: usize = 2048;
/// The numbers of tokens and rows that passes are filled up to are multiples of these.
const TOKENS: usize = 64;
const MANY_TOKENS: usize = 128;
const ROWS: usize = 16;
/// The most rows of a pass that becomes a graph: more than a pass has that is not made of very short rows.
const MOST_ROWS: usize = 512;
/// The most numbers that the inputs of such a pass consist of: three for each token, and thirteen for each row.
pub(super) const MOST_INPUTS: usize = 3 * MOST_TOKENS + 13 * MOST_ROWS;
/// The most graphs of a decoder. Each takes some hundred kilobytes.
const MOST_GRAPHS: usize = 64;

/// The number of captures that may fail, for lack of memory for example, before no more are tried.
const MOST_FAILURES: usize = 3;

/// Rows that fill a pass up to a common size.
pub(super) struct Filling {
    tokens: Vec<u32>,
    /// The lengths of the rows that are added.
    lengths: Vec<usize>,
}

impl Filling {
    /// Returns what has to be added to some rows, at least one row, or `None` if the pass is too large for a graph or has
    /// no tokens. Positions stay below `max_positions`.
    pub(super) fn of(rows: &[PackedRow<'_>], max_positions: usize) -> Option<Self> {
        // A token of the batch, so that the added rows compute nothing that the batch does not.
        let token = *rows.first()?.own.first()?;
        let own: usize = rows.iter().map(|row| row.own.len()).sum();
        let count = (rows.len() + 1).next_multiple_of(ROWS) - rows.len();
        let multiple = if own < MOST_TOKENS / 4 { TOKENS } else { MANY_TOKENS };
        let tokens = (own + count).next_multiple_of(multiple) - own;
        if own + tokens > MOST_TOKENS || rows.len() + count > MOST_ROWS || tokens > max_positions {
            return None;
        }
        // All but the last are as short as possible.
        let mut lengths = vec![1; count];
        lengths[count - 1] = tokens - (count - 1);
        Some(Self {
            tokens: vec![token; tokens],
            lengths,
        })
    }

    /// Returns the rows followed by those that are added.
    pub(super) fn add_to<'a>(&'a self, rows: &[PackedRow<'a>]) -> Vec<PackedRow<'a>> {
        let added = self.lengths.iter().map(|&length| PackedRow {
            own: &self.tokens[..length],
            shared: 0,
        });
        rows.iter().copied().chain(added).collect()
    }
}

/// Everything that the kernels of a graph depend on besides the decoder.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    pub(super) tokens: usize,
    pub(super) outputs: usize,
    pub(super) buffers: Buffers,
    /// The id of the prefix, or 0.
    pub(super) prefix: u64,
    /// The tables of angles.
    pub(super) tables: Vec<[Address; 2]>,
}

/// The graphs of one decoder.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    /// Sizes that have come once.
    seen: HashSet<GraphKey>,
    /// The graphs, and when each was last used.
    graphs: HashMap<GraphKey, (Graph, u64)>,
    uses: u64,
    failures: usize,
}

impl Graphs {
    /// Returns whether a size has not come before.
    pub(super) fn is_new(&self, key: &GraphKey) -> bool {
        !self.graphs.contains_key(key) && !self.seen.contains(key)
    }

    /// Remembers that a size has come.
    pub(super) fn remember(&mut self, key: GraphKey) {
        if self.seen.len() > 16 * MOST_GRAPHS {
            self.seen.clear();
        }
        self.seen.insert(key);
    }

    /// Returns the graph of a size.
    pub(super) fn get(&mut self, key: &GraphKey) -> Option<&Graph> {
        self.uses += 1;
        let (graph, used) = self.graphs.get_mut(key)?;
        *used = self.uses;
        Some(graph)
    }

    /// Adds a graph. Removes those over buffers that no longer exist, and the one that was not used for longest if there
    /// are too many.
    pub(super) fn insert(&mut self, key: GraphKey, graph: Graph) {
        self.graphs.retain(|other, _| other.buffers == key.buffers);
        if self.graphs.len() >= MOST_GRAPHS {
            let oldest = self.graphs.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.graphs.remove(&oldest);
            }
        }
        self.seen.remove(&key);
        self.graphs.insert(key, (graph, self.uses));
    }

    /// Counts a capture that has failed, and returns whether it was the last one to be tried.
    pub(super) fn fail(&mut self) -> bool {
        self.failures += 1;
        self.are_off()
    }

    /// Returns whether passes are queued kernel by kernel from now on.
    pub(super) fn are_off(&self) -> bool {
        self.failures >= MOST_FAILURES
    }

    #[cfg(test)]
    pub(super) fn turn_off(&mut self) {
        self.failures = MOST_FAILURES;
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.graphs.len()
    }
}

/// Kernels and products that one call queues.
#[derive(Debug)]
pub(super) struct Graph {
    executable: CUgraphExec,
    context: Arc<CudaContext>,
}

#[expect(unsafe_code, reason = "the driver's handle is a pointer")]
// SAFETY: the driver lets any thread use a graph, and the owner's lock keeps two threads from using it at once.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `queue` queues on `stream`, on which nothing else is queued. Nothing of it runs.
    pub(super) fn capture(stream: &Arc<CudaStream>, queue: impl FnOnce() -> Result<()>) -> Result<Self> {
        let context = Arc::clone(stream.context());
        context.bind_to_thread().w()?;
        // Other threads may allocate memory and wait meanwhile.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        #[expect(unsafe_code, reason = "foreign calls")]
        // SAFETY: the stream is open, and the captured graph is destroyed exactly once, after it was instantiated.
        unsafe {
            result::stream::begin_capture(stream.cu_stream(), mode).w()?;
            let queued = queue();
            // A capture that failed must be ended too.
            let graph = result::stream::end_capture(stream.cu_stream()).w()?;
            let executable = queued.and_then(|()| result::graph::instantiate(graph, CUgraphInstantiate_flags(0)).w());
            // The executable graph is a copy, and what cannot be destroyed was lost with the device.
            let _ = result::graph::destroy(graph);
            Ok(Self {
                executable: executable?,
                context,
            })
        }
    }

    /// Queues the graph on the stream of the device.
    pub(super) fn launch(&self, device: &CudaDevice) -> Result<()> {
        self.context.bind_to_thread().w()?;
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the graph is open, and its addresses are those of the key under which it was found.
        unsafe { result::graph::launch(self.executable, device.cuda_stream().cu_stream()) }.w()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // The driver keeps a graph that is still running. An error means that the device has failed.
        if self.context.bind_to_thread().is_ok() {
            #[expect(unsafe_code, reason = "a foreign call")]
            // SAFETY: the graph is open and is not used again.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_filled_up_to_few_sizes() {
        let tokens = vec![7; MOST_TOKENS];
        let filled = |lengths: &[usize]| {
            let row = |&length: &usize| PackedRow {
                own: &tokens[..length],
                shared: 0,
            };
            let rows: Vec<PackedRow<'_>> = lengths.iter().map(row).collect();
            let filling = Filling::of(&rows, 8192)?;
            let all = filling.add_to(&rows);
            assert!(all.len() > rows.len(), "at least one row is added");
            Some((all.iter().map(|row| row.own.len()).sum(), all.len()))
        };
        assert_eq!(filled(&[1]), Some((64, 16)));
        assert_eq!(filled(&[49]), Some((64, 16)));
        assert_eq!(filled(&[50]), Some((128, 16)));
        assert_eq!(filled(&[30; 15]), Some((512, 16)));
        assert_eq!(filled(&[30; 16]), Some((512, 32)));
        assert_eq!(filled(&[40; 20]), Some((896, 32)));
        assert_eq!(filled(&[2040, 7]), None);
        let short = vec![1; 600];
        assert_eq!(filled(&short), None);
        let one = [PackedRow {
            own: &tokens[..1],
            shared: 0,
        }];
        assert!(
            Filling::of(&one, 16).is_none(),
            "no row may be longer than the model supports"
        );
    }
}
