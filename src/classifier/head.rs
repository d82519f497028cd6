//! A classification head, from which the margin is read instead of from two labels of the vocabulary.
//!
//! The head is `score.weight` of a `Gemma…ForSequenceClassification`, in the checkpoint or in a PEFT adapter for
//! `SEQ_CLS`. Its logits are those of the last token of the text (transformers' `GenericForSequenceClassification`),
//! which has no frame around it. The margin is the logit of the hateful output minus that of the other, or the logit of
//! a single output.

use candle_core::{Result as CandleResult, Tensor};

use crate::config::PromptConfig;
use crate::fault::{Fault, Faults};
use crate::model::config::Outputs;
use crate::model::files::checkpoint::Checkpoint;
use crate::model::files::lora::{Adapter, HeadWeight};

/// The output that is the hateful one if the config does not name the outputs, as in the data sets of binary
/// classifiers, where 1 is the positive class.
const DEFAULT_HATEFUL: usize = 1;

/// The name that decisions use for the hateful label.
const HATEFUL: &str = "hateful";

/// A head whose outputs are known.
#[derive(Debug, Clone)]
pub(super) struct Head {
    /// The weights of the hateful output and of the other: (2, hidden), f32. A single output is compared with 0.
    pub(super) rows: Tensor,
    /// The outputs in words.
    pub(super) description: String,
    /// Remarks for the operator.
    pub(super) notes: Vec<String>,
}

impl Head {
    /// Returns the head of the adapter or else of the checkpoint, or `None` if neither has one.
    ///
    /// # Errors
    /// Returns a fault if the head cannot be read, or if its outputs are not those of one decision.
    pub(super) fn find(
        checkpoint: &Checkpoint,
        adapter: Option<&Adapter>,
        prompt: &PromptConfig,
    ) -> Result<Option<Self>, Faults> {
        let weight = match adapter.and_then(Adapter::head) {
            Some(HeadWeight(weight)) => weight.clone(),
            None => match checkpoint.read_head()? {
                Some(weight) => weight,
                None => return Ok(None),
            },
        };
        let outputs = &checkpoint.config().outputs;
        let choice = Choice::new(weight.dims()[0], outputs, prompt)
            .map_err(|text| Fault::file(&checkpoint.folder().join("config.json"), text))?;
        let rows = choice.rows(&weight);
        let rows = rows.map_err(|error| Fault::file(checkpoint.folder(), format!("cannot read the head: {error}")))?;
        Ok(Some(Self {
            rows,
            description: choice.description(outputs),
            notes: choice.notes(outputs),
        }))
    }
}

/// Which output is the hateful one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Single,
    Of2 { hateful: usize },
}

impl Choice {
    fn new(count: usize, outputs: &Outputs, prompt: &PromptConfig) -> Result<Self, String> {
        match (count, outputs.problem_type.as_deref()) {
            (1, _) => Ok(Self::Single),
            (2, None | Some("single_label_classification")) => {
                let hateful = match &outputs.names {
                    None => DEFAULT_HATEFUL,
                    Some(names) => hateful_of(names, prompt)?,
                };
                Ok(Self::Of2 { hateful })
            }
            (2, Some(other)) => Err(format!(
                "`problem_type` is `{other}` for a head of 2 outputs, expected `single_label_classification`"
            )),
            (count, _) => Err(format!(
                "the classification head has {count} outputs, expected 1, or 2 of which one is for hateful texts"
            )),
        }
    }

    /// Returns the weights of the hateful output and of the other from those (outputs, hidden) of all.
    fn rows(self, weight: &Tensor) -> CandleResult<Tensor> {
        let (hateful, other) = match self {
            Self::Single => (weight.get(0)?, weight.get(0)?.zeros_like()?),
            Self::Of2 { hateful } => (weight.get(hateful)?, weight.get(1 - hateful)?),
        };
        Tensor::stack(&[hateful, other], 0)
    }

    fn description(self, outputs: &Outputs) -> String {
        let name = |index: usize| match &outputs.names {
            Some(names) => format!("{index} ({})", names[index]),
            None => index.to_string(),
        };
        match self {
            Self::Single => "1 output, which is the margin".to_owned(),
            Self::Of2 { hateful } => format!(
                "2 outputs, the margin is output {} minus output {}",
                name(hateful),
                name(1 - hateful)
            ),
        }
    }

