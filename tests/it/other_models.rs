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

type Tensors = HashMap<String, Tensor>;

/// The texts of the recorded probabilities of multimodal models.
const TEXTS: [&str; 3] = [
    "you look very nice today",
    "the weather in March was cold, and we walked home",
    "[why] would 12345 people agree",
];

const HEAD: &str = "score.weight";

fn load_tensors(path: &Path) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn zeros(shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// A folder with a checkpoint that a test builds from the Gemma 3 fixture.
struct Built {
    folder: tempfile::TempDir,
}

impl Built {
    fn new(config: &Value, tensors: &Tensors) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixture("gemma3/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        candle_core::safetensors::save(tensors, folder.path().join("model.safetensors")).unwrap();
        Self { folder }
    }

    /// The Gemma 3 fixture after a change.
    fn changed(change: impl FnOnce(&mut Value, &mut Tensors)) -> Self {
        let mut config = read_json(&fixture("gemma3/config.json"));
        let mut tensors = load_tensors(&fixture("gemma3/model.safetensors"));
        change(&mut config, &mut tensors);
        Self::new(&config, &tensors)
    }

    /// The Gemma 3 fixture inside a multimodal model, in the names that `prefix` stands for, after a change.
    fn multimodal(prefix: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> Self {
        let mut config = read_json(&fixture("gemma3/multimodal/config.json"));
        let text = load_tensors(&fixture("gemma3/model.safetensors"));
        let nested = |(name, tensor): (String, Tensor)| (name.replacen("model.", prefix, 1), tensor);
        let mut tensors: Tensors = text.into_iter().map(nested).collect();
        tensors.insert("vision_tower.post_layernorm.weight".into(), zeros(32));
        tensors.insert("multi_modal_projector.mm_soft_emb_norm.weight".into(), zeros(32));
        change(&mut config, &mut tensors);
        Self::new(&config, &tensors)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    fn load(&self, adapter: Option<PathBuf>) -> Result<Classifier, Faults> {
        load(self.path(), adapter, &prompt_config())
    }
}

fn load(path: PathBuf, adapter: Option<PathBuf>, prompt: &PromptConfig) -> Result<Classifier, Faults> {
    let model = ModelConfig {
        path: Some(path),
        adapter,
        ..model_config("gemma3")
    };
    Classifier::load(&model, prompt)
}

#[track_caller]
fn assert_fault(loaded: Result<Classifier, Faults>, parts: &[&str]) {
    let text = match loaded {
        Ok(_) => panic!("loaded, expected {parts:?}"),
        Err(faults) => faults.to_string(),
    };
    for part in parts {
        assert!(text.contains(part), "`{part}` not in\n{text}");
    }
}

fn margins(classifier: &mut Classifier, texts: &[&str]) -> Vec<f64> {
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

/// A checkpoint with the head of the recorded adapter, of which `rows` are kept.
fn with_head(rows: usize, change: impl FnOnce(&mut Value)) -> Built {
    Built::changed(|config, tensors| {
        let adapter = load_tensors(&fixture("gemma3/seq_cls/adapter_model.safetensors"));
        let head = adapter["base_model.model.score.weight"].narrow(0, 0, rows).unwrap();
        tensors.insert(HEAD.into(), head.contiguous().unwrap());
        config["architectures"] = json!(["Gemma3TextForSequenceClassification"]);
        change(config);
    })
}

/// Returns the recorded texts, and the logits of both outputs for each.
fn recorded_heads(base: &str, kind: &str) -> (Vec<String>, Vec<[f64; 2]>) {
    let recorded = read_json(&fixture(base).join("seq_cls/expected.json"));
    let texts = recorded["texts"].as_array().unwrap().iter();
    let logits = recorded[kind].as_array().unwrap().iter();
    (
        texts.map(|text| text.as_str().unwrap().to_owned()).collect(),
        logits
            .map(|pair| [pair[0].as_f64().unwrap(), pair[1].as_f64().unwrap()])
            .collect(),
    )
}

#[track_caller]
fn assert_head(classifier: &mut Classifier, kind: &str, margin: impl Fn([f64; 2]) -> f64) {
    assert_head_over("gemma3", classifier, kind, margin);
}

#[track_caller]
fn assert_head_over(base: &str, classifier: &mut Classifier, kind: &str, margin: impl Fn([f64; 2]) -> f64) {
    let (texts, logits) = recorded_heads(base, kind);
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    for (found, logits) in margins(classifier, &texts).into_iter().zip(logits) {
        let expected = margin(logits);
        assert!((found - expected).abs() < 1e-5, "{found}, expected {expected}");
    }
}

/// `tests/transformers/record_heads.py` records the logits.
#[test]
fn classification_heads_score_as_with_transformers_and_peft() {
    let second = |[first, second]: [f64; 2]| second - first;
    assert_head(&mut with_head(2, |_| ()).load(None).unwrap(), "base", second);
    let adapter = fixture("gemma3/seq_cls");
    let mut classifier = load(fixture("gemma3"), Some(adapter.clone()), &prompt_config()).unwrap();
    assert_head(&mut classifier, "adapter", second);
    assert!(classifier.head().unwrap().contains("output 1 minus output 0"));
    assert_ne!(classifier.identity().prompt, prompt_config().content_hash());
    // The head of the adapter replaces that of the checkpoint.
    let mut both = with_head(1, |_| ()).load(Some(adapter)).unwrap();
    assert_head(&mut both, "adapter", second);

    assert_head(&mut with_head(1, |_| ()).load(None).unwrap(), "base", |[first, _]| {
        first
    });
    let named = with_head(2, |config| config["id2label"] = json!({"0": "hateful", "1": "ok"}));
    assert_head(&mut named.load(None).unwrap(), "base", |[first, second]| first - second);
    // A cap of logits concerns the vocabulary.
    let capped = with_head(2, |config| config["final_logit_softcapping"] = json!(0.01));
    assert_head(&mut capped.load(None).unwrap(), "base", second);
    let capped = Built::changed(|config, _| config["final_logit_softcapping"] = json!(0.01));
    let mut adapted = capped.load(Some(fixture("gemma3/seq_cls"))).unwrap();
    assert_head(&mut adapted, "adapter", second);
}

/// The multimodal fixture has other names on disk than transformers writes today, so both are tried.
#[test]
fn heads_over_gemma_2_and_multimodal_models_score_as_with_transformers_and_peft() {
    let second = |[first, second]: [f64; 2]| second - first;
    let add_head = |base: &str, config: &mut Value, tensors: &mut Tensors| {
        let adapter = load_tensors(&fixture(base).join("seq_cls/adapter_model.safetensors"));
        tensors.insert(HEAD.into(), adapter["base_model.model.score.weight"].clone());
        let architecture = config["architectures"][0].as_str().unwrap();
        let family = architecture.split("For").next().unwrap();
        config["architectures"] = json!([format!("{family}ForSequenceClassification")]);
    };
    let adapter = |base: &str| Some(fixture(base).join("seq_cls"));

    let base = "gemma2";
    let mut config = read_json(&fixture("gemma2/config.json"));
    // A cap of logits concerns the vocabulary.
    assert!(config["final_logit_softcapping"].as_f64().is_some());
    let mut tensors = load_tensors(&fixture("gemma2/model.safetensors"));
    let mut adapted = load(fixture(base), adapter(base), &prompt_config()).unwrap();
    assert_head_over(base, &mut adapted, "adapter", second);
    add_head(base, &mut config, &mut tensors);
    let built = Built::new(&config, &tensors);
    std::fs::copy(fixture("gemma2/tokenizer.json"), built.path().join("tokenizer.json")).unwrap();
    assert_head_over(base, &mut built.load(None).unwrap(), "base", second);
    assert_head_over(base, &mut built.load(adapter(base)).unwrap(), "adapter", second);

    let base = "gemma3/multimodal";
    for prefix in ["language_model.model.", "model.language_model."] {
        let bare = Built::multimodal(prefix, |_, _| ());
        assert_head_over(base, &mut bare.load(adapter(base)).unwrap(), "adapter", second);
        let built = Built::multimodal(prefix, |config, tensors| add_head(base, config, tensors));
        assert_head_over(base, &mut built.load(None).unwrap(), "base", second);
        assert_head_over(base, &mut built.load(adapter(base)).unwrap(), "adapter", second);
    }
}

#[test]
fn the_labels_of_the_settings_choose_the_hateful_output() {
    let built = with_head(2, |config| config["id2label"] = json!({"0": "toxic", "1": "safe"}));
    assert_fault(built.load(None), &["set `prompt.labels` to [\"toxic\", \"safe\"]"]);
    let prompt = PromptConfig {
        labels: ["safe".into(), "toxic".into()],
        hateful_label: "toxic".into(),
        ..prompt_config()
    };
    let mut classifier = load(built.path(), None, &prompt).unwrap();
    assert_head(&mut classifier, "base", |[first, second]| first - second);
}

#[test]
fn heads_that_do_not_fit_are_refused() {
    let missing = Built::changed(|config, _| config["architectures"] = json!(["Gemma3TextForSequenceClassification"]));
    assert_fault(missing.load(None), &["tensor `score.weight` is missing"]);
    let three = with_head(2, |_| ());
    let mut tensors = load_tensors(&three.path().join("model.safetensors"));
    tensors.insert(HEAD.into(), zeros((3, 64)));
    candle_core::safetensors::save(&tensors, three.path().join("model.safetensors")).unwrap();
    assert_fault(
        three.load(None),
        &["the classification head has 3 outputs, expected 1, or 2"],
    );
    let multi = with_head(2, |config| config["problem_type"] = json!("multi_label_classification"));
    assert_fault(multi.load(None), &["`problem_type` is `multi_label_classification`"]);
    let causal = with_head(2, |_| ()).load(Some(fixture("gemma3/lora_qv")));
    assert_fault(
        causal,
        &["`task_type` is `CAUSAL_LM`, but the base model is a `Gemma3TextForSequenceClassification`"],
    );
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
