//! Estimates how much device memory a model needs for its weights and for the activations of a pass.

use candle_core::DType;

use crate::config::Quantize;
use crate::model::config::GemmaConfig;
use crate::model::files::checkpoint::Checkpoint;

/// The own tokens of the smallest pass that must fit in memory together with the weights.
const MIN_PASS_TOKENS: u64 = 1024;

/// Memory for the matrix library, the driver's code, and the unused parts of the driver's pages.
const OVERHEAD_BYTES: u64 = 400 << 20;

/// Returns the bytes that must be free to load a checkpoint and to score with it. Linear layers are in `dtype` if they
/// are not quantised, and embeddings are in the dtype of the file.
pub(crate) fn required_bytes(checkpoint: &Checkpoint, dtype: DType, quantize: Quantize) -> u64 {
    let config = checkpoint.config();
    let weights = config.num_layers() * config.linear_weights_per_layer();
    let matrix = config.hidden_size * config.intermediate_size;
    let linear = match quantize {
        // The weights of the MLP have a byte for each element, except for those of the layer that is being quantised,
        // of which gate and up exist twice.
        Quantize::Fp8 => (weights + 5 * matrix) * dtype.size_in_bytes() - 3 * matrix * config.num_layers(),
        // Room for one more copy of the largest weight, gate and up, because weights on a GPU are stacked in a copy.
        Quantize::None | Quantize::Int8 => (weights + 2 * matrix) * dtype.size_in_bytes(),
    } as u64;
    linear + checkpoint.embedding_bytes() + MIN_PASS_TOKENS * bytes_per_token(config, dtype) + OVERHEAD_BYTES
}

/// Returns the bytes that a pass uses at its peak for each own token.
///
/// The peak is in the attention (normed residual stream, queries before and after RoPE, keys, values and output) or in
/// the MLP (normed residual stream, gate, up and their product). In both cases the old and the new residual stream are
/// held in f32, and an unmerged delta adds its product and a copy of the layer's input. In bf16, the buffers of the
/// scoring pass hold all of the attention and the MLP at once, but one residual stream.
pub(crate) fn bytes_per_token(config: &GemmaConfig, dtype: DType) -> u64 {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    let attention = hidden + 3 * queries + 3 * keys;
    let mlp = 2 * hidden + 4 * inner;
    let buffers = match dtype {
        DType::BF16 => 2 * queries + 4 * keys + 3 * inner,
        _ => 0,
    };
    (2 * hidden * DType::F32.size_in_bytes() + attention.max(mlp).max(buffers) * dtype.size_in_bytes()) as u64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn an_mlp_in_fp8_takes_a_byte_for_each_weight() {
        let folder = crate::test_files::test_file("tests/fixtures/gemma3");
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let required = |quantize| required_bytes(&checkpoint, DType::BF16, quantize);
        // Four layers save 3 * 64 * 128 bytes each, and one layer is held in bf16 while it is quantised.
        let matrices = 3 * 64 * 128;
        assert_eq!(
            required(Quantize::None) - required(Quantize::Fp8),
            4 * matrices - 2 * matrices
        );
    }

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
