//! The `config.json` of a checkpoint: whatever is accepted has shapes and constants that the decoder can compute with.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use moderatord::config::Projection;
use moderatord::model::config::GemmaConfig;
use moderatord_fuzz::check_faults;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match GemmaConfig::parse(Path::new("config.json"), text) {
        Ok(config) => check(&config),
        Err(faults) => check_faults(&faults, data),
    }
});

fn check(config: &GemmaConfig) {
    let sizes = [
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.max_position_embeddings,
        config.num_layers(),
    ];
    assert!(sizes.iter().all(|size| (1..=1 << 24).contains(size)), "{sizes:?}");
    assert!(config.num_layers() <= 512);
    assert_eq!(config.head_dim % 2, 0);
    assert_eq!(config.num_attention_heads % config.num_key_value_heads, 0);
    for projection in Projection::ALL {
        let [outputs, inputs] = projection.shape(config);
        assert!(
            outputs
                .checked_mul(inputs)
                .is_some_and(|size| size > 0 && size < 1 << 46)
        );
    }
    // The decoder computes in f32.
    let ropes = config
        .layers
        .iter()
        .flat_map(|layer| [layer.rope.theta, layer.rope.factor]);
    let caps = [config.attn_logit_softcapping, config.final_logit_softcapping];
    let numbers = [config.rms_norm_eps, config.query_scale].into_iter().chain(ropes);
    for number in numbers.chain(caps.into_iter().flatten()) {
        assert!((number as f32).is_normal() && number > 0.0, "{number} as f32");
    }
    for layer in &config.layers {
        assert!(layer.window.is_none_or(|window| (1..=1 << 20).contains(&window)));
    }
}
