//! Opens files of comments or labels, and recognises what is in them: JSON lines, a table in CSV, or gzip of either.
//!
//! The content decides, not the name of the file. What cannot be read is named: a Parquet file, UTF-16 and the like at
//! once, and text that is not in the expected form once no part of it could be read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;

use anyhow::{Context, bail};
use flate2::bufread::MultiGzDecoder;
use indicatif::ProgressBar;

use super::lines::{self, Line};
use super::table::{Columns, Table};
use crate::json::BYTE_ORDER_MARK;
use crate::plural::Count;

/// Size of the read buffer. It holds several batches of short comments, so that batches fill up between two reads.
const BUFFER_BYTES: usize = 1 << 20;

/// The most of a first line that is looked at. A header with the names of columns is shorter.
const MAX_HEAD_BYTES: u64 = 64 << 10;

/// The formats that are expected, in words.
const EXPECTED: &str = "JSON lines, CSV with a header, or gzip of either";

/// The formats that are recognised by their first bytes and cannot be read, with the next step.
const UNREADABLE: [(&[u8], &str); 15] = [
    (
        b"PAR1",
        "a Parquet file; convert it, for example with DuckDB: COPY (FROM 'x.parquet') TO 'x.csv'",
    ),
    (
        b"PK\x03\x04",
        "a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV in UTF-8",
    ),
    (
        b"\xd0\xcf\x11\xe0",
        "an old Excel or Word file; save it as CSV in UTF-8",
    ),
    (
        b"\x28\xb5\x2f\xfd",
        "compressed with zstd; decompress it with `zstd -dc`",
    ),
    (b"\xfd7zXZ", "compressed with xz; decompress it with `xz -dc`"),
    (b"BZh", "compressed with bzip2; decompress it with `bzip2 -dc`"),
    (b"\x04\x22\x4d\x18", "compressed with LZ4; decompress it with `lz4 -dc`"),
    (
        b"Obj\x01",
        "an Avro file; convert it to JSON lines, for example with `avro-tools tojson`",
    ),
    (b"ARROW1", "an Arrow file; convert it to JSON lines or CSV"),
    (b"ORC", "an ORC file; convert it to JSON lines or CSV"),
    (
        b"SQLite format 3",
        "an SQLite database; export the table as CSV with a header",
    ),
    (b"%PDF", "a PDF file"),
    (
        b"version https://git-lfs",
        "a pointer of Git LFS; fetch the file itself with `git lfs pull`",
    ),
    (
        b"\xff\xfe",
        "text in UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    ),
    (
        b"\xfe\xff",
        "text in UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    ),
];

/// A file that was opened and recognised.
pub(super) struct InputFile {
    /// The path as given, for messages.
    pub(super) name: String,
    records: Records,
    /// What the file looks like, in case no part of it can be read.
    looks_like: Option<&'static str>,
}

enum Records {
    Lines(Source),
    Table(Box<Table<Source>>),
}

/// One line or row.
#[derive(Debug)]
pub(super) enum Entry {
    /// A JSON object within the limit; the cells of a row are its fields.
    Json(Vec<u8>),
    /// A longer line, with its length in bytes.
    TooLong(usize),
    /// A row that cannot be read, with the reason.
    Refused(String),
}

impl InputFile {
    /// Opens a file, or stdin if the path is `-`. `progress` counts the bytes that are read from the file.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, has a format that is recognised but not supported, or is a table
    /// without a column that is needed.
    pub(super) fn open(
        path: &Path,
        columns: &Columns,
        progress: impl FnOnce(&File) -> ProgressBar,
    ) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let source: Box<dyn Read> = if path == Path::new("-") {
            Box::new(io::stdin())
        } else {
            let file = File::open(path).with_context(|| format!("cannot open `{name}`"))?;
            Box::new(progress(&file).wrap_read(file))
        };
        let cannot_read = || format!("cannot read `{name}`");
        let mut source = Source::new(source).with_context(cannot_read)?;
        if source.head().starts_with(b"\x1f\x8b") {
            let unpacked = MultiGzDecoder::new(source);
            source = Source::new(Box::new(unpacked)).with_context(cannot_read)?;
        }
        if let Some((_, format)) = UNREADABLE.iter().find(|(magic, _)| source.head().starts_with(magic)) {
            bail!("cannot read `{name}`: it is {format}; expected {EXPECTED}");
        }
        if source.head().starts_with(BYTE_ORDER_MARK) {
            source.consume(BYTE_ORDER_MARK.len());
        }
        let head = source.head().trim_ascii_start();
        if let [0, _, ..] | [_, 0, ..] = head {
            bail!(
                "cannot read `{name}`: it looks like text in UTF-16 without a byte order mark; convert it with `iconv -f \
                   UTF-16LE -t UTF-8`"
            );
        }
        let looks_like = looks_like(head);
        let is_named_table = [".csv", ".tsv", ".csv.gz", ".tsv.gz"]
            .iter()
            .any(|extension| name.to_ascii_lowercase().ends_with(extension));
        let is_table = !head.is_empty() && !head.starts_with(b"{");
        let delimiter = columns.delimiter(head);
        let records = if is_table && (delimiter.is_some() || is_named_table) {
            let table = Table::new(source, delimiter.unwrap_or(b','), columns);
            Records::Table(Box::new(table.with_context(cannot_read)?))
        } else {
            Records::Lines(source)
        };
        Ok(Self {
            name,
            records,
            looks_like,
        })
    }

    /// Returns whether the file is a table, whose rows have the fields of [`Columns`] whatever the settings say.
    pub(super) fn is_table(&self) -> bool {
        matches!(self.records, Records::Table(_))
    }

    /// Returns whether more can be read without waiting. Of a table, this is not known.
    pub(super) fn has_buffered(&self) -> bool {
        match &self.records {
            Records::Lines(source) => source.has_buffered(),
            Records::Table(_) => true,
        }
    }

    /// Returns a note about columns that are not read, if the file is a table that has any.
    pub(super) fn note(&self) -> Option<String> {
        match &self.records {
            Records::Lines(_) => None,
            Records::Table(table) => Some(format!("`{}`: {}", self.name, table.ignored()?)),
        }
    }

    /// Returns the next line or row that is not blank, with the number of the line on which it begins.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub(super) fn next(&mut self, max_bytes: usize) -> anyhow::Result<Option<(u64, Entry)>> {
        match &mut self.records {
            Records::Table(table) => {
                let line = table.line();
                table
                    .next()
                    .with_context(|| format!("cannot read line {line} of `{}`", self.name))
            }
            Records::Lines(source) => loop {
                source.lines += 1;
                let number = source.lines;
                let line = lines::next(source, max_bytes);
                match line.with_context(|| format!("cannot read line {number} of `{}`", self.name))? {
                    None => return Ok(None),
                    Some(Line::Complete(line)) if line.trim_ascii().is_empty() => {}
                    Some(Line::Complete(line)) => return Ok(Some((number, Entry::Json(line)))),
                    Some(Line::TooLong(bytes)) => return Ok(Some((number, Entry::TooLong(bytes)))),
                }
            },
        }
    }

    /// Returns the error for a file of which none of the `refused` lines or rows could be read.
    pub(super) fn nothing_read(&self, refused: usize) -> String {
        let rows = Count(refused, if self.is_table() { "row" } else { "line" });
        let looks_like = self.looks_like.filter(|_| !self.is_table());
        let format = looks_like.map_or_else(
            || format!("expected {EXPECTED}"),
            |format| format!("it looks like {format}"),
        );
        format!("nothing could be read from `{}`, which has {rows}: {format}", self.name)
    }
}

