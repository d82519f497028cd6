//! Losses over the unembedding and their gradients, in closed form.
//!
//! A vocabulary has 262,144 rows and a training batch needs its whole-vocabulary cross-entropy at a
//! few positions. Autograd would keep the widened table and several copies of the logits; in closed
//! form the gradient is `softmax - target`, and the table is widened a chunk at a time.

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use crate::model::forward::gemma::Gemma;

/// A target distribution over a few vocabulary rows, for one hidden state.
#[derive(Debug, Clone, PartialEq)]
pub struct LossTarget {
    /// Index into the hidden states.
    pub position: usize,
    /// Vocabulary rows and their probabilities, which add up to one.
    pub distribution: Vec<(u32, f32)>,
    /// Factor of this target's cross-entropy in the loss.
    pub weight: f32,
}

/// Rows of the unembedding that are widened to f32 at a time: 32 MB at a width of 1024.
const VOCABULARY_CHUNK: usize = 8192;
/// Logits held at a time: 64 MB.
const MAX_LOGITS: usize = 1 << 24;

impl Gemma {
    /// The weighted sum of cross-entropies over the whole vocabulary, and its gradient by `hidden`
    /// (positions, hidden).
    ///
    /// # Errors
    /// candle's; a target outside of the positions or the vocabulary.
    pub(super) fn vocabulary_cross_entropy(&self, hidden: &Tensor, targets: &[LossTarget]) -> Result<(f64, Tensor)> {
        let vocabulary = self.config.vocab_size;
        let (positions, width) = hidden.dims2()?;
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
            gradients.push(self.through_unembedding(&gradient)?);
        }
        if let Some(target) = targets.iter().find(|target| target.position >= positions) {
            bail!("a target is at position {} of {positions}", target.position);
        }
        Ok((loss, Tensor::cat(&gradients, 0)?))
    }

    /// The weighted sum of cross-entropies over the two label logits only, and its gradient. Targets'
    /// distributions are over indices 0 and 1 of `labels`.
    ///
    /// # Errors
    /// As [`Gemma::vocabulary_cross_entropy`].
    pub(super) fn pair_cross_entropy(
        &self,
        hidden: &Tensor,
        labels: [u32; 2],
        targets: &[LossTarget],
    ) -> Result<(f64, Tensor)> {
        let rows = self.unembedding_of(&labels)?;
        let logits = hidden.matmul(&rows.t()?)?.flatten_all()?.to_vec1::<f32>()?;
        let targets: Vec<(usize, &LossTarget)> = targets.iter().map(|target| (target.position, target)).collect();
        let (loss, gradient) = self.logit_gradient(logits, 2, &targets)?;
        Ok((loss, gradient.matmul(&rows)?))
    }

    /// Uncapped logits of the whole vocabulary, row after row.
    fn all_logits(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        let (positions, vocabulary) = (hidden.dim(0)?, self.config.vocab_size);
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

    /// `gradient` (positions, vocabulary) of the logits to that of the hidden states.
    fn through_unembedding(&self, gradient: &Tensor) -> Result<Tensor> {
        let (positions, vocabulary) = gradient.dims2()?;
        let mut sum = Tensor::zeros((positions, self.config.hidden_size), DType::F32, &self.device)?;
        for start in (0..vocabulary).step_by(VOCABULARY_CHUNK) {
            let count = VOCABULARY_CHUNK.min(vocabulary - start);
            let rows = self.unembedding().narrow(0, start, count)?.to_dtype(DType::F32)?;
            sum = (sum + gradient.narrow(1, start, count)?.contiguous()?.matmul(&rows)?)?;
        }
        Ok(sum)
    }

    /// Loss and gradient by uncapped logits: `weight * (softmax - target)`, times the soft-cap's
    /// slope `1 - (capped / cap)^2`.
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
            for (gradient, &logit) in gradient.iter_mut().zip(row) {
                *gradient += target.weight * (f64::from(logit) - log_sum).exp() as f32;
            }
            for &(id, probability) in &target.distribution {
                let Some(&logit) = row.get(id as usize) else {
                    bail!("target {id} is outside of {width} logits")
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
