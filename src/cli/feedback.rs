//! Reads files of labelled comments, for `retrain` and `eval`.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::Context;

use super::lines;
use super::lines::Line;
use crate::retrain::data::feedback::FeedbackRules;
use crate::retrain::data::gather::{FeedbackGatherer, GatheredFeedback};

/// Reads a file with one labelled JSON object per line. Ids and sources are optional.
///
/// # Errors
/// Returns an error if the file cannot be read. Invalid lines are counted in the result instead.
pub(super) fn read(path: &Path, max_bytes: usize) -> anyhow::Result<GatheredFeedback> {
    let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
    let mut reader = BufReader::new(file);
    let mut gatherer = FeedbackGatherer::new(FeedbackRules {
        max_bytes,
        lenient: true,
    });
    for number in 1.. {
        let line = lines::next(&mut reader, max_bytes);
        match line.with_context(|| format!("cannot read line {number} of `{}`", path.display()))? {
            None => break,
            Some(Line::Complete(line)) if line.trim_ascii().is_empty() => {}
            Some(Line::Complete(line)) => gatherer.add_line(number, &line),
            Some(Line::TooLong(bytes)) => gatherer.refuse_long_line(number, bytes),
        }
    }
    Ok(gatherer.finish())
}
