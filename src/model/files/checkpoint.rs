//! A Hugging Face folder: `config.json`, `tokenizer.json` and one safetensors file or a sharded set.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::Deserialize;

use super::bundled;
use super::tensor_file::TensorFile;
use crate::config::ModelConfig;
use crate::fault::{Fault, Faults};
use crate::hash::content_hash;
use crate::model::config::GemmaConfig;

/// Larger than any published `config.json` or shard index; smaller than harm.
const MAX_JSON_BYTES: u64 = 16 << 20;
/// Gemma 3's tokenizer.json has 33 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// Where text decoders keep their tensors: alone, or inside a multimodal checkpoint (old and new).
const PREFIXES: [&str; 3] = ["model.", "language_model.model.", "model.language_model."];

/// An opened base model: everything read and checked but the weights, which stay mapped.
pub struct Checkpoint {
    folder: PathBuf,
    config: GemmaConfig,
    tokenizer: Vec<u8>,
    files: Vec<TensorFile>,
    /// Tensor name to index into `files`.
    index: BTreeMap<String, usize>,
    prefix: &'static str,
    config_text: String,
}

impl Checkpoint {
    /// Opens the base that the settings name, or the bundled one where they name none.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn of(model: &ModelConfig) -> Result<Self, Faults> {
        match &model.path {
            Some(folder) => Self::open(folder),
            None => Self::bundled(),
        }
    }

    /// Opens the checkpoint inside this binary.
    ///
    /// # Errors
    /// None in a binary whose tests have passed.
    pub fn bundled() -> Result<Self, Faults> {
        let folder = PathBuf::from(bundled::NAME);
        let file = TensorFile::carried(&folder.join("model.safetensors"), bundled::WEIGHTS)?;
        let (files, index) = single(file);
        Ok(Self {
            config: GemmaConfig::parse(&folder.join("config.json"), bundled::CONFIG)?,
            tokenizer: bundled::TOKENIZER.to_vec(),
            prefix: find_prefix(&folder, &index)?,
            config_text: bundled::CONFIG.to_owned(),
            files,
            index,
            folder,
        })
    }

    /// Opens the folder, reads its config and tokenizer, maps its weights.
    ///
    /// # Errors
    /// Every fault found in the folder's files.
    pub fn open(folder: &Path) -> Result<Self, Faults> {
        if !folder.is_dir() {
            return Err(Fault::file(folder, "is not a folder, expected a checkpoint in Hugging Face layout").into());
        }
        let mut faults = Vec::new();
        let mut keep = |error: Faults| faults.extend(error);
        let config_path = folder.join("config.json");
        let config_text = read_text(&config_path, MAX_JSON_BYTES)
            .map_err(|error| keep(error.into()))
            .ok();
        let config = config_text
            .as_ref()
            .and_then(|text| GemmaConfig::parse(&config_path, text).map_err(&mut keep).ok());
        let tokenizer = read_bytes(&folder.join("tokenizer.json"), MAX_TOKENIZER_BYTES)
            .map_err(|error| keep(error.into()))
            .ok();
        let weights = open_weights(folder).map_err(&mut keep).ok();
        let prefix = weights
            .as_ref()
            .and_then(|(_, index)| find_prefix(folder, index).map_err(|error| keep(error.into())).ok());
        match (config, config_text, tokenizer, weights, prefix) {
            (Some(config), Some(config_text), Some(tokenizer), Some((files, index)), Some(prefix)) => Ok(Self {
                folder: folder.to_owned(),
                config,
                tokenizer,
                files,
                index,
                prefix,
                config_text,
            }),
            _ => Err(faults.into()),
        }
    }

    /// The architecture.
    pub fn config(&self) -> &GemmaConfig {
        &self.config
    }

    /// The text of `config.json`.
    pub fn config_text(&self) -> &str {
        &self.config_text
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The bytes of `tokenizer.json`.
    pub fn tokenizer(&self) -> &[u8] {
        &self.tokenizer
    }

    /// Path of `tokenizer.json`, to be named in errors.
    pub fn tokenizer_path(&self) -> PathBuf {
        self.folder.join("tokenizer.json")
    }

    /// The weight files.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// What stands before `layers.0…` in this file's tensor names.
    pub fn prefix(&self) -> &str {
        self.prefix
    }

    /// Reads `name` (without the prefix) as f32.
    ///
    /// # Errors
    /// As [`TensorFile::read_f32`].
    pub fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Tensor, Fault> {
        let name = format!("{}{name}", self.prefix);
        self.file(&name, shape)?.read_f32(&name, shape)
    }

    /// Reads `name` (without the prefix) in the file's dtype, to a device.
    ///
    /// # Errors
    /// As [`TensorFile::read_f32`].
    pub fn read_as_stored(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, Fault> {
        let name = format!("{}{name}", self.prefix);
        self.file(&name, shape)?.read_as_stored(&name, shape, device)
    }

    /// Reads the unembedding of a checkpoint that does not tie it to the embedding.
    ///
    /// # Errors
    /// As [`TensorFile::read_f32`].
    pub fn read_lm_head(&self, shape: &[usize], device: &Device) -> Result<Tensor, Fault> {
        let name = format!("{}lm_head.weight", self.prefix.trim_end_matches("model."));
        self.file(&name, shape)?.read_as_stored(&name, shape, device)
    }

    /// Bytes of the embedding, and of the unembedding where there is one.
    pub fn embedding_bytes(&self) -> u64 {
        let unembedding = format!("{}lm_head.weight", self.prefix.trim_end_matches("model."));
        let names = [format!("{}embed_tokens.weight", self.prefix), unembedding];
        let bytes = |name: &String| self.files[*self.index.get(name)?].tensor_bytes(name);
        names.iter().filter_map(bytes).sum::<usize>() as u64
    }

    /// Names below `layers.` (without the prefix): what the architecture must account for.
    pub fn layer_tensors(&self) -> impl Iterator<Item = &str> {
        self.index
            .keys()
            .filter_map(|name| name.strip_prefix(self.prefix))
            .filter(|name| name.starts_with("layers."))
    }

    /// Content hash of the base: over the SHA-256 of each of its files, by name.
    ///
    /// An auditor can check it with `sha256sum`.
    pub fn fingerprint(&self) -> String {
        let mut lines: Vec<String> = self
            .files
            .par_iter()
            .map(|file| {
                let name = file
                    .path()
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default();
                format!("{name} {}\n", content_hash(file.bytes()))
            })
            .collect();
        lines.push(format!("config.json {}\n", content_hash(self.config_text.as_bytes())));
        lines.push(format!("tokenizer.json {}\n", content_hash(&self.tokenizer)));
        lines.sort_unstable();
        content_hash(lines.concat().as_bytes())
    }

    fn file(&self, name: &str, shape: &[usize]) -> Result<&TensorFile, Fault> {
        match self.index.get(name) {
            Some(&file) => Ok(&self.files[file]),
            None => Err(Fault::file(
                &self.folder,
                format!("tensor `{name}` is missing, expected {shape:?}"),
            )),
        }
    }
}

/// The shard index that accompanies several safetensors files.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

type Weights = (Vec<TensorFile>, BTreeMap<String, usize>);

fn open_weights(folder: &Path) -> Result<Weights, Faults> {
    let index_path = folder.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Ok(single(TensorFile::open(&folder.join("model.safetensors"))?));
    }
    let text = read_text(&index_path, MAX_JSON_BYTES)?;
    let shards: ShardIndex = serde_json::from_str(&text)
        .map_err(|error| Fault::file(&index_path, format!("cannot read the shard index: {error}")))?;
    let mut names: Vec<&String> = shards.weight_map.values().collect();
    names.sort_unstable();
    names.dedup();
    let mut faults = Vec::new();
    let mut files = Vec::new();
    for name in &names {
        // A shard is a file of this folder: an index must not reach out of it.
        let mut parts = Path::new(name.as_str()).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            faults.push(Fault::file(
                &index_path,
                format!("names the shard `{name}`, expected a plain file name"),
            ));
            continue;
        }
        match TensorFile::open(&folder.join(name.as_str())) {
            Ok(file) => files.push(file),
            Err(fault) => faults.push(fault),
        }
    }
    if !faults.is_empty() {
        return Err(faults.into());
    }
    let mut index = BTreeMap::new();
    for (tensor, shard) in &shards.weight_map {
        // `names` is sorted, and one file was opened for each.
        let file = names.binary_search(&shard).unwrap_or_default();
        if files[file].shape(tensor).is_none() {
            faults.push(Fault::file(
                &index_path,
                format!("says that `{shard}` holds `{tensor}`, but it does not"),
            ));
        }
        index.insert(tensor.clone(), file);
    }
    if faults.is_empty() {
        Ok((files, index))
    } else {
        Err(faults.into())
    }
}

