//! Reads JSON objects that other programs wrote, exactly.
//!
//! Two things that common writers do are accepted: a byte order mark before the value, and half of a surrogate pair as an
//! escape, which UTF-8 cannot represent and which is read as U+FFFD. Such halves are counted, so that the caller can say
//! so. Integers of any size keep their digits. An object that has the same field twice is refused, because parsers differ
//! in which one they use.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// The byte order mark in UTF-8, which some editors and spreadsheets write at the beginning of a file.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The length of an escape such as `\ud83d`.
const ESCAPE_BYTES: usize = 6;

/// A JSON value with the text that it was read from.
pub(crate) struct Document<'a> {
    value: Value,
    text: Cow<'a, str>,
    /// Where in the text halves of surrogate pairs were replaced, in ascending order.
    replaced: Vec<usize>,
}

/// The reason why bytes are not a JSON value. It quotes nothing.
#[derive(Debug)]
pub(crate) enum JsonError {
    /// The byte at this offset is not part of a character in UTF-8.
    NotUtf8 { offset: usize },
    /// Not JSON, nested too deeply, or with a duplicate field, which is a [data error](serde_json::Error::is_data).
    NotJson(serde_json::Error),
}

impl<'a> Document<'a> {
    /// Reads the one JSON value of `bytes`.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, JsonError> {
        let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
        let text = std::str::from_utf8(bytes).map_err(|error| JsonError::NotUtf8 {
            offset: error.valid_up_to(),
        })?;
        let replaced = lone_surrogates(text.as_bytes());
        let text = if replaced.is_empty() {
            Cow::Borrowed(text)
        } else {
            Cow::Owned(with_replacements(text, &replaced))
        };
        // serde_json rejects more than 128 levels of nesting, long before the stack overflows.
        let UniqueFields(value) = serde_json::from_str(&text).map_err(JsonError::NotJson)?;
        Ok(Self { value, text, replaced })
    }

    /// Returns the value as serde_json represents it.
    pub(crate) fn value(&self) -> &Value {
        &self.value
    }

    /// Returns the value for changes. What is counted in the text does not follow them.
    pub(crate) fn value_mut(&mut self) -> &mut Value {
        &mut self.value
    }

    /// Returns the number of halves of surrogate pairs in the value at a JSON pointer, each of which was replaced by
    /// U+FFFD.
    pub(crate) fn replaced_surrogates(&self, pointer: &str) -> usize {
        if self.replaced.is_empty() {
            return 0;
        }
        let Some(raw) = self.raw(pointer) else { return 0 };
        self.replaced_within(raw)
    }

    /// Returns the number of halves of surrogate pairs in each item of the list at a JSON pointer, or nothing if there are
    /// none in the whole document. Takes as long for all items as [`Document::replaced_surrogates`] does for one.
    pub(crate) fn replaced_in_items(&self, pointer: &str) -> Vec<usize> {
        if self.replaced.is_empty() {
            return Vec::new();
        }
        let items: Option<Vec<&RawValue>> = self.raw(pointer).and_then(|raw| serde_json::from_str(raw).ok());
        let items = items.unwrap_or_default().into_iter();
        items.map(|item| self.replaced_within(item.get())).collect()
    }

    /// Returns the number of halves of surrogate pairs in a part of the text.
    fn replaced_within(&self, raw: &str) -> usize {
        let start = raw.as_ptr().addr() - self.text.as_ptr().addr();
        let before = |end: usize| self.replaced.partition_point(|&at| at < end);
        before(start + raw.len()) - before(start)
    }

    /// Returns the digits of the integer at a JSON pointer as they were written, or `None` if the value is something
    /// else, such as a number with an exponent.
    pub(crate) fn integer(&self, pointer: &str) -> Option<String> {
        match self.value.pointer(pointer)? {
            Value::Number(number) if number.is_i64() || number.is_u64() => Some(number.to_string()),
            // serde_json reads an integer of more than 64 bits as the nearest f64.
            Value::Number(_) => {
                let raw = self.raw(pointer)?;
                let digits = raw.strip_prefix('-').unwrap_or(raw);
                digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| raw.to_owned())
            }
            _ => None,
        }
    }

    /// Returns the text of the value at a JSON pointer, as a part of `self.text`.
    fn raw(&self, pointer: &str) -> Option<&str> {
        let mut raw: &RawValue = serde_json::from_str(&self.text).ok()?;
        for name in pointer.split('/').skip(1) {
            let name = name.replace("~1", "/").replace("~0", "~");
            raw = if raw.get().starts_with('{') {
                let fields: BTreeMap<Cow<'_, str>, &RawValue> = serde_json::from_str(raw.get()).ok()?;
                fields.get(name.as_str()).copied()?
            } else {
                let items: Vec<&RawValue> = serde_json::from_str(raw.get()).ok()?;
                items.get(name.parse::<usize>().ok()?).copied()?
            };
        }
        Some(raw.get())
    }
}

