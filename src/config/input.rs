//! The section `input`: where the fields of a comment event are located, and what its operations mean.

use std::collections::BTreeMap;
use std::fmt;

use super::reader::SettingsReader;
use crate::message::Op;

/// What a location in a record's headers begins with, in the settings.
const HEADER: &str = "header:";

/// The location of the fields of a comment event, and its maximum size.
#[derive(Debug, Clone)]
pub struct InputConfig {
    /// The location of each field, and the meaning of operations.
    pub fields: InputFields,
    /// The maximum size of an event in bytes; a larger event is rejected without being parsed.
    pub max_bytes: usize,
}

/// The locations of the fields of a comment event, and the meaning of its operation.
///
/// By default, each field is at the top of the event, under its own name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFields {
    /// The id of the event.
    pub event_id: FieldLocations,
    /// The id of the content.
    pub content_id: FieldLocations,
    /// The revision of the content.
    pub revision: FieldLocations,
    /// The operation, which is a key of `ops`.
    pub op: FieldLocations,
    /// The id of the community.
    pub community_id: FieldLocations,
    /// The text.
    pub text: FieldLocations,
    /// The meaning of each value of the operation.
    pub ops: BTreeMap<String, Op>,
}

impl Default for InputFields {
    fn default() -> Self {
        let top = |name: &str| FieldLocations::from(format!("/{name}"));
        Self {
            event_id: top("event_id"),
            content_id: top("content_id"),
            revision: top("revision"),
            op: top("op"),
            community_id: top("community_id"),
            text: top("text"),
            ops: OPS.map(|(name, op)| (name.to_owned(), op)).into(),
        }
    }
}

impl InputFields {
    /// Returns the name of each field with its locations.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &FieldLocations)> {
        [
            ("event_id", &self.event_id),
            ("content_id", &self.content_id),
            ("revision", &self.revision),
            ("op", &self.op),
            ("community_id", &self.community_id),
            ("text", &self.text),
        ]
        .into_iter()
    }
}

/// The operations by their names in the settings.
const OPS: [(&str, Op); 3] = [("create", Op::Create), ("edit", Op::Edit), ("delete", Op::Delete)];

/// The locations at which a field may be. The first one that has a value other than null counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldLocations(Vec<FieldLocation>);

/// One location of a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FieldLocation {
    /// A JSON pointer (RFC 6901) into the event.
    Pointer(String),
    /// The name of a header of the record.
    Header(String),
}

impl FieldLocations {
    /// Returns the locations in the order in which they are tried.
    pub fn iter(&self) -> impl Iterator<Item = &FieldLocation> {
        self.0.iter()
    }
}

/// A location as in the settings.
impl From<String> for FieldLocations {
    fn from(location: String) -> Self {
        Self(vec![location.into()])
    }
}

/// A location as in the settings.
impl From<&str> for FieldLocations {
    fn from(location: &str) -> Self {
        location.to_owned().into()
    }
}

impl<const N: usize> From<[&str; N]> for FieldLocations {
    fn from(locations: [&str; N]) -> Self {
        Self(locations.map(|location| location.to_owned().into()).into())
    }
}

/// Locations as in the settings.
impl FromIterator<String> for FieldLocations {
    fn from_iter<I: IntoIterator<Item = String>>(locations: I) -> Self {
        Self(locations.into_iter().map(Into::into).collect())
    }
}

impl From<String> for FieldLocation {
    fn from(location: String) -> Self {
        match location.strip_prefix(HEADER) {
            Some(header) => Self::Header(header.to_owned()),
            None => Self::Pointer(location),
        }
    }
}

impl fmt::Display for FieldLocations {
    /// Lists the locations as in the settings, each in backquotes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, location) in self.0.iter().enumerate() {
            let or = if index == 0 { "" } else { " or " };
            match location {
                FieldLocation::Pointer(pointer) => write!(f, "{or}`{pointer}`")?,
                FieldLocation::Header(name) => write!(f, "{or}`{HEADER}{name}`")?,
            }
        }
        Ok(())
    }
}

pub(super) fn read(reader: &mut SettingsReader) -> Option<InputConfig> {
    let [event_id, content_id, revision, op, community_id, text] =
        ["event_id", "content_id", "revision", "op", "community_id", "text"]
            .map(|field| locations(reader, &format!("input.{field}")));
    let ops = ops(reader);
    let max_bytes = reader.integer("input.max_bytes", 1024..=64 << 20);
    Some(InputConfig {
        fields: InputFields {
            event_id: event_id?,
            content_id: content_id?,
            revision: revision?,
            op: op?,
            community_id: community_id?,
            text: text?,
            ops,
        },
        max_bytes: max_bytes?,
    })
}

fn locations(reader: &mut SettingsReader, key: &str) -> Option<FieldLocations> {
    let locations = reader.string_or_list(key)?;
    if !locations.is_empty() && locations.iter().all(|location| is_location(location)) {
        return Some(locations.into_iter().collect());
    }
    reader.fault(
        key,
        "expected a JSON pointer such as \"/text\" or \"/payload/body\", a header such as \"header:ce_type\", or a \
         list of these",
    );
    None
}

fn is_location(location: &str) -> bool {
    if let Some(header) = location.strip_prefix(HEADER) {
        return !header.is_empty();
    }
    // In RFC 6901, `~` is always followed by 0 or 1.
    let are_escapes_valid = location.split('~').skip(1).all(|rest| rest.starts_with(['0', '1']));
    location.starts_with('/') && are_escapes_valid
}

fn ops(reader: &mut SettingsReader) -> BTreeMap<String, Op> {
    let mut ops = BTreeMap::new();
    for (value, meaning) in reader.entries("input.ops") {
        let name = meaning.scalar().unwrap_or_default();
        match OPS.iter().find(|(known, _)| *known == name) {
            Some(&(_, op)) => {
                ops.insert(value, op);
            }
            None => reader.reject(&meaning, "expected \"create\", \"edit\" or \"delete\""),
        }
    }
    ops
}
