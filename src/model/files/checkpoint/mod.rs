//! A base model in Hugging Face layout: a folder with `config.json`, `tokenizer.json` or `tokenizer.model`, and the weights
//! in one safetensors file or in shards.

#[cfg(test)]
mod tests;
mod weights;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Tensor};

use super::bundled;
use super::contents::{Contents, HEAD};
use super::tensor_file::TensorFile;
use super::{formats, sentencepiece};
use crate::config::ModelConfig;
use crate::fault::{Fault, Faults};
use crate::hash::content_hash;
use crate::model::config::GemmaConfig;
use crate::model::transfer::upload::{UploadError, WeightUpload};
use weights::{WeightFiles, open_weights, single_file};

/// Larger than any published `config.json` or shard index, and small enough to read into memory.
pub(super) const MAX_JSON_BYTES: u64 = 16 << 20;
/// The `tokenizer.json` of Gemma 3 is 33 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// An open base model. Its config and tokenizer have been read, and its weights are mapped.
pub struct Checkpoint {
    folder: PathBuf,
    config: GemmaConfig,
    tokenizer: TokenizerFile,
    files: Vec<TensorFile>,
    /// Maps each tensor name to an index into `files`.
    index: BTreeMap<String, usize>,
    contents: Contents,
    config_text: String,
}

impl Checkpoint {
    /// Opens the base model at `model.path`, or the bundled one if `model.path` is not set.
    ///
    /// # Errors
    /// Returns every fault found in the files, and a fault if the folder also contains an adapter that the settings do
    /// not name.
    pub fn from_settings(model: &ModelConfig) -> Result<Self, Faults> {
        let Some(folder) = &model.path else {
            return Self::bundled();
        };
        let checkpoint = Self::open(folder)?;
        let adapter = folder.join("adapter_config.json");
        if adapter.exists() && model.adapter.as_ref() != Some(folder) {
            let text = "is in the same folder as the checkpoint, and transformers would apply this adapter: point \
                        `model.adapter` to this folder as well, or move the adapter away if its weights are merged";
            return Err(Fault::file(&adapter, text).into());
        }
        Ok(checkpoint)
    }

    /// Opens the checkpoint that is embedded in this binary.
    ///
    /// # Errors
    /// Returns every fault found. The tests make sure that there are none.
    pub fn bundled() -> Result<Self, Faults> {
        let folder = PathBuf::from(bundled::NAME);
        let file = TensorFile::embedded(&folder.join("model.safetensors"), bundled::WEIGHTS)?;
        let config = GemmaConfig::parse(&folder.join("config.json"), bundled::CONFIG)?;
        let tokenizer = TokenizerFile::json(bundled::TOKENIZER.to_vec());
        Self::new(
            &folder,
            config,
            bundled::CONFIG.to_owned(),
            tokenizer,
            single_file(file),
        )
    }

    /// Opens a folder: reads its config and tokenizer, and maps its weights.
    ///
    /// # Errors
    /// Returns every fault found in the folder's files.
    pub fn open(folder: &Path) -> Result<Self, Faults> {
        if let Some(fault) = formats::not_a_checkpoint(folder) {
            return Err(fault.into());
        }
        if !folder.is_dir() {
            return Err(Fault::file(folder, "is not a folder, expected a checkpoint in Hugging Face layout").into());
        }
        let mut faults = Faults::default();
        let config_path = folder.join("config.json");
        let config_text = faults.collect(read_text(&config_path, MAX_JSON_BYTES));
        let config = config_text
            .as_ref()
            .and_then(|text| faults.collect(GemmaConfig::parse(&config_path, text)));
        let tokenizer = faults.collect(TokenizerFile::read(folder));
        let weights = faults.collect(open_weights(folder));
        match (config, config_text, tokenizer, weights) {
            (Some(config), Some(config_text), Some(tokenizer), Some(weights)) => {
                Self::new(folder, config, config_text, tokenizer, weights)
            }
            _ => Err(faults),
        }
    }

    fn new(
        folder: &Path,
        config: GemmaConfig,
        config_text: String,
        tokenizer: TokenizerFile,
        (files, index): WeightFiles,
    ) -> Result<Self, Faults> {
        let contents = Contents::find(folder, &config, &files, &index)?;
        Ok(Self {
            folder: folder.to_owned(),
            config: GemmaConfig {
                tie_word_embeddings: contents.unembedding.is_none(),
                ..config
            },
            tokenizer,
            files,
            index,
            contents,
            config_text,
        })
    }

