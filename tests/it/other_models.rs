//! Checkpoints and adapters that people bring: each scores as transformers and PEFT score it, or is refused by name.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use moderatord::classifier::Classifier;
use moderatord::classifier::tolerance::REFERENCE_SHORT_F32;
use moderatord::config::{ModelConfig, PromptConfig};
use moderatord::fault::Faults;
use moderatord::scorer::Scorer;
use serde_json::{Value, json};

use crate::common::{fixture, model_config, prompt_config, reference_cases};

pub(crate) type Tensors = HashMap<String, Tensor>;

/// The texts of the recorded probabilities of multimodal models.
const TEXTS: [&str; 3] = [
    "you look very nice today",
    "the weather in March was cold, and we walked home",
    "[why] would 12345 people agree",
];

/// The name of a classification head.
pub(crate) const HEAD: &str = "score.weight";

pub(crate) fn load_tensors(path: &Path) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub(crate) fn zeros(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// A folder with a checkpoint that a test builds from the Gemma 3 fixture.
pub(crate) struct Built {
    folder: tempfile::TempDir,
}

impl Built {
    pub(crate) fn new(config: &Value, tensors: &Tensors) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixture("gemma3/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        candle_core::safetensors::save(tensors, folder.path().join("model.safetensors")).unwrap();
        Self { folder }
    }

    /// The Gemma 3 fixture after a change.
    pub(crate) fn changed(change: impl FnOnce(&mut Value, &mut Tensors)) -> Self {
        let mut config = read_json(&fixture("gemma3/config.json"));
        let mut tensors = load_tensors(&fixture("gemma3/model.safetensors"));
        change(&mut config, &mut tensors);
        Self::new(&config, &tensors)
    }

    /// The Gemma 3 fixture inside a multimodal model, in the names that `prefix` stands for, after a change.
    pub(crate) fn multimodal(prefix: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> Self {
        let mut config = read_json(&fixture("gemma3/multimodal/config.json"));
        let text = load_tensors(&fixture("gemma3/model.safetensors"));
        let nested = |(name, tensor): (String, Tensor)| (name.replacen("model.", prefix, 1), tensor);
        let mut tensors: Tensors = text.into_iter().map(nested).collect();
        tensors.insert("vision_tower.post_layernorm.weight".into(), zeros(32));
        tensors.insert("multi_modal_projector.mm_soft_emb_norm.weight".into(), zeros(32));
        change(&mut config, &mut tensors);
        Self::new(&config, &tensors)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    pub(crate) fn load(&self, adapter: Option<PathBuf>) -> Result<Classifier, Faults> {
        load(self.path(), adapter, &prompt_config())
    }
}

pub(crate) fn load(path: PathBuf, adapter: Option<PathBuf>, prompt: &PromptConfig) -> Result<Classifier, Faults> {
    let model = ModelConfig {
        path: Some(path),
        adapter,
        ..model_config("gemma3")
    };
    Classifier::load(&model, prompt)
}

#[track_caller]
pub(crate) fn assert_fault(loaded: Result<Classifier, Faults>, parts: &[&str]) {
    let text = match loaded {
        Ok(_) => panic!("loaded, expected {parts:?}"),
        Err(faults) => faults.to_string(),
    };
    for part in parts {
        assert!(text.contains(part), "`{part}` not in\n{text}");
    }
}

pub(crate) fn margins(classifier: &mut Classifier, texts: &[&str]) -> Vec<f64> {
    let prompter = classifier.prompter();
    let rows: Vec<_> = texts
        .iter()
        .flat_map(|text| prompter.encode(text).unwrap().rows)
        .collect();
    assert_eq!(rows.len(), texts.len());
    classifier.score(&rows).unwrap().into_iter().map(f64::from).collect()
}

#[track_caller]
fn assert_probabilities(classifier: &mut Classifier, expected: &Value) {
    let found = margins(classifier, &TEXTS)
        .into_iter()
        .map(|margin| 1.0 / (1.0 + (-margin).exp()));
    for (found, expected) in found.zip(expected.as_array().unwrap()) {
        let expected = expected.as_f64().unwrap();
        // They are recorded with six decimals.
        let limit = REFERENCE_SHORT_F32.probability + 1e-6;
        assert!((found - expected).abs() < limit, "{found}, expected {expected}");
    }
}

/// The adapters were trained with PEFT on `Gemma3ForConditionalGeneration`, which records these probabilities.
#[test]
fn adapters_of_multimodal_models_score_as_with_peft() {
    for prefix in ["language_model.model.", "model.language_model."] {
        let base = Built::multimodal(prefix, |_, _| ());
        for name in ["alpha", "targets", "vision"] {
            let adapter = fixture("gemma3/multimodal").join(name);
            let expected = read_json(&adapter.join("expected_probabilities.json"));
            let mut classifier = base.load(Some(adapter)).unwrap();
            assert_probabilities(&mut classifier, &expected);
            let notes = classifier.notes().join("\n");
            assert!(notes.contains("2 tensors for images and sounds left out"), "{notes}");
            assert_eq!(
                notes.contains("adapter's deltas of 4 modules"),
                name == "vision",
                "{notes}"
            );
        }
    }
}

/// An unembedding of twice the embedding doubles every margin, because Gemma 3 has no cap.
#[test]
fn an_unembedding_that_differs_is_used_whatever_the_flags_say() {
    let mut plain = load(fixture("gemma3"), None, &prompt_config()).unwrap();
    let expected: Vec<f64> = margins(&mut plain, &TEXTS).iter().map(|margin| 2.0 * margin).collect();
    let check = |built: &Built, factor: f64| {
        let found = margins(&mut built.load(None).unwrap(), &TEXTS);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected * factor / 2.0).abs() < 1e-4, "{found} {expected}");
        }
    };
    let flags = [None, Some(true), Some(false)];
    for (name, outer, inner) in ["lm_head.weight", "language_model.lm_head.weight"]
        .into_iter()
        .flat_map(|name| flags.map(|outer| (name, outer)))
        .flat_map(|(name, outer)| flags.map(|inner| (name, outer, inner)))
    {
        let set = |config: &mut Value| {
            config["tie_word_embeddings"] = json!(outer);
            config["text_config"]["tie_word_embeddings"] = json!(inner);
            if outer.is_none() {
                config.as_object_mut().unwrap().remove("tie_word_embeddings");
            }
        };
        let with_head = |factor: f64| {
            Built::multimodal("language_model.model.", |config, tensors| {
                set(config);
                let embedding = tensors["language_model.model.embed_tokens.weight"].clone();
                tensors.insert(name.into(), (embedding * factor).unwrap());
            })
        };
        check(&with_head(2.0), 2.0);
        check(&with_head(1.0), 1.0);
        let without = Built::multimodal("language_model.model.", |config, _| set(config));
        match outer {
            Some(false) => assert_fault(without.load(None), &["tensor `lm_head.weight` is missing"]),
            _ => check(&without, 1.0),
        }
    }
    let tied = Built::changed(|_, tensors| {
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".into(), (embedding * 2.0).unwrap());
    });
    check(&tied, 2.0);
    let classifier = tied.load(None).unwrap();
    assert!(classifier.notes()[0].contains("`lm_head.weight` differs from the embedding"));
}

