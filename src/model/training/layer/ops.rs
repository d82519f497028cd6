//! The operations that a layer in training consists of, on the device that computes.

use candle_core::{Result, Tensor};

use crate::model::forward::linear::TrainingLinear;
use crate::model::kernels::training::QueriesKeysValues;
use crate::model::kernels::{PackedAttention, RopeAngles};

/// The operations of one device. They write into buffers that are allocated once and used by every layer.
///
/// The number of rows of an operation follows from the lengths of its buffers.
pub(in crate::model::training) trait LayerOps {
    /// Elements in f32, row by row.
    type Buffer;

    /// Returns a buffer of `len` elements, whose values are unspecified.
    fn buffer(&self, len: usize) -> Result<Self::Buffer>;

    /// Returns a buffer like [`LayerOps::buffer`] that can be a factor of a product with a frozen weight.
    fn factor(&self, len: usize) -> Result<Self::Buffer>;

    /// Returns the bytes that a pass may use to keep what the gradients of layers need. Layers for which they do not suffice
    /// are computed again in the backward pass.
    fn bytes_to_keep(&self) -> Result<usize>;

    /// Returns a buffer that can be a factor, with the elements of a tensor of f32.
    fn copy_of(&self, x: &Tensor) -> Result<Self::Buffer>;

    /// Copies a buffer into a tensor of rows of `width` elements.
    fn to_tensor(&self, x: &Self::Buffer, width: usize) -> Result<Tensor>;

    /// Writes `y = x W' + scale low B'`, with `low = x A'` if the layer has a delta. `low` may be longer.
    fn linear(
        &self,
        linear: &TrainingLinear<'_>,
        x: &Self::Buffer,
        low: &mut Self::Buffer,
        y: &mut Self::Buffer,
    ) -> Result<()>;

    /// Writes or adds the gradient with respect to the input of [`LayerOps::linear`], `dx = dy W + d_low A` with
    /// `d_low = scale dy B`. Returns the gradients of A, `d_low' x`, and B, `scale dy' low`, if the layer has a delta.
    fn linear_backward(
        &self,
        linear: &TrainingLinear<'_>,
        saved: SavedInput<'_, Self::Buffer>,
        gradient: &Self::Buffer,
        d_low: &mut Self::Buffer,
        out: InputGradient<'_, Self::Buffer>,
    ) -> Result<Option<(Tensor, Tensor)>>;

    /// Writes `x / sqrt(mean(x^2) + eps) * weight` for each row.
    fn rms_norm(&self, x: &Self::Buffer, weight: &Tensor, eps: f64, out: &mut Self::Buffer) -> Result<()>;

    /// Writes `residual + rms_norm(y, post)`, or `residual + y` without a norm. `width` is the length of a row.
    fn add_norm(
        &self,
        residual: &Self::Buffer,
        y: &Self::Buffer,
        post: Option<&Tensor>,
        eps: f64,
        width: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Writes the gradient with respect to the input `x` of [`LayerOps::rms_norm`], plus `residual` if there is one.
    fn rms_norm_backward(
        &self,
        x: &Self::Buffer,
        weight: &Tensor,
        eps: f64,
        gradient: &Self::Buffer,
        residual: Option<&Self::Buffer>,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Writes `gelu(gate) * up`.
    fn geglu(&self, gate: &Self::Buffer, up: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;

    /// Replaces `gate` and `up` by their gradients, given that of the output of [`LayerOps::geglu`].
    fn geglu_backward(&self, gate: &mut Self::Buffer, up: &mut Self::Buffer, gradient: &Self::Buffer) -> Result<()>;

    /// Normalises each head of each token, if there is a norm, and rotates it.
    fn norm_rope(
        &self,
        x: &Self::Buffer,
        angles: &RopeAngles,
        norm: Option<(&Tensor, f64)>,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Writes the gradient with respect to the input `x` of [`LayerOps::norm_rope`]. `gradient` may be overwritten.
    fn norm_rope_backward(
        &self,
        x: &Self::Buffer,
        angles: &RopeAngles,
        norm: Option<(&Tensor, f64)>,
        gradient: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Writes the output of attention, whose prefix is the first `prefix` tokens of the keys and values.
    ///
    /// `log_sums` gets the logarithm of the sum of the exponentials of the scores of each query and head, if the device
    /// uses it in the backward pass: (queries * heads).
    fn attention(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&Self::Buffer>,
        prefix: usize,
        log_sums: &mut Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Writes the gradients with respect to queries, keys and values.
    fn attention_backward(
        &self,
        attention: &PackedAttention<'_>,
        inputs: &QueriesKeysValues<&Self::Buffer>,
        saved: AttentionOutput<'_, Self::Buffer>,
        gradient: &Self::Buffer,
        out: QueriesKeysValues<&mut Self::Buffer>,
    ) -> Result<()>;

    /// Writes the rows of `x` at these indices, (rows) of u32.
    fn select(&self, x: &Self::Buffer, indices: &Tensor, out: &mut Self::Buffer) -> Result<()>;

    /// Adds rows to those of `out` at these distinct indices, (rows) of u32.
    fn add_at(&self, x: &Self::Buffer, indices: &Tensor, out: &mut Self::Buffer) -> Result<()>;
}

/// What the backward pass of a linear layer needs of its forward pass.
pub(in crate::model::training) struct SavedInput<'a, B> {
    pub(in crate::model::training) x: &'a B,
    /// The product of the input and A, if the layer has a delta.
    pub(in crate::model::training) low: &'a B,
}

/// Where the gradient with respect to the input of a linear layer goes.
pub(in crate::model::training) enum InputGradient<'a, B> {
    /// Nowhere: it is not needed.
    Skip,
    /// It replaces the contents of the buffer.
    Write(&'a mut B),
    /// It is added to the buffer.
    Add(&'a mut B),
}

impl<B> InputGradient<'_, B> {
    /// Returns the same target, or none if the gradient is not needed.
    pub(in crate::model::training) fn only_if(self, is_needed: bool) -> Self {
        if is_needed { self } else { Self::Skip }
    }
}

#[cfg_attr(
    not(feature = "cuda"),
    expect(dead_code, reason = "on the CPU, the backward pass computes it again")
)]
/// What the backward pass of attention needs of its forward pass, and space of the same size as `log_sums`.
pub(in crate::model::training) struct AttentionOutput<'a, B> {
    pub(in crate::model::training) output: &'a B,
    pub(in crate::model::training) log_sums: &'a B,
    pub(in crate::model::training) space: &'a mut B,
    /// Number of tokens of the prefix.
    pub(in crate::model::training) prefix: usize,
}
