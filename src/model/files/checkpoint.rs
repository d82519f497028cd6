//! A base model in Hugging Face layout: a folder with `config.json`, `tokenizer.json`, and the weights in one
//! safetensors file or in shards.

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

/// Larger than any published `config.json` or shard index, and small enough to read into memory.
pub(super) const MAX_JSON_BYTES: u64 = 16 << 20;
/// The `tokenizer.json` of Gemma 3 is 33 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;
/// The prefixes of the decoder's tensor names in text-only checkpoints, and in old and new multimodal ones.
const PREFIXES: [&str; 3] = ["model.", "language_model.model.", "model.language_model."];

/// An open base model. Its config and tokenizer have been read, and its weights are mapped.
pub struct Checkpoint {
    folder: PathBuf,
    config: GemmaConfig,
    tokenizer: Vec<u8>,
    files: Vec<TensorFile>,
    /// Maps each tensor name to an index into `files`.
    index: BTreeMap<String, usize>,
    prefix: &'static str,
    config_text: String,
}

impl Checkpoint {
    /// Opens the base model at `model.path`, or the bundled one if `model.path` is not set.
    ///
    /// # Errors
    /// Returns every fault found in the files.
    pub fn from_settings(model: &ModelConfig) -> Result<Self, Faults> {
        match &model.path {
            Some(folder) => Self::open(folder),
            None => Self::bundled(),
        }
    }

    /// Opens the checkpoint that is embedded in this binary.
    ///
    /// # Errors
    /// Returns every fault found. The tests make sure that there are none.
    pub fn bundled() -> Result<Self, Faults> {
        let folder = PathBuf::from(bundled::NAME);
        let file = TensorFile::embedded(&folder.join("model.safetensors"), bundled::WEIGHTS)?;
        let (files, index) = single_file(file);
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

    /// Opens a folder: reads its config and tokenizer, and maps its weights.
    ///
    /// # Errors
    /// Returns every fault found in the folder's files.
    pub fn open(folder: &Path) -> Result<Self, Faults> {
        if !folder.is_dir() {
            return Err(Fault::file(folder, "is not a folder, expected a checkpoint in Hugging Face layout").into());
        }
        let mut faults = Faults::default();
        let config_path = folder.join("config.json");
        let config_text = faults.collect(read_text(&config_path, MAX_JSON_BYTES));
        let config = config_text
            .as_ref()
            .and_then(|text| faults.collect(GemmaConfig::parse(&config_path, text)));
        let tokenizer = faults.collect(read_bytes(&folder.join("tokenizer.json"), MAX_TOKENIZER_BYTES));
        let weights = faults.collect(open_weights(folder));
        let prefix = weights
            .as_ref()
            .and_then(|(_, index)| faults.collect(find_prefix(folder, index)));
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
            _ => Err(faults),
        }
    }

    /// Returns the shape and constants of the decoder.
    pub fn config(&self) -> &GemmaConfig {
        &self.config
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the bytes of `tokenizer.json`.
    pub fn tokenizer(&self) -> &[u8] {
        &self.tokenizer
    }

    /// Returns the path of `tokenizer.json`, for use in errors.
    pub fn tokenizer_path(&self) -> PathBuf {
        self.folder.join("tokenizer.json")
    }

    pub(crate) fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// Returns the prefix of tensor names: what comes before `layers.0` and `embed_tokens`.
    pub(crate) fn prefix(&self) -> &str {
        self.prefix
    }

    /// Reads a tensor, whose name is given without the prefix, as f32; see [`TensorFile::read_f32`].
    pub(crate) fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Tensor, Fault> {
        let name = format!("{}{name}", self.prefix);
        self.file(&name, shape)?.read_f32(&name, shape)
    }

    /// Copies a tensor, whose name is given without the prefix, to a device; see [`TensorFile::read_as_stored`].
    pub(crate) fn read_as_stored(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, Fault> {
        let name = format!("{}{name}", self.prefix);
        self.file(&name, shape)?.read_as_stored(&name, shape, device)
    }

    /// Copies the unembedding to a device. The checkpoint must have one of its own, which is not tied to the embedding.
    pub(crate) fn read_lm_head(&self, shape: &[usize], device: &Device) -> Result<Tensor, Fault> {
        let name = self.lm_head_name();
        self.file(&name, shape)?.read_as_stored(&name, shape, device)
    }

    /// Returns the size of the embedding in bytes, plus that of the unembedding if the checkpoint has its own.
    pub(crate) fn embedding_bytes(&self) -> u64 {
        let names = [format!("{}embed_tokens.weight", self.prefix), self.lm_head_name()];
        let bytes = |name: &String| self.files[*self.index.get(name)?].tensor_bytes(name);
        names.iter().filter_map(bytes).sum::<usize>() as u64
    }

    /// Returns the names, without the prefix, of all tensors that belong to layers.
    pub(crate) fn layer_tensors(&self) -> impl Iterator<Item = &str> {
        self.index
            .keys()
            .filter_map(|name| name.strip_prefix(self.prefix))
            .filter(|name| name.starts_with("layers."))
    }

    /// Returns the content hash of the base model: the hash of a sorted list of its file names and their SHA-256.
    ///
    /// It can be recomputed with `sha256sum`.
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
                format!("{name} {}\n", file.content_hash())
            })
            .collect();
        lines.push(format!("config.json {}\n", content_hash(self.config_text.as_bytes())));
        lines.push(format!("tokenizer.json {}\n", content_hash(&self.tokenizer)));
        lines.sort_unstable();
        content_hash(lines.concat().as_bytes())
    }

    /// Returns the name of the unembedding's tensor, which is not part of the decoder and has a shorter prefix.
    fn lm_head_name(&self) -> String {
        format!("{}lm_head.weight", self.prefix.trim_end_matches("model."))
    }

    /// Returns the file that contains the tensor with the given full name. The shape appears only in the error.
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

