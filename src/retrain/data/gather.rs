//! Feedback from records or lines: the latest word on each content, and a list of what was refused.

use std::collections::BTreeMap;

use super::feedback::{Feedback, FeedbackError, Latest, Rules, decode};

/// Refusals that are listed by their place; the rest is only counted.
const LISTED: usize = 100;

/// Builds up feedback in the order of its source.
#[derive(Debug)]
pub struct Gatherer {
    rules: Rules,
    latest: Latest,
    refused: Refused,
    records: usize,
}

/// What could not be used, and why.
#[derive(Debug, Default)]
pub struct Refused {
    /// By reason.
    pub counts: BTreeMap<&'static str, usize>,
    /// Where, and what was wrong; the first hundred.
    pub listed: Vec<String>,
}

impl Refused {
    /// All of them.
    pub fn total(&self) -> usize {
        self.counts.values().sum()
    }
}

/// What stands at the end.
#[derive(Debug)]
pub struct Gathered {
    /// The latest word on each content.
    pub rows: Vec<Feedback>,
    /// Records or lines seen.
    pub records: usize,
    /// Labels that a later one took the place of.
    pub superseded: usize,
    /// Contents that the platform wants forgotten.
    pub forgotten: usize,
    /// What could not be used.
    pub refused: Refused,
}

impl Gatherer {
    /// Nothing yet.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            latest: Latest::default(),
            refused: Refused::default(),
            records: 0,
        }
    }

    /// A record of the topic, whose key is the content's id; `place` is for people.
    pub fn record(&mut self, place: impl Fn() -> String, position: u64, key: Option<&[u8]>, value: Option<&[u8]>) {
        self.records += 1;
        match (value, key) {
            (Some(value), _) => self.decode(place, position, value),
            (None, Some(key)) => self.latest.forget(&String::from_utf8_lossy(key)),
            (None, None) => self.refuse(place, &FeedbackError::Missing("key of a tombstone")),
        }
    }

    /// A line of a file.
    pub fn line(&mut self, number: u64, line: &[u8]) {
        self.records += 1;
        self.decode(|| format!("line {number}"), number, line);
    }

    /// A line that was too long to be held.
    pub fn long_line(&mut self, number: u64, bytes: usize) {
        self.records += 1;
        let limit = self.rules.max_bytes;
        self.refuse(|| format!("line {number}"), &FeedbackError::TooLarge { bytes, limit });
    }

    fn decode(&mut self, place: impl Fn() -> String, position: u64, value: &[u8]) {
        match decode(value, position, self.rules) {
            Ok(feedback) => self.latest.label(feedback),
            Err(error) => self.refuse(place, &error),
        }
    }

    fn refuse(&mut self, place: impl Fn() -> String, error: &FeedbackError) {
        *self.refused.counts.entry(error.reason()).or_default() += 1;
        if self.refused.listed.len() < LISTED {
            self.refused.listed.push(format!("{}: {error}", place()));
        }
    }

    /// What stands.
    pub fn finish(self) -> Gathered {
        let (rows, superseded, forgotten) = self.latest.finish();
        Gathered {
            rows,
            records: self.records,
            superseded,
            forgotten,
            refused: self.refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_word_counts_and_nothing_is_dropped_silently() {
        let rules = Rules {
            max_bytes: 200,
            lenient: false,
        };
        let mut gatherer = Gatherer::new(rules);
        let label = |content: &str, label: &str| {
            format!(r#"{{"content_id":"{content}","text":"a text","label":"{label}","source":"moderator"}}"#)
        };
        let mut offset = 0;
        let mut add = |key: Option<&str>, value: Option<&str>| {
            let place = move || format!("offset {offset}");
            gatherer.record(place, offset, key.map(str::as_bytes), value.map(str::as_bytes));
            offset += 1;
        };
        add(Some("a"), Some(&label("a", "ok")));
        add(Some("b"), Some(&label("b", "ok")));
        add(Some("a"), Some(&label("a", "hateful")));
        add(Some("b"), None);
        add(Some("c"), Some("no json"));
        add(Some("c"), Some(&label("c", "nasty")));
        add(None, None);
        gatherer.long_line(8, 1 << 30);
        let gathered = gatherer.finish();
        assert_eq!((gathered.records, gathered.superseded, gathered.forgotten), (8, 1, 1));
        assert_eq!(gathered.rows.len(), 1);
        assert_eq!(
            (gathered.rows[0].content_id.as_str(), gathered.rows[0].hateful),
            ("a", 1.0)
        );
        assert_eq!(
            gathered.refused.listed,
            [
                "offset 4: is not a JSON object in UTF-8",
                "offset 5: `label` is another name, expected `hateful`, `ok`, or a number from 0 to 1",
                "offset 6: `key of a tombstone` is missing",
                "line 8: has 1073741824 bytes, expected at most 200",
            ]
        );
        assert_eq!(gathered.refused.total(), 4);
    }
}