    fn notes(self, outputs: &Outputs) -> Vec<String> {
        match (self, outputs.problem_type.as_deref()) {
            (Self::Single, Some("regression")) => vec![
                "`problem_type` is `regression`: the output of the head is used as a logit; add a calibration if the head \
                 was trained to predict a probability"
                    .to_owned(),
            ],
            _ => Vec::new(),
        }
    }
}

/// The labels of the shipped settings, in which the negative one is hateful. A head may mean the opposite by the same
/// names.
const DEFAULT_LABELS: [&str; 2] = ["Positive", "Negative"];

/// Returns the index of the hateful output: the one that `prompt.hateful_label` names if the two outputs are labels that
/// the operator has chosen, or else the one with the name `hateful`.
fn hateful_of(names: &[String], prompt: &PromptConfig) -> Result<usize, String> {
    let [first, second] = names else {
        return Err(format!("`id2label` names {} outputs, but the head has 2", names.len()));
    };
    let is_default = |name: &String| DEFAULT_LABELS.iter().any(|label| name.eq_ignore_ascii_case(label));
    if is_default(first) && is_default(second) {
        return Err(format!(
            "`id2label` names the outputs `{first}` and `{second}`, of which it is not known which one is for hateful \
             texts: rename that output to `hateful` in config.json"
        ));
    }
    if prompt.labels.contains(first) && prompt.labels.contains(second) && first != second {
        return Ok(usize::from(*second == prompt.hateful_label));
    }
    match [first, second].map(|name| name.eq_ignore_ascii_case(HATEFUL)) {
        [true, false] => Ok(0),
        [false, true] => Ok(1),
        _ => Err(format!(
            "`id2label` names the outputs `{first}` and `{second}`, of which it is not known which one is for hateful \
             texts: set `prompt.labels` to [\"{first}\", \"{second}\"] and `prompt.hateful_label` to one of them"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Markup, Normalize};

    fn choice(count: usize, names: &[&str], problem_type: Option<&str>) -> Result<Choice, String> {
        let config = PromptConfig {
            labels: ["Positive".into(), "Negative".into()],
            hateful_label: "Negative".into(),
            instructions: String::new(),
            separator: "##".into(),
            template: None,
            markup: Markup::None,
            normalize: Normalize::None,
            max_window_tokens: Some(64),
            max_windows: Some(1),
            windows: None,
        };
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let outputs = Outputs {
            classifier: None,
            names: (!names.is_empty()).then_some(names),
            problem_type: problem_type.map(str::to_owned),
        };
        Choice::new(count, &outputs, &config)
    }

    #[test]
    fn the_hateful_output_is_named_or_the_second() {
        for (names, hateful) in [(&[][..], 1), (&["hateful", "ok"], 0), (&["fine", "Hateful"], 1)] {
            assert_eq!(choice(2, names, None), Ok(Choice::Of2 { hateful }), "{names:?}");
        }
        assert_eq!(choice(1, &[], Some("regression")), Ok(Choice::Single));
    }

    #[test]
    fn the_default_labels_are_those_of_the_shipped_settings() {
        let config = crate::config::Config::load(&crate::config::Sources::default()).unwrap();
        assert_eq!(config.prompt.labels, DEFAULT_LABELS);
    }

    #[test]
    fn heads_whose_outputs_are_unclear_are_refused() {
        for (count, names, problem_type, part) in [
            (
                2,
                &["safe", "toxic"][..],
                None,
                "set `prompt.labels` to [\"safe\", \"toxic\"]",
            ),
            (
                2,
                &["Negative", "Positive"],
                None,
                "rename that output to `hateful` in config.json",
            ),
            (2, &["a", "b", "c"], None, "names 3 outputs"),
            (
                2,
                &[],
                Some("multi_label_classification"),
                "`problem_type` is `multi_label_classification`",
            ),
            (3, &[], None, "has 3 outputs"),
            (0, &[], None, "has 0 outputs"),
        ] {
            let text = choice(count, names, problem_type).unwrap_err();
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn rows_begin_with_the_hateful_output() {
        let weight = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &candle_core::Device::Cpu).unwrap();
        let rows = |choice: Choice| choice.rows(&weight).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows(Choice::Of2 { hateful: 1 }), [[3.0, 4.0], [1.0, 2.0]]);
        assert_eq!(rows(Choice::Single), [[1.0, 2.0], [0.0, 0.0]]);
    }
}
