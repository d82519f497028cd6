//! Formats that users may have but that moderatord does not read. They are recognised by their first bytes or their name,
//! so that the error can say what was found and how to convert it. None of them is parsed; pickles could run code.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::fault::Fault;

/// What a file that cannot be read turns out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    GitLfsPointer,
    Gguf,
    Hdf5,
    /// A pickle, alone or in the zip archive that `torch.save` writes.
    Pickle,
    Zip,
}

impl Format {
    /// Recognises the beginning of a file's content.
    fn of(bytes: &[u8], path: &Path) -> Option<Self> {
        let extension = path
            .extension()
            .and_then(|extension| extension.to_str())
            .unwrap_or_default();
        match bytes {
            _ if bytes.starts_with(b"version https://git-lfs") => Some(Self::GitLfsPointer),
            _ if bytes.starts_with(b"GGUF") => Some(Self::Gguf),
            _ if bytes.starts_with(b"\x89HDF\r\n\x1a\n") => Some(Self::Hdf5),
            _ if bytes.starts_with(b"PK\x03\x04") && extension == "keras" => Some(Self::Zip),
            _ if bytes.starts_with(b"PK\x03\x04") => Some(Self::Pickle),
            // A pickle begins with its protocol; `torch.save` has written protocol 2 before it wrote archives.
            [0x80, 2..=5, ..] => Some(Self::Pickle),
            _ => match extension {
                "gguf" => Some(Self::Gguf),
                "h5" | "hdf5" => Some(Self::Hdf5),
                "keras" => Some(Self::Zip),
                "bin" | "pt" | "pth" | "ckpt" => Some(Self::Pickle),
                _ => None,
            },
        }
    }

    /// Says what the file is and what to do, for a checkpoint. The conversion of a pickle keeps the architecture, because
    /// transformers drops a classification head with no more than a warning if it loads another one.
    fn checkpoint_advice(self, path: &Path) -> String {
        match self {
            Self::GitLfsPointer => LFS.to_owned(),
            Self::Gguf => "is a GGUF file, expected safetensors: GGUF weights are quantised or rearranged, so point \
                           `model.path` to the checkpoint that it was converted from"
                .to_owned(),
            Self::Hdf5 | Self::Zip => {
                "holds weights of Keras, expected safetensors: load the model in KerasHub and write \
                                       it with `model.export_to_transformers(FOLDER)`"
                    .to_owned()
            }
            Self::Pickle => format!(
                "is a pickle, expected safetensors: pickles can run code and are not read. Convert it where you trust it, \
                 and point `model.path` to the new folder: python -c \"import transformers as t; d = '{0}'; n = d + \
                 '-safetensors'; c = t.AutoConfig.from_pretrained(d); getattr(t, \
                 c.architectures[0]).from_pretrained(d, dtype='auto').save_pretrained(n); \
                 t.AutoTokenizer.from_pretrained(d).save_pretrained(n)\"",
                folder_of(path).display()
            ),
        }
    }

    /// Says what the file is and what to do, for an adapter.
    fn adapter_advice(self, path: &Path) -> String {
        match self {
            Self::GitLfsPointer => LFS.to_owned(),
            Self::Gguf => {
                "is a GGUF file, expected a PEFT adapter in safetensors: point `model.adapter` to the adapter that \
                           it was converted from"
                    .to_owned()
            }
            Self::Hdf5 | Self::Zip => {
                "holds LoRA weights of Keras, expected a PEFT adapter in safetensors: load them in KerasHub \
                 (`model.backbone.load_lora_weights(FILE)`), write the merged model with \
                 `model.export_to_transformers(FOLDER)` and point `model.path` to it"
                    .to_owned()
            }
            Self::Pickle => format!(
                "is a pickle, expected safetensors: pickles can run code and are not read. Convert it: python -c \"import \
                 torch, safetensors.torch as s; s.save_file({{k: v.contiguous().clone() for k, v in torch.load('{}', \
                 map_location='cpu', weights_only=True).items()}}, '{}')\"",
                path.display(),
                folder_of(path).join("adapter_model.safetensors").display()
            ),
        }
    }
}

