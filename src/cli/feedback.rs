//! Reads files of labelled comments, for `retrain` and `eval`.

use std::path::Path;

use anyhow::bail;
use indicatif::ProgressBar;

use super::input::{Entry, InputFile};
use super::table::Columns;
use crate::retrain::data::feedback::FeedbackRules;
use crate::retrain::data::gather::{FeedbackGatherer, GatheredFeedback};

/// The labelled comments of a file.
pub(super) struct LabelFile {
    pub(super) gathered: GatheredFeedback,
    /// What the operator should know about the file.
    pub(super) note: Option<String>,
    /// Why nothing could be read, if nothing could.
    unreadable: Option<String>,
}

impl LabelFile {
    /// Returns the labels that were read from a topic.
    pub(super) fn of_topic(gathered: GatheredFeedback, topic: &str) -> Self {
        let unreadable = gathered.is_unreadable().then(|| {
            format!(
                "none of the {} records of the topic `{topic}` could be used",
                gathered.records
            )
        });
        Self {
            gathered,
            note: None,
            unreadable,
        }
    }

    /// Fails if the file has rows, and none of them could be read.
    pub(super) fn require_readable(&self) -> anyhow::Result<()> {
        match &self.unreadable {
            Some(reason) => bail!("{reason}"),
            None => Ok(()),
        }
    }
}

/// Reads a file with one labelled JSON object per line, or a table. Ids and sources are optional.
///
/// # Errors
/// Returns an error if the file cannot be read. Invalid lines are counted in the result instead.
pub(super) fn read(path: &Path, max_bytes: usize) -> anyhow::Result<LabelFile> {
    let mut file = InputFile::open(path, &Columns::of_labels(), |_| ProgressBar::hidden())?;
    let mut gatherer = FeedbackGatherer::new(FeedbackRules {
        max_bytes,
        lenient: true,
    });
    while let Some((number, entry)) = file.next(max_bytes)? {
        match entry {
            Entry::Json(json) => gatherer.add_line(number, &json),
            Entry::TooLong(bytes) => gatherer.refuse_long_line(number, bytes),
            Entry::Refused(reason) => gatherer.refuse_row(number, reason),
        }
    }
    let gathered = gatherer.finish();
    let unreadable = gathered.is_unreadable().then(|| file.nothing_read(gathered.records));
    Ok(LabelFile {
        gathered,
        note: file.note(),
        unreadable,
    })
}