#[test]
fn tensors_that_would_be_ignored_are_refused_by_name() {
    for (name, hint) in [
        (HEAD, "name its class in `architectures`"),
        ("classifier.weight", "would be ignored"),
        ("v_head.summary.weight", "would be ignored"),
        ("model.layers_extra.weight", "would be ignored"),
        ("model.encoder.norm.weight", "would be ignored"),
    ] {
        let built = Built::changed(|_, tensors| {
            tensors.insert(name.into(), zeros((2, 64)));
        });
        assert_fault(built.load(None), &[&format!("tensor `{name}` is not part of"), hint]);
    }
    for name in [
        "LlamaForCausalLM",
        "Gemma3ForTokenClassification",
        "PaliGemmaForConditionalGeneration",
    ] {
        let built = Built::changed(|config, _| config["architectures"] = json!([name]));
        assert_fault(built.load(None), &[&format!("`architectures` names \"{name}\"")]);
    }
    let built = Built::multimodal("model.language_model.", |config, _| {
        config["text_config"]["quantization_config"] = json!({"quant_method": "bitsandbytes"});
    });
    assert_fault(built.load(None), &["`quantization_config` is set"]);
    let built = Built::multimodal("model.language_model.", |config, _| {
        config["model_type"] = json!("paligemma")
    });
    assert_fault(
        built.load(None),
        &["`model_type` is \"paligemma\" beside `text_config`"],
    );
}

