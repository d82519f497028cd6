//! The forward pass: the inputs of a pass, and its way through the layers.

use candle_core::{Result, Tensor, bail};

use super::Gemma;
use super::layer::DecoderLayer;
use crate::model::forward::linear::LinearInput;
use crate::model::forward::packing::{
    OutputPositions, PackedRow, PackedRows, PassInputs, PassOutput, SharedPrefix, last_queries,
};
use crate::model::kernels::{
    CachedKeysValues, PackedAttention, PackedSpans, RopeAngles, Spans, add_rms_norm, norm_rope, rms_norm,
};
use crate::model::transfer::UploadBuffer;

impl Gemma {
    /// Copies the input of a pass to the device.
    pub(in crate::model) fn inputs(&self, packed: PackedRows, outputs: OutputPositions) -> Result<PassInputs> {
        self.check_ids(&packed.tokens)?;
        let mut upload = UploadBuffer::default();
        let tokens = upload.push(packed.tokens);
        // They fit in u32, because `RopeTables::angles` below refuses positions beyond the config's limit.
        let position = |&position: &usize| position as u32;
        let is_gpu = !self.device.is_cpu();
        let positions = is_gpu.then(|| upload.push(packed.positions.iter().map(position)));
        let mut last_positions = None;
        let last = match outputs {
            OutputPositions::Last { skip } => {
                let (spans, ends) = last_queries(&packed.spans, skip);
                let at_ends = ends.iter().map(|&end| position(&packed.positions[end as usize]));
                last_positions = is_gpu.then(|| upload.push(at_ends));
                let ends = upload.push(ends);
                Some((PackedSpans::new(spans, &self.device, &mut upload)?, ends))
            }
            OutputPositions::All | OutputPositions::KeysValues => None,
        };
        let spans = PackedSpans::new(packed.spans, &self.device, &mut upload)?;
        let uploaded = self.transfer.upload(upload)?;
        let positions = positions.map(|positions| uploaded.get(&positions)).transpose()?;
        Ok(PassInputs {
            tokens: uploaded.get(&tokens)?,
            angles: self.ropes.angles(&packed.positions, positions.as_ref())?,
            spans: spans.on_device(&uploaded)?,
            last: match last {
                Some((spans, ends)) => Some((spans.on_device(&uploaded)?, uploaded.get(&ends)?)),
                None => None,
            },
            last_positions: last_positions.map(|positions| uploaded.get(&positions)).transpose()?,
            #[cfg(feature = "cuda")]
            uploaded: uploaded.whole(),
        })
    }

    /// Checks the rows of a pass and copies them to the device.
    pub(in crate::model::forward) fn pass_inputs(
        &self,
        rows: &[PackedRow<'_>],
        prefix: SharedPrefix<'_>,
        outputs: OutputPositions,
    ) -> Result<PassInputs> {
        let packed = PackedRows::new(rows)?;
        let prefix = prefix.tokens(rows);
        match packed.spans.iter().find(|span| span.shared > prefix) {
            None => self.inputs(packed, outputs),
            Some(span) => bail!("a row shares {} tokens, but the prefix has only {prefix}", span.shared),
        }
    }

    /// Runs a pass. `observe` is called in each layer with its input (tokens, hidden), its keys and its values.
    pub(in crate::model) fn run(
        &self,
        rows: &[PackedRow<'_>],
        prefix: SharedPrefix<'_>,
        outputs: OutputPositions,
        observe: &mut dyn FnMut(&Tensor, &Tensor, &Tensor),
    ) -> Result<PassOutput> {
        let PassInputs {
            tokens,
            angles,
            mut spans,
            last,
            last_positions,
            ..
        } = self.pass_inputs(rows, prefix, outputs)?;
        let eps = self.config.rms_norm_eps;
        let mut residual = (self.embedding_rows(&self.embed_tokens, &tokens)? * self.config.embedding_scale())?;
        let Some(first) = self.layers.first() else {
            bail!("the model has no layers")
        };
        let mut normed = rms_norm(&residual, &first.input_layernorm, eps, self.dtype)?;
        for (index, layer) in self.layers.iter().enumerate() {
            #[cfg(test)]
            crate::model::forward::memory_limit::check(index, residual.dim(0)?, &self.device)?;
            let last_normed;
            let mut layer_angles = angles.of(&layer.config.rope).clone();
            let mut input = LinearInput::new(&normed);
            let (k, v) = self.keys_values(layer, &input, &layer_angles)?;
            observe(&residual, &k, &v);
            if index + 1 == self.layers.len() {
                if let OutputPositions::KeysValues = outputs {
                    break;
                }
                if let Some((last, ends)) = &last {
                    spans = last.clone();
                    residual = residual.index_select(ends, 0)?;
                    last_normed = normed.index_select(ends, 0)?;
                    input = LinearInput::new(&last_normed);
                    layer_angles = layer_angles.select(ends, last_positions.as_ref())?;
                }
            }
            let norm = layer.qk_norm.as_ref().map(|(q_norm, _)| (q_norm, eps));
            let q = norm_rope(&layer.q_proj.forward(&input)?, &layer_angles, norm)?;
            let prefix = prefix.keys_values(index, rows, &k, &v)?;
            let attention = self.attention(layer, &spans, prefix.as_ref());
            let y = layer
                .o_proj
                .forward(&LinearInput::new(&attention.forward(&q, &k, &v)?))?;
            // Memory use peaks in the MLP, so these are freed before it.
            drop((q, k, v, prefix));
            let post = layer.post_attention_norm.as_ref();
            (residual, normed) = add_rms_norm(&residual, &y, post, &layer.pre_feedforward_norm, eps)?;
            let y = layer.mlp(&normed)?;
            let next = self
                .layers
                .get(index + 1)
                .map_or(&self.norm, |next| &next.input_layernorm);
            (residual, normed) = add_rms_norm(&residual, &y, layer.post_feedforward_norm.as_ref(), next, eps)?;
        }
        Ok(PassOutput { residual, normed })
    }

    /// Computes the keys and values of a layer: (tokens, kv_heads * head_dim) each.
    fn keys_values(
        &self,
        layer: &DecoderLayer,
        input: &LinearInput<'_>,
        angles: &RopeAngles,
    ) -> Result<(Tensor, Tensor)> {
        let norm = layer
            .qk_norm
            .as_ref()
            .map(|(_, k_norm)| (k_norm, self.config.rms_norm_eps));
        let k = norm_rope(&layer.k_proj.forward(input)?, angles, norm)?;
        Ok((k, layer.v_proj.forward(input)?))
    }

    pub(in crate::model) fn attention<'a>(
        &self,
        layer: &DecoderLayer,
        spans: &'a Spans,
        prefix: Option<&'a CachedKeysValues>,
    ) -> PackedAttention<'a> {
        PackedAttention {
            spans,
            prefix,
            heads: self.config.num_attention_heads,
            kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim,
            scale: self.config.query_scale,
            softcap: self.config.attn_logit_softcapping,
            window: layer.config.window,
        }
    }
}