    /// Returns the shape and constants of the decoder.
    pub fn config(&self) -> &GemmaConfig {
        &self.config
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the content of `tokenizer.json`, which is converted from `tokenizer.model` if there is only that.
    pub fn tokenizer(&self) -> &[u8] {
        &self.tokenizer.json
    }

    /// Returns the path of the tokenizer's file, for use in errors.
    pub fn tokenizer_path(&self) -> PathBuf {
        self.folder.join(self.tokenizer.name)
    }

    pub(crate) fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// Returns the prefix of tensor names: what comes before `layers.0` and `embed_tokens`.
    pub(crate) fn prefix(&self) -> &str {
        self.contents.prefix
    }

    /// Reads a tensor, whose name is given without the prefix, as f32; see [`TensorFile::read_f32`].
    pub(crate) fn read_f32(&self, name: &str, shape: &[usize]) -> Result<Tensor, Fault> {
        let name = format!("{}{name}", self.contents.prefix);
        self.file(&name, shape)?.read_f32(&name, shape)
    }

    /// Copies tensors of the given shapes, whose names are given without the prefix, to a device, with their rows one
    /// after the other in one tensor. It has the dtype of the file, or f32 if the tensors have several.
    ///
    /// # Errors
    /// Returns an error if a tensor is missing, has another shape or an unsupported dtype, or contains a value that is
    /// not finite, and if the device has too little memory.
    pub(in crate::model) fn read_as_stored(
        &self,
        tensors: &[(&str, [usize; 2])],
        upload: &WeightUpload,
    ) -> Result<Tensor, Fault> {
        let named = |&(name, shape): &(&str, [usize; 2])| (format!("{}{name}", self.contents.prefix), shape);
        let tensors: Vec<(String, [usize; 2])> = tensors.iter().map(named).collect();
        self.stack(&tensors, upload)
    }

    /// Copies the unembedding to a device, or returns `None` if it is the embedding.
    pub(in crate::model) fn read_lm_head(
        &self,
        shape: [usize; 2],
        upload: &WeightUpload,
    ) -> Result<Option<Tensor>, Fault> {
        let Some(name) = self.contents.unembedding else {
            return Ok(None);
        };
        self.stack(&[(name.to_owned(), shape)], upload).map(Some)
    }

    /// Copies tensors, given by their full names, as [`Checkpoint::read_as_stored`] does.
    fn stack(&self, tensors: &[(String, [usize; 2])], upload: &WeightUpload) -> Result<Tensor, Fault> {
        let mut dtypes = Vec::new();
        for (name, shape) in tensors {
            dtypes.push(self.file(name, shape)?.dtype(name, shape)?);
        }
        if dtypes.iter().all(|dtype| *dtype == dtypes[0]) {
            return self.stack_of_dtype(tensors, dtypes[0], upload);
        }
        let converted = tensors.iter().zip(dtypes).map(|(tensor, dtype)| {
            let stored = self.stack_of_dtype(std::slice::from_ref(tensor), dtype, upload)?;
            let fault = |error| {
                self.file(&tensor.0, &tensor.1)
                    .map(|file| file.upload_fault(&tensor.0, error))
            };
            stored
                .to_dtype(DType::F32)
                .or_else(|error| Err(fault(UploadError::Device(error))?))
        });
        let converted = converted.collect::<Result<Vec<Tensor>, Fault>>()?;
        Tensor::cat(&converted, 0).map_err(|error| Fault::file(&self.folder, format!("cannot stack tensors: {error}")))
    }

    /// Copies tensors that all have the given dtype.
    fn stack_of_dtype(
        &self,
        tensors: &[(String, [usize; 2])],
        dtype: DType,
        upload: &WeightUpload,
    ) -> Result<Tensor, Fault> {
        let mut borrowed = Vec::new();
        for (name, shape) in tensors {
            borrowed.push(self.file(name, shape)?.borrow(name, shape)?);
        }
        let parts: Vec<&[u8]> = borrowed.iter().map(|tensor| tensor.data).collect();
        let rows = tensors.iter().map(|(_, [rows, _])| rows).sum();
        let shape = [rows, tensors[0].1[1]];
        upload.stack(&parts, dtype, &shape).or_else(|error| {
            let index = match &error {
                UploadError::NotFinite(index) => *index,
                UploadError::Device(_) => 0,
            };
            let (name, shape) = &tensors[index];
            Err(self.file(name, shape)?.upload_fault(name, error))
        })
    }

    /// Reads the weight (outputs, hidden) of the classification head as f32, or returns `None` if there is no head.
    ///
    /// # Errors
    /// Fails like [`TensorFile::read_f32`].
    pub(crate) fn read_head(&self) -> Result<Option<Tensor>, Fault> {
        if self.config.outputs.classifier.is_none() {
            return Ok(None);
        }
        let hidden = self.config.hidden_size;
        let file = self.file(HEAD, &[2, hidden])?;
        let outputs = file.shape(HEAD).and_then(<[usize]>::first).copied().unwrap_or_default();
        file.read_f32(HEAD, &[outputs, hidden]).map(Some)
    }

    /// Returns remarks for the operator, such as parts that are left out.
    pub fn notes(&self) -> &[String] {
        &self.contents.notes
    }

    /// Returns the size of the embedding in bytes, plus that of the unembedding if the checkpoint has its own.
    pub(crate) fn embedding_bytes(&self) -> u64 {
        let embedding = format!("{}embed_tokens.weight", self.contents.prefix);
        let names = [Some(embedding.as_str()), self.contents.unembedding];
        let bytes = |name: &str| self.files[*self.index.get(name)?].tensor_bytes(name);
        names.into_iter().flatten().filter_map(bytes).sum::<usize>() as u64
    }

    /// Returns the names, without the prefix, of all tensors that belong to layers.
    pub(crate) fn layer_tensors(&self) -> impl Iterator<Item = &str> {
        self.index
            .keys()
            .filter_map(|name| name.strip_prefix(self.contents.prefix))
            .filter(|name| name.starts_with("layers."))
    }

    /// Returns the content hash of the base model: the hash of a sorted list of its file names and their SHA-256.
    ///
    /// It can be recomputed with `sha256sum`.
    pub fn fingerprint(&self) -> String {
        let line = |file: &TensorFile| {
            let name = file
                .path()
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            format!("{name} {}\n", file.content_hash())
        };
        // The hash of one file cannot be computed in parallel. Threads of their own leave the pool to others, who load
        // the weights in the meantime.
        let next = AtomicUsize::new(0);
        let hash_files = || {
            let files = std::iter::from_fn(|| self.files.get(next.fetch_add(1, Ordering::Relaxed)));
            files.map(line).collect::<Vec<String>>()
        };
        let threads = self
            .files
            .len()
            .min(std::thread::available_parallelism().map_or(1, usize::from));
        let mut lines: Vec<String> = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(hash_files)).collect();
            let mut lines = hash_files();
            for other in others {
                lines.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            lines
        });
        lines.push(format!("config.json {}\n", content_hash(self.config_text.as_bytes())));
        let tokenizer = self.tokenizer.hash.clone();
        let tokenizer = tokenizer.unwrap_or_else(|| content_hash(&self.tokenizer.json));
        lines.push(format!("{} {tokenizer}\n", self.tokenizer.name));
        lines.sort_unstable();
        content_hash(lines.concat().as_bytes())
    }

    /// Returns a fault for each weight file that has been written to since the checkpoint was opened. If there is none,
    /// the fingerprint and all tensors that were read belong together.
    pub(crate) fn require_unchanged(&self) -> Result<(), Faults> {
        let mut faults = Faults::default();
        for fault in self.files.iter().filter_map(TensorFile::changed) {
            faults.push(fault);
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
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

/// A tokenizer in the format of `tokenizer.json`, and the file that it was read from.
struct TokenizerFile {
    name: &'static str,
    /// The content hash of that file, if its content is not `json`.
    hash: Option<String>,
    json: Vec<u8>,
}

impl TokenizerFile {
    fn json(json: Vec<u8>) -> Self {
        Self {
            name: "tokenizer.json",
            hash: None,
            json,
        }
    }

    /// Reads `tokenizer.json`, or `tokenizer.model` if there is only that.
    fn read(folder: &Path) -> Result<Self, Fault> {
        const MODEL: &str = "tokenizer.model";
        let (json, model) = (folder.join("tokenizer.json"), folder.join(MODEL));
        if json.exists() || !model.exists() {
            return read_bytes(&json, MAX_TOKENIZER_BYTES).map(Self::json);
        }
        let bytes = read_bytes(&model, MAX_TOKENIZER_BYTES)?;
        Ok(Self {
            name: MODEL,
            hash: Some(content_hash(&bytes)),
            json: sentencepiece::to_tokenizer_json(&model, &bytes)?,
        })
    }
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
    match formats::pointer_fault(path, &bytes) {
        Some(fault) => Err(fault),
        None => Ok(bytes),
    }
}

/// Reads a whole UTF-8 file, or returns a fault if it has more than `limit` bytes.
fn read_text(path: &Path, limit: u64) -> Result<String, Fault> {
    String::from_utf8(read_bytes(path, limit)?)
        .map_err(|error| Fault::file(path, format!("is not UTF-8: {}", error.utf8_error())))
}
