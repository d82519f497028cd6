//! Reads tables in CSV, whose first row names the columns, as JSON objects.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use anyhow::bail;
use csv::{ByteRecord, ReaderBuilder};
use serde_json::{Map, Number, Value};

use super::input::Entry;
use crate::config::{FieldLocation, InputFields};

/// The size of a row from which on a quote is assumed to be unclosed. A reader would otherwise take the rest of a file for
/// one cell, and hold it in memory.
const MAX_ROW_BYTES: u64 = 64 << 20;

/// What may separate columns; spreadsheets use all three.
const DELIMITERS: [u8; 3] = [b',', b';', b'\t'];

/// The longest name of a column that is shown.
const MAX_NAME_CHARS: usize = 40;

/// The columns that are read, under the names of the fields that they become.
pub(super) struct Columns(Vec<Column>);

struct Column {
    /// The field, with a dot for a field of a field.
    field: &'static str,
    /// The names in the first row, of which the first that is there counts.
    names: Vec<String>,
    is_required: bool,
    kind: CellKind,
}

/// How a cell becomes a value. An empty cell is an absent field, but for a text, which may be empty.
#[derive(Clone, Copy)]
enum CellKind {
    /// Always a string.
    Text,
    /// A string; absent if it is empty.
    Name,
    /// A number if it is one in JSON, and otherwise a string; absent if it is empty.
    Number,
}

impl Columns {
    /// The columns of comments. A field that the settings locate at the top of an event may have that name.
    pub(super) fn of_comments(fields: &InputFields) -> Self {
        let column = |(field, locations): (&'static str, &crate::config::FieldLocations)| {
            let top = |location: &FieldLocation| match location {
                FieldLocation::Pointer(pointer) => {
                    let name = pointer.strip_prefix('/').filter(|name| !name.contains('/'))?;
                    Some(name.replace("~1", "/").replace("~0", "~"))
                }
                FieldLocation::Header(_) => None,
            };
            Column {
                field,
                names: locations.iter().filter_map(top).chain([field.to_owned()]).collect(),
                is_required: field == "text",
                kind: match field {
                    "text" => CellKind::Text,
                    "revision" => CellKind::Number,
                    _ => CellKind::Name,
                },
            }
        };
        Self(fields.iter().map(column).collect())
    }

    /// The columns of labelled comments.
    pub(super) fn of_labels() -> Self {
        let column = |(field, kind, is_required): (&'static str, CellKind, bool)| Column {
            field,
            names: vec![field.to_owned()],
            is_required,
            kind,
        };
        let columns = [
            ("text", CellKind::Text, true),
            ("label", CellKind::Number, true),
            ("content_id", CellKind::Name, false),
            ("community_id", CellKind::Name, false),
            ("source", CellKind::Name, false),
            ("weight", CellKind::Number, false),
            ("sample.rate", CellKind::Number, false),
            ("feedback_id", CellKind::Name, false),
            ("supersedes", CellKind::Name, false),
        ];
        Self(columns.map(column).into())
    }

    /// Returns what separates the columns of a first row, if the row names one that is required.
    pub(super) fn delimiter(&self, head: &[u8]) -> Option<u8> {
        DELIMITERS.into_iter().find(|&delimiter| {
            let mut reader = ReaderBuilder::new()
                .has_headers(false)
                .delimiter(delimiter)
                .from_reader(head);
            let mut header = ByteRecord::new();
            // A first row of one column would be the same with every delimiter, and any text could be one.
            reader.read_byte_record(&mut header).unwrap_or_default()
                && header.len() > 1
                && self
                    .0
                    .iter()
                    .any(|column| column.is_required && column.find(&header).is_some())
        })
    }
}

impl Column {
    /// Returns the place of the column in a first row.
    fn find(&self, header: &ByteRecord) -> Option<usize> {
        self.names
            .iter()
            .find_map(|name| header.iter().position(|cell| is_name(cell, name)))
    }
}

/// Returns whether a cell of the first row is this name; case and white space around it do not matter.
fn is_name(cell: &[u8], name: &str) -> bool {
    cell.trim_ascii().eq_ignore_ascii_case(name.as_bytes())
}

