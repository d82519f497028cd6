//! LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; the file format and the
//! matching of patterns are PEFT's (`peft/tuners/lora`, `peft/utils/other.py`). What would change
//! the arithmetic and is not computed here (DoRA, biases, replicated layers …) is refused by name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use super::checkpoint::{MAX_ADAPTER_CONFIG_BYTES, read_bytes};
use super::config::GemmaConfig;
use super::problem::{LoadError, Problem};
use super::tensor_file::TensorFile;
use crate::message::content_hash;

/// The seven linear layers of a block that an adapter can target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// MLP gate.
    Gate,
    /// MLP up.
    Up,
    /// MLP down.
    Down,
}

impl Projection {
    /// All seven, in the order of the forward pass.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Name in the checkpoint, such as `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Path inside a layer, such as `self_attn.q_proj`.
    pub fn path(self) -> String {
        let module = if self < Self::Gate { "self_attn" } else { "mlp" };
        format!("{module}.{}", self.name())
    }

    /// Shape of its weight: (outputs, inputs).
    pub fn shape(self, config: &GemmaConfig) -> [usize; 2] {
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        match self {
            Self::Q => [queries, config.hidden_size],
            Self::K | Self::V => [keys, config.hidden_size],
            Self::O => [config.hidden_size, queries],
            Self::Gate | Self::Up => [config.intermediate_size, config.hidden_size],
            Self::Down => [config.hidden_size, config.intermediate_size],
        }
    }
}

/// The low-rank delta of one linear layer: `scale * B A`, all f32.
#[derive(Debug, Clone)]
pub struct LoraWeights {
    /// (rank, inputs).
    pub a: Tensor,
    /// (outputs, rank).
    pub b: Tensor,
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rslora.
    pub scale: f64,
}

/// An adapter, read and matched against a base.
#[derive(Debug)]
pub struct Adapter {
    weights: BTreeMap<(usize, Projection), LoraWeights>,
    fingerprint: String,
    version: Option<String>,
    description: String,
}

/// The part of `adapter_config.json` that is read as it stands.
#[derive(Debug, Deserialize)]
struct RawConfig {
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

/// Our manifest beside the PEFT files, where the adapter came from a registry.
#[derive(Debug, Deserialize)]
struct RawManifest {
    version: Option<String>,
    base: Option<String>,
}

/// PEFT options that change the arithmetic and that we do not compute: refused unless empty.
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

impl Adapter {
    /// Reads the folder and checks every tensor against the base's shapes.
    ///
    /// `base_fingerprint` is compared with the manifest's, where the folder has one.
    ///
    /// # Errors
    /// Every fault found: unreadable files, options that we do not compute, missing, misshapen or
    /// superfluous tensors, values that are not finite, another base.
    pub fn load(folder: &Path, config: &GemmaConfig, base_fingerprint: &str) -> Result<Self, LoadError> {
        let config_path = folder.join("adapter_config.json");
        let weights_path = folder.join("adapter_model.safetensors");
        let config_bytes = read_bytes(&config_path, MAX_ADAPTER_CONFIG_BYTES)?;
        let file = TensorFile::open(&weights_path)?;
        let mut reader = Reader {
            config_path,
            file: &file,
            base: config,
            problems: Vec::new(),
        };
        let weights = reader.read(&config_bytes);
        let version = reader.manifest(&folder.join("manifest.json"), base_fingerprint);
        if !reader.problems.is_empty() {
            return Err(LoadError {
                problems: reader.problems,
            });
        }
        let files = format!(
            "adapter_config.json {}\nadapter_model.safetensors {}\n",
            content_hash(&config_bytes),
            content_hash(file.bytes())
        );
        let description = describe(&weights);
        Ok(Self {
            weights,
            fingerprint: content_hash(files.as_bytes()),
            version,
            description,
        })
    }

    /// The delta of one linear layer, if the adapter has one.
    pub fn get(&self, layer: usize, projection: Projection) -> Option<&LoraWeights> {
        self.weights.get(&(layer, projection))
    }

    /// Content hash over the SHA-256 of the two PEFT files.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The version that its manifest names.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// For people: ranks and targets.
    pub fn description(&self) -> &str {
        &self.description
    }
}

fn describe(weights: &BTreeMap<(usize, Projection), LoraWeights>) -> String {
    let mut targets: Vec<Projection> = weights.keys().map(|&(_, projection)| projection).collect();
    targets.sort_unstable();
    targets.dedup();
    let mut ranks: Vec<usize> = weights.values().map(|lora| lora.a.dims()[0]).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let join = |parts: Vec<String>| parts.join(", ");
    let ranks = join(ranks.iter().map(usize::to_string).collect());
    format!(
        "rank {ranks} on {}",
        join(targets.iter().map(|target| target.name().to_owned()).collect())
    )
}

struct Reader<'a> {
    config_path: PathBuf,
    file: &'a TensorFile,
    base: &'a GemmaConfig,
    problems: Vec<Problem>,
}

