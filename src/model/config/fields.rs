//! The fields of one JSON object of a `config.json`, read as transformers reads them: a field that is missing has the
//! default of its family, and one that is `null` has none.

use std::path::Path;

use serde_json::{Map, Value};

use crate::fault::{Fault, Faults};

/// Reads fields one at a time and collects every fault instead of stopping at the first.
pub(super) struct Fields<'a> {
    file: &'a Path,
    map: &'a Map<String, Value>,
    pub(super) faults: Faults,
}

impl<'a> Fields<'a> {
    pub(super) fn new(file: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self {
            file,
            map,
            faults: Faults::default(),
        }
    }

    pub(super) fn fault(&mut self, text: impl Into<String>) {
        self.faults.push(Fault::file(self.file, text));
    }

    /// Returns a field that is present, even if it is `null`.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name)
    }

    /// Returns a field that is present and not `null`.
    pub(super) fn set(&self, name: &str) -> Option<&'a Value> {
        self.get(name).filter(|value| !value.is_null())
    }

    /// Returns a whole number from 1 to `max`, and 1 after a fault.
    pub(super) fn dimension(&mut self, name: &str, default: usize, max: usize) -> usize {
        let Some(value) = self.get(name) else {
            return default;
        };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        match number.filter(|number| (1..=max).contains(number)) {
            Some(number) => number,
            None => {
                self.fault(format!("`{name}` is {}, expected 1 to {max}", shown(value)));
                1
            }
        }
    }

    /// Returns a number that is suitable for computing in f32, and 1 after a fault.
    pub(super) fn positive(&mut self, name: &str, default: f64) -> f64 {
        match self.get(name) {
            None => default,
            Some(value) => self.positive_value(name, value),
        }
    }

    /// Returns the value as a number above 0. The decoder computes in f32, in which the smallest and the largest numbers
    /// of a file would be 0 or infinite.
    pub(super) fn positive_value(&mut self, name: &str, value: &Value) -> f64 {
        match value.as_f64() {
            Some(number) if number > 0.0 && (number as f32).is_normal() => number,
            number => {
                let found = number.map_or_else(|| shown(value), |number| format!("{number:?}"));
                self.fault(format!(
                    "`{name}` is {found}, expected a number above 0 in the range of f32"
                ));
                1.0
            }
        }
    }

    /// Returns a number that `null` turns off.
    pub(super) fn cap(&mut self, name: &str, default: Option<f64>) -> Option<f64> {
        match self.get(name) {
            None => default,
            Some(Value::Null) => None,
            Some(value) => Some(self.positive_value(name, value)),
        }
    }

    /// Returns a truth value.
    pub(super) fn flag(&mut self, name: &str, default: bool) -> bool {
        match self.get(name) {
            None => default,
            Some(Value::Bool(value)) => *value,
            Some(other) => {
                self.fault(format!("`{name}` is {}, expected true or false", shown(other)));
                default
            }
        }
    }
}

/// Returns a value for an error message. A long one is cut, because a file can hold megabytes.
pub(super) fn shown(value: &Value) -> String {
    const LONGEST: usize = 80;
    let mut text = value.to_string();
    if text.len() > LONGEST {
        let end = (0..=LONGEST)
            .rev()
            .find(|&end| text.is_char_boundary(end))
            .unwrap_or_default();
        text.truncate(end);
        text.push('…');
    }
    text
}
