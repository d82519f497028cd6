//! Reads and checks the files of an adapter, and reports every fault in them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::names::{Side, TensorNames};
use super::options;
use super::pattern::{LayerFilter, ModuleMatcher, SuffixPatterns, ends_with, full_pattern};
use super::raw::{InOrder, NamesOrPattern, OneOrMany, RawAdapterConfig};
use super::{HeadWeight, LoraWeights, Manifest};
use crate::config::Projection;
use crate::fault::{Fault, Faults};
use crate::model::config::GemmaConfig;
use crate::model::files::checkpoint::{MAX_JSON_BYTES, read_bytes};
use crate::model::files::contents::VISION_LAYERS;
use crate::model::files::tensor_file::TensorFile;
use crate::plural::Count;

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
    #[serde(default)]
    version: Value,
    #[serde(default)]
    base: Value,
}

/// The modules that PEFT saves as a whole for a classifier, whose head has one of these names.
const HEAD_MODULES: [&str; 2] = ["score", "classifier"];

/// What an adapter's files contain. It is complete unless `faults` is not empty.
#[derive(Default)]
pub(super) struct AdapterParts {
    pub(super) weights: BTreeMap<(usize, Projection), LoraWeights>,
    pub(super) head: Option<HeadWeight>,
    pub(super) notes: Vec<String>,
}

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

    /// Returns the value, or adds a fault in the config.
    fn config_result<T>(&mut self, result: Result<T, String>) -> Option<T> {
        result.map_err(|text| self.config_fault(text)).ok()
    }

    /// Reads the deltas by layer and projection, and the head.
    pub(super) fn read(&mut self, config_bytes: &[u8]) -> AdapterParts {
        let Some(raw) = self.parse(config_bytes) else {
            return AdapterParts::default();
        };
        let names = TensorNames::sort(self.file.names());
        let head = self.head(&raw, &names);
        let ranks = self.patterns("rank_pattern", raw.rank_pattern.as_ref(), &names);
        let alphas = self.patterns("alpha_pattern", raw.alpha_pattern.as_ref(), &names);
        let (Some(targets), Some(ranks), Some(alphas)) = (self.targets(&raw, &names), ranks, alphas) else {
            return AdapterParts::default();
        };
        let scales = Scales {
            rank: raw.r,
            ranks,
            alpha: raw.lora_alpha,
            alphas,
            use_rslora: raw.use_rslora,
        };
        self.check_names(&names, &targets);
        let mut weights = BTreeMap::new();
        for (layer, projection) in targets {
            if let Some(lora) = self.read_pair(&scales, &names, layer, projection) {
                weights.insert((layer, projection), lora);
            }
        }
        let mut notes = Vec::new();
        if !names.left_out.is_empty() {
            notes.push(format!(
                "the adapter's deltas of {} for images and sounds are left out, because no text passes through them",
                Count(names.left_out.len(), "module")
            ));
        }
        AdapterParts { weights, head, notes }
    }

    /// Parses the config and checks what does not depend on the tensors.
    fn parse(&mut self, config_bytes: &[u8]) -> Option<RawAdapterConfig> {
        // The second pass over the bytes keeps the order of keys.
        let parsed = serde_json::from_slice::<Map<String, Value>>(config_bytes).and_then(|options| {
            for fault in options::faults(&options) {
                self.config_fault(fault);
            }
            serde_json::from_slice::<RawAdapterConfig>(config_bytes)
        });
        let raw = self.config_result(parsed.map_err(|error| format!("cannot read: {error}")))?;
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
        match raw.task_type.as_deref() {
            None | Some("CAUSAL_LM" | "SEQ_CLS") => {}
            Some(other) => self.config_fault(format!("`task_type` is `{other}`, expected `CAUSAL_LM` or `SEQ_CLS`")),
        }
        if let Some(bias) = raw.bias.as_ref().filter(|bias| *bias != "none") {
            self.config_fault(format!("`bias` is `{bias}`, expected `none`"));
        }
        for module in raw.modules_to_save.iter().flatten() {
            if !HEAD_MODULES.contains(&module.as_str()) {
                self.config_fault(format!(
                    "`modules_to_save` names `{module}`, expected none, or `score` for a classification head: save the \
                     merged model with PEFT's `merge_and_unload`, and point `model.path` to it"
                ));
            }
        }
        if let Some(head) = &self.base.outputs.classifier
            && raw.task_type.as_deref() == Some("CAUSAL_LM")
        {
            let text = format!("`task_type` is `CAUSAL_LM`, but the base model is a `{head}`, expected `SEQ_CLS`");
            self.config_fault(text);
        }
        Some(raw)
    }

    /// Reads the weight of the classification head, which an adapter for `SEQ_CLS` contains.
    fn head(&mut self, raw: &RawAdapterConfig, names: &TensorNames) -> Option<HeadWeight> {
        let is_declared = raw.declares_head();
        let Some(name) = &names.head else {
            // The base may have a head that the adapter leaves as it is.
            if is_declared && self.base.outputs.classifier.is_none() {
                self.file_fault("tensor `base_model.model.score.weight` is missing, expected the classification head");
            }
            return None;
        };
        if !is_declared {
            self.file_fault(format!(
                "tensor `{name}` is a classification head, expected `task_type` `SEQ_CLS` or `score` in `modules_to_save`"
            ));
            return None;
        }
        let outputs = self
            .file
            .shape(name)
            .and_then(<[usize]>::first)
            .copied()
            .unwrap_or_default();
        let weight = self.file.read_f32(name, &[outputs, self.base.hidden_size]);
        self.faults.collect(weight).map(HeadWeight)
    }

    /// Returns the linear layers that `target_modules` and related options select, by PEFT's rules.
    fn targets(&mut self, raw: &RawAdapterConfig, names: &TensorNames) -> Option<Vec<(usize, Projection)>> {
        let Some(included) = &raw.target_modules else {
            self.config_fault("`target_modules` is missing, expected the names of linear layers or a pattern");
            return None;
        };
        let included_matcher = self.matcher("target_modules", included)?;
        let excluded = match &raw.exclude_modules {
            Some(excluded) => Some(self.matcher("exclude_modules", excluded)?),
            None => None,
        };
        let layers = self.layer_filter(raw)?;
        let select = |module: &str| -> Result<bool, String> {
            if let Some(excluded) = &excluded
                && excluded.matches(module)?
            {
                return Ok(false);
            }
            // A whole name selects its module whatever `layers_to_transform` says.
            let is_named =
                matches!(&included_matcher, ModuleMatcher::Names(names) if names.iter().any(|name| name == module));
            Ok(is_named
                || included_matcher.matches(module)?
                    && match &layers {
                        Some(layers) => layers.matches(module)?,
                        None => true,
                    })
        };
        let mut targets = Vec::new();
        for layer in 0..self.base.num_layers() {
            for projection in Projection::ALL {
                if self.config_result(select(&names.module(layer, projection)))? {
                    targets.push((layer, projection));
                }
            }
        }
        self.check_matches(included, excluded.is_some(), names);
        if targets.is_empty() {
            self.config_fault("`target_modules` does not match any linear layer of the base model");
        }
        Some(targets)
    }

    /// Returns the layers that `layers_to_transform` selects. PEFT uses it for lists of names only.
    fn layer_filter(&mut self, raw: &RawAdapterConfig) -> Option<Option<LayerFilter>> {
        let layers = raw.layers_to_transform.as_ref().map(OneOrMany::to_vec);
        let patterns = raw.layers_pattern.as_ref().map(OneOrMany::to_vec).unwrap_or_default();
        let patterns: Vec<String> = patterns.into_iter().filter(|pattern| !pattern.is_empty()).collect();
        let is_pattern = matches!(raw.target_modules, Some(NamesOrPattern::Pattern(_)));
        if is_pattern && (layers.is_some() || raw.layers_pattern.is_some()) {
            self.config_fault(
                "`layers_to_transform` or `layers_pattern` is set beside a pattern in `target_modules`, \
                 expected a list of names",
            );
            return None;
        }
        let Some(layers) = layers else {
            if !patterns.is_empty() {
                self.config_fault("`layers_pattern` is set without `layers_to_transform`, expected both or none");
            }
            return Some(None);
        };
        let count = self.base.num_layers();
        if let Some(&layer) = layers.iter().find(|&&layer| layer >= count) {
            self.config_fault(format!(
                "`layers_to_transform` names layer {layer}, but the base model has {count} layers"
            ));
        }
        // PEFT reads an empty list as no choice.
        if layers.is_empty() {
            return Some(None);
        }
        self.config_result(LayerFilter::new(layers, &patterns)).map(Some)
    }

    /// Returns the names of all modules that a pattern of this adapter can mean: the linear layers of the text decoder,
    /// and the modules that are left out.
    fn modules(&self, names: &TensorNames) -> Vec<String> {
        let layers = 0..self.base.num_layers();
        let text = layers.flat_map(|layer| Projection::ALL.map(|projection| names.module(layer, projection)));
        text.chain(names.left_out.iter().cloned()).collect()
    }

    /// Reports names in `target_modules` that select nothing. With `exclude_modules`, they may be of layers that see
    /// images: PEFT saves `all-linear` as the names of all linear layers, the excluded ones too.
    fn check_matches(&mut self, included: &NamesOrPattern, excludes: bool, names: &TensorNames) {
        let NamesOrPattern::Names(included) = included else {
            return;
        };
        let modules = self.modules(names);
        let selects = |name: &&String| modules.iter().any(|module| ends_with(module, name));
        let is_excluded = |name: &&String| excludes && VISION_LAYERS.contains(&name.as_str());
        let unmatched: Vec<&String> = included
            .iter()
            .filter(|name| !selects(name) && !is_excluded(name))
            .collect();
        for name in unmatched {
            self.config_fault(format!(
                "`target_modules` names `{name}`, expected the name of a linear layer, such as `q_proj`"
            ));
        }
    }

    /// Compiles the keys of `rank_pattern` or `alpha_pattern`. Each key selects at least one of the linear layers.
    fn patterns<T: Copy>(
        &mut self,
        name: &str,
        raw: Option<&InOrder<T>>,
        names: &TensorNames,
    ) -> Option<SuffixPatterns<T>> {
        let modules = self.modules(names);
        let raw = raw.map_or(&[][..], |raw| &raw.0);
        let patterns = match SuffixPatterns::compile(raw, modules.len()) {
            Ok(patterns) => patterns,
            Err(errors) => {
                for error in errors {
                    self.config_fault(format!("`{name}` {error}"));
                }
                return None;
            }
        };
        for key in self.config_result(patterns.without_match(&modules))? {
            let example = names.module(0, Projection::Q);
            self.config_fault(format!(
                "`{name}` has the pattern `{key}`, which matches no linear layer, expected the end of a name such as \
                 `{example}`"
            ));
        }
        Some(patterns)
    }

    fn matcher(&mut self, key: &str, names: &NamesOrPattern) -> Option<ModuleMatcher> {
        match names {
            NamesOrPattern::Names(names) => Some(ModuleMatcher::Names(names.clone())),
            NamesOrPattern::Pattern(pattern)
                if key == "target_modules" && pattern.eq_ignore_ascii_case("all-linear") =>
            {
                Some(ModuleMatcher::All)
            }
            NamesOrPattern::Pattern(pattern) => match full_pattern(pattern) {
                Ok(regex) => Some(ModuleMatcher::Pattern(regex)),
                Err(error) => {
                    self.config_fault(format!("`{key}` is not a supported pattern: {error}"));
                    None
                }
            },
        }
    }

    /// Reports tensors that would not be used.
    fn check_names(&mut self, names: &TensorNames, targets: &[(usize, Projection)]) {
        let layers = self.base.num_layers();
        for (&(layer, projection, _), name) in &names.sides {
            if layer >= layers {
                self.file_fault(format!(
                    "tensor `{name}` is for layer {layer}, but the base model has {layers} layers: \
                     the adapter was made for another base model"
                ));
            } else if !targets.contains(&(layer, projection)) {
                self.file_fault(format!(
                    "tensor `{name}` is for a module that `target_modules` and the options beside it do not select"
                ));
            }
        }
        for name in &names.unknown {
            self.file_fault(format!(
                "tensor `{name}` is not supported, expected `base_model.model.{}layers.N.….lora_A.weight` or `lora_B`",
                names.prefix
            ));
        }
    }

    /// Reads A, B and the scale of one linear layer.
    fn read_pair(
        &mut self,
        scales: &Scales,
        names: &TensorNames,
        layer: usize,
        projection: Projection,
    ) -> Option<LoraWeights> {
        let module = names.module(layer, projection);
        let rank = self.config_result(scales.ranks.first_match(&module))?.or(scales.rank);
        let rank = match rank {
            Some(rank) if (1..=65_536).contains(&rank) => rank,
            rank => {
                self.config_fault(format!(
                    "the rank of `{module}` is {}, expected 1 to 65536",
                    or_missing(rank.as_ref())
                ));
                return None;
            }
        };
        let alpha = self.config_result(scales.alphas.first_match(&module))?.or(scales.alpha);
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
        let a = self.read_side(names, (layer, projection, 'A'), &[rank, inputs]);
        let b = self.read_side(names, (layer, projection, 'B'), &[outputs, rank]);
        Some(LoraWeights { a: a?, b: b?, scale })
    }

    fn read_side(&mut self, names: &TensorNames, side: Side, shape: &[usize]) -> Option<Tensor> {
        self.faults.collect(self.file.read_f32(&names.tensor(side), shape))
    }

    /// Reads the manifest, if there is one.
    pub(super) fn read_manifest(&mut self, path: &Path) -> Option<Manifest> {
        if !path.exists() {
            return None;
        }
        let manifest = read_bytes(path, MAX_JSON_BYTES).and_then(|bytes| {
            serde_json::from_slice::<RawManifest>(&bytes)
                .map_err(|error| Fault::file(path, format!("cannot read: {error}")))
        });
        let manifest = self.faults.collect(manifest)?;
        // Other programs also write files of this name, with fields of other types.
        Some(Manifest {
            path: path.to_owned(),
            version: manifest.version.as_str().map(str::to_owned),
            base: manifest.base.as_str().map(str::to_owned),
        })
    }
}

/// Returns a value in backticks, or "missing".
fn or_missing(value: Option<&impl std::fmt::Display>) -> String {
    value.map_or("missing".to_owned(), |value| format!("`{value}`"))
}

/// Returns whether an adapter's config declares a classification head. A config that cannot be read declares none;
/// reading the adapter reports why.
pub(super) fn declares_head(config: &Path) -> bool {
    let bytes = read_bytes(config, MAX_JSON_BYTES).unwrap_or_default();
    serde_json::from_slice::<RawAdapterConfig>(&bytes).is_ok_and(|raw| raw.declares_head())
}
