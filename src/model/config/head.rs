//! What a `config.json` says about the outputs of the model: `architectures`, and the outputs of a classification head.

use serde_json::{Map, Value};

use super::fields::{Fields, shown};

/// The last part of the architectures whose margin is the difference of two logits of the vocabulary. The bare decoder
/// (`Gemma3TextModel`) has the embedding for its unembedding, as transformers loads it.
const LANGUAGE_MODELS: [&str; 3] = ["ForCausalLM", "ForConditionalGeneration", "Model"];
const CLASSIFIER: &str = "ForSequenceClassification";

/// The outputs of a classification head, as far as a `config.json` describes them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outputs {
    /// The architecture if it has a classification head, such as `Gemma3TextForSequenceClassification`.
    pub classifier: Option<String>,
    /// The names of the outputs in order (`id2label`), or `None` if the file does not name them or only numbers them.
    pub names: Option<Vec<String>>,
    /// The loss that the head was trained with (`problem_type`), if the file names it.
    pub problem_type: Option<String>,
}

impl Fields<'_> {
    /// Reads the description of the outputs, which is at the top level of the file.
    pub(super) fn outputs(&mut self) -> Outputs {
        let architectures: Vec<&Value> = match self.set("architectures") {
            None => Vec::new(),
            Some(Value::Array(names)) => names.iter().collect(),
            Some(other) => vec![other],
        };
        let mut outputs = Outputs::default();
        for architecture in architectures {
            let name = architecture.as_str().unwrap_or_default();
            let ends = |end: &str| name.starts_with("Gemma") && name.ends_with(end);
            if ends(CLASSIFIER) {
                outputs.classifier = Some(name.to_owned());
            } else if !LANGUAGE_MODELS.iter().any(|end| ends(end)) {
                self.fault(format!(
                    "`architectures` names {}, expected a Gemma for causal language modelling or for sequence \
                     classification",
                    shown(architecture)
                ));
            }
        }
        outputs.names = self.output_names();
        outputs.problem_type = self.set("problem_type").and_then(Value::as_str).map(str::to_owned);
        outputs
    }

    fn output_names(&mut self) -> Option<Vec<String>> {
        let value = self.set("id2label")?;
        let names = value.as_object().and_then(names_in_order);
        if names.is_none() {
            self.fault(format!(
                "`id2label` is {}, expected the names of outputs by their index",
                shown(value)
            ));
        }
        // transformers writes these names if there are none.
        let is_generic = |(index, name): (usize, &String)| *name == format!("LABEL_{index}");
        names.filter(|names| !names.iter().enumerate().all(is_generic))
    }
}

/// Returns the names by index, if there is one for each index from 0.
fn names_in_order(map: &Map<String, Value>) -> Option<Vec<String>> {
    (0..map.len())
        .map(|index| map.get(&index.to_string())?.as_str().map(str::to_owned))
        .collect()
}
