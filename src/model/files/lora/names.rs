//! PEFT's names of an adapter's tensors.

use std::collections::BTreeMap;

use crate::config::Projection;
use crate::model::files::contents::is_other_modality;

/// The prefixes of a text layer's module in the models that PEFT wraps: a text decoder with its unembedding or head, new
/// and old multimodal models, and bare decoders.
const TEXT_PREFIXES: [&str; 5] = [
    "model.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
    "",
];

/// What PEFT puts before the name of a module.
const WRAPPER: &str = "base_model.model.";

/// One side of the delta of a linear layer.
pub(super) type Side = (usize, Projection, char);

/// The names in an adapter's file, by what they belong to.
#[derive(Debug, Default)]
pub(super) struct TensorNames {
    /// What comes before `layers.` in the names of the text layers' modules. Patterns are matched with such names.
    pub(super) prefix: &'static str,
    /// The names by layer, projection and side (A or B).
    pub(super) sides: BTreeMap<Side, String>,
    /// The name of a classification head's weight.
    pub(super) head: Option<String>,
    /// The modules that see images or sounds, by their names in the model.
    pub(super) left_out: Vec<String>,
    /// The names of all other tensors.
    pub(super) unknown: Vec<String>,
}

impl TensorNames {
    /// Sorts names, which come in any order.
    pub(super) fn sort(mut names: Vec<String>) -> Self {
        names.sort_unstable();
        let mut sorted = Self::default();
        let mut prefix = None;
        for name in names {
            let module = name.strip_prefix(WRAPPER);
            match module.and_then(parse) {
                // The modules of one adapter belong to one model.
                Some((found, side)) if prefix.is_none_or(|prefix| prefix == found) => {
                    prefix = Some(found);
                    sorted.sides.insert(side, name);
                }
                _ if module == Some("score.weight") => sorted.head = Some(name),
                _ if module.is_some_and(is_other_modality) => {
                    let module = module.unwrap_or_default();
                    let module = module.split_once(".lora_").map_or(module, |(module, _)| module);
                    sorted.left_out.push(module.to_owned());
                }
                _ => sorted.unknown.push(name),
            }
        }
        sorted.left_out.dedup();
        sorted.prefix = prefix.unwrap_or(TEXT_PREFIXES[0]);
        sorted
    }

    /// Returns the name of a linear layer's module.
    pub(super) fn module(&self, layer: usize, projection: Projection) -> String {
        format!("{}layers.{layer}.{}", self.prefix, projection.path())
    }

    /// Returns the name of a tensor, whether it is in the file or not.
    pub(super) fn tensor(&self, (layer, projection, side): Side) -> String {
        let default = || format!("{WRAPPER}{}.lora_{side}.weight", self.module(layer, projection));
        self.sides
            .get(&(layer, projection, side))
            .cloned()
            .unwrap_or_else(default)
    }
}

/// Parses the name of a tensor in the model: `model.layers.3.self_attn.q_proj.lora_A.weight` gives `model.` and
/// (3, Q, 'A').
fn parse(name: &str) -> Option<(&'static str, Side)> {
    let (prefix, rest) = TEXT_PREFIXES
        .into_iter()
        .find_map(|prefix| Some((prefix, name.strip_prefix(prefix)?.strip_prefix("layers.")?)))?;
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
    Some((prefix, (layer.parse().ok()?, projection, side)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_by_what_they_belong_to() {
        let sort = |name: &str| TensorNames::sort(vec![name.to_owned()]);
        for prefix in TEXT_PREFIXES {
            let name = format!("base_model.model.{prefix}layers.12.mlp.down_proj.lora_B.weight");
            let names = sort(&name);
            assert_eq!(names.prefix, prefix);
            assert_eq!(
                names.sides,
                BTreeMap::from([((12, Projection::Down, 'B'), name.clone())])
            );
            assert_eq!(names.tensor((12, Projection::Down, 'B')), name);
        }
        for name in [
            "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "base_model.model.multi_modal_projector.linear.lora_B.weight",
        ] {
            assert_eq!(sort(name).left_out.len(), 1, "{name}");
        }
        assert!(sort("base_model.model.score.weight").head.is_some());
        for other in [
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
            "base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "base_model.model.lm_head.weight",
            "base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        ] {
            assert_eq!(sort(other).unknown, [other]);
        }
    }

    #[test]
    fn modules_of_two_models_are_not_mixed() {
        let names = ["model.layers.0", "model.language_model.layers.0"]
            .map(|module| format!("base_model.model.{module}.self_attn.q_proj.lora_A.weight"));
        let sorted = TensorNames::sort(names.to_vec());
        assert_eq!((sorted.sides.len(), sorted.unknown.len()), (1, 1));
    }
}
