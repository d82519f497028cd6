//! The loss of an adapter on a batch, and its gradients.
//!
//! The forward pass computes the same as in serving, with the adapter in training applied. The backward pass goes through
//! the layers from last to first and computes each one again from its recorded input. Memory therefore holds what the
//! gradients of one layer need at a time (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016). Frozen
//! weights get no gradients. Rows share the prompt's prefix in training too: it is computed once per batch, and gradients
//! flow through its keys and values.

#[cfg(test)]
#[cfg(feature = "cuda")]
mod cuda_tests;
mod attention;
mod unembedding;
mod cross_entropy;
mod layer;
mod pass;
#[cfg(test)]
mod plain;

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, Var, bail};

use self::cross_entropy::{LossTarget, LossValue};
use self::layer::CpuOps;
#[cfg(feature = "cuda")]
use self::layer::CudaOps;
use super::files::lora::LoraWeights;
use super::forward::gemma::Gemma;
use super::forward::packing::{OutputPositions, PackedRow};
#[cfg(all(test, feature = "cuda"))]
pub(crate) use super::kernels::cuda::driver_calls::driver_calls;
#[cfg(feature = "cuda")]
pub(crate) use super::kernels::cuda::optimizer::{AdamWStep, OptimizerTensor, TensorTable};
use crate::config::{Loss, Projection};

/// One example: the token ids of a prompt, and the label that should follow them.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    /// Token ids of the whole prompt, starting with `<bos>`.
    pub tokens: &'a [u32],
    /// Probability that the text is hateful. [`Loss::Sequence`] counts one half or more as hateful.
    pub hateful: f32,
    /// Weight of the example relative to the others in its batch.
    pub weight: f32,
}

/// The tensors of an adapter in training, by layer and projection.
pub type Variables = BTreeMap<(usize, Projection), LoraVariables>;

/// The delta of one linear layer in training: `scale * B A`.
#[derive(Debug, Clone)]
pub struct LoraVariables {
    /// The matrix A: (rank, inputs).
    pub a: Var,
    /// The matrix B: (outputs, rank).
    pub b: Var,
    /// Factor of the delta: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f64,
}

/// The gradients of A and B, by layer and projection.
pub type Gradients = BTreeMap<(usize, Projection), (Tensor, Tensor)>;

/// A base model with an adapter that is being trained.
pub struct Trainable {
    model: Gemma,
    variables: Variables,
    /// Token ids of the hateful label and of the other label.
    labels: [u32; 2],
    eos: u32,
    prefix: Vec<u32>,
}

impl Trainable {
    /// Attaches the adapter in `variables` to a base model that was loaded without an adapter and is not quantised.
    ///
    /// `prefix` holds the token ids that prompts may share; `labels` are the ids of the hateful label and of the other
    /// label.
    pub fn new(mut model: Gemma, variables: Variables, prefix: &[u32], labels: [u32; 2], eos: u32) -> Self {
        for (&(layer, projection), lora) in &variables {
            let (a, b) = (lora.a.as_tensor().clone(), lora.b.as_tensor().clone());
            model.layers[layer].projection_mut(projection).attach(LoraWeights {
                a,
                b,
                scale: lora.scale,
            });
        }
        Self {
            model,
            variables,
            labels,
            eos,
            prefix: prefix.to_vec(),
        }
    }

    /// Returns the tensors of the adapter.
    pub fn variables(&self) -> &Variables {
        &self.variables
    }

    /// Returns the base model with the adapter applied, which computes exactly as in serving.
    pub(crate) fn model(&self) -> &Gemma {
        &self.model
    }

