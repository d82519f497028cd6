//! The deltas of an adapter as the kernels read them.
//!
//! One product computes the low-rank activations `x A'` of all projections with the same input. The kernel that reads
//! a projection's output anyway multiplies them by `scale * B` and adds the result to the output in f32. So a delta needs
//! neither a copy of the base's weights nor a pass of its own over memory, and a small one is not rounded away.

use candle_core::{CudaDevice, DType, Device, Result, Tensor};

use super::Sizes;
use super::products::Weight;
use super::weights::Resident;
use crate::config::Projection;
use crate::model::files::lora::{Adapter, LoraWeights};
use crate::model::kernels::cuda::launch::Delta;
use crate::model::kernels::fragments::{Columns, RANKS, in_fragments};
use crate::model::transfer::cuda_tensor::Address;

/// The deltas of one layer, by the inputs that projections share.
#[derive(Debug)]
pub(super) struct LayerDeltas {
    pub(super) qkv: Option<InputDeltas>,
    pub(super) o: Option<InputDeltas>,
    pub(super) gate_up: Option<InputDeltas>,
    pub(super) down: Option<InputDeltas>,
}

impl LayerDeltas {
    /// Copies the deltas of a layer to the GPU. Returns `None` if the adapter has none for it.
    pub(super) fn new(adapter: &Adapter, layer: usize, sizes: &Sizes, device: &CudaDevice) -> Result<Option<Self>> {
        use Projection::{Down, Gate, K, O, Q, Up, V};
        let new = |projections: &[Projection]| InputDeltas::new(adapter, layer, projections, sizes, device);
        let deltas = Self {
            qkv: new(&[Q, K, V])?,
            o: new(&[O])?,
            gate_up: new(&[Gate, Up])?,
            down: new(&[Down])?,
        };
        Ok((deltas.widest() > 0).then_some(deltas))
    }

    /// Returns the most low-rank activations of one input.
    pub(super) fn widest(&self) -> usize {
        let inputs = [&self.qkv, &self.o, &self.gate_up, &self.down];
        inputs.into_iter().flatten().map(InputDeltas::width).max().unwrap_or(0)
    }
}

/// The deltas of all projections that read one input.
#[derive(Debug)]
pub(super) struct InputDeltas {
    /// The matrices A, one below the other: (all ranks, inputs), bf16. Each is padded with zeros to a multiple of
    /// [`RANKS`] rows.
    a: Resident,
    /// The matrices `scale * B`, in the order of the projections.
    b: Vec<Option<ProjectionDelta>>,
}

/// The matrix `scale * B` of one projection in the order of fragments, and where its activations are.
#[derive(Debug)]
struct ProjectionDelta {
    b: Resident,
    /// The first of its columns of the low-rank activations.
    start: usize,
    /// The number of these columns.
    rank: usize,
}

impl InputDeltas {
    fn new(
        adapter: &Adapter,
        layer: usize,
        projections: &[Projection],
        sizes: &Sizes,
        device: &CudaDevice,
    ) -> Result<Option<Self>> {
        let (mut a, mut b, mut start) = (Vec::new(), Vec::new(), 0);
        for &projection in projections {
            let Some(lora) = adapter.get(layer, projection) else {
                b.push(None);
                continue;
            };
            let lora = lora.to_device(&Device::Cpu)?;
            let rank = lora.a.dim(0)?.next_multiple_of(RANKS);
            a.push(lora.a.pad_with_zeros(0, 0, rank - lora.a.dim(0)?)?);
            b.push(Some(ProjectionDelta {
                b: fragments(&lora, columns(projection, sizes), device)?,
                start,
                rank,
            }));
            start += rank;
        }
        if a.is_empty() {
            return Ok(None);
        }
        let device = Device::Cuda(device.clone());
        let a = Tensor::cat(&a, 0)?.to_dtype(DType::BF16)?.to_device(&device)?;
        Ok(Some(Self {
            a: Resident::new(&a)?,
            b,
        }))
    }

    fn width(&self) -> usize {
        self.a.tensor.dims()[0]
    }

    /// Returns the stacked matrices A.
    pub(super) fn a(&self) -> Weight {
        self.a.rows(0, self.width())
    }

    /// Returns whether the projection at this index has a delta.
    pub(super) fn has(&self, index: usize) -> bool {
        self.b[index].is_some()
    }

    /// Returns the deltas of `N` projections, whose activations begin at `low`.
    pub(super) fn given<const N: usize>(&self, low: Address) -> [Delta; N] {
        std::array::from_fn(|index| match &self.b[index] {
            None => Delta::NONE,
            Some(delta) => Delta::new(low.bf16(delta.start), delta.b.address, self.width(), delta.rank),
        })
    }
}

/// Returns the order in which the kernel that adds a projection's delta computes its outputs.
fn columns(projection: Projection, sizes: &Sizes) -> Columns {
    match projection {
        Projection::Q | Projection::K => Columns::RotatedHeads {
            head_dim: sizes.head_dim,
        },
        _ => Columns::Plain,
    }
}

/// Copies `scale * B` to the GPU in the order of fragments.
fn fragments(lora: &LoraWeights, columns: Columns, device: &CudaDevice) -> Result<Resident> {
    let b = (&lora.b * lora.scale)?;
    let (outputs, rank) = b.dims2()?;
    let words = in_fragments(&b.flatten_all()?.to_vec1()?, outputs, rank, columns);
    let count = words.len();
    Resident::new(&Tensor::from_vec(words, count, &Device::Cuda(device.clone()))?)
}
