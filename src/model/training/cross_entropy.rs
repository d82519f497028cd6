//! Cross-entropy losses over the unembedding, and their gradients in closed form.
//!
//! A training batch needs the cross-entropy over the whole vocabulary (up to 262,144 tokens) at a few positions.
//! Automatic differentiation would keep an f32 copy of the unembedding table and several copies of the logits. In
//! closed form, the gradient is `softmax - target`, and only a chunk of the table is converted to f32 at a time. On a
//! GPU, the table is not converted at all, and logits stay there.

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::unembedding;
use crate::model::forward::gemma::Gemma;
#[cfg(feature = "cuda")]
use crate::model::kernels::cuda::loss;

/// A target distribution over a few tokens, for one hidden state.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LossTarget {
    /// Index of the hidden state.
    pub(super) position: usize,
    /// Token ids and their probabilities, which add up to one.
    pub(super) distribution: Vec<(u32, f32)>,
    /// Weight of this target's cross-entropy in the loss.
    pub(super) weight: f32,
}

/// A loss, which a GPU may still be computing. The host queues the backward pass meanwhile.
#[derive(Debug)]
pub(super) enum LossValue {
    Known(f64),
    #[cfg(feature = "cuda")]
    Pending(loss::PendingLoss),
}

impl LossValue {
    /// Waits for the loss.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub(super) fn wait(self) -> Result<f64> {
        match self {
            Self::Known(value) => Ok(value),
            #[cfg(feature = "cuda")]
            Self::Pending(loss) => loss.wait(),
        }
    }
}

/// Number of rows of the unembedding that are converted to f32 at a time: 32 MiB if the hidden size is 1024.
const VOCABULARY_CHUNK: usize = 8192;
/// Number of logits held in memory at a time: 64 MiB, or 128 MiB on a GPU, which holds two numbers for each.
const MAX_LOGITS: usize = 1 << 24;

impl Gemma {
    /// Returns the weighted sum of the cross-entropies over the whole vocabulary, and its gradient with respect to
    /// `hidden`: (positions, hidden size).
    ///
    /// # Errors
    /// Returns an error if a target is outside the positions or the vocabulary, or the computation fails.
    pub(super) fn vocabulary_cross_entropy(
        &self,
        hidden: &Tensor,
        targets: &[LossTarget],
    ) -> Result<(LossValue, Tensor)> {
        let vocabulary = self.config.vocab_size;
        let (positions, width) = hidden.dims2()?;
        if let Some(target) = targets.iter().find(|target| target.position >= positions) {
            bail!(
                "a target is at position {}, expected less than {positions}",
                target.position
            );
        }
        // A table in f16 goes through the host, as on the CPU. Gemma's checkpoints are bf16.
        #[cfg(feature = "cuda")]
        if self.device.is_cuda() && loss::supports(self.unembedding().dtype()) {
            let rows = row_targets(targets, positions);
            let softcap = self.config.final_logit_softcapping;
            let (loss, gradient) = loss::cross_entropy(self.unembedding(), hidden, &rows, softcap, MAX_LOGITS)?;
            return Ok((LossValue::Pending(loss), gradient));
        }
        let group = (MAX_LOGITS / vocabulary).max(1);
        let mut loss = 0f64;
        let mut gradients = Vec::new();
        for start in (0..positions).step_by(group) {
            let count = group.min(positions - start);
            let chunk = hidden.narrow(0, start, count)?.contiguous()?;
            let targets = targets
                .iter()
                .filter(|target| (start..start + count).contains(&target.position));
            let targets: Vec<(usize, &LossTarget)> = targets.map(|target| (target.position - start, target)).collect();
            if targets.is_empty() {
                gradients.push(Tensor::zeros((count, width), DType::F32, &self.device)?);
                continue;
            }
            let logits = self.all_logits(&chunk)?;
            let (chunk_loss, gradient) = self.logit_gradient(logits, vocabulary, &targets)?;
            loss += chunk_loss;
            gradients.push(self.unembedding_backward(&gradient)?);
        }
        Ok((LossValue::Known(loss), Tensor::cat(&gradients, 0)?))
    }

    /// Returns the weighted sum of the cross-entropies over only the two label logits, and its gradient with respect to
    /// `hidden`: (positions, hidden size). The distributions of the targets are over the indices 0 and 1 of `labels`.
    ///
    /// # Errors
    /// Returns an error if a label is outside the vocabulary, a target is not 0 or 1, or the computation fails.
    pub(super) fn pair_cross_entropy(
        &self,
        hidden: &Tensor,
        labels: [u32; 2],
        targets: &[LossTarget],
    ) -> Result<(f64, Tensor)> {
        let rows = self.unembedding_rows(&labels)?;
        let logits = hidden.matmul(&rows.t()?)?.flatten_all()?.to_vec1::<f32>()?;
        let targets: Vec<(usize, &LossTarget)> = targets.iter().map(|target| (target.position, target)).collect();
        let (loss, gradient) = self.logit_gradient(logits, 2, &targets)?;
        Ok((loss, gradient.matmul(&rows)?))
    }

