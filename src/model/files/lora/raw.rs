//! The form of `adapter_config.json`.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// The fields of `adapter_config.json` that are understood; [`options`](super::options) lists the others.
#[derive(Debug, Deserialize)]
pub(super) struct RawAdapterConfig {
    pub(super) peft_type: Option<String>,
    pub(super) task_type: Option<String>,
    pub(super) r: Option<usize>,
    pub(super) lora_alpha: Option<f64>,
    #[serde(default)]
    pub(super) use_rslora: bool,
    pub(super) rank_pattern: Option<InOrder<usize>>,
    pub(super) alpha_pattern: Option<InOrder<f64>>,
    pub(super) target_modules: Option<NamesOrPattern>,
    pub(super) exclude_modules: Option<NamesOrPattern>,
    pub(super) layers_to_transform: Option<OneOrMany<usize>>,
    pub(super) layers_pattern: Option<OneOrMany<String>>,
    pub(super) modules_to_save: Option<Vec<String>>,
    pub(super) bias: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum NamesOrPattern {
    Pattern(String),
    Names(Vec<String>),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T: Clone> OneOrMany<T> {
    pub(super) fn to_vec(&self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value.clone()],
            Self::Many(values) => values.clone(),
        }
    }
}

/// An object whose keys keep the order of the file, in which PEFT tries them.
#[derive(Debug, Default)]
pub(super) struct InOrder<T>(pub(super) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for InOrder<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Vec<(String, T)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of patterns and numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries: Vec<(String, T)> = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, T>()? {
                    // As in Python, a key that is repeated keeps its place and gets the last value.
                    match entries.iter_mut().find(|(known, _)| *known == key) {
                        Some(entry) => entry.1 = value,
                        None => entries.push((key, value)),
                    }
                }
                Ok(entries)
            }
        }
        deserializer
            .deserialize_map(Entries(std::marker::PhantomData))
            .map(InOrder)
    }
}

impl RawAdapterConfig {
    /// Returns whether the adapter replaces the unembedding by a classification head. PEFT adds `score` to the modules
    /// of every adapter for `SEQ_CLS`.
    pub(super) fn declares_head(&self) -> bool {
        let saves_head = self.modules_to_save.iter().flatten().any(|module| module == "score");
        saves_head || self.task_type.as_deref() == Some("SEQ_CLS")
    }
}
