//! Estimates how much device memory a model needs for its weights and for the activations of a pass.

use candle_core::DType;

use crate::model::config::GemmaConfig;
use crate::model::files::checkpoint::Checkpoint;

/// The own tokens of the smallest pass that must fit in memory together with the weights.
const MIN_PASS_TOKENS: u64 = 1024;

/// Memory for the matrix library, the driver's code, and the unused parts of the driver's pages.
const OVERHEAD_BYTES: u64 = 400 << 20;

/// Returns the bytes that must be free to load a checkpoint and to score with it. Linear layers are in `dtype`, and
/// embeddings are in the dtype of the file.
pub(crate) fn required_bytes(checkpoint: &Checkpoint, dtype: DType) -> u64 {
    let config = checkpoint.config();
    // Room for one more copy of the largest weight, because a weight and its delta are concatenated in a copy.
    let largest = config.hidden_size * config.intermediate_size;
    let linear = ((config.num_layers() * config.linear_weights_per_layer() + largest) * dtype.size_in_bytes()) as u64;
    linear + checkpoint.embedding_bytes() + MIN_PASS_TOKENS * bytes_per_token(config, dtype) + OVERHEAD_BYTES
}

/// Returns the bytes that a pass uses at its peak for each own token.
///
/// The peak is in the attention (normed residual stream, queries before and after RoPE, keys, values and output) or in
/// the MLP (normed residual stream, gate, up and their product). In both cases the old and the new residual stream are
/// held in f32, and an unmerged delta adds its product and a copy of the layer's input.
pub(crate) fn bytes_per_token(config: &GemmaConfig, dtype: DType) -> u64 {
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
    fn the_bytes_per_token_follow_from_the_shape() {
        let json = r#"{"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384,
            "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
            "vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "hidden_activation": "gelu_pytorch_tanh"}"#;
        let config = GemmaConfig::parse(Path::new("config.json"), json).unwrap();
        assert_eq!(bytes_per_token(&config, DType::BF16), 16_384 + 2 * (4096 + 65_536));
        assert_eq!(bytes_per_token(&config, DType::F32), 16_384 + 4 * (4096 + 65_536));
    }
}
