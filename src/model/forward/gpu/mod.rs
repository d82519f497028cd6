//! The scoring pass on a GPU in bf16.
//!
//! It computes the same as the pass over tensors in [`super::gemma`], from the same weights, with few calls of the
//! driver: queries, keys and values come from one product, as do gate and up; every kernel reads and writes buffers
//! that are allocated once ([`workspace`]); and deltas of an adapter are added inside the kernels ([`deltas`]), so that
//! the weights are shared by any number of adapters. A layer takes nine calls, and up to five more with an adapter; small
//! passes become one call ([`graphs`]).

mod deltas;
mod fp8;
mod graphs;
mod inputs;
mod pass;
mod products;
#[cfg(test)]
mod tests;
mod weights;
mod workspace;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaDevice, Result, Tensor};
use tracing::warn;

use self::deltas::LayerDeltas;
pub(in crate::model) use self::fp8::Fp8Mlp;
use self::graphs::{Filling, Graph, GraphKey, Graphs};
use self::inputs::Inputs;
use self::pass::Pass;
use self::products::Products;
use self::weights::{LayerWeights, Mlp, Resident};
use self::workspace::{Buffers, Workspace};
use super::gemma::{Gemma, PackedRow, PrefixCache};
use super::packing::{OutputPositions, PassInputs, SharedPrefix};
use crate::model::config::GemmaConfig;
use crate::model::device::message_without_backtrace;
use crate::model::files::lora::Adapter;
use crate::model::kernels::CachedKeysValues;
use crate::model::kernels::cuda::fp8::Fp8Products;
use crate::model::kernels::cuda::launch::Kernels;
use crate::model::transfer::cuda_tensor::CudaTensor;

/// Sizes of a model, in elements.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    hidden: usize,
    /// All query heads.
    queries: usize,
    /// All key heads, and all value heads.
    keys: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Whether products of the MLP are in FP8.
    is_fp8: bool,
}

impl Sizes {
    /// The width of the stacked queries, keys and values.
    fn qkv(&self) -> usize {
        self.queries + 2 * self.keys
    }
}

/// A decoder for scoring on a GPU. Decoders with different adapters share everything but the deltas.
#[derive(Debug, Clone)]
pub(in crate::model) struct GpuDecoder {
    base: Arc<Base>,
    /// `None` for layers without a delta.
    deltas: Vec<Option<Arc<LayerDeltas>>>,
    /// Small passes that have come before.
    graphs: Arc<Mutex<Graphs>>,
}

/// A stream on which nothing runs, and what is queued on it to capture graphs.
#[derive(Debug)]
struct Capture {
    stream: Arc<CudaStream>,
    kernels: Kernels,
    products: Products,
}

#[derive(Debug)]
struct Base {
    device: CudaDevice,
    kernels: Arc<Kernels>,
    products: Products,
    /// The kernels and products on the stream on which graphs are captured.
    capture: OnceLock<Capture>,
    /// For layers whose MLP is in FP8.
    fp8_products: Option<Fp8Products>,
    sizes: Sizes,
    embed_tokens: Resident,
    embedding_scale: f32,
    eps: f32,
    norm: Resident,
    layers: Vec<LayerWeights>,
    /// Passes run one after another, in the order in which they are queued, so that all can use the same buffers.
    workspace: Mutex<Workspace>,
}

impl GpuDecoder {
    /// Prepares a decoder without an adapter, whose weights are on a GPU. Returns `None` if the kernels do not support
    /// its dtype or sizes; the pass over tensors then scores.
    pub(super) fn new(gemma: &Gemma) -> Result<Option<Self>> {
        let config = &gemma.config;
        let Some(layers) = LayerWeights::of(gemma)? else {
            return Ok(None);
        };
        let sizes = Sizes {
            hidden: config.hidden_size,
            queries: config.num_attention_heads * config.head_dim,
            keys: config.num_key_value_heads * config.head_dim,
            inner: config.intermediate_size,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            is_fp8: layers.iter().any(|layer| matches!(layer.mlp, Mlp::Fp8(_))),
        };
        if !Kernels::supports(sizes.hidden, sizes.inner, sizes.head_dim) {
            return Ok(None);
        }
        let device = gemma.device.as_cuda_device()?.clone();
        let base = Base {
            kernels: Kernels::of(&device)?,
            products: Products::new(&device)?,
            capture: OnceLock::new(),
            fp8_products: sizes.is_fp8.then(|| Fp8Products::new(&device)).transpose()?,
            sizes,
            embed_tokens: Resident::new(&gemma.embed_tokens)?,
            embedding_scale: config.embedding_scale() as f32,
            eps: config.rms_norm_eps as f32,
            norm: Resident::new(&gemma.norm)?,
            layers,
            workspace: Mutex::default(),
            device,
        };
        let deltas = vec![None; base.layers.len()];
        Ok(Some(Self {
            base: Arc::new(base),
            deltas,
            graphs: Arc::default(),
        }))
    }

