//! The gated MLP of a layer: `down(gelu(gate(x)) * up(x))`.

use candle_core::{Result, Tensor};

use super::gemma::DecoderLayer;
use super::linear::{LinearInput, RowsInput, rows_per_chunk};
use crate::model::kernels::{geglu, geglu_rows};
use crate::model::products::{in_chunks, with_rows};

impl DecoderLayer {
    /// Computes the MLP: (tokens, hidden).
    pub(super) fn mlp(&self, x: &Tensor) -> Result<Tensor> {
        let layers = [&self.gate_proj, &self.up_proj, &self.down_proj];
        if layers.iter().all(|layer| layer.is_packed()) {
            return self.mlp_in_chunks(x);
        }
        self.mlp_of_tensors(x)
    }

    fn mlp_of_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let input = LinearInput::new(x);
        let hidden = geglu(&self.gate_proj.forward(&input)?, &self.up_proj.forward(&input)?)?;
        self.down_proj.forward(&LinearInput::new(&hidden))
    }

    /// Computes the MLP on the CPU. The wide rows between the layers are computed a chunk at a time, so that they stay in
    /// the cache of a core.
    fn mlp_in_chunks(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let rows_per_chunk = rows_per_chunk(rows);
        let y = with_rows(x, width, |rows, x| {
            in_chunks(rows, width, rows_per_chunk, |index| {
                let start = index * rows_per_chunk;
                let rows = rows_per_chunk.min(rows - start);
                let input = RowsInput::new(rows, &x[start * width..(start + rows) * width]);
                let mut hidden = self.gate_proj.forward_rows(&input)?;
                geglu_rows(&mut hidden, &self.up_proj.forward_rows(&input)?);
                self.down_proj.forward_rows(&RowsInput::new(rows, &hidden))
            })
        })?;
        Tensor::from_vec(y, (rows, width), x.device())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Quantize;
    use crate::model::forward::gemma::tests::{adapter, base};
    use crate::model::kernels::tests::{assert_close, random};

    #[test]
    fn an_mlp_in_chunks_equals_that_of_whole_tensors() -> Result<()> {
        for quantize in [Quantize::None, Quantize::Int8] {
            let base = base(quantize);
            for gemma in [base.with_adapter(&adapter("lora_all_rslora", &base))?, base] {
                // One row, one chunk, and several of which the last is not full.
                for rows in [1, 64, 1100] {
                    let x = random((rows, gemma.config.hidden_size), 1)?;
                    for layer in &gemma.layers {
                        assert_close(&layer.mlp_in_chunks(&x)?, &layer.mlp_of_tensors(&x)?, 1e-5);
                    }
                }
            }
        }
        Ok(())
    }
}
