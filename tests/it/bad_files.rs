//! Wrong, damaged and hostile files are rejected with an error that names the file, the part of it, what was found and
//! what was expected. None of them causes a panic.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::common::{fixture, lines, model_config, prompt_config};
use candle_core::{DType, Device, Tensor};
use moderatord::classifier::Classifier;
use moderatord::config::{ModelConfig, PromptConfig};
use moderatord::prompt::Prompter;
use serde_json::{Value, json};

/// A copy of the Gemma 3 fixture with one adapter, which a test damages.
struct DamagedCopy {
    folder: tempfile::TempDir,
}

impl DamagedCopy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("lora_qv")).unwrap();
        for file in [
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "lora_qv/adapter_config.json",
            "lora_qv/adapter_model.safetensors",
        ] {
            std::fs::copy(fixture("gemma3").join(file), folder.path().join(file)).unwrap();
        }
        Self { folder }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    fn json(&self, file: &str, change: impl FnOnce(&mut Value)) -> &Self {
        let mut json = serde_json::from_slice(&std::fs::read(self.path(file)).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(self.path(file), json.to_string()).unwrap();
        self
    }

    fn bytes(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) -> &Self {
        let mut bytes = std::fs::read(self.path(file)).unwrap();
        change(&mut bytes);
        std::fs::write(self.path(file), bytes).unwrap();
        self
    }

    fn tensors(&self, file: &str, change: impl FnOnce(&mut HashMap<String, Tensor>)) -> &Self {
        let mut tensors = candle_core::safetensors::load(self.path(file), &Device::Cpu).unwrap();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, self.path(file)).unwrap();
        self
    }

    fn load(&self, adapter: bool) -> Result<Classifier, moderatord::fault::Faults> {
        let adapter = adapter.then(|| self.path("lora_qv"));
        let model = ModelConfig {
            path: Some(self.folder.path().to_owned()),
            adapter,
            ..model_config("gemma3")
        };
        Classifier::load(&model, &prompt_config())
    }

    /// Checks that loading fails and that the error contains all of `expected`.
    #[track_caller]
    fn assert_fails(&self, expected: &[&str]) {
        let text = match self.load(true) {
            Ok(_) => panic!("loaded, expected {expected:?}"),
            Err(error) => error.to_string(),
        };
        for part in expected {
            assert!(text.contains(part), "`{part}` not in\n{text}");
        }
    }
}

const Q0: &str = "model.layers.0.self_attn.q_proj.weight";
const A0: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

#[test]
fn an_undamaged_copy_loads() {
    DamagedCopy::new().load(true).unwrap();
}

#[test]
fn a_missing_folder_is_reported() {
    let model = ModelConfig {
        path: Some("/nonexistent/gemma".into()),
        ..model_config("gemma3")
    };
    let faults = Classifier::load(&model, &prompt_config()).err().unwrap();
    assert_eq!(
        lines(&faults),
        "/nonexistent/gemma: is not a folder, expected a checkpoint in Hugging Face layout"
    );
}

#[test]
fn all_missing_files_are_named_together() {
    let copy = DamagedCopy::new();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::remove_file(copy.path(file)).unwrap();
    }
    copy.assert_fails(&[
        "config.json: cannot open",
        "tokenizer.json: cannot open",
        "model.safetensors: cannot open",
    ]);
}

#[test]
fn an_architecture_that_does_not_match_is_rejected() {
    DamagedCopy::new()
        .json("config.json", |json| json["model_type"] = json!("llama"))
        .assert_fails(&["config.json: `model_type` is `llama`, expected `gemma`, `gemma2` or `gemma3_text`"]);
    // A Gemma 3 read as a Gemma 2 has weights that are not part of the architecture.
    DamagedCopy::new()
        .json("config.json", |json| json["model_type"] = json!("gemma2"))
        .assert_fails(&["tensor `model.layers.0.self_attn.k_norm.weight` is not part of a `gemma2` of 4 layers"]);
    // The config has fewer layers than the weights.
    DamagedCopy::new()
        .json("config.json", |json| {
            json["num_hidden_layers"] = json!(3);
            json["layer_types"].as_array_mut().unwrap().pop();
        })
        .assert_fails(&["tensor `model.layers.3.", "is not part of a `gemma3_text` of 3 layers"]);
}