    /// Returns the loss on a batch, and the gradients of every A and B.
    ///
    /// The loss is the weighted mean over the examples or, for [`Loss::Sequence`], over all tokens to be predicted.
    ///
    /// # Errors
    /// Returns an error if the batch is empty, a token id or a label is outside the vocabulary, a gradient is missing,
    /// or the computation fails.
    pub fn loss_and_gradients(&self, loss: Loss, batch: &[Example<'_>]) -> Result<(f64, Gradients)> {
        let batch = TrainingBatch::new(self, loss, batch)?;
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = &self.model.device {
            return self.pass(&CudaOps::new(device, self.model.dtype)?, loss, &batch);
        }
        self.pass(&CpuOps::default(), loss, &batch)
    }

    /// Returns the loss, and its gradient with respect to the normalised hidden states.
    fn cross_entropy(&self, loss: Loss, hidden: &Tensor, targets: &[LossTarget]) -> Result<(LossValue, Tensor)> {
        match loss {
            Loss::Pair => {
                let (value, gradient) = self.model.pair_cross_entropy(hidden, self.labels, targets)?;
                Ok((LossValue::Known(value), gradient))
            }
            Loss::Label | Loss::Sequence => self.model.vocabulary_cross_entropy(hidden, targets),
        }
    }
}

/// The rows of a batch, and what each of their positions should predict.
struct TrainingBatch {
    /// The own tokens of each row, and the number of prefix tokens that it shares.
    own: Vec<(Vec<u32>, usize)>,
    targets: Vec<LossTarget>,
    outputs: OutputPositions,
}

impl TrainingBatch {
    fn new(trainable: &Trainable, loss: Loss, examples: &[Example<'_>]) -> Result<Self> {
        if examples.is_empty() {
            bail!("a training batch needs at least one example");
        }
        let prefix = &trainable.prefix;
        let mut own = Vec::with_capacity(examples.len());
        for example in examples {
            let mut tokens = example.tokens.to_vec();
            let common = tokens
                .iter()
                .zip(prefix)
                .take_while(|(token, prefix)| token == prefix)
                .count();
            let shared = common.min(tokens.len().saturating_sub(1));
            if loss == Loss::Sequence {
                // `<eos>` follows the label, but is not appended: it is a target and predicts nothing.
                tokens.push(trainable.label(example));
            }
            own.push((tokens.split_off(shared), shared));
        }
        let (targets, outputs) = match loss {
            Loss::Sequence => (sequence_targets(trainable, examples, &own), OutputPositions::All),
            Loss::Label => (
                label_targets(examples, trainable.labels),
                OutputPositions::Last { skip: 1 },
            ),
            Loss::Pair => (label_targets(examples, [0, 1]), OutputPositions::Last { skip: 1 }),
        };
        Ok(Self { own, targets, outputs })
    }

    /// Returns the prefix as the first row, followed by the rows of the examples.
    fn rows<'a>(&'a self, prefix: &'a [u32]) -> Vec<PackedRow<'a>> {
        let own = self.own.iter().map(|(own, shared)| PackedRow { own, shared: *shared });
        std::iter::once(PackedRow { own: prefix, shared: 0 })
            .chain(own)
            .collect()
    }
}

impl Trainable {
    /// Returns the token id of the likelier label of an example.
    fn label(&self, example: &Example<'_>) -> u32 {
        self.labels[usize::from(example.hateful < 0.5)]
    }
}

/// Returns one target per example: the distribution over the two labels after the prompt.
fn label_targets(examples: &[Example<'_>], [hateful, other]: [u32; 2]) -> Vec<LossTarget> {
    let total: f32 = examples.iter().map(|example| example.weight).sum();
    let target = |(position, example): (usize, &Example<'_>)| LossTarget {
        position,
        distribution: vec![(hateful, example.hateful), (other, 1.0 - example.hateful)],
        weight: example.weight / total,
    };
    examples.iter().enumerate().map(target).collect()
}

/// Returns one target for each token of each example after its first one.
///
/// A position of the prefix that several rows share has one target for each of these rows.
fn sequence_targets(trainable: &Trainable, examples: &[Example<'_>], own: &[(Vec<u32>, usize)]) -> Vec<LossTarget> {
    let mut targets = Vec::new();
    let mut start = trainable.prefix.len();
    for (example, (own, shared)) in examples.iter().zip(own) {
        let next = own.iter().copied().chain(std::iter::once(trainable.eos));
        // The last shared position predicts the first own token.
        let shared_targets = trainable.prefix[..*shared].iter().skip(1).copied().enumerate();
        let mut push = |position, id| {
            targets.push(LossTarget {
                position,
                distribution: vec![(id, 1.0)],
                weight: example.weight,
            });
        };
        shared_targets.for_each(|(position, id)| push(position, id));
        for (index, id) in next.enumerate() {
            match index {
                0 if *shared == 0 => {}
                0 => push(shared - 1, id),
                index => push(start + index - 1, id),
            }
        }
        start += own.len();
    }
    let total: f32 = targets.iter().map(|target| target.weight).sum();
    targets.iter_mut().for_each(|target| target.weight /= total);
    targets
}