impl Reader<'_> {
    fn config_fault(&mut self, text: impl Into<String>) {
        self.problems.push(Problem::new(&self.config_path, text));
    }

    fn file_fault(&mut self, text: impl Into<String>) {
        self.problems.push(Problem::new(self.file.path(), text));
    }

    fn read(&mut self, config_bytes: &[u8]) -> BTreeMap<(usize, Projection), LoraWeights> {
        let raw = match serde_json::from_slice::<Value>(config_bytes) {
            Ok(json) => {
                self.refuse_unsupported(&json);
                serde_json::from_value::<RawConfig>(json)
            }
            Err(error) => Err(error),
        };
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
            self.config_fault(format!("`peft_type` is {:?}, expected `LORA`", raw.peft_type));
        }
        if raw.bias.as_deref().is_some_and(|bias| bias != "none") {
            self.config_fault(format!("`bias` is {:?}, expected `none`", raw.bias));
        }
        let rank_keys = raw.rank_pattern.iter().flat_map(BTreeMap::keys);
        let alpha_keys = raw.alpha_pattern.iter().flat_map(BTreeMap::keys);
        for key in rank_keys.chain(alpha_keys) {
            if let Err(error) = suffix_pattern(key) {
                self.config_fault(format!("the pattern `{key}` cannot be read: {error}"));
            }
        }
        let Some(targets) = self.targets(&raw) else {
            return BTreeMap::new();
        };
        let found = self.tensors();
        let mut weights = BTreeMap::new();
        for (layer, projection) in targets {
            if let Some(lora) = self.read_pair(&raw, &found, layer, projection) {
                weights.insert((layer, projection), lora);
            }
        }
        weights
    }

    fn refuse_unsupported(&mut self, json: &Value) {
        for name in UNSUPPORTED {
            let empty = match json.get(name) {
                None | Some(Value::Null | Value::Bool(false)) => true,
                Some(Value::Array(items)) => items.is_empty(),
                Some(Value::Object(fields)) => fields.is_empty(),
                Some(_) => false,
            };
            if !empty {
                self.config_fault(format!(
                    "`{name}` is set, expected none: this LoRA variant is not supported"
                ));
            }
        }
    }

    /// The linear layers that the config says are adapted, by PEFT's rules of matching.
    fn targets(&mut self, raw: &RawConfig) -> Option<Vec<(usize, Projection)>> {
        let Some(wanted) = &raw.target_modules else {
            self.config_fault("`target_modules` is missing, expected names of linear layers or a pattern");
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
                "`layers_to_transform` names layer {layer}, but the base has {layers} layers"
            ));
        }
        let wanted = self.matcher("target_modules", wanted)?;
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
                if wanted.matches(&name) && !excluded && transformed {
                    targets.push((layer, projection));
                }
            }
        }
        if targets.is_empty() {
            self.config_fault("`target_modules` matches no linear layer of the base");
        }
        Some(targets)
    }

    fn matcher(&mut self, key: &str, names: &NamesOrPattern) -> Option<Matcher> {
        match names {
            NamesOrPattern::Names(names) => {
                for name in names {
                    let last = name.rsplit('.').next().unwrap_or(name);
                    if !Projection::ALL.iter().any(|projection| projection.name() == last) {
                        self.config_fault(format!(
                            "`{key}` names `{name}`, expected one of the seven linear layers"
                        ));
                    }
                }
                Some(Matcher::Names(names.clone()))
            }
            NamesOrPattern::Pattern(pattern) if pattern == "all-linear" => Some(Matcher::All),
            NamesOrPattern::Pattern(pattern) => match Regex::new(&format!("^(?:{pattern})$")) {
                Ok(regex) => Some(Matcher::Pattern(regex)),
                Err(error) => {
                    self.config_fault(format!("`{key}` is not a pattern we can read: {error}"));
                    None
                }
            },
        }
    }

    /// Tensor names of the file by layer, projection and side; names anything else as a fault.
    fn tensors(&mut self) -> BTreeMap<(usize, Projection, char), String> {
        let mut found = BTreeMap::new();
        let mut names = self.file.names();
        names.sort_unstable();
        for name in names {
            match parse_name(&name) {
                Some(key) if key.0 < self.base.num_layers() => {
                    found.insert(key, name);
                }
                Some((layer, ..)) => {
                    let layers = self.base.num_layers();
                    self.file_fault(format!(
                        "tensor `{name}` is for layer {layer}, but the base has {layers} layers: made for another base"
                    ));
                }
                None => self.file_fault(format!(
                    "tensor `{name}` is not one of ours, expected `base_model.model.model.layers.N.….lora_A.weight` or `lora_B`"
                )),
            }
        }
        found
    }

    fn read_pair(
        &mut self,
        raw: &RawConfig,
        found: &BTreeMap<(usize, Projection, char), String>,
        layer: usize,
        projection: Projection,
    ) -> Option<LoraWeights> {
        let module = format!("model.layers.{layer}.{}", projection.path());
        let rank = match lookup(raw.rank_pattern.as_ref(), &module).or(raw.r) {
            Some(rank) if (1..=65_536).contains(&rank) => rank,
            rank => {
                self.config_fault(format!("the rank of `{module}` is {rank:?}, expected 1 to 65536"));
                return None;
            }
        };
        let alpha = match lookup(raw.alpha_pattern.as_ref(), &module).or(raw.lora_alpha) {
            Some(alpha) if alpha.is_finite() => alpha,
            alpha => {
                self.config_fault(format!(
                    "the alpha of `{module}` is {alpha:?}, expected a finite number"
                ));
                return None;
            }
        };
        let scale = if raw.use_rslora {
            alpha / (rank as f64).sqrt()
        } else {
            alpha / rank as f64
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
        self.file
            .read_f32(&name, shape)
            .map_err(|problem| self.problems.push(problem))
            .ok()
    }

    fn manifest(&mut self, path: &Path, base_fingerprint: &str) -> Option<String> {
        if !path.exists() {
            return None;
        }
        let manifest = read_bytes(path, MAX_ADAPTER_CONFIG_BYTES).and_then(|bytes| {
            serde_json::from_slice::<RawManifest>(&bytes)
                .map_err(|error| Problem::new(path, format!("cannot read: {error}")))
        });
        match manifest {
            Ok(manifest) => {
                if let Some(base) = manifest.base.filter(|base| base != base_fingerprint) {
                    self.problems.push(Problem::new(
                        path,
                        format!("the adapter was made for base `{base}`, expected `{base_fingerprint}`"),
                    ));
                }
                manifest.version
            }
            Err(problem) => {
                self.problems.push(problem);
                None
            }
        }
    }
}