    /// Returns whether the products of a model's MLP can be computed in FP8.
    pub(super) fn supports_fp8(config: &GemmaConfig) -> bool {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Kernels::supports(hidden, inner, config.head_dim) && Kernels::support_fp8(hidden, inner)
    }

    /// Returns a decoder with the same weights and with an adapter.
    pub(super) fn with_adapter(&self, adapter: &Adapter) -> Result<Self> {
        let layers = 0..self.base.layers.len();
        let deltas: Result<_> = layers
            .map(|layer| Ok(LayerDeltas::new(adapter, layer, &self.base.sizes, &self.base.device)?.map(Arc::new)))
            .collect();
        Ok(Self {
            base: Arc::clone(&self.base),
            deltas: deltas?,
            graphs: Arc::default(),
        })
    }

    /// Returns the bytes that the buffers hold while no pass runs.
    pub(super) fn buffer_bytes(&self) -> u64 {
        self.workspace().bytes()
    }

    /// Frees the buffers if they are for passes of more than `max_tokens` tokens.
    pub(super) fn limit_buffers(&self, max_tokens: usize) {
        self.workspace().limit(max_tokens);
    }

    fn workspace(&self) -> MutexGuard<'_, Workspace> {
        self.base.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a pass and returns the normed hidden states at the last position of each row: (rows, hidden), bf16.
    pub(super) fn last_hidden(
        &self,
        gemma: &Gemma,
        rows: &[PackedRow<'_>],
        prefix: Option<&PrefixCache>,
    ) -> Result<Tensor> {
        let shared = prefix.map_or(SharedPrefix::None, SharedPrefix::Cached);
        let outputs = OutputPositions::Last { skip: 0 };
        let filling = Filling::of(rows, gemma.config.max_position_embeddings).filter(|_| !self.graphs().are_off());
        let Some(filling) = filling else {
            let inputs = gemma.pass_inputs(rows, shared, outputs)?;
            let mut workspace = self.workspace();
            let job = Job::new(self, gemma, &inputs, &mut workspace)?;
            return job.hidden(prefix);
        };
        let inputs = gemma.pass_inputs(&filling.add_to(rows), shared, outputs)?;
        let mut workspace = self.workspace();
        let job = Job::new(self, gemma, &inputs, &mut workspace)?;
        job.hidden_from_graph(prefix)?.narrow(0, 0, rows.len())
    }

    /// Queues a pass over a prefix and returns the keys and values of every layer: (tokens, keys), bf16.
    pub(super) fn keys_values(&self, gemma: &Gemma, inputs: &PassInputs) -> Result<Vec<CachedKeysValues>> {
        let mut workspace = self.workspace();
        let job = Job::new(self, gemma, inputs, &mut workspace)?;
        let pass = job.pass(&self.base.kernels, &self.base.products, &job.inputs);
        let mut layers = Vec::with_capacity(self.base.layers.len());
        let last = pass.layers_but_the_last(None, &mut |pass| {
            layers.push(pass.copy_keys_values()?);
            Ok(())
        })?;
        pass.qkv(last, false)?;
        layers.push(pass.copy_keys_values()?);
        Ok(layers)
    }

    /// Makes this decoder queue its passes kernel by kernel.
    #[cfg(test)]
    fn without_graphs(&mut self) {
        self.graphs = Arc::default();
        self.graphs().turn_off();
    }

    #[cfg(test)]
    fn graph_count(&self) -> usize {
        self.graphs().count()
    }

    fn graphs(&self) -> MutexGuard<'_, Graphs> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most low-rank activations of one product.
    fn widest_low(&self) -> usize {
        self.deltas
            .iter()
            .flatten()
            .map(|deltas| deltas.widest())
            .max()
            .unwrap_or(0)
    }
}

/// A pass that is about to be queued, with its inputs and buffers.
struct Job<'a> {
    decoder: &'a GpuDecoder,
    gemma: &'a Gemma,
    buffers: Buffers,
    tokens: usize,
    outputs: usize,
    inputs: Inputs,
    /// The memory that holds the inputs.
    uploaded: &'a Tensor,
}

