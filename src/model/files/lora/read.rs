//! Reads and checks the files of an adapter, and reports every fault in them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::Deserialize;
use serde_json::Value;

use super::LoraWeights;
use super::pattern::{ModuleMatcher, SuffixPatterns, full_pattern, parse_tensor_name};
use crate::config::Projection;
use crate::fault::{Fault, Faults};
use crate::model::config::GemmaConfig;
use crate::model::files::checkpoint::{MAX_JSON_BYTES, read_bytes};
use crate::model::files::tensor_file::TensorFile;

/// The fields of `adapter_config.json` that are supported. Those in [`UNSUPPORTED`] must not be set.
#[derive(Debug, Deserialize)]
struct RawAdapterConfig {
    peft_type: Option<String>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    #[serde(default)]
    use_rslora: bool,
    rank_pattern: Option<BTreeMap<String, usize>>,
    alpha_pattern: Option<BTreeMap<String, f64>>,
    target_modules: Option<NamesOrPattern>,
    exclude_modules: Option<NamesOrPattern>,
    layers_to_transform: Option<OneOrMany>,
    bias: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum NamesOrPattern {
    Pattern(String),
    Names(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(usize),
    Many(Vec<usize>),
}

/// The options that determine the rank and the scale of each linear layer's delta.
struct Scales {
    rank: Option<usize>,
    ranks: SuffixPatterns<usize>,
    alpha: Option<f64>,
    alphas: SuffixPatterns<f64>,
    use_rslora: bool,
}

/// The manifest that accompanies the PEFT files of an adapter from a registry.
#[derive(Debug, Deserialize)]
struct RawManifest {
    version: Option<String>,
    base: Option<String>,
}

/// PEFT options that change the arithmetic and are not supported. Setting one of them is a fault.
const UNSUPPORTED: [&str; 13] = [
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
];

/// Collects every fault instead of stopping at the first.
pub(super) struct AdapterReader<'a> {
    pub(super) config_path: PathBuf,
    pub(super) file: &'a TensorFile,
    pub(super) base: &'a GemmaConfig,
    pub(super) faults: Faults,
}

impl AdapterReader<'_> {
    fn config_fault(&mut self, text: impl Into<String>) {
        self.faults.push(Fault::file(&self.config_path, text));
    }

    fn file_fault(&mut self, text: impl Into<String>) {
        self.faults.push(Fault::file(self.file.path(), text));
    }

    /// Reads the deltas by layer and projection. They are complete unless `faults` is not empty afterwards.
    pub(super) fn read(&mut self, config_bytes: &[u8]) -> BTreeMap<(usize, Projection), LoraWeights> {
        let raw = serde_json::from_slice::<Value>(config_bytes).and_then(|json| {
            self.check_supported(&json);
            serde_json::from_value::<RawAdapterConfig>(json)
        });
        let raw = match raw {
            Ok(raw) => raw,
            Err(error) => {
                self.config_fault(format!("cannot read: {error}"));
                return BTreeMap::new();
            }
        };
        if !raw
            .peft_type
            .as_deref()
            .is_some_and(|name| name.eq_ignore_ascii_case("lora"))
        {
            self.config_fault(format!(
                "`peft_type` is {}, expected `LORA`",
                or_missing(raw.peft_type.as_ref())
            ));
        }
        if let Some(bias) = raw.bias.as_ref().filter(|bias| *bias != "none") {
            self.config_fault(format!("`bias` is `{bias}`, expected `none`"));
        }
        let ranks = self.patterns("rank_pattern", raw.rank_pattern.as_ref());
        let alphas = self.patterns("alpha_pattern", raw.alpha_pattern.as_ref());
        let (Some(targets), Some(ranks), Some(alphas)) = (self.targets(&raw), ranks, alphas) else {
            return BTreeMap::new();
        };
        let scales = Scales {
            rank: raw.r,
            ranks,
            alpha: raw.lora_alpha,
            alphas,
            use_rslora: raw.use_rslora,
        };
        let found = self.tensor_names();
        let mut weights = BTreeMap::new();
        for (layer, projection) in targets {
            if let Some(lora) = self.read_pair(&scales, &found, layer, projection) {
                weights.insert((layer, projection), lora);
            }
        }
        weights
    }