/// The decoder computes in f32, and a fault for each entry of a long list would need far more memory than the file.
#[test]
fn extreme_numbers_and_lists_in_a_config_are_rejected() {
    DamagedCopy::new()
        .json("config.json", |json| {
            json["rms_norm_eps"] = json!(1e-60);
            json["rope_theta"] = json!(1e300);
            json["query_pre_attn_scalar"] = json!(1e-320);
            json["layer_types"] = json!(vec!["x"; 1000]);
        })
        .assert_fails(&[
            "`rms_norm_eps` is 1e-60, expected a number above 0 in the range of f32",
            "`rope_theta` is 1e300, expected",
            "`query_pre_attn_scalar` is 1e-320, expected",
            "`layer_types` has 1000 entries, expected 4",
        ]);
    let copy = DamagedCopy::new();
    copy.json("config.json", |json| json["layer_types"] = json!(vec!["x"; 1000]));
    let faults = copy.load(false).err().unwrap();
    assert!(faults.iter().count() < 20, "{} faults", faults.iter().count());
}

#[test]
fn missing_and_misshapen_tensors_are_rejected() {
    DamagedCopy::new()
        .tensors("model.safetensors", |tensors| {
            tensors.remove(Q0);
            tensors.remove("model.norm.weight");
        })
        .assert_fails(&[
            &format!("tensor `{Q0}` is missing, expected [128, 64]"),
            "tensor `model.norm.weight` is missing",
        ]);
    DamagedCopy::new()
        .tensors("model.safetensors", |tensors| {
            let transposed = tensors[Q0].t().unwrap().contiguous().unwrap();
            tensors.insert(Q0.into(), transposed);
        })
        .assert_fails(&[&format!(
            "model.safetensors: tensor `{Q0}` has shape [64, 128], expected [128, 64]"
        )]);
    DamagedCopy::new()
        .tensors("model.safetensors", |tensors| {
            tensors.insert(Q0.into(), Tensor::zeros((128, 64), DType::U8, &Device::Cpu).unwrap());
        })
        .assert_fails(&[&format!("tensor `{Q0}` has dtype U8, expected F32, F16 or BF16")]);
}

