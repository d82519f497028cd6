//! What a model takes of a device's memory: its weights, and the activations of a pass.

use candle_core::DType;

use crate::config::Projection;
use crate::model::config::GemmaConfig;
use crate::model::files::checkpoint::Checkpoint;

/// The smallest pass that must have room beside the weights, in own tokens.
const SMALLEST_PASS: u64 = 1024;

/// What the matrix library, the driver's code and what it cannot use of its pages take beside.
const OVERHEAD_BYTES: u64 = 400 << 20;

/// Bytes that must be free for a checkpoint to be loaded and to score: linear layers in `dtype`, embeddings as
/// the file has them.
pub(crate) fn bytes_needed(checkpoint: &Checkpoint, dtype: DType) -> u64 {
    let config = checkpoint.config();
    let linear: usize = Projection::ALL
        .iter()
        .map(|projection| projection.shape(config).iter().product::<usize>())
        .sum();
    // One more of the largest: a weight and its delta are joined in a copy.
    let largest = config.hidden_size * config.intermediate_size;
    let linear = ((config.num_layers() * linear + largest) * dtype.size_in_bytes()) as u64;
    linear + checkpoint.embedding_bytes() + SMALLEST_PASS * pass_bytes(config, dtype) + OVERHEAD_BYTES
}

/// Bytes that a pass holds at its peak for each own token.
///
/// That is in the attention (the normed stream, queries before and after their turn, keys, values and output)
/// or in the MLP (the normed stream, gate, up and their product), beside the old and the new f32 residual
/// stream; a delta's product and the copy of a layer's input that it is made of stand beside either.
pub(crate) fn pass_bytes(config: &GemmaConfig, dtype: DType) -> u64 {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let attention = hidden + 3 * queries + 3 * keys;
    let mlp = 2 * hidden + 4 * inner;
    (2 * hidden * DType::F32.size_in_bytes() + attention.max(mlp) * dtype.size_in_bytes()) as u64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_gemma_2b_takes_what_its_shape_says() {
        let json = r#"{"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384,
            "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
            "vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "hidden_activation": "gelu_pytorch_tanh"}"#;
        let config = GemmaConfig::parse(Path::new("config.json"), json).unwrap();
        assert_eq!(pass_bytes(&config, DType::BF16), 16_384 + 2 * (4096 + 65_536));
        assert_eq!(pass_bytes(&config, DType::F32), 16_384 + 4 * (4096 + 65_536));
    }
}