    /// Reports options that change the arithmetic and are not supported.
    fn check_supported(&mut self, json: &Value) {
        for name in UNSUPPORTED {
            let empty = match json.get(name) {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::Array(items)) => items.is_empty(),
                Some(Value::Object(fields)) => fields.is_empty(),
                Some(_) => false,
            };
            if !empty {
                self.config_fault(format!(
                    "`{name}` is set, expected no value: this LoRA variant is not supported"
                ));
            }
        }
    }

    /// Returns the linear layers that `target_modules` and related options select, by PEFT's rules.
    fn targets(&mut self, raw: &RawAdapterConfig) -> Option<Vec<(usize, Projection)>> {
        let Some(included) = &raw.target_modules else {
            self.config_fault("`target_modules` is missing, expected the names of linear layers or a pattern");
            return None;
        };
        let layers = match &raw.layers_to_transform {
            None => None,
            Some(OneOrMany::One(layer)) => Some(vec![*layer]),
            Some(OneOrMany::Many(layers)) => Some(layers.clone()),
        };
        if let Some(&layer) = layers.iter().flatten().find(|&&layer| layer >= self.base.num_layers()) {
            let layers = self.base.num_layers();
            self.config_fault(format!(
                "`layers_to_transform` names layer {layer}, but the base model has {layers} layers"
            ));
        }
        let included = self.matcher("target_modules", included)?;
        let excluded = match &raw.exclude_modules {
            Some(excluded) => Some(self.matcher("exclude_modules", excluded)?),
            None => None,
        };
        let mut targets = Vec::new();
        for layer in 0..self.base.num_layers() {
            for projection in Projection::ALL {
                let name = format!("model.layers.{layer}.{}", projection.path());
                let excluded = excluded.as_ref().is_some_and(|excluded| excluded.matches(&name));
                let transformed = layers.as_ref().is_none_or(|layers| layers.contains(&layer));
                if included.matches(&name) && !excluded && transformed {
                    targets.push((layer, projection));
                }
            }
        }
        if targets.is_empty() {
            self.config_fault("`target_modules` does not match any linear layer of the base model");
        }
        Some(targets)
    }

    /// Compiles the keys of `rank_pattern` or `alpha_pattern`. Each key selects at least one of the linear layers.
    fn patterns<T: Copy>(&mut self, name: &str, raw: Option<&BTreeMap<String, T>>) -> Option<SuffixPatterns<T>> {
        let modules = self.base.num_layers() * Projection::ALL.len();
        match SuffixPatterns::compile(raw, modules) {
            Ok(patterns) => Some(patterns),
            Err(errors) => {
                for error in errors {
                    self.config_fault(format!("`{name}` {error}"));
                }
                None
            }
        }
    }

    fn matcher(&mut self, key: &str, names: &NamesOrPattern) -> Option<ModuleMatcher> {
        match names {
            NamesOrPattern::Names(names) => {
                for name in names {
                    let last = name.rsplit('.').next().unwrap_or(name);
                    if !Projection::ALL.iter().any(|projection| projection.name() == last) {
                        self.config_fault(format!(
                            "`{key}` names `{name}`, expected the name of a linear layer, such as `q_proj`"
                        ));
                    }
                }
                Some(ModuleMatcher::Names(names.clone()))
            }
            NamesOrPattern::Pattern(pattern) if pattern == "all-linear" => Some(ModuleMatcher::All),
            NamesOrPattern::Pattern(pattern) => match full_pattern(pattern) {
                Ok(regex) => Some(ModuleMatcher::Pattern(regex)),
                Err(error) => {
                    self.config_fault(format!("`{key}` is not a supported pattern: {error}"));
                    None
                }
            },
        }
    }

    /// Returns the file's tensor names by layer, projection and side (A or B), and reports unexpected names.
    fn tensor_names(&mut self) -> BTreeMap<(usize, Projection, char), String> {
        let mut found = BTreeMap::new();
        let mut names = self.file.names();
        names.sort_unstable();
        for name in names {
            match parse_tensor_name(&name) {
                Some(key) if key.0 < self.base.num_layers() => {
                    found.insert(key, name);
                }
                Some((layer, ..)) => {
                    let layers = self.base.num_layers();
                    self.file_fault(format!(
                        "tensor `{name}` is for layer {layer}, but the base model has {layers} layers: \
                         the adapter was made for another base model"
                    ));
                }
                None => self.file_fault(format!(
                    "tensor `{name}` is not supported, \
                     expected `base_model.model.model.layers.N.….lora_A.weight` or `lora_B`"
                )),
            }
        }
        found
    }

    /// Reads A, B and the scale of one linear layer.
    fn read_pair(
        &mut self,
        scales: &Scales,
        found: &BTreeMap<(usize, Projection, char), String>,
        layer: usize,
        projection: Projection,
    ) -> Option<LoraWeights> {
        let module = format!("model.layers.{layer}.{}", projection.path());
        let rank = match scales.ranks.first_match(&module).or(scales.rank) {
            Some(rank) if (1..=65_536).contains(&rank) => rank,
            rank => {
                self.config_fault(format!(
                    "the rank of `{module}` is {}, expected 1 to 65536",
                    or_missing(rank.as_ref())
                ));
                return None;
            }
        };
        let alpha = scales.alphas.first_match(&module).or(scales.alpha);
        let divisor = if scales.use_rslora {
            (rank as f64).sqrt()
        } else {
            rank as f64
        };
        // The delta is computed in f32, in which the scale must be finite as well.
        let scale = match alpha.map(|alpha| alpha / divisor) {
            Some(scale) if (scale as f32).is_finite() => scale,
            _ => {
                self.config_fault(format!(
                    "the alpha of `{module}` is {}, expected a number in the range of f32",
                    alpha.map_or("missing".to_owned(), |alpha| format!("`{alpha:?}`"))
                ));
                return None;
            }
        };
        let [outputs, inputs] = projection.shape(self.base);
        let a = self.read_side(found, (layer, projection, 'A'), &[rank, inputs]);
        let b = self.read_side(found, (layer, projection, 'B'), &[outputs, rank]);
        Some(LoraWeights { a: a?, b: b?, scale })
    }

    fn read_side(
        &mut self,
        found: &BTreeMap<(usize, Projection, char), String>,
        key: (usize, Projection, char),
        shape: &[usize],
    ) -> Option<Tensor> {
        let (layer, projection, side) = key;
        let default = || {
            format!(
                "base_model.model.model.layers.{layer}.{}.lora_{side}.weight",
                projection.path()
            )
        };
        let name = found.get(&key).cloned().unwrap_or_else(default);
        self.faults.collect(self.file.read_f32(&name, shape))
    }

    /// Checks the base fingerprint in the manifest, if there is a manifest, and returns the version that it names.
    pub(super) fn read_version(&mut self, path: &Path, base_fingerprint: &str) -> Option<String> {
        if !path.exists() {
            return None;
        }
        let manifest = read_bytes(path, MAX_JSON_BYTES).and_then(|bytes| {
            serde_json::from_slice::<RawManifest>(&bytes)
                .map_err(|error| Fault::file(path, format!("cannot read: {error}")))
        });
        let manifest = self.faults.collect(manifest)?;
        if let Some(base) = manifest.base.filter(|base| base != base_fingerprint) {
            self.faults.push(Fault::file(
                path,
                format!("the adapter was made for base model `{base}`, expected `{base_fingerprint}`"),
            ));
        }
        manifest.version
    }
}

/// Returns a value in backticks, or "missing".
fn or_missing(value: Option<&impl std::fmt::Display>) -> String {
    value.map_or("missing".to_owned(), |value| format!("`{value}`"))
}