fn single(file: TensorFile) -> Weights {
    let index = file.names().into_iter().map(|name| (name, 0)).collect();
    (vec![file], index)
}

fn find_prefix(folder: &Path, index: &BTreeMap<String, usize>) -> Result<&'static str, Fault> {
    let has = |prefix: &&&str| index.contains_key(&format!("{prefix}embed_tokens.weight"));
    PREFIXES.iter().find(has).copied().ok_or_else(|| {
        Fault::file(
            folder,
            "tensor `model.embed_tokens.weight` is missing: the weights are not a Gemma text decoder's",
        )
    })
}

/// Reads a whole file, but never more than `limit` bytes.
pub(super) fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>, Fault> {
    let file = File::open(path).map_err(|error| Fault::file(path, format!("cannot open: {error}")))?;
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Fault::file(path, format!("cannot read: {error}")))?;
    if bytes.len() as u64 > limit {
        return Err(Fault::file(path, format!("is larger than {limit} bytes")));
    }
    Ok(bytes)
}

/// Reads a whole text file, but never more than `limit` bytes.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<String, Fault> {
    String::from_utf8(read_bytes(path, limit)?)
        .map_err(|error| Fault::file(path, format!("is not UTF-8: {}", error.utf8_error())))
}

pub(super) const MAX_ADAPTER_CONFIG_BYTES: u64 = MAX_JSON_BYTES;