impl<'a> Job<'a> {
    /// Prepares a pass. The caller holds the workspace until the pass is queued.
    fn new(
        decoder: &'a GpuDecoder,
        gemma: &'a Gemma,
        inputs: &'a PassInputs,
        workspace: &mut Workspace,
    ) -> Result<Self> {
        let base = &decoder.base;
        let tokens = inputs.tokens.dim(0)?;
        let outputs = inputs.last.as_ref().map_or(0, |(spans, _)| spans.len());
        Ok(Self {
            buffers: workspace.buffers(&base.device, &base.sizes, decoder.widest_low(), tokens, outputs)?,
            decoder,
            gemma,
            tokens,
            outputs,
            inputs: Inputs::of(inputs)?,
            uploaded: &inputs.uploaded,
        })
    }

    fn pass<'b>(&'b self, kernels: &'b Kernels, products: &'b Products, inputs: &'b Inputs) -> Pass<'b> {
        let base = &*self.decoder.base;
        Pass {
            decoder: self.decoder,
            base,
            gemma: self.gemma,
            kernels,
            products,
            buffers: self.buffers,
            tokens: self.tokens,
            outputs: self.outputs,
            inputs,
        }
    }

    /// Queues the pass and returns its hidden states.
    fn hidden(&self, prefix: Option<&PrefixCache>) -> Result<Tensor> {
        let base = &self.decoder.base;
        let pass = self.pass(&base.kernels, &base.products, &self.inputs);
        let last = pass.layers_but_the_last(prefix, &mut |_| Ok(()))?;
        let hidden = pass.new_tensor(self.outputs, base.sizes.hidden)?;
        pass.last_layer(last, prefix, CudaTensor::new("hidden states", &hidden)?.address()?)?;
        Ok(hidden)
    }

    /// Queues the pass as a graph, if its size has come before.
    fn hidden_from_graph(&self, prefix: Option<&PrefixCache>) -> Result<Tensor> {
        let base = &self.decoder.base;
        let key = GraphKey {
            tokens: self.tokens,
            outputs: self.outputs,
            buffers: self.buffers,
            prefix: prefix.map_or(0, |prefix| prefix.id),
            tables: self.inputs.tables(),
        };
        let mut graphs = self.decoder.graphs();
        if graphs.is_new(&key) {
            let hidden = self.hidden(prefix)?;
            graphs.remember(key);
            return Ok(hidden);
        }
        if graphs.get(&key).is_none() {
            match self.capture(prefix) {
                Ok(graph) => graphs.insert(key.clone(), graph),
                Err(error) => {
                    if graphs.fail() {
                        warn!(
                            error = message_without_backtrace(&error),
                            "cannot capture a graph of a small batch: small batches are queued kernel by kernel"
                        );
                    }
                    return self.hidden(prefix);
                }
            }
        }
        let Some(graph) = graphs.get(&key) else {
            return self.hidden(prefix);
        };
        let uploaded = CudaTensor::new("inputs of a pass", self.uploaded)?.address()?;
        uploaded.copy(self.buffers.inputs, 4 * self.uploaded.elem_count(), &base.device)?;
        graph.launch(&base.device)?;
        let width = base.sizes.hidden;
        let hidden = self
            .pass(&base.kernels, &base.products, &self.inputs)
            .new_tensor(self.outputs, width)?;
        let to = CudaTensor::new("hidden states", &hidden)?.address()?;
        self.buffers.result.copy(to, 2 * self.outputs * width, &base.device)?;
        Ok(hidden)
    }

    /// Captures the pass over inputs in [`Buffers::inputs`], with its hidden states in [`Buffers::result`].
    fn capture(&self, prefix: Option<&PrefixCache>) -> Result<Graph> {
        let base = &self.decoder.base;
        let capture = match base.capture.get() {
            Some(capture) => capture,
            None => {
                let stream = base.device.cuda_stream().context().new_stream().w()?;
                let new = Capture {
                    kernels: base.kernels.on(&stream),
                    products: base.products.captured_on(&base.device, &stream)?,
                    stream,
                };
                base.capture.get_or_init(|| new)
            }
        };
        let uploaded = CudaTensor::new("inputs of a pass", self.uploaded)?.address()?;
        let inputs = self.inputs.moved(uploaded, self.buffers.inputs);
        Graph::capture(&capture.stream, || {
            let pass = self.pass(&capture.kernels, &capture.products, &inputs);
            let last = pass.layers_but_the_last(prefix, &mut |_| Ok(()))?;
            pass.last_layer(last, prefix, self.buffers.result)
        })
    }
}
