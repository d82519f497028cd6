//! The [`Scorer`] that the daemon uses: a base model with an adapter and a frame, which are loaded together and checked
//! against each other.

pub mod canary;
pub mod defaults;
pub mod golden;
mod head;
mod load;
pub mod oracle;
pub mod tolerance;
pub mod warm_up;

use std::sync::Arc;

use candle_core::{Result as CandleResult, Tensor};
use tracing::warn;

pub use load::Base;

use defaults::ModelDefaults;

use crate::message::ModelIdentity;
use crate::model::device;
use crate::model::device::Placement;
use crate::model::device::footprint::bytes_per_token;
use crate::model::forward::gemma::{Gemma, PackedRow, PrefixCache};
use crate::model::transfer::PendingLogits;
use crate::prompt::Prompter;
use crate::scorer::{Begun, Row, Running, ScoreError, Scorer};

/// The largest number of own tokens in one forward pass on the CPU. Passes of 150 to 500 tokens are as fast as larger
/// ones, and their activations stay in the processor's cache. A single row with more own tokens is still one pass.
const CPU_PASS_TOKENS: usize = 512;

/// The largest number of own tokens in one forward pass on a GPU. It limits the memory of the activations, but is large
/// because a GPU needs large matrices.
const GPU_PASS_TOKENS: usize = 1 << 15;

/// The share of a GPU's free memory that a pass may use. The rest is for fragmentation and for other processes.
const SHARE_OF_MEMORY: f64 = 0.8;

/// A loaded model that computes margins.
pub struct Classifier {
    model: Gemma,
    prefix: PrefixCache,
    /// The rows of the unembedding, or of a classification head, for the two labels, the hateful one first: (2, hidden).
    labels: Tensor,
    /// The outputs of a classification head in words, if the model has one.
    head: Option<String>,
    notes: Vec<String>,
    prompter: Arc<Prompter>,
    defaults: ModelDefaults,
    placement: Placement,
    identity: ModelIdentity,
    description: String,
}

impl Classifier {
    /// Returns the prompter, which the threads that tokenise share.
    pub fn prompter(&self) -> Arc<Prompter> {
        Arc::clone(&self.prompter)
    }

    /// Returns the defaults that the base model brings.
    pub fn defaults(&self) -> &ModelDefaults {
        &self.defaults
    }

    /// Returns everything that a score depends on apart from the text, with files and settings as content hashes.
    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    /// Limits the unused memory that stays reserved on a GPU to what micro-batches of `max_tokens` own tokens need.
    /// This releases what only the warm-up needed.
    ///
    /// # Errors
    /// Returns an error if the device fails.
    pub fn limit_reserved_memory(&self, max_tokens: usize) -> CandleResult<()> {
        self.model.limit_buffers(max_tokens);
        let tokens = max_tokens.min(GPU_PASS_TOKENS) as u64;
        device::retain_freed_memory(
            self.model.device(),
            tokens * bytes_per_token(self.model.config(), self.placement.dtype),
        )
    }

    /// Returns the device and the data type in which the model computes.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Returns a description for people: architecture, size, device and adapter.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Returns the outputs of the classification head in words, or `None` if the margin is that of two labels.
    pub fn head(&self) -> Option<&str> {
        self.head.as_deref()
    }

    /// Returns remarks on the model's files for the operator, such as parts that are left out.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Returns the decoder, which turns token ids into logits and is independent of the frame.
    pub fn model(&self) -> &Gemma {
        &self.model
    }

    /// Returns the logits of the two labels, the hateful one first, for each row.
    ///
    /// # Errors
    /// Returns [`ScoreError::Failed`] if the device or the arithmetic fails. The logits may be infinite or NaN.
    pub fn label_logits(&self, rows: &[Row]) -> Result<Vec<[f32; 2]>, ScoreError> {
        self.begin_passes(rows)?.logits()
    }

    /// Begins to compute all rows, without waiting for a GPU.
    fn begin_passes(&self, rows: &[Row]) -> Result<PendingPasses, ScoreError> {
        let pass_tokens = if self.model.device().is_cpu() {
            CPU_PASS_TOKENS
        } else {
            GPU_PASS_TOKENS
        };
        let passes: CandleResult<Vec<PendingLogits>> = split_into_passes(rows, pass_tokens)
            .map(|pass| self.begin_pass(pass))
            .collect();
        let rows = rows.len();
        passes
            .map(|passes| PendingPasses { passes, rows })
            .map_err(|error| self.release_and_fail(rows, &error))
    }