/// What `Gemma3TextModel.save_pretrained` writes, which transformers loads as a language model.
#[test]
fn a_bare_decoder_scores_like_the_language_model() {
    let mut plain = load(fixture("gemma3"), None, &prompt_config()).unwrap();
    for prefix in ["", "language_model."] {
        let built = Built::changed(|config, tensors| {
            config["architectures"] = json!(["Gemma3TextModel"]);
            let bare = |(name, tensor): (String, Tensor)| (name.replacen("model.", prefix, 1), tensor);
            *tensors = tensors.drain().map(bare).collect();
        });
        assert_eq!(
            margins(&mut built.load(None).unwrap(), &TEXTS),
            margins(&mut plain, &TEXTS),
            "{prefix}"
        );
    }
}

/// The adapter of the fixture, after a change of its config and its tensors.
fn changed_adapter(change: impl FnOnce(&mut Value, &mut Tensors)) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let mut config = read_json(&fixture("gemma3/lora_qv/adapter_config.json"));
    let mut tensors = load_tensors(&fixture("gemma3/lora_qv/adapter_model.safetensors"));
    change(&mut config, &mut tensors);
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    candle_core::safetensors::save(&tensors, folder.path().join("adapter_model.safetensors")).unwrap();
    let path = folder.path().to_owned();
    (folder, path)
}

#[test]
fn options_of_peft_that_change_the_scores_are_refused() {
    for (change, part) in [
        (json!({"init_lora_weights": "pissa"}), "`init_lora_weights` is `pissa`"),
        (
            json!({"init_lora_weights": "pissa_niter_4"}),
            "`init_lora_weights` is `pissa_niter_4`",
        ),
        (
            json!({"init_lora_weights": "olora"}),
            "path_initial_model_for_weight_conversion",
        ),
        (
            json!({"peft_type": "ADALORA"}),
            "`peft_type` is `ADALORA`, expected `LORA`",
        ),
        (json!({"peft_type": null}), "`peft_type` is missing, expected `LORA`"),
        (
            json!({"lora_alpha": null}),
            "the alpha of `model.layers.0.self_attn.q_proj` is missing",
        ),
        (
            json!({"r": null}),
            "the rank of `model.layers.0.self_attn.q_proj` is missing",
        ),
        (json!({"task_type": "TOKEN_CLS"}), "`task_type` is `TOKEN_CLS`"),
        (
            json!({"modules_to_save": ["lm_head"]}),
            "`modules_to_save` names `lm_head`",
        ),
        (json!({"next_variant": 3}), "`next_variant` is set"),
        (
            json!({"alpha_pattern": {"language_model.*q_proj": 64}}),
            "`alpha_pattern` has the pattern `language_model.*q_proj`, which matches no linear layer",
        ),
        (
            json!({"rank_pattern": {"w_proj": 4}}),
            "`rank_pattern` has the pattern `w_proj`",
        ),
        (
            json!({"target_modules": ["q_proj", "v_proj", "w_proj"]}),
            "`target_modules` names `w_proj`",
        ),
        (
            json!({"target_modules": ["q_proj", "v_proj", "fc1"]}),
            "`target_modules` names `fc1`",
        ),
        (
            json!({"target_modules": ["q_proj", "v_proj", "lm_head"], "exclude_modules": ".*vision.*"}),
            "`target_modules` names `lm_head`",
        ),
        (
            json!({"target_modules": "model.language_model.*"}),
            "does not match any linear layer",
        ),
        (
            json!({"target_modules": ["q_proj"]}),
            "v_proj.lora_A.weight` is for a module that `target_modules`",
        ),
        (json!({"exclude_modules": ["v_proj"]}), "do not select"),
        (
            json!({"layers_to_transform": [0, 1]}),
            "layers.2.self_attn.q_proj.lora_A.weight` is for a module",
        ),
        (json!({"layers_to_transform": 9}), "`layers_to_transform` names layer 9"),
        (
            json!({"layers_pattern": "layers"}),
            "`layers_pattern` is set without `layers_to_transform`",
        ),
        (
            json!({"target_modules": ".*[qv]_proj", "layers_to_transform": [0]}),
            "beside a pattern in `target_modules`",
        ),
        (
            json!({"task_type": "SEQ_CLS"}),
            "tensor `base_model.model.score.weight` is missing",
        ),
    ] {
        let (_folder, path) = changed_adapter(|config, _| {
            for (key, value) in change.as_object().unwrap() {
                config[key] = value.clone();
            }
        });
        assert_fault(load(fixture("gemma3"), Some(path), &prompt_config()), &[part]);
    }
    for name in [
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.weight",
        HEAD,
    ] {
        let (_folder, path) = changed_adapter(|_, tensors| {
            tensors.insert(name.into(), zeros((2, 64)));
        });
        let part = format!("tensor `{name}` is not supported");
        assert_fault(load(fixture("gemma3"), Some(path), &prompt_config()), &[&part]);
    }
}

