//! The largest difference that is allowed between two correct computations of the same number.
//!
//! Every bound between whole models is here, for the daemon and for its tests. The two computations may differ in the
//! implementation, the device, the batch or the arithmetic; a larger difference means that one of them is wrong.
//!
//! | what is compared | quantity | f32 | bf16 | int8 |
//! |---|---|---|---|---|
//! | a loaded version with its golden set | margin | [`GOLDEN_EXACT`] | [`GOLDEN_ROUNDED`] | [`GOLDEN_ROUNDED`] |
//! | `explain` with the decision | margin | [`EXPLAIN_F32`] | [`EXPLAIN_BF16`] | [`EXPLAIN_QUANTISED`] |
//! | `check --oracle`: the model with candle-transformers | logit | [`ORACLE_F32`] | | |
//! | the model with the recorded references, short texts | logit, probability | [`REFERENCE_SHORT_F32`] | | |
//! | the model with the recorded references, long text | logit, probability | [`REFERENCE_LONG_F32`] | | |
//! | the quantised model with the same model in f32 | margin | | | [`QUANTISED_INT8`] |
//! | the bundled model, quantised, with the same model in f32 | probability | | | [`QUANTISED_PROBABILITY`] |
//! | a model with its MLP in FP8 with the same model in bf16, on a GPU | margin | | [`GPU_FP8`] | |
//! | a row in one batch with the same row in another | margin | [`BATCH_F32`] | | |
//! | the serving model with the model in training | margin | [`TRAINING_F32`] | | |
//! | a GPU with the CPU | probability | [`GPU_F32`] | [`GPU_BF16`] | |
//! | a row in one batch with the same row in another, on a GPU | margin | [`GPU_BATCH_F32`] | [`GPU_BATCH_BF16`] | |
//! | training on a GPU with training on the CPU | loss | [`GPU_LOSS_F32`] | [`GPU_LOSS_BF16`] | |
//!
//! Differences are absolute unless a comment states otherwise. The bounds of single kernels against their formulas are
//! next to the kernels, in `model::kernels`, and those of gradients are in `tests/it/training_parity.rs`.

/// The bounds for one set of reference texts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReferenceTolerance {
    /// The largest difference of a logit.
    pub logit: f32,
    /// The largest difference of the probability of the hateful label.
    pub probability: f64,
}

/// The bound for golden margins if both were computed in f32 over unquantised weights. Two correct implementations
/// differ by about 1e-4, including the rounding of different processors.
pub const GOLDEN_EXACT: f32 = 1e-2;

/// The bound for golden margins if either was computed in bf16 or over quantised weights. The error then depends on the
/// device.
pub const GOLDEN_ROUNDED: f32 = 1.0;

/// The bound for the margin of a decision in f32. Processors differ in how they round.
pub const EXPLAIN_F32: f32 = 1e-3;

/// The bound for the margin of a decision if either computation was in bf16, whose rounding depends on the order in
/// which a device adds. It corresponds to about 2e-2 in probability.
pub const EXPLAIN_BF16: f32 = 0.1;

/// The bound for the margin of a decision over quantised weights, whose error depends on the kernels of the device.
pub const EXPLAIN_QUANTISED: f32 = 0.25;

/// The bound for logits of candle-transformers over an operator's weights. On the reference checkpoints, two correct
/// f32 implementations differ by about 3e-5 ([`REFERENCE_SHORT_F32`]), and a wrong one by far more than this bound.
pub const ORACLE_F32: f32 = 1e-2;

/// The bounds for the recorded references of all texts except the long one.
///
/// They follow from the differences between f32 and f64 in the reference implementations themselves. The common
/// mistakes (another GELU, window, scale or rope base) cause differences that are one to four orders of magnitude
/// larger.
pub const REFERENCE_SHORT_F32: ReferenceTolerance = ReferenceTolerance {
    logit: 3e-5,
    probability: 1e-5,
};

/// The bounds for the recorded references of the long text, whose attention adds over more tokens. They have the same
/// source as [`REFERENCE_SHORT_F32`].
pub const REFERENCE_LONG_F32: ReferenceTolerance = ReferenceTolerance {
    logit: 1e-4,
    probability: 2e-5,
};

/// The bound for margins over 8-bit weights, compared with f32, on the reference checkpoints. Random weights of width 64
/// are the worst case, because their rounding errors do not average out.
pub const QUANTISED_INT8: f32 = 0.25;

/// The bound for probabilities of the bundled model over 8-bit weights, compared with f32, on the demo's comments. Over
/// public corpora, the 99th percentile is at most 0.012 (`benches/results/int8-accuracy.md`).
pub const QUANTISED_PROBABILITY: f32 = 0.01;

/// The bound for margins of one row in two batches on the CPU. They can differ because the order of additions inside a
/// matrix product may depend on the size of the batch.
pub const BATCH_F32: f32 = 1e-5;

/// The bound for margins of a written adapter, merged into the weights or beside them, compared with those of the model
/// that was trained. The two forward passes compute the same numbers in another order.
pub const TRAINING_F32: f32 = 1e-5;

/// The bound for probabilities on a GPU in f32, whose libraries add in another order than the CPU.
pub const GPU_F32: f64 = 1e-4;

/// The bound for probabilities on a GPU in bf16, which has 8 significant bits, compared with f32 on the CPU.
pub const GPU_BF16: f64 = 2e-2;

/// The bound for margins of one row in two batches on a GPU in f32. cuBLAS chooses its order of additions by the number
/// of rows.
pub const GPU_BATCH_F32: f32 = 1e-4;

/// The bound for margins with the MLP in FP8 on a GPU, compared with bf16, on the reference checkpoints.
///
/// e4m3 has 4 significant bits, so a factor is wrong by up to 1/16 and by about 1/40 on average, and a sum of products
/// of two such factors by about 1/28 of its size. Random weights of width 64 are the worst case, because their rounding
/// errors do not average out: Gemma's fixture moves by 0.14 without an adapter and by 0.32 with one on all projections.
/// Without the scales of the inputs it moves by 2.2, and with the scale of the first row or output for all, by 1.0 to 1.8.
pub const GPU_FP8: f32 = 0.6;

/// The bounds for margins of one row in two batches on a GPU in bf16: for the 99th percentile over all rows, and for
/// the maximum. They are shares of the largest error of bf16 against f32, because the batch may change margins less
/// than rounding to bf16 does.
pub const GPU_BATCH_BF16: [f32; 2] = [0.5, 1.0];

/// The bound for training losses on a GPU in f32 in the first [`GPU_LOSS_STEPS`] steps. It is relative to the loss if
/// the loss is above 1.
pub const GPU_LOSS_F32: f64 = 1e-3;

/// The bound for training losses on a GPU in bf16, in the same steps and relative in the same way as [`GPU_LOSS_F32`].
pub const GPU_LOSS_BF16: f64 = 0.05;

/// The number of steps after which the bounds on training losses are multiplied by [`GPU_LOSS_GROWTH`]. Adam takes a
/// full step even if a gradient consists of rounding error only, and steps accumulate.
pub const GPU_LOSS_STEPS: usize = 8;

/// The factor for the bounds on training losses after the first [`GPU_LOSS_STEPS`] steps.
pub const GPU_LOSS_GROWTH: f64 = 20.0;