    /// Returns whether products with the whole unembedding are those for a few hidden states.
    fn multiplies_few(&self, positions: usize) -> bool {
        self.device.is_cpu() && positions <= unembedding::FEW
    }

    /// Returns the logits of the whole vocabulary before the soft-cap: (positions, vocabulary), row by row.
    fn all_logits(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        let (positions, vocabulary) = (hidden.dim(0)?, self.config.vocab_size);
        if self.multiplies_few(positions) {
            return unembedding::logits(&hidden.flatten_all()?.to_vec1::<f32>()?, self.unembedding());
        }
        let mut logits = vec![0f32; positions * vocabulary];
        for start in (0..vocabulary).step_by(VOCABULARY_CHUNK) {
            let count = VOCABULARY_CHUNK.min(vocabulary - start);
            let rows = self.unembedding().narrow(0, start, count)?.to_dtype(DType::F32)?;
            let part = hidden.matmul(&rows.t()?)?.to_vec2::<f32>()?;
            for (logits, part) in logits.chunks_exact_mut(vocabulary).zip(part) {
                logits[start..start + count].copy_from_slice(&part);
            }
        }
        Ok(logits)
    }

    /// Returns the gradient with respect to the hidden states, (positions, hidden size), given the gradient with
    /// respect to the logits, (positions, vocabulary).
    fn unembedding_backward(&self, gradient: &Tensor) -> Result<Tensor> {
        let (positions, vocabulary) = gradient.dims2()?;
        if self.multiplies_few(positions) {
            let factors = gradient.flatten_all()?.to_vec1::<f32>()?;
            let sums = unembedding::weighted_rows(&factors, self.unembedding())?;
            return Tensor::from_vec(sums, (positions, self.config.hidden_size), &self.device);
        }
        let mut sum = Tensor::zeros((positions, self.config.hidden_size), DType::F32, &self.device)?;
        for start in (0..vocabulary).step_by(VOCABULARY_CHUNK) {
            let count = VOCABULARY_CHUNK.min(vocabulary - start);
            let rows = self.unembedding().narrow(0, start, count)?.to_dtype(DType::F32)?;
            sum = (sum + gradient.narrow(1, start, count)?.contiguous()?.matmul(&rows)?)?;
        }
        Ok(sum)
    }

    /// Returns the loss and its gradient with respect to the logits before the soft-cap: (positions, width).
    ///
    /// The gradient is `weight * (softmax - target)`, times the derivative of the soft-cap, `1 - (capped / cap)^2`, if
    /// the model has one.
    fn logit_gradient(
        &self,
        mut logits: Vec<f32>,
        width: usize,
        targets: &[(usize, &LossTarget)],
    ) -> Result<(f64, Tensor)> {
        let positions = logits.len() / width;
        let cap = self.config.final_logit_softcapping.map(|cap| cap as f32);
        if let Some(cap) = cap {
            logits
                .par_iter_mut()
                .for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        let capped = logits;
        let mut gradient = vec![0f32; capped.len()];
        let mut loss = 0f64;
        for &(position, target) in targets {
            let row = &capped[position * width..][..width];
            let gradient = &mut gradient[position * width..][..width];
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.par_iter().map(|&logit| f64::from(logit - max).exp()).sum();
            let log_sum = f64::from(max) + sum.ln();
            gradient.par_iter_mut().zip(row).for_each(|(gradient, &logit)| {
                *gradient += target.weight * (f64::from(logit) - log_sum).exp() as f32;
            });
            for &(id, probability) in &target.distribution {
                let Some(&logit) = row.get(id as usize) else {
                    bail!("target {id} is outside the {width} logits")
                };
                loss += f64::from(target.weight) * f64::from(probability) * (log_sum - f64::from(logit));
                gradient[id as usize] -= target.weight * probability;
            }
        }
        if let Some(cap) = cap {
            let slopes = gradient.par_iter_mut().zip(capped.par_iter());
            slopes.for_each(|(gradient, capped)| *gradient *= 1.0 - (capped / cap) * (capped / cap));
        }
        Ok((loss, Tensor::from_vec(gradient, (positions, width), &self.device)?))
    }
}

/// Returns what each position should predict: the sum of its targets.
#[cfg(feature = "cuda")]
pub(super) fn row_targets(targets: &[LossTarget], positions: usize) -> Vec<loss::RowTargets> {
    let mut rows = vec![loss::RowTargets::default(); positions];
    for target in targets {
        let row = &mut rows[target.position];
        row.weight += f64::from(target.weight);
        for &(id, probability) in &target.distribution {
            *row.tokens.entry(id).or_default() += f64::from(target.weight) * f64::from(probability);
        }
    }
    rows
}