/// A table whose first row was read.
pub(super) struct Table<R> {
    reader: csv::Reader<RowLimit<R>>,
    row_bytes: Rc<Cell<u64>>,
    record: ByteRecord,
    /// The number of columns.
    width: usize,
    /// The place, the field and the kind of each column that is read.
    columns: Vec<(usize, &'static str, CellKind)>,
    ignored: Vec<String>,
}

impl<R: Read> Table<R> {
    /// Reads the first row.
    pub(super) fn new(source: R, delimiter: u8, columns: &Columns) -> anyhow::Result<Self> {
        let row_bytes = Rc::new(Cell::new(0));
        let mut reader = ReaderBuilder::new()
            .delimiter(delimiter)
            .flexible(true)
            .from_reader(RowLimit {
                source,
                end: io::Cursor::new([b"\n", AFTER_THE_END].concat()),
                row_bytes: Rc::clone(&row_bytes),
            });
        let header = reader.byte_headers()?.clone();
        let found: Vec<_> = columns.0.iter().map(|column| (column, column.find(&header))).collect();
        let missing: Vec<String> = found
            .iter()
            .filter(|(column, place)| column.is_required && place.is_none())
            .map(|(column, _)| format!("`{}`", column.names[0]))
            .collect();
        // If no name is known, the first row may be a comment, which must not be shown.
        let is_header = found.iter().any(|(_, place)| place.is_some());
        if !missing.is_empty() {
            let named = if is_header {
                format!("its columns are {}", named(header.iter()))
            } else {
                format!(
                    "its first line must name the columns, and names none of the {} that are known",
                    columns.0.len()
                )
            };
            bail!("it is CSV without the column {}; {named}", missing.join(" and "));
        }
        for place in found.iter().filter_map(|(_, place)| *place) {
            let name = String::from_utf8_lossy(header[place].trim_ascii());
            if header.iter().filter(|cell| is_name(cell, &name)).count() > 1 {
                bail!("it is CSV with two columns `{name}`");
            }
        }
        let columns: Vec<_> = found
            .into_iter()
            .filter_map(|(column, place)| Some((place?, column.field, column.kind)))
            .collect();
        let is_ignored = |(place, _): &(usize, &[u8])| columns.iter().all(|(read, ..)| read != place);
        let ignored = header.iter().enumerate().filter(is_ignored);
        Ok(Self {
            ignored: ignored.map(|(_, cell)| shown(cell)).collect(),
            reader,
            row_bytes,
            record: ByteRecord::new(),
            width: header.len(),
            columns,
        })
    }

    /// Names the columns that are not read, if there are any.
    pub(super) fn ignored(&self) -> Option<String> {
        let read: Vec<String> = self.columns.iter().map(|(_, field, _)| format!("`{field}`")).collect();
        let (ignored, read) = (self.ignored.join(", "), read.join(", "));
        (!ignored.is_empty()).then(|| format!("reads the columns {read}, and ignores {ignored}"))
    }

    /// Returns the line on which the next row begins.
    pub(super) fn line(&self) -> u64 {
        self.reader.position().line()
    }

    /// Returns the next row as a JSON object, with the line on which it begins.
    pub(super) fn next(&mut self) -> anyhow::Result<Option<(u64, Entry)>> {
        self.row_bytes.set(0);
        if !self.reader.read_byte_record(&mut self.record)? {
            return Ok(None);
        }
        let line = self.record.position().map_or(0, csv::Position::line);
        let last = self.record.iter().next_back().unwrap_or_default();
        if last == AFTER_THE_END && self.record.len() == 1 {
            return Ok(None);
        }
        if last.ends_with(AFTER_THE_END) {
            let reason =
                "a quote that begins here or later in the row never ends, so it and all that follows is one cell";
            return Ok(Some((line, Entry::Refused(reason.to_owned()))));
        }
        Ok(Some((line, self.entry())))
    }

    fn entry(&self) -> Entry {
        if self.record.len() != self.width {
            let (found, width) = (self.record.len(), self.width);
            return Entry::Refused(format!("the row has {found} columns, expected {width}"));
        }
        let mut row = Map::new();
        for &(place, field, kind) in &self.columns {
            let Ok(cell) = std::str::from_utf8(&self.record[place]) else {
                return Entry::Refused(format!("column `{field}` is not valid UTF-8; save the file as UTF-8"));
            };
            let Some(value) = kind.value(cell) else { continue };
            match field.split_once('.') {
                None => row.insert(field.to_owned(), value),
                Some((outer, inner)) => row.insert(outer.to_owned(), serde_json::json!({ inner: value })),
            };
        }
        Entry::Json(Value::Object(row).to_string().into_bytes())
    }
}

impl CellKind {
    fn value(self, cell: &str) -> Option<Value> {
        match self {
            Self::Text => Some(cell.into()),
            Self::Name | Self::Number if cell.trim().is_empty() => None,
            Self::Name => Some(cell.trim().into()),
            Self::Number => {
                let number: Option<Number> = serde_json::from_str(cell.trim()).ok();
                Some(number.map_or_else(|| cell.trim().into(), Value::Number))
            }
        }
    }
}

/// Lists the names of columns.
fn named<'a>(cells: impl Iterator<Item = &'a [u8]>) -> String {
    cells.map(shown).collect::<Vec<_>>().join(", ")
}

/// Shows the name of a column, unless it is too long to be one.
fn shown(cell: &[u8]) -> String {
    let name = String::from_utf8_lossy(cell.trim_ascii());
    if name.chars().count() > MAX_NAME_CHARS || name.chars().any(char::is_control) {
        return "one with a long name".to_owned();
    }
    format!("`{name}`")
}

/// A row that is added after the end of a file, by itself. If a quote is still open there, it is in that cell instead.
const AFTER_THE_END: &[u8] = b"\x00the file has ended\x00";

/// A reader that fails if one row is larger than any real one, and adds [`AFTER_THE_END`].
struct RowLimit<R> {
    source: R,
    /// What is added to the source.
    end: io::Cursor<Vec<u8>>,
    /// The bytes that were read since the last row began.
    row_bytes: Rc<Cell<u64>>,
}

impl<R: Read> Read for RowLimit<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.row_bytes.get() > MAX_ROW_BYTES {
            let reason = format!("a row has more than {MAX_ROW_BYTES} bytes, expected a quote that ends it");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        let count = match self.source.read(buffer)? {
            0 => self.end.read(buffer)?,
            count => count,
        };
        self.row_bytes.set(self.row_bytes.get() + count as u64);
        Ok(count)
    }
}
