//! The loss of an adapter on a batch and its gradients.
//!
//! The forward pass is the serving one, over the live adapter. The backward pass goes layer by
//! layer: each is run again from its recorded input in differentiable operations, so memory holds
//! one layer's graph at a time, and frozen weights get no gradients (Chen et al., "Training Deep
//! Nets with Sublinear Memory Cost", 2016). Rows share the prompt's prefix in training too: it is
//! computed once a batch, and gradients flow through its keys and values.

mod cross_entropy;
mod differentiable;

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor, Var, bail};

use super::files::lora::LoraWeights;
use super::forward::gemma::Gemma;
use super::forward::packing::{Packed, PackedRow, Prefix, Wanted};
use crate::config::{Loss, Projection};
use crate::model::training::cross_entropy::LossTarget;
use crate::model::training::differentiable::{Rows, rms_norm};

/// One example: the prompt's ids and what should follow them.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    /// Ids of the whole prompt, `<bos>` first.
    pub tokens: &'a [u32],
    /// Probability that it is hateful; [`Loss::Sequence`] takes it as 0 or 1 at one half.
    pub hateful: f32,
    /// Weight beside the other examples of the batch.
    pub weight: f32,
}

/// An adapter's tensors in training, by layer and projection: (A, B, scale).
pub type Variables = BTreeMap<(usize, Projection), LoraVariables>;

/// One linear layer's delta in training.
#[derive(Debug, Clone)]
pub struct LoraVariables {
    /// (rank, inputs).
    pub a: Var,
    /// (outputs, rank).
    pub b: Var,
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rslora.
    pub scale: f64,
}

/// Gradients of A and B, by layer and projection.
pub type Gradients = BTreeMap<(usize, Projection), (Tensor, Tensor)>;

/// A base with a live adapter.
pub struct Trainable {
    model: Gemma,
    variables: Variables,
    /// Ids of the hateful label, the other, and `<eos>`.
    labels: [u32; 2],
    eos: u32,
    prefix: Vec<u32>,
}

impl Trainable {
    /// Puts `variables` beside the base's weights, which must be loaded without an adapter and
    /// unquantised.
    ///
    /// `prefix` is what prompts share; `labels` are the ids of the hateful label and the other.
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

    /// The adapter's tensors.
    pub fn variables(&self) -> &Variables {
        &self.variables
    }

    /// The base with the live adapter, as it serves.
    pub fn model(&self) -> &Gemma {
        &self.model
    }