/// Returns the type of a value in words, for errors that must not quote it.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Returns the offset of each escape that is half of a surrogate pair without the other half.
///
/// A backslash outside of a string is not JSON, so strings need not be told apart.
fn lone_surrogates(json: &[u8]) -> Vec<usize> {
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(next) = json
        .get(at..)
        .and_then(|rest| rest.iter().position(|&byte| byte == b'\\'))
    {
        at += next;
        match surrogate(&json[at..]) {
            // The character after the backslash may be another one.
            None => at += 2,
            Some(Half::Leading) if matches!(surrogate(&json[at + ESCAPE_BYTES..]), Some(Half::Trailing)) => {
                at += 2 * ESCAPE_BYTES;
            }
            Some(_) => {
                found.push(at);
                at += ESCAPE_BYTES;
            }
        }
    }
    found
}

/// Half of a surrogate pair, by which UTF-16 and JSON's escapes represent a character above U+FFFF.
enum Half {
    Leading,
    Trailing,
}

/// Returns the half of a surrogate pair that the escape at the beginning of `json` stands for, if it does.
fn surrogate(json: &[u8]) -> Option<Half> {
    let [b'\\', b'u', b'd' | b'D', second, third, fourth, ..] = json else {
        return None;
    };
    if !third.is_ascii_hexdigit() || !fourth.is_ascii_hexdigit() {
        return None;
    }
    match second {
        b'8' | b'9' | b'a' | b'b' | b'A' | b'B' => Some(Half::Leading),
        b'c'..=b'f' | b'C'..=b'F' => Some(Half::Trailing),
        _ => None,
    }
}

/// Returns the text with the escape of U+FFFD in place of the escapes at these offsets. Offsets do not change.
fn with_replacements(text: &str, offsets: &[usize]) -> String {
    let (mut repaired, mut end) = (String::with_capacity(text.len()), 0);
    for &at in offsets {
        repaired.push_str(&text[end..at]);
        repaired.push_str("\\ufffd");
        end = at + ESCAPE_BYTES;
    }
    repaired.push_str(&text[end..]);
    repaired
}

/// A JSON value in which no object has duplicate fields.
struct UniqueFields(Value);

impl<'de> Deserialize<'de> for UniqueFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueFieldsVisitor).map(Self)
    }
}

struct UniqueFieldsVisitor;