/// Returns what text that is not JSON lines looks like, judged by its first line.
fn looks_like(head: &[u8]) -> Option<&'static str> {
    let line = head
        .split(|&byte| byte == b'\n')
        .next()
        .unwrap_or_default()
        .trim_ascii();
    match line {
        [b'[', ..] => Some("a JSON array; write one object per line, for example with `jq -c '.[]'`"),
        b"{" => Some("a JSON object on several lines; write one object per line, for example with `jq -c .`"),
        [b'{', ..] | [] => None,
        [b'<', ..] => Some("XML or HTML; write one JSON object per line"),
        _ if line.iter().any(|byte| b",;\t".contains(byte)) => {
            Some("CSV without the names of the columns; its first line must name them, such as `text` and `label`")
        }
        _ => None,
    }
}

/// A reader whose first line is known before it is read.
struct Source {
    head: Cursor<Vec<u8>>,
    rest: BufReader<Box<dyn Read>>,
    /// The number of lines that were read.
    lines: u64,
}

impl Source {
    /// Reads the first line, or as much of it as is looked at.
    fn new(source: Box<dyn Read>) -> io::Result<Self> {
        let mut rest = BufReader::with_capacity(BUFFER_BYTES, source);
        let mut head = Vec::new();
        rest.by_ref().take(MAX_HEAD_BYTES).read_until(b'\n', &mut head)?;
        Ok(Self {
            head: Cursor::new(head),
            rest,
            lines: 0,
        })
    }

    /// Returns what is left of the first line.
    fn head(&self) -> &[u8] {
        let at = usize::try_from(self.head.position()).unwrap_or_default();
        self.head.get_ref().get(at..).unwrap_or_default()
    }

    fn has_buffered(&self) -> bool {
        !self.head().is_empty() || !self.rest.buffer().is_empty()
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Source {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.head().is_empty() {
            return self.rest.fill_buf();
        }
        self.head.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        if self.head().is_empty() {
            self.rest.consume(count);
        } else {
            self.head.consume(count);
        }
    }
}