    /// Loss of the batch and the gradients of every A and B.
    ///
    /// The loss is the weighted mean over examples; for [`Loss::Sequence`] over all next tokens.
    ///
    /// # Errors
    /// candle's; an empty batch.
    pub fn loss_and_gradients(&self, loss: Loss, batch: &[Example<'_>]) -> Result<(f64, Gradients)> {
        let batch = TrainingBatch::new(self, loss, batch)?;
        let rows = batch.rows(&self.prefix);
        let mut inputs = Vec::with_capacity(self.model.layers.len());
        let output = self
            .model
            .run(&rows, Prefix::FirstRow, batch.wanted, &mut |input, _, _| {
                inputs.push(input.detach())
            })?;
        let hidden = output.normed.detach().to_dtype(DType::F32)?;
        let (value, gradient) = self.top(loss, &hidden, &batch.targets)?;
        let gradient = self.through_final_norm(&output.residual.detach(), &gradient)?;
        Ok((value, self.backward(&rows, batch.wanted, inputs, gradient)?))
    }

    fn top(&self, loss: Loss, hidden: &Tensor, targets: &[LossTarget]) -> Result<(f64, Tensor)> {
        match loss {
            Loss::Pair => self.model.pair_cross_entropy(hidden, self.labels, targets),
            Loss::Label | Loss::Sequence => self.model.vocabulary_cross_entropy(hidden, targets),
        }
    }

    fn through_final_norm(&self, residual: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let x = Var::from_tensor(residual)?;
        let normed = rms_norm(x.as_tensor(), &self.model.norm, self.model.config.rms_norm_eps)?;
        let gradients = (normed * gradient)?.sum_all()?.backward()?;
        found(gradients.get(x.as_tensor()), "final norm")
    }

    fn backward(
        &self,
        rows: &[PackedRow<'_>],
        wanted: Wanted,
        mut inputs: Vec<Tensor>,
        mut gradient: Tensor,
    ) -> Result<Gradients> {
        let pass = self.model.inputs(Packed::new(rows)?, wanted)?;
        let mut all = Gradients::new();
        let count = self.model.layers.len();
        for index in (0..count).rev() {
            let Some(input) = inputs.pop() else {
                bail!("layer {index} has no recorded input")
            };
            let (spans, ends) = match &pass.last {
                Some((spans, ends)) if index + 1 == count => (spans, Some(ends)),
                _ => (&pass.spans, None),
            };
            let rows = Rows {
                spans,
                ends,
                turn: pass.angles.of(&self.model.layers[index].config.rope),
                prefix: self.prefix.len(),
            };
            let x = Var::from_tensor(&input)?;
            let y = self.model.differentiable_layer(index, x.as_tensor(), &rows)?;
            let gradients = (y * &gradient)?.sum_all()?.backward()?;
            for projection in Projection::ALL {
                let Some(lora) = self.variables.get(&(index, projection)) else {
                    continue;
                };
                let a = found(gradients.get(lora.a.as_tensor()), projection.name())?;
                let b = found(gradients.get(lora.b.as_tensor()), projection.name())?;
                all.insert((index, projection), (a, b));
            }
            gradient = found(gradients.get(x.as_tensor()), "layer input")?;
        }
        Ok(all)
    }
}

/// candle drops a gradient without a word where an operation has no backward.
fn found(gradient: Option<&Tensor>, name: &str) -> Result<Tensor> {
    match gradient {
        Some(gradient) => Ok(gradient.clone()),
        None => bail!("the gradient of {name} was lost"),
    }
}

/// Rows behind the prefix and what each position should predict.
struct TrainingBatch {
    own: Vec<(Vec<u32>, usize)>,
    targets: Vec<LossTarget>,
    wanted: Wanted,
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
                // The last token, `<eos>`, predicts nothing: it is a target only.
                tokens.push(trainable.label(example));
            }
            own.push((tokens.split_off(shared), shared));
        }
        let (targets, wanted) = match loss {
            Loss::Sequence => (sequence_targets(trainable, examples, &own), Wanted::All),
            Loss::Label => (label_targets(examples, trainable.labels), Wanted::Last { skip: 1 }),
            Loss::Pair => (label_targets(examples, [0, 1]), Wanted::Last { skip: 1 }),
        };
        Ok(Self { own, targets, wanted })
    }

    fn rows<'a>(&'a self, prefix: &'a [u32]) -> Vec<PackedRow<'a>> {
        let own = self.own.iter().map(|(own, shared)| PackedRow { own, shared: *shared });
        std::iter::once(PackedRow { own: prefix, shared: 0 })
            .chain(own)
            .collect()
    }
}

impl Trainable {
    fn label(&self, example: &Example<'_>) -> u32 {
        self.labels[usize::from(example.hateful < 0.5)]
    }
}

fn label_targets(examples: &[Example<'_>], [hateful, other]: [u32; 2]) -> Vec<LossTarget> {
    let total: f32 = examples.iter().map(|example| example.weight).sum();
    let target = |(position, example): (usize, &Example<'_>)| LossTarget {
        position,
        distribution: vec![(hateful, example.hateful), (other, 1.0 - example.hateful)],
        weight: example.weight / total,
    };
    examples.iter().enumerate().map(target).collect()
}

/// Every next token of every example; positions that rows share with the prefix predict once for
/// each of them.
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
