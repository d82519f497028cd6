//! Writes a checkpoint of a published shape with random weights, in Hugging Face layout, and an adapter for it.
//!
//! The weights are approximately normal, with a variance that keeps activations of order one. They are bf16, as in
//! published checkpoints. The tokenizer is that of the bundled model, whose vocabulary is smaller.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use half::bf16;
use moderatord::config::Projection;
use moderatord::model::config::GemmaConfig;
use moderatord::model::files::bundled;
use moderatord::model::training::{LoraVariables, Variables};
use moderatord::retrain::train::peft;
use moderatord::retrain::train::trainer::TrainerConfig;
use serde_json::{Value, json};

use super::Random;

/// The names of the supported shapes of published checkpoints.
pub const SHAPES: [&str; 4] = ["gemma-2b", "gemma-2-2b", "gemma-3-270m", "gemma-3-1b"];

/// The name of a shape of our own, for tests of the benchmarks themselves.
pub const TINY: &str = "tiny";

/// Returns the `config.json` of a published shape or of [`TINY`], or `None` if the name is unknown.
pub fn config(shape: &str) -> Option<Value> {
    let (base, own) = match shape {
        "gemma-2b" => (
            json!({"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0}),
            json!({"vocab_size": 256_000, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
                   "num_attention_heads": 8, "num_key_value_heads": 1}),
        ),
        "gemma-2-2b" => (
            json!({"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0,
                   "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}),
            json!({"vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                   "num_attention_heads": 8, "num_key_value_heads": 4}),
        ),
        "gemma-3-270m" => (
            gemma3(),
            json!({"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
                   "num_attention_heads": 4, "num_key_value_heads": 1}),
        ),
        "gemma-3-1b" => (
            gemma3(),
            json!({"vocab_size": 262_144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
                   "num_attention_heads": 4, "num_key_value_heads": 1}),
        ),
        TINY => (
            gemma3(),
            json!({"vocab_size": 16384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "num_key_value_heads": 1}),
        ),
        _ => return None,
    };
    let mut config = json!({"head_dim": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 8192,
                            "query_pre_attn_scalar": 256, "attention_bias": false, "torch_dtype": "bfloat16"});
    for part in [base, own] {
        for (key, value) in part.as_object()? {
            config[key] = value.clone();
        }
    }
    Some(config)
}

fn gemma3() -> Value {
    json!({"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1_000_000.0,
           "rope_local_base_freq": 10000.0, "sliding_window": 512, "sliding_window_pattern": 6})
}

/// Writes `config.json`, `tokenizer.json` and `model.safetensors` for a config into `folder`.
pub fn write(folder: &Path, config: &Value, seed: u64) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("tokenizer.json"), bundled::TOKENIZER)?;
    std::fs::write(folder.join("config.json"), serde_json::to_string_pretty(config)?)?;
    let tensors = shapes(config);
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for (name, shape) in &tensors {
        let bytes = shape.iter().product::<usize>() * 2;
        header.insert(
            name.clone(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + bytes]}),
        );
        offset += bytes;
    }
    let header = serde_json::to_vec(&header)?;
    let mut file = BufWriter::with_capacity(1 << 20, File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (index, (name, shape)) in tensors.iter().enumerate() {
        // Norms store `w - 1`. An embedding row times sqrt(hidden) is of order one, and linear layers keep that order.
        let scale = if shape.len() == 1 {
            0.1
        } else {
            (*shape.last().unwrap_or(&1) as f32).powf(-0.5)
        };
        let scale = if name.contains("embed_tokens") {
            scale
        } else {
            scale * 1.7
        };
        let mut random = Random::new(seed ^ (index as u64 + 1) << 20);
        let mut row = Vec::with_capacity(1 << 16);
        let mut left: usize = shape.iter().product();
        while left > 0 {
            row.clear();
            for _ in 0..left.min(1 << 15) {
                row.extend(bf16::from_f32(bell(&mut random) * scale).to_le_bytes());
            }
            file.write_all(&row)?;
            left -= left.min(1 << 15);
        }
    }
    file.flush()
}

/// Writes an adapter of the given rank into `folder`, with a small random delta for every linear layer.
pub fn write_adapter(folder: &Path, config: &GemmaConfig, rank: usize, seed: u64) -> anyhow::Result<()> {
    let trainer = TrainerConfig {
        targets: Projection::ALL.to_vec(),
        rank,
        alpha: 1e-3 * rank as f64,
        ..TrainerConfig::default()
    };
    let mut random = Random::new(seed);
    let mut matrix = |rows: usize, columns: usize, scale: f32| {
        let values: Vec<f32> = (0..rows * columns).map(|_| bell(&mut random) * scale).collect();
        Var::from_tensor(&Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
    };
    let mut variables = Variables::new();
    for layer in 0..config.num_layers() {
        for projection in Projection::ALL {
            let [outputs, inputs] = projection.shape(config);
            let delta = LoraVariables {
                a: matrix(rank, inputs, (inputs as f32).powf(-0.5))?,
                b: matrix(outputs, rank, 1.0)?,
                scale: 1e-3,
            };
            variables.insert((layer, projection), delta);
        }
    }
    let files = peft::write(&variables, &trainer, "random")?;
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("adapter_config.json"), files.config)?;
    std::fs::write(folder.join("adapter_model.safetensors"), files.weights)?;
    Ok(())
}

/// Returns a random number between -2 and 2: the sum of two uniform numbers, which is bounded and close enough to a
/// bell shape.
fn bell(random: &mut Random) -> f32 {
    let bits = random.next();
    let uniform = |bits: u64| (bits & 0xffff) as f32 / 32_768.0 - 1.0;
    uniform(bits) + uniform(bits >> 15)
}

/// Returns the name and shape of every tensor of the architecture.
fn shapes(config: &Value) -> BTreeMap<String, Vec<usize>> {
    let number = |key: &str| config[key].as_u64().unwrap_or_default() as usize;
    let (hidden, inter, head_dim) = (number("hidden_size"), number("intermediate_size"), number("head_dim"));
    let (q, kv) = (
        number("num_attention_heads") * head_dim,
        number("num_key_value_heads") * head_dim,
    );
    let family = config["model_type"].as_str().unwrap_or_default();
    let mut shapes = BTreeMap::from([
        (
            "model.embed_tokens.weight".to_owned(),
            vec![number("vocab_size"), hidden],
        ),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ]);
    for layer in 0..number("num_hidden_layers") {
        let mut add =
            |name: &str, shape: Vec<usize>| shapes.insert(format!("model.layers.{layer}.{name}.weight"), shape);
        add("self_attn.q_proj", vec![q, hidden]);
        add("self_attn.k_proj", vec![kv, hidden]);
        add("self_attn.v_proj", vec![kv, hidden]);
        add("self_attn.o_proj", vec![hidden, q]);
        add("mlp.gate_proj", vec![inter, hidden]);
        add("mlp.up_proj", vec![inter, hidden]);
        add("mlp.down_proj", vec![hidden, inter]);
        add("input_layernorm", vec![hidden]);
        add("post_attention_layernorm", vec![hidden]);
        if family != "gemma" {
            add("pre_feedforward_layernorm", vec![hidden]);
            add("post_feedforward_layernorm", vec![hidden]);
        }
        if family == "gemma3_text" {
            add("self_attn.q_norm", vec![head_dim]);
            add("self_attn.k_norm", vec![head_dim]);
        }
    }
    shapes
}