/// How PEFT matches module names: a list by suffix, a string by a full match.
enum Matcher {
    All,
    Names(Vec<String>),
    Pattern(Regex),
}

impl Matcher {
    fn matches(&self, module: &str) -> bool {
        match self {
            Self::All => true,
            Self::Names(names) => names
                .iter()
                .any(|name| module == name || module.strip_suffix(name).is_some_and(|head| head.ends_with('.'))),
            Self::Pattern(regex) => regex.is_match(module),
        }
    }
}

/// PEFT's `get_pattern_key`: the first key that matches the end of the module's name.
fn lookup<T: Copy>(pattern: Option<&BTreeMap<String, T>>, module: &str) -> Option<T> {
    pattern?.iter().find_map(|(key, &value)| {
        // Patterns that cannot be read were reported before any is looked up.
        suffix_pattern(key)
            .is_ok_and(|regex| regex.is_match(module))
            .then_some(value)
    })
}

fn suffix_pattern(key: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
}

/// `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` to (3, Q, 'A').
fn parse_name(name: &str) -> Option<(usize, Projection, char)> {
    let (_, rest) = name.strip_prefix("base_model.model.")?.split_once("layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let (module, side) = rest.rsplit_once(".lora_")?;
    let projection = Projection::ALL
        .into_iter()
        .find(|projection| projection.path() == module)?;
    let side = match side {
        "A.weight" => 'A',
        "B.weight" => 'B',
        _ => return None,
    };
    Some((layer.parse().ok()?, projection, side))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_by_module() {
        let name = "base_model.model.model.layers.12.mlp.down_proj.lora_B.weight";
        assert_eq!(parse_name(name), Some((12, Projection::Down, 'B')));
        for other in [
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
            "base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "base_model.model.model.embed_tokens.lora_embedding_A",
        ] {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }

    #[test]
    fn patterns_match_the_end_of_a_module_name() {
        let module = "model.layers.1.self_attn.v_proj";
        let pattern = |key: &str| BTreeMap::from([(key.to_owned(), 4)]);
        for key in ["v_proj", "self_attn.v_proj", r"layers\.[01]\.self_attn\.v_proj", module] {
            assert_eq!(lookup(Some(&pattern(key)), module), Some(4), "{key}");
        }
        for key in ["proj", "q_proj", "v_proj.weight", "layers.1"] {
            assert_eq!(lookup(Some(&pattern(key)), module), None, "{key}");
        }
    }
}
