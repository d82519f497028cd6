//! Reads lines in bounded memory: a line over the limit is skipped instead of being stored.

use std::io::{self, BufRead};

/// A line without its line ending.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// A line within the limit.
    Complete(Vec<u8>),
    /// A longer line, with its length in bytes.
    TooLong(usize),
}

/// Reads the next line. Returns `None` at the end of the input.
///
/// # Errors
/// Returns the errors of the reader.
pub(super) fn next(reader: &mut dyn BufRead, max_bytes: usize) -> io::Result<Option<Line>> {
    let (mut line, mut bytes, mut last, mut has_started) = (Vec::new(), 0, None, false);
    loop {
        let available = match reader.fill_buf() {
            Ok(available) => available,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if available.is_empty() {
            return Ok(has_started.then(|| finish(line, bytes, last, max_bytes)));
        }
        has_started = true;
        let end = available.iter().position(|&byte| byte == b'\n');
        let part = &available[..end.unwrap_or(available.len())];
        bytes += part.len();
        last = part.last().copied().or(last);
        // The one byte over the limit may be the `\r` of the line ending.
        if bytes <= max_bytes.saturating_add(1) {
            line.extend_from_slice(part);
        }
        let used = part.len() + usize::from(end.is_some());
        reader.consume(used);
        if end.is_some() {
            return Ok(Some(finish(line, bytes, last, max_bytes)));
        }
    }
}

fn finish(mut line: Vec<u8>, bytes: usize, last: Option<u8>, max_bytes: usize) -> Line {
    let bytes = bytes - usize::from(last == Some(b'\r'));
    if bytes > max_bytes {
        return Line::TooLong(bytes);
    }
    line.truncate(bytes);
    Line::Complete(line)
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use proptest::prelude::*;

    use super::*;

    fn all(input: &[u8], max_bytes: usize, buffer: usize) -> Vec<Line> {
        let mut reader = BufReader::with_capacity(buffer, input);
        std::iter::from_fn(|| next(&mut reader, max_bytes).unwrap()).collect()
    }

    #[test]
    fn lines_over_the_limit_are_reported_with_their_length() {
        let complete = |text: &str| Line::Complete(text.into());
        let check = |input: &str, expected: &[Line]| {
            for buffer in [1, 2, 3, 100] {
                assert_eq!(all(input.as_bytes(), 4, buffer), expected, "{input:?} {buffer}");
            }
        };
        check("", &[]);
        check("\n", &[complete("")]);
        check("abcd\nabcde\nab", &[complete("abcd"), Line::TooLong(5), complete("ab")]);
        check(
            "abcd\r\nabcde\r\n\r\n",
            &[complete("abcd"), Line::TooLong(5), complete("")],
        );
        check("abcdefghijkl", &[Line::TooLong(12)]);
    }

    proptest! {
        #[test]
        fn no_line_is_lost(lines in prop::collection::vec("[a-z]{0,9}", 0..20), buffer in 1usize..12) {
            let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
            let expected: Vec<Line> = lines
                .iter()
                .map(|line| if line.len() > 5 { Line::TooLong(line.len()) } else { Line::Complete(line.as_bytes().to_vec()) })
                .collect();
            prop_assert_eq!(all(input.as_bytes(), 5, buffer), expected);
        }
    }
}