impl<'de> Visitor<'de> for UniqueFieldsVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(UniqueFields(value)) = values.next_element()? {
            list.push(value);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut object = serde_json::Map::new();
        while let Some((name, UniqueFields(value))) = entries.next_entry::<String, UniqueFields>()? {
            if object.insert(name, value).is_some() {
                return Err(A::Error::custom("duplicate field"));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text_of(json: &str) -> (String, usize) {
        let document = Document::read(json.as_bytes()).unwrap();
        let text = document.value()["text"].as_str().unwrap().to_owned();
        (text, document.replaced_surrogates("/text"))
    }

    #[test]
    fn half_a_surrogate_pair_is_replaced_and_counted() {
        let check = |escaped: &str, expected: &str, replaced| {
            let json = format!(r#"{{"before":"\ud800","text":"{escaped}","after":["\udfff"]}}"#);
            assert_eq!(text_of(&json), (expected.to_owned(), replaced), "{escaped}");
        };
        check(r"have a nice day \ud83d", "have a nice day \u{fffd}", 1);
        check(r"have \udc00 a nice day", "have \u{fffd} a nice day", 1);
        check(r"\ud83c\udf31", "\u{1f331}", 0);
        check(r"\uD83C\uDF31", "\u{1f331}", 0);
        check(r"\ud83c\ud83c\udf31", "\u{fffd}\u{1f331}", 1);
        check(r"\udf31\ud83c", "\u{fffd}\u{fffd}", 2);
        check(r"\ud83cx\udf31", "\u{fffd}x\u{fffd}", 2);
        check(r"\ud83c\n", "\u{fffd}\n", 1);
        // A backslash that is escaped itself begins no escape.
        check(r"\\ud83c", r"\ud83c", 0);
        check(r"\\\ud83c", "\\\u{fffd}", 1);
        // A text may contain U+FFFD itself.
        check(r"\ufffd\ud7ff\ue000", "\u{fffd}\u{d7ff}\u{e000}", 0);
    }

    #[test]
    fn what_is_no_escape_stays_an_error() {
        for json in [
            r#""\ud8""#,
            r#""\ud8zz""#,
            r#""\ud83c\u""#,
            r#""\"#,
            r#""\ud83"#,
            r"\ud83c",
            r#"{"a":1,"a":2}"#,
        ] {
            let error = Document::read(json.as_bytes()).err();
            assert!(matches!(error, Some(JsonError::NotJson(_))), "{json}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        let document = Document::read(b"\xef\xbb\xbf{\"a\":1}").unwrap();
        assert_eq!(document.value(), &serde_json::json!({"a": 1}));
        assert!(Document::read(b"\xef\xbb\xbf\xef\xbb\xbf{}").is_err());
        assert!(Document::read(b"{\"a\":\xef\xbb\xbf1}").is_err());
    }

    #[test]
    fn integers_keep_their_digits() {
        let check = |number: &str, expected: Option<&str>| {
            let json = format!(r#"{{"a":[null,{{"x/y":{number}}}]}}"#);
            let document = Document::read(json.as_bytes()).unwrap();
            assert_eq!(document.integer("/a/1/x~1y").as_deref(), expected, "{number}");
        };
        for number in [
            "0",
            "-7",
            "9223372036854775807",
            "18446744073709551615",
            "18446744073709551616",
            "12345678901234567890123",
            "-12345678901234567890123",
        ] {
            check(number, Some(number));
        }
        for other in ["1.0", "1e3", "12345678901234567890123.0", "1E30", "\"1\"", "null"] {
            check(other, None);
        }
    }

    proptest! {
        /// What JavaScript writes for any sequence of UTF-16 units is read as Rust reads these units.
        #[test]
        fn any_utf16_is_read_with_replacements(units in prop::collection::vec(prop_oneof![
            any::<u16>(), 0xd800_u16..0xe000, Just(u16::from(b'\\')), Just(u16::from(b'u')),
        ], 0..20)) {
            let escaped: String = units.iter().map(|unit| format!("\\u{unit:04x}")).collect();
            let expected = String::from_utf16_lossy(&units);
            let lone = char::decode_utf16(units).filter(Result::is_err).count();
            prop_assert_eq!(text_of(&format!(r#"{{"text":"{escaped}"}}"#)), (expected, lone));
        }

        #[test]
        fn any_json_is_read_as_serde_json_reads_it(text in any::<String>(), number in any::<f64>()) {
            let value = serde_json::json!({ "a": [text, { "b": number }], "c": null });
            let json = value.to_string();
            let document = Document::read(json.as_bytes()).unwrap();
            prop_assert_eq!(document.value(), &value);
            prop_assert_eq!(document.replaced_surrogates("/a"), 0);
        }
    }
}
