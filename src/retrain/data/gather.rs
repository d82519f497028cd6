//! Collects feedback from topic records or lines of a file: the latest label for each content id, and the refused
//! records.

use std::collections::BTreeMap;

use crate::plural::Count;

use super::feedback::{Feedback, FeedbackError, FeedbackRules, LatestLabels, decode};

/// Number of refused records that are listed with their positions. Further ones are only counted.
const MAX_LISTED: usize = 100;

/// Collects feedback, in the order of the topic or file that it comes from.
#[derive(Debug)]
pub struct FeedbackGatherer {
    rules: FeedbackRules,
    labels: LatestLabels,
    refused: RefusedRecords,
    records: usize,
    repaired: usize,
}

/// The records that could not be used.
#[derive(Debug, Default)]
pub struct RefusedRecords {
    /// Number of refused records by reason.
    pub counts: BTreeMap<&'static str, usize>,
    /// The positions and errors of the first hundred refused records.
    pub listed: Vec<String>,
}

impl RefusedRecords {
    /// Returns the number of refused records.
    pub fn total(&self) -> usize {
        self.counts.values().sum()
    }
}

/// The feedback that was gathered.
#[derive(Debug)]
pub struct GatheredFeedback {
    /// The latest label for each content id.
    pub rows: Vec<Feedback>,
    /// Number of records or lines that were read.
    pub records: usize,
    /// Number of labels that a later label replaced.
    pub superseded: usize,
    /// Number of labels that a tombstone removed.
    pub forgotten: usize,
    /// Number of records whose text contains half of a surrogate pair, which was read as U+FFFD.
    pub repaired: usize,
    /// The records that could not be used.
    pub refused: RefusedRecords,
}

impl GatheredFeedback {
    /// Returns whether there were records, and none of them could be used.
    pub fn is_unreadable(&self) -> bool {
        self.records > 0 && self.refused.total() == self.records
    }

    /// Says how many texts were changed to make them readable, if any were.
    pub fn repairs(&self) -> Option<String> {
        let records = Count(self.repaired, "record");
        (self.repaired > 0).then(|| format!("{records} with half of a surrogate pair in the text, read as U+FFFD"))
    }
}

impl FeedbackGatherer {
    /// Creates a gatherer that decodes records by these rules.
    pub fn new(rules: FeedbackRules) -> Self {
        Self {
            rules,
            labels: LatestLabels::default(),
            refused: RefusedRecords::default(),
            records: 0,
            repaired: 0,
        }
    }

    /// Adds a record of the topic, whose key is the content id; a null value removes the label for that id.
    ///
    /// `describe` returns the position of the record in words, for the list of refused records.
    pub fn add_record(
        &mut self,
        describe: impl Fn() -> String,
        position: u64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
    ) {
        self.records += 1;
        match (value, key) {
            (Some(value), _) => self.decode(describe, position, value),
            (None, Some(key)) => self.labels.remove(&String::from_utf8_lossy(key)),
            (None, None) => self.refuse(describe, &FeedbackError::Missing("key")),
        }
    }

    /// Adds a line of a file. Lines are numbered from 1.
    pub fn add_line(&mut self, number: u64, line: &[u8]) {
        self.records += 1;
        self.decode(|| format!("line {number}"), number, line);
    }

    /// Counts a line as refused. It was not read into memory, because its length exceeds the limit.
    pub fn refuse_long_line(&mut self, number: u64, bytes: usize) {
        self.records += 1;
        let limit = self.rules.max_bytes;
        self.refuse(|| format!("line {number}"), &FeedbackError::TooLarge { bytes, limit });
    }

    /// Counts a row of a table as refused, for a reason that quotes no text.
    pub fn refuse_row(&mut self, number: u64, reason: String) {
        self.records += 1;
        self.refuse(|| format!("line {number}"), &FeedbackError::BrokenRow(reason));
    }

    fn decode(&mut self, describe: impl Fn() -> String, position: u64, value: &[u8]) {
        match decode(value, position, self.rules) {
            Ok(feedback) => {
                self.repaired += usize::from(feedback.replaced_surrogates > 0);
                self.labels.insert(feedback);
            }
            Err(error) => self.refuse(describe, &error),
        }
    }

    fn refuse(&mut self, describe: impl Fn() -> String, error: &FeedbackError) {
        *self.refused.counts.entry(error.reason()).or_default() += 1;
        if self.refused.listed.len() < MAX_LISTED {
            self.refused.listed.push(format!("{}: {error}", describe()));
        }
    }

    /// Returns the feedback that was gathered.
    pub fn finish(self) -> GatheredFeedback {
        let (rows, superseded, forgotten) = self.labels.finish();
        GatheredFeedback {
            rows,
            records: self.records,
            superseded,
            forgotten,
            repaired: self.repaired,
            refused: self.refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_label_applies_and_every_refused_record_is_counted() {
        let rules = FeedbackRules {
            max_bytes: 200,
            lenient: false,
        };
        let mut gatherer = FeedbackGatherer::new(rules);
        let label = |content: &str, label: &str| {
            format!(r#"{{"content_id":"{content}","text":"a text","label":"{label}","source":"moderator"}}"#)
        };
        let mut offset = 0;
        let mut add = |key: Option<&str>, value: Option<&str>| {
            let describe = move || format!("offset {offset}");
            gatherer.add_record(describe, offset, key.map(str::as_bytes), value.map(str::as_bytes));
            offset += 1;
        };
        add(Some("a"), Some(&label("a", "ok")));
        add(Some("b"), Some(&label("b", "ok").replace("a text", r"a text \ud83d")));
        add(Some("a"), Some(&label("a", "hateful")));
        add(Some("b"), None);
        add(Some("c"), Some("no json"));
        add(Some("c"), Some(&label("c", "nasty")));
        add(None, None);
        gatherer.refuse_long_line(8, 1 << 30);
        let gathered = gatherer.finish();
        assert_eq!((gathered.records, gathered.superseded, gathered.forgotten), (8, 1, 1));
        assert_eq!((gathered.rows.len(), gathered.repaired), (1, 1));
        assert_eq!(
            (gathered.rows[0].content_id.as_str(), gathered.rows[0].hateful),
            ("a", 1.0)
        );
        assert_eq!(
            gathered.refused.listed,
            [
                "offset 4: is not a JSON object in UTF-8",
                "offset 5: `label` is an unknown name, expected `hateful`, `ok`, or a number from 0 to 1",
                "offset 6: `key` is missing",
                "line 8: has 1073741824 bytes, expected at most 200",
            ]
        );
        assert_eq!(gathered.refused.total(), 4);
    }
}