    /// Returns the error of a failed call, after releasing the unused memory of the device, so that a smaller call can
    /// succeed.
    fn release_and_fail(&self, rows: usize, error: &candle_core::Error) -> ScoreError {
        if let Err(error) = device::release_unused_memory(self.model.device()) {
            warn!(
                error = device::message_without_backtrace(&error),
                "cannot release the unused memory of the device"
            );
        }
        failed(rows, error)
    }

    fn begin_pass(&self, rows: &[Row]) -> CandleResult<PendingLogits> {
        let mut packed = Vec::with_capacity(rows.len());
        for (index, row) in rows.iter().enumerate() {
            let (shared, own) = row.tokens.split_at_checked(row.shared).unwrap_or_default();
            if !self.prefix.tokens().starts_with(shared) {
                candle_core::bail!(
                    "the first {} ids of row {index} are not those of the prefix",
                    row.shared
                );
            }
            packed.push(PackedRow {
                own,
                shared: row.shared,
            });
        }
        self.model.begin(&packed, Some(&self.prefix), &self.labels)
    }
}

impl Drop for Classifier {
    fn drop(&mut self) {
        device::leak_if_failed(self.model.device());
    }
}

fn failed(rows: usize, error: &candle_core::Error) -> ScoreError {
    ScoreError::Failed {
        rows,
        reason: device::message_without_backtrace(error),
    }
}

/// Forward passes over all rows of one call, in order.
struct PendingPasses {
    passes: Vec<PendingLogits>,
    rows: usize,
}

impl PendingPasses {
    /// Waits for the logits of the two labels, the hateful one first, for each row.
    fn logits(self) -> Result<Vec<[f32; 2]>, ScoreError> {
        let mut logits = Vec::with_capacity(self.rows);
        for pass in self.passes {
            let pairs = pass.wait().map_err(|error| failed(self.rows, &error))?;
            logits.extend_from_slice(pairs.as_chunks::<2>().0);
        }
        Ok(logits)
    }
}

impl Running for PendingPasses {
    fn is_done(&self) -> bool {
        self.passes.last().is_none_or(PendingLogits::is_ready)
    }

    fn margins(self: Box<Self>) -> Result<Vec<f32>, ScoreError> {
        let margins: Vec<f32> = self.logits()?.iter().map(|[hateful, other]| hateful - other).collect();
        match margins.iter().position(|margin| !margin.is_finite()) {
            None => Ok(margins),
            Some(row) => Err(ScoreError::NotFinite {
                row,
                margin: margins[row],
            }),
        }
    }
}

impl Scorer for Classifier {
    fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
        Box::new(self.begin_passes(rows)?).margins()
    }

    fn token_capacity(&self) -> Option<usize> {
        let free = match self.placement.free_bytes() {
            Ok(free) => free?,
            Err(error) => {
                warn!(
                    error = device::message_without_backtrace(&error),
                    "cannot read the free memory of the device"
                );
                return None;
            }
        };
        // A larger pass can also use the memory of the buffers that it replaces.
        let free = free + self.model.buffer_bytes();
        let tokens = (free as f64 * SHARE_OF_MEMORY) as usize
            / bytes_per_token(self.model.config(), self.placement.dtype) as usize;
        // Larger batches are split into passes, so the memory is only a limit if it is too small for a full pass.
        (tokens < GPU_PASS_TOKENS).then_some(tokens)
    }

    fn begin(&mut self, rows: &[Row]) -> Result<Begun, ScoreError> {
        let passes = Box::new(self.begin_passes(rows)?);
        if self.model.device().is_cpu() {
            passes.margins().map(Begun::Done)
        } else {
            Ok(Begun::Running(passes))
        }
    }
}

/// Splits rows into passes of at most `pass_tokens` own tokens, in order. A row with more own tokens is a pass by
/// itself.
fn split_into_passes(rows: &[Row], pass_tokens: usize) -> impl Iterator<Item = &[Row]> {
    let mut rest = rows;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fits = |row: &&Row| {
            tokens += row.own_tokens();
            tokens <= pass_tokens
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (pass, after) = rest.split_at_checked(count)?;
        rest = after;
        Some(pass)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_keep_the_order_and_the_token_limit() {
        let row = |tokens: usize| Row {
            tokens: vec![0; tokens].into(),
            shared: 0,
        };
        let check = |costs: &[usize], expected: &[usize]| {
            let rows: Vec<Row> = costs.iter().map(|&cost| row(cost)).collect();
            assert_eq!(
                split_into_passes(&rows, 512).map(<[Row]>::len).collect::<Vec<_>>(),
                expected,
                "{costs:?}"
            );
        };
        check(&[], &[]);
        check(&[512, 1], &[1, 1]);
        check(&[2000, 1, 1], &[1, 2]);
        check(&[256, 256, 256], &[2, 1]);
    }
}