/// The file that maps tensor names to shards.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// The weight files, and for each tensor name the index of its file.
type WeightFiles = (Vec<TensorFile>, BTreeMap<String, usize>);

fn open_weights(folder: &Path) -> Result<WeightFiles, Faults> {
    let index_path = folder.join("model.safetensors.index.json");
    if !index_path.exists() {
        return Ok(single_file(TensorFile::open(&folder.join("model.safetensors"))?));
    }
    let text = read_text(&index_path, MAX_JSON_BYTES)?;
    let shards: ShardIndex = serde_json::from_str(&text)
        .map_err(|error| Fault::file(&index_path, format!("cannot read the shard index: {error}")))?;
    let mut names: Vec<&String> = shards.weight_map.values().collect();
    names.sort_unstable();
    names.dedup();
    let mut faults = Faults::default();
    let mut files = Vec::new();
    for name in &names {
        // A shard must be a file of this folder, so that an index cannot make us read other files.
        let mut parts = Path::new(name.as_str()).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            faults.push(Fault::file(
                &index_path,
                format!("names the shard `{name}`, expected a plain file name"),
            ));
            continue;
        }
        files.extend(faults.collect(TensorFile::open(&folder.join(name.as_str()))));
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let mut index = BTreeMap::new();
    for (tensor, shard) in &shards.weight_map {
        // `names` is sorted, and `files` has one file for each name.
        let file = names.binary_search(&shard).unwrap_or_default();
        if files[file].shape(tensor).is_none() {
            faults.push(Fault::file(
                &index_path,
                format!("lists tensor `{tensor}` for `{shard}`, which does not contain it"),
            ));
        }
        index.insert(tensor.clone(), file);
    }
    if faults.is_empty() {
        Ok((files, index))
    } else {
        Err(faults)
    }
}

fn single_file(file: TensorFile) -> WeightFiles {
    let index = file.names().into_iter().map(|name| (name, 0)).collect();
    (vec![file], index)
}

fn find_prefix(folder: &Path, index: &BTreeMap<String, usize>) -> Result<&'static str, Fault> {
    let has = |prefix: &&&str| index.contains_key(&format!("{prefix}embed_tokens.weight"));
    PREFIXES.iter().find(has).copied().ok_or_else(|| {
        Fault::file(
            folder,
            "tensor `model.embed_tokens.weight` is missing: these are not the weights of a Gemma text decoder",
        )
    })
}

/// Reads a whole file, or returns a fault if it has more than `limit` bytes.
pub(super) fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>, Fault> {
    let file = File::open(path).map_err(|error| Fault::file(path, format!("cannot open: {error}")))?;
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Fault::file(path, format!("cannot read: {error}")))?;
    if bytes.len() as u64 > limit {
        return Err(Fault::file(
            path,
            format!("is too large, expected at most {limit} bytes"),
        ));
    }
    Ok(bytes)
}

/// Reads a whole UTF-8 file, or returns a fault if it has more than `limit` bytes.
fn read_text(path: &Path, limit: u64) -> Result<String, Fault> {
    String::from_utf8(read_bytes(path, limit)?)
        .map_err(|error| Fault::file(path, format!("is not UTF-8: {}", error.utf8_error())))
}
