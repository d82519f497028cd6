//! Which part of a model each tensor of a file belongs to. A tensor that the scorer does not use is a fault, unless it is
//! known not to affect the score of a text.

use std::collections::BTreeMap;
use std::path::Path;

use super::tensor_file::TensorFile;
use crate::fault::{Fault, Faults};
use crate::model::config::GemmaConfig;
use crate::plural::Count;

/// The prefixes of the decoder's tensor names in text-only checkpoints, in old and new multimodal ones, and in those of
/// a bare multimodal model and a bare decoder.
const PREFIXES: [&str; 5] = [
    "model.",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "",
];

/// The modules that see images or sounds. A text does not pass through them.
const OTHER_MODALITIES: [&str; 6] = [
    "vision_tower",
    "vision_model",
    "multi_modal_projector",
    "audio_tower",
    "embed_vision",
    "embed_audio",
];

/// The names of an unembedding of its own.
const UNEMBEDDINGS: [&str; 2] = ["lm_head.weight", "language_model.lm_head.weight"];

/// The name of a classification head.
pub(super) const HEAD: &str = "score.weight";

/// The largest number of unexpected tensors that a fault names. A file has room for millions.
const MOST_NAMED: usize = 4;

/// Returns whether a tensor or module belongs to the vision or audio part of a multimodal model.
pub(super) fn is_other_modality(name: &str) -> bool {
    let name = name.strip_prefix("model.").unwrap_or(name);
    let module = name.split('.').next().unwrap_or(name);
    OTHER_MODALITIES.contains(&module)
}

/// The linear layers that only the vision part of a multimodal model has (transformers' `SiglipVisionModel`).
pub(super) const VISION_LAYERS: [&str; 3] = ["fc1", "fc2", "out_proj"];

/// The parts of a checkpoint, apart from the layers of its decoder.
pub(super) struct Contents {
    /// What comes before `layers.0` and `embed_tokens` in the names of the decoder's tensors.
    pub(super) prefix: &'static str,
    /// The name of the unembedding, if it is not the embedding.
    pub(super) unembedding: Option<&'static str>,
    /// Remarks for the operator.
    pub(super) notes: Vec<String>,
}

impl Contents {
    /// Finds the parts of a checkpoint with this config. `index` maps each tensor's name to one of the `files`.
    ///
    /// # Errors
    /// Returns a fault if there is no decoder, if an unembedding or head is missing, and for tensors of no known part.
    pub(super) fn find(
        folder: &Path,
        config: &GemmaConfig,
        files: &[TensorFile],
        index: &BTreeMap<String, usize>,
    ) -> Result<Self, Faults> {
        let prefix = find_prefix(folder, index)?;
        let mut faults = Faults::default();
        let (mut left_out, mut unexpected, mut unembeddings) = (0, Vec::new(), Vec::new());
        let is_classifier = config.outputs.classifier.is_some();
        for name in index.keys() {
            let unembedding = UNEMBEDDINGS.into_iter().find(|unembedding| unembedding == name);
            match unembedding {
                _ if name.strip_prefix(prefix).is_some_and(is_of_decoder) => {}
                Some(unembedding) if !is_classifier => unembeddings.push(unembedding),
                _ if is_classifier && name == HEAD => {}
                _ if is_other_modality(name) => left_out += 1,
                _ => unexpected.push(name.as_str()),
            }
        }
        faults.extend(unexpected_fault(folder, config, &unexpected));
        if let Some(architecture) = &config.outputs.classifier
            && !index.contains_key(HEAD)
        {
            let text = format!("tensor `{HEAD}` is missing, expected the head of a `{architecture}`");
            faults.push(Fault::file(folder, text));
        }
        let mut notes = Vec::new();
        if left_out > 0 {
            notes.push(format!(
                "{} for images and sounds left out, because no text passes through them",
                Count(left_out, "tensor")
            ));
        }
        let unembedding = match unembeddings[..] {
            [] if config.tie_word_embeddings || is_classifier => None,
            [] => {
                let text = "tensor `lm_head.weight` is missing, expected the unembedding, because `tie_word_embeddings` is \
                            false";
                faults.push(Fault::file(folder, text));
                None
            }
            [name] if is_same(files, index, name, &format!("{prefix}embed_tokens.weight")) => None,
            [name] => {
                // transformers does not tie two tensors that differ, whatever the config says.
                if config.tie_word_embeddings {
                    notes.push(format!(
                        "`{name}` differs from the embedding and is used, although `tie_word_embeddings` is true"
                    ));
                }
                Some(name)
            }
            [first, second, ..] => {
                let text = format!("holds both `{first}` and `{second}`, expected one unembedding");
                faults.push(Fault::file(folder, text));
                None
            }
        };
        if faults.is_empty() {
            Ok(Self {
                prefix,
                unembedding,
                notes,
            })
        } else {
            Err(faults)
        }
    }
}

/// Returns whether a tensor, whose name is given without the prefix, is part of the decoder. Those of layers are checked
/// when the layers are loaded.
fn is_of_decoder(name: &str) -> bool {
    // Old checkpoints contain the rotary frequencies, which also follow from the config.
    matches!(
        name,
        "embed_tokens.weight" | "norm.weight" | "rotary_emb.inv_freq" | "rotary_emb_local.inv_freq"
    ) || name.starts_with("layers.")
}

fn unexpected_fault(folder: &Path, config: &GemmaConfig, names: &[&str]) -> Option<Fault> {
    let first = names.first()?;
    let named: Vec<String> = names.iter().take(MOST_NAMED).map(|name| format!("`{name}`")).collect();
    let more = names.len() - named.len();
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    let architecture = match &config.outputs.classifier {
        Some(name) => format!("a `{name}`"),
        None => format!("a `{}` for causal language modelling", config.family.model_type()),
    };
    let hint = match (*first, &config.outputs.classifier) {
        (HEAD, None) => {
            "; if this is the head of a classifier, name its class in `architectures` of config.json, such as \
             `Gemma3TextForSequenceClassification`"
        }
        _ => "",
    };
    let (tensors, are) = match names {
        [_] => ("tensor", "is"),
        _ => ("tensors", "are"),
    };
    Some(Fault::file(
        folder,
        format!(
            "{tensors} {}{more} {are} not part of {architecture}, and would be ignored{hint}",
            named.join(", ")
        ),
    ))
}

/// Returns whether two tensors have the same type, shape and bytes.
fn is_same(files: &[TensorFile], index: &BTreeMap<String, usize>, left: &str, right: &str) -> bool {
    let content = |name: &str| files[*index.get(name)?].content_of(name);
    match (content(left), content(right)) {
        (Some(left), Some(right)) => left == right,
        _ => false,
    }
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
