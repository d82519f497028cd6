//! Labelled lines of a file, for the commands that take one.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::Context;

use super::lines;
use super::lines::Line;
use crate::retrain::data::feedback::Rules;
use crate::retrain::data::gather::{Gathered, Gatherer};

/// Reads a file of labelled JSON objects, one a line; ids and sources may be left out.
///
/// # Errors
/// The file cannot be read.
pub(super) fn read(path: &Path, max_bytes: usize) -> anyhow::Result<Gathered> {
    let file = File::open(path).with_context(|| format!("cannot open `{}`", path.display()))?;
    let mut reader = BufReader::new(file);
    let mut gatherer = Gatherer::new(Rules {
        max_bytes,
        lenient: true,
    });
    for number in 1.. {
        let line = lines::next(&mut reader, max_bytes);
        match line.with_context(|| format!("cannot read line {number} of `{}`", path.display()))? {
            None => break,
            Some(Line::Whole(line)) if line.trim_ascii().is_empty() => {}
            Some(Line::Whole(line)) => gatherer.line(number, &line),
            Some(Line::TooLong(bytes)) => gatherer.long_line(number, bytes),
        }
    }
    Ok(gatherer.finish())
}