/// Other spellings of the same choice of modules give the same scores.
#[test]
fn options_of_peft_that_select_the_same_modules_change_nothing() {
    let adapter = fixture("gemma3/lora_qv");
    let expected = margins(
        &mut load(fixture("gemma3"), Some(adapter), &prompt_config()).unwrap(),
        &TEXTS,
    );
    for change in [
        json!({"target_modules": "model\\.layers\\.\\d+\\.self_attn\\.(q|v)_proj"}),
        json!({"target_modules": "(?!.*vision).*\\.[qv]_proj"}),
        json!({"target_modules": "all-linear", "exclude_modules": ".*(k_proj|o_proj|mlp.*)"}),
        // What PEFT saves for `all-linear` without the vision part of a multimodal model.
        json!({"target_modules": ["q_proj", "fc2", "v_proj", "fc1", "out_proj"], "exclude_modules": ".*vision.*"}),
        json!({"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers"}),
        json!({"layers_to_transform": [], "init_lora_weights": "eva", "lora_dropout": 0.5}),
        json!({"r": 99, "rank_pattern": {"model.layers.0.self_attn.q_proj": 4, ".*": 4}}),
        json!({"lora_alpha": 99, "alpha_pattern": {"[qv]_proj": 8, "q_proj": 77}}),
    ] {
        let (_folder, path) = changed_adapter(|config, _| {
            assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(8)));
            for (key, value) in change.as_object().unwrap() {
                config[key] = value.clone();
            }
        });
        let mut classifier = load(fixture("gemma3"), Some(path), &prompt_config()).unwrap();
        assert_eq!(margins(&mut classifier, &TEXTS), expected, "{change}");
    }
}