const LFS: &str = "is a pointer of Git LFS, expected the file itself: run `git lfs pull` in its repository";

fn folder_of(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

/// Returns a fault if the content is a pointer of Git LFS instead of the file that it stands for.
pub(super) fn pointer_fault(path: &Path, bytes: &[u8]) -> Option<Fault> {
    (Format::of(bytes, path) == Some(Format::GitLfsPointer)).then(|| Fault::file(path, LFS))
}

/// Explains the content of a file that is not a safetensors file, if its format is known.
pub(super) fn not_safetensors(path: &Path, bytes: &[u8]) -> Option<Fault> {
    let format = Format::of(bytes, path)?;
    let is_adapter = path
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("adapter"));
    let advice = match is_adapter {
        true => format.adapter_advice(path),
        false => format.checkpoint_advice(path),
    };
    Some(Fault::file(path, advice))
}

/// Explains why there is no checkpoint at this path, if what is there is known.
pub(super) fn not_a_checkpoint(path: &Path) -> Option<Fault> {
    if path.is_file() {
        return known_file(path).map(|format| Fault::file(path, format.checkpoint_advice(path)));
    }
    if path.join("model.safetensors").exists() || path.join("model.safetensors.index.json").exists() {
        return None;
    }
    if path.join("adapter_config.json").exists() {
        let text = "contains a PEFT adapter, expected a checkpoint: point `model.adapter` to it, and `model.path` to its \
                    base model";
        return Some(Fault::file(path, text));
    }
    let files = || files_of(path).filter(|file| file.file_name().is_some_and(|name| name != "training_args.bin"));
    let of_format = |file: PathBuf| Some(Fault::file(&file, known_file(&file)?.checkpoint_advice(&file)));
    files()
        .find_map(of_format)
        .or_else(|| training_checkpoints(path, "model.path"))
}

/// Explains why there is no adapter at this path, if what is there is known.
pub(super) fn not_an_adapter(path: &Path) -> Option<Fault> {
    if path.is_file() {
        return known_file(path).map(|format| Fault::file(path, format.adapter_advice(path)));
    }
    if path.join("adapter_model.safetensors").exists() {
        return None;
    }
    let is_adapter = |file: &PathBuf| {
        let name = file
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        name.starts_with("adapter_model") || name.ends_with(".lora.h5") || name.ends_with(".gguf")
    };
    let of_format = |file: PathBuf| Some(Fault::file(&file, known_file(&file)?.adapter_advice(&file)));
    if let Some(fault) = files_of(path).filter(is_adapter).find_map(of_format) {
        return Some(fault);
    }
    if path.join("adapter_config.json").exists() {
        return None;
    }
    if path.join("config.json").exists() {
        let text = "contains a whole checkpoint, expected a PEFT adapter: point `model.path` to it, without an adapter";
        return Some(Fault::file(path, text));
    }
    training_checkpoints(path, "model.adapter")
}

/// Explains that a folder contains what a trainer saved along the way.
fn training_checkpoints(folder: &Path, setting: &str) -> Option<Fault> {
    let step = |path: &PathBuf| {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix("checkpoint-")?.parse::<u64>().ok()
    };
    let newest = entries(folder)
        .filter(|path| path.is_dir())
        .filter_map(|path| Some((step(&path)?, path)))
        .max()?;
    let text = format!(
        "contains the checkpoints of a training run and no model: point `{setting}` to one of them, such as `{}`",
        newest.1.display()
    );
    Some(Fault::file(folder, text))
}

fn known_file(path: &Path) -> Option<Format> {
    let mut beginning = Vec::new();
    File::open(path).ok()?.take(64).read_to_end(&mut beginning).ok()?;
    Format::of(&beginning, path)
}

/// Returns the files of a folder in the order of their names.
fn files_of(folder: &Path) -> impl Iterator<Item = PathBuf> {
    entries(folder).filter(|path| path.is_file())
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort_unstable();
    paths.into_iter()
}