#[test]
fn weights_that_are_not_finite_are_rejected() {
    for (name, dtype, value) in [
        (Q0, DType::F32, f32::NAN),
        (Q0, DType::BF16, f32::INFINITY),
        (Q0, DType::F16, f32::NAN),
        ("model.embed_tokens.weight", DType::BF16, f32::NAN),
        ("model.embed_tokens.weight", DType::F16, f32::NEG_INFINITY),
        ("model.embed_tokens.weight", DType::F32, f32::NAN),
        ("model.norm.weight", DType::F32, f32::NAN),
    ] {
        let damage = |tensors: &mut HashMap<String, Tensor>| {
            let good = tensors[name].to_dtype(DType::F32).unwrap();
            let mut values = good.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values[5] = value;
            let bad = Tensor::from_vec(values, good.shape(), &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap();
            tensors.insert(name.into(), bad);
        };
        DamagedCopy::new().tensors("model.safetensors", damage).assert_fails(&[
            &format!("model.safetensors: tensor `{name}` holds"),
            "expected finite numbers",
        ]);
    }
}

#[test]
fn truncated_and_hostile_safetensors_are_rejected() {
    let file = "model.safetensors";
    DamagedCopy::new()
        .bytes(file, |bytes| bytes.truncate(bytes.len() / 2))
        .assert_fails(&["not a complete safetensors file"]);
    DamagedCopy::new()
        .bytes(file, Vec::clear)
        .assert_fails(&["model.safetensors"]);
    DamagedCopy::new()
        .bytes(file, |bytes| bytes.truncate(7))
        .assert_fails(&["not a complete safetensors file (7 bytes)"]);
    // The header claims to be larger than the file, or than memory.
    for length in [1u64 << 20, 1 << 40, u64::MAX] {
        DamagedCopy::new()
            .bytes(file, |bytes| bytes[..8].copy_from_slice(&length.to_le_bytes()))
            .assert_fails(&["not a complete safetensors file"]);
    }
    // The offsets and shapes do not match the data.
    for header in [
        json!({Q0: {"dtype": "F32", "shape": [128, 64], "data_offsets": [0, 1u64 << 40]}}),
        json!({Q0: {"dtype": "F32", "shape": [u64::MAX, u64::MAX], "data_offsets": [0, 8]}}),
        json!({Q0: {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
        json!({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
               "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}),
        json!([1, 2, 3]),
    ] {
        let header = header.to_string();
        DamagedCopy::new()
            .bytes(file, |bytes| {
                *bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 12]].concat();
            })
            .assert_fails(&["not a complete safetensors file"]);
    }
    // Changing a byte of the header gives an error or another valid description, but never a panic.
    for at in (0..2000).step_by(37) {
        let _ = DamagedCopy::new().bytes(file, |bytes| bytes[at] ^= 0x15).load(false);
    }
}

#[test]
fn damaged_and_hostile_tokenizers_are_rejected() {
    let file = "tokenizer.json";
    DamagedCopy::new()
        .bytes(file, |bytes| bytes.truncate(1000))
        .assert_fails(&["tokenizer.json: is not JSON"]);
    DamagedCopy::new()
        .bytes(file, |bytes| *bytes = b"{}".into())
        .assert_fails(&["tokenizer.json: is not a tokenizer"]);
    DamagedCopy::new()
        .json(file, |json| json["model"]["dropout"] = json!(0.1))
        .assert_fails(&["`model.dropout` is 0.1"]);
    DamagedCopy::new()
        .json(file, |json| json["post_processor"] = Value::Null)
        .assert_fails(&["expected one `<bos>` (2) first"]);
    DamagedCopy::new()
        .json(file, |json| json["model"]["merges"] = json!([["no", "such"]]))
        .assert_fails(&["tokenizer.json"]);
    DamagedCopy::new()
        .json(file, |json| json["model"]["vocab"] = json!({}))
        .assert_fails(&["tokenizer.json"]);
    DamagedCopy::new()
        .json(file, |json| {
            json["post_processor"]["special_tokens"]["<bos>"]["ids"] = json!([4_000_000_000u32]);
        })
        .assert_fails(&["tokenizer.json"]);
    // The tokenizers crate accepts these files, and panics when it uses them.
    DamagedCopy::new()
        .json(file, |json| json["post_processor"]["special_tokens"] = json!({}))
        .assert_fails(&["tokenizer.json: "]);
    DamagedCopy::new()
        .json(file, |json| {
            json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0});
        })
        .assert_fails(&["tokenizer.json: cannot tokenise: the tokenizer panicked"]);
    // Truncation would cut the frame, so it is turned off even if the file enables it, and so is padding.
    let truncating = DamagedCopy::new();
    truncating.json(file, |json| {
        json["truncation"] = json!({"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0});
        json["padding"] = json!({"strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": null,
                                 "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"});
    });
    let prompter = truncating.load(false).unwrap().prompter();
    let expected = DamagedCopy::new().load(false).unwrap().prompter();
    assert_eq!(
        prompter.encode("a fine day").unwrap(),
        expected.encode("a fine day").unwrap()
    );
}

/// A tokenizer that knows none of the letters of the frame, and takes one letter for `<bos>`.
#[test]
fn a_tokenizer_that_returns_no_tokens_is_rejected() {
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "BPE", "vocab": {"<bos>": 0, "a": 0, "Q": 1, "Z": 2}, "merges": []},
    });
    let config = PromptConfig {
        labels: ["Q".into(), "Z".into()],
        hateful_label: "Z".into(),
        instructions: "x".into(),
        separator: "##".into(),
        template: None,
        ..prompt_config()
    };
    let path = Path::new("tokenizer.json");
    let faults = Prompter::new(path, tokenizer.to_string().as_bytes(), &config, 3, 8192)
        .err()
        .unwrap();
    assert!(
        faults.to_string().contains("the tokenizer returns no tokens"),
        "{faults}"
    );
}

#[test]
fn adapters_that_do_not_fit_the_base_are_rejected() {
    let (config, weights) = ("lora_qv/adapter_config.json", "lora_qv/adapter_model.safetensors");
    DamagedCopy::new()
        .json(config, |json| json["r"] = json!(8))
        .assert_fails(&[&format!(
            "adapter_model.safetensors: tensor `{A0}` has shape [4, 64], expected [8, 64]"
        )]);
    DamagedCopy::new()
        .json(config, |json| json["use_dora"] = json!(true))
        .assert_fails(&["`use_dora` is set"]);
    DamagedCopy::new()
        .json(config, |json| json["peft_type"] = json!("IA3"))
        .assert_fails(&["`peft_type` is `IA3`"]);
    DamagedCopy::new()
        .json(config, |json| json["bias"] = json!("all"))
        .assert_fails(&["`bias` is"]);
    DamagedCopy::new()
        .json(config, |json| json["target_modules"] = json!(["q_proj", "lm_head"]))
        .assert_fails(&["`target_modules` names `lm_head`"]);
    DamagedCopy::new()
        .json(config, |json| {
            json["target_modules"] = json!(["q_proj", "v_proj", "k_proj"])
        })
        .assert_fails(&[
            "tensor `base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight` is missing, expected [4, 64]",
        ]);
    DamagedCopy::new()
        .json(config, |json| json["rank_pattern"] = json!({"q_proj(": 2}))
        .assert_fails(&["the pattern `q_proj(`"]);
    // Each of these is only valid inside the group that anchors it.
    DamagedCopy::new()
        .json(config, |json| json["target_modules"] = json!("x)|(?:.*q_proj"))
        .assert_fails(&["`target_modules` is not a supported pattern"]);
    DamagedCopy::new()
        .json(config, |json| json["alpha_pattern"] = json!({"x)|(?:.*q_proj": 2.0}))
        .assert_fails(&["`alpha_pattern` has the pattern `x)|(?:.*q_proj`, which is not supported"]);
    // Infinite as f32.
    DamagedCopy::new()
        .json(config, |json| json["lora_alpha"] = json!(1e300))
        .assert_fails(&[
            "the alpha of `model.layers.0.self_attn.q_proj` is `1e300`, expected a number in the range of f32",
        ]);
    DamagedCopy::new()
        .tensors(weights, |tensors| {
            tensors.remove(A0);
        })
        .assert_fails(&[&format!("tensor `{A0}` is missing, expected [4, 64]")]);
    DamagedCopy::new()
        .tensors(weights, |tensors| {
            let wide = Tensor::zeros((4, 80), DType::F32, &Device::Cpu).unwrap();
            tensors.insert(A0.into(), wide);
        })
        .assert_fails(&["has shape [4, 80], expected [4, 64]"]);
    DamagedCopy::new()
        .tensors(weights, |tensors| {
            let nan = Tensor::full(f32::NAN, (4, 64), &Device::Cpu).unwrap();
            tensors.insert(A0.into(), nan);
        })
        .assert_fails(&[&format!("tensor `{A0}` holds NaN at index 0")]);
    DamagedCopy::new()
        .tensors(weights, |tensors| {
            let tensor = tensors[A0].clone();
            tensors.insert(A0.replace("layers.0", "layers.9"), tensor);
        })
        .assert_fails(&[
            "is for layer 9, but the base model has 4 layers: the adapter was made for another base model",
        ]);
    DamagedCopy::new()
        .bytes(weights, |bytes| bytes.truncate(500))
        .assert_fails(&["adapter_model.safetensors: not a complete"]);
}

#[test]
fn an_adapter_whose_manifest_names_another_base_is_rejected() {
    let copy = DamagedCopy::new();
    let base = copy.load(false).unwrap().identity().base.clone();
    let manifest = |base: &str| json!({"version": "v7", "base": base}).to_string();
    std::fs::write(copy.path("lora_qv/manifest.json"), manifest(&base)).unwrap();
    assert_eq!(
        copy.load(true).unwrap().identity().adapter_version.as_deref(),
        Some("v7")
    );
    std::fs::write(copy.path("lora_qv/manifest.json"), manifest("sha256:00")).unwrap();
    copy.assert_fails(&["manifest.json: the adapter was made for base model `sha256:00`, expected `sha256:"]);
}

#[test]
fn faults_of_base_adapter_and_prompt_are_reported_together() {
    let copy = DamagedCopy::new();
    copy.tensors("model.safetensors", |tensors| {
        tensors.remove(Q0);
    })
    .json("lora_qv/adapter_config.json", |json| json["use_dora"] = json!(true));
    let adapter = Some(copy.path("lora_qv"));
    let model = ModelConfig {
        path: Some(copy.folder.path().to_owned()),
        adapter,
        ..model_config("gemma3")
    };
    let mut prompt = prompt_config();
    prompt.labels[0] = "Harmless".into();
    let text = Classifier::load(&model, &prompt).err().unwrap().to_string();
    for part in [Q0, "`use_dora`", "the label `Harmless`"] {
        assert!(text.contains(part), "`{part}` not in\n{text}");
    }
}

/// An index is rejected if it names a file outside the folder, or a shard that does not hold the tensor.
#[test]
fn a_sharded_checkpoint_scores_like_a_single_file() {
    let copy = DamagedCopy::new();
    let tensors = candle_core::safetensors::load(copy.path("model.safetensors"), &Device::Cpu).unwrap();
    let mut shards: [HashMap<String, Tensor>; 2] = Default::default();
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in tensors.into_iter().enumerate() {
        map.insert(name.clone(), json!(shard_name(index % 2)));
        shards[index % 2].insert(name, tensor);
    }
    for (index, shard) in shards.iter().enumerate() {
        candle_core::safetensors::save(shard, copy.path(&shard_name(index))).unwrap();
    }
    let whole = margin(copy.folder.path());
    std::fs::remove_file(copy.path("model.safetensors")).unwrap();
    let index = "model.safetensors.index.json";
    std::fs::write(copy.path(index), json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    assert_eq!(margin(copy.folder.path()), whole);

    copy.json(index, |json| json["weight_map"][Q0] = json!("../outside.safetensors"));
    copy.assert_fails(&["names the shard `../outside.safetensors`, expected a plain file name"]);
    let other = shard_name(usize::from(map[Q0] == json!(shard_name(0))));
    copy.json(index, |json| json["weight_map"][Q0] = json!(other));
    copy.assert_fails(&[&format!("lists tensor `{Q0}` for `{other}`, which does not contain it")]);
}

fn shard_name(index: usize) -> String {
    format!("model-{:05}-of-00002.safetensors", index + 1)
}

fn margin(folder: &Path) -> [f32; 2] {
    let model = ModelConfig {
        path: Some(folder.to_owned()),
        ..model_config("gemma3")
    };
    let classifier = Classifier::load(&model, &prompt_config()).unwrap();
    let rows = classifier.prompter().encode("a fine day").unwrap().rows;
    classifier.label_logits(&rows).unwrap()[0]
}

/// The weights of all fixtures can be represented in bf16, so f32 and bf16 files have the same values.
#[test]
fn the_stored_data_type_does_not_change_the_scores() {
    let copy = DamagedCopy::new();
    let expected = margin(copy.folder.path());
    for dtype in [DType::F32, DType::BF16] {
        copy.tensors("model.safetensors", |tensors| {
            tensors
                .values_mut()
                .for_each(|tensor| *tensor = tensor.to_dtype(dtype).unwrap());
        });
        assert_eq!(margin(copy.folder.path()), expected, "{dtype:?}");
    }
    copy.tensors("model.safetensors", |tensors| {
        tensors
            .values_mut()
            .for_each(|tensor| *tensor = tensor.to_dtype(DType::F16).unwrap());
    });
    for (found, expected) in margin(copy.folder.path()).iter().zip(expected) {
        assert!(
            (found - expected).abs() < 1e-3,
            "f16, which rounds small weights: {found}, expected {expected}"
        );
    }
}