/// The files that people hold, in a folder of their own, and what is said about them.
#[test]
fn other_formats_are_recognised() {
    let folder = |files: &[(&str, &[u8])]| {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        folder
    };
    const LFS: &[u8] = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n";
    const HDF5: &[u8] = b"\x89HDF\r\n\x1a\n\0\0\0\0";
    const ZIP: &[u8] = b"PK\x03\x04\0\0";
    for (files, part) in [
        (
            &[("model.gguf", &b"GGUF\x03\0\0\0"[..])][..],
            "model.gguf: is a GGUF file",
        ),
        (
            &[("config.json", b"{}"), ("pytorch_model.bin", ZIP)],
            "getattr(t, c.architectures[0]).from_pretrained",
        ),
        (&[("model.pt", b"\x80\x02}")], "model.pt: is a pickle"),
        (&[("model.weights.h5", HDF5)], "export_to_transformers(FOLDER)"),
        (
            &[("adapter_config.json", b"{}"), ("adapter_model.safetensors", ZIP)],
            "contains a PEFT adapter",
        ),
        (
            &[
                ("checkpoint-50/config.json", b"{}"),
                ("checkpoint-100/config.json", b"{}"),
            ],
            "point `model.path` to one of them, such as `",
        ),
        (
            &[
                ("config.json", b"{}"),
                ("tokenizer.json", LFS),
                ("model.safetensors", LFS),
            ],
            "model.safetensors: is a pointer of Git LFS",
        ),
        (
            &[("tokenizer.json", LFS), ("model.safetensors", LFS)],
            "tokenizer.json: is a pointer of Git LFS",
        ),
    ] {
        let folder = folder(files);
        assert_fault(load(folder.path().to_owned(), None, &prompt_config()), &[part]);
        if let [(name, _)] = files {
            // The file itself instead of its folder.
            assert_fault(load(folder.path().join(name), None, &prompt_config()), &[part]);
        }
    }
    let config = b"{\"peft_type\": \"LORA\"}";
    for (files, part) in [
        (
            &[("adapter_config.json", &config[..]), ("adapter_model.bin", ZIP)][..],
            "adapter_model.bin: is a pickle, expected safetensors",
        ),
        (
            &[("adapter_config.json", config), ("adapter_model.pt", b"\x80\x02")],
            "weights_only=True",
        ),
        (&[("a.lora.h5", HDF5)], "a.lora.h5: holds LoRA weights of Keras"),
        (&[("adapter.gguf", b"GGUF")], "adapter.gguf: is a GGUF file"),
        (
            &[("config.json", b"{}"), ("model.safetensors", ZIP)],
            "contains a whole checkpoint",
        ),
        (
            &[("checkpoint-100/adapter_config.json", config)],
            "point `model.adapter` to one of them",
        ),
        (
            &[("adapter_config.json", config), ("adapter_model.safetensors", LFS)],
            "adapter_model.safetensors: is a pointer of Git LFS",
        ),
    ] {
        let folder = folder(files);
        assert_fault(
            load(fixture("gemma3"), Some(folder.path().to_owned()), &prompt_config()),
            &[part],
        );
    }
}

/// KerasHub and Google's own tools write no `tokenizer.json`.
#[test]
fn a_sentencepiece_model_gives_the_same_tokens() {
    let built = Built::changed(|_, _| ());
    let expected = built.load(None).unwrap();
    std::fs::remove_file(built.path().join("tokenizer.json")).unwrap();
    std::fs::copy(fixture("gemma3/tokenizer.model"), built.path().join("tokenizer.model")).unwrap();
    let found = built.load(None).unwrap();
    for case in reference_cases("gemma3") {
        let rows = found.prompter().encode(&case.text).unwrap().rows;
        assert_eq!(*rows[0].tokens, *case.served_ids(), "{}", case.key);
    }
    assert_ne!(found.identity().base, expected.identity().base);
}

#[test]
fn an_adapter_beside_a_checkpoint_is_not_ignored() {
    let built = Built::changed(|_, _| ());
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(fixture("gemma3/lora_qv").join(file), built.path().join(file)).unwrap();
    }
    assert_fault(
        built.load(None),
        &["adapter_config.json: is in the same folder as the checkpoint"],
    );
    let mut both = built.load(Some(built.path())).unwrap();
    let mut apart = load(fixture("gemma3"), Some(fixture("gemma3/lora_qv")), &prompt_config()).unwrap();
    assert_eq!(margins(&mut both, &TEXTS), margins(&mut apart, &TEXTS));
}
