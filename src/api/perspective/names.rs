//! The two names of a field.
//!
//! Google's APIs are defined as protocol buffers, whose JSON form accepts a field by its name in JSON
//! (`requestedAttributes`) and by its name in the definition (`requested_attributes`), but not by both at once.
//! <https://protobuf.dev/programming-guides/json/#field-names>

use serde_json::Value;

use crate::api::body::Fields;
use crate::api::error::ApiError;

/// The name of a field in the definition, and its name in JSON, if they differ.
type Names = (&'static str, &'static str);

/// The fields of the requests of both methods.
const REQUEST: [Names; 8] = [
    ("requested_attributes", "requestedAttributes"),
    ("attribute_scores", "attributeScores"),
    ("span_annotations", "spanAnnotations"),
    ("drop_unsupported_attributes", "dropUnsupportedAttributes"),
    ("do_not_store", "doNotStore"),
    ("client_token", "clientToken"),
    ("community_id", "communityId"),
    ("session_id", "sessionId"),
];

/// The fields of an attribute that is asked for.
const ATTRIBUTE: [Names; 2] = [("score_type", "scoreType"), ("score_threshold", "scoreThreshold")];

/// The fields of the suggested scores of an attribute.
const SCORES: [Names; 2] = [("summary_score", "summaryScore"), ("span_scores", "spanScores")];

/// The fields of the context.
const CONTEXT: [Names; 1] = [("article_and_parent_comment", "articleAndParentComment")];

/// Reads a body and gives its fields their names in JSON.
///
/// # Errors
/// Returns an error if the body is not one object in JSON, or if it has a field by both of its names.
pub(super) fn read_fields(body: &[u8]) -> Result<Fields<'_>, ApiError> {
    let mut fields = Fields::read(body)?;
    let body = fields.body_mut();
    rename(body, "", &REQUEST)?;
    if let Some(context) = body.get_mut("context") {
        rename(context, "context.", &CONTEXT)?;
    }
    for (map, names) in [("requestedAttributes", ATTRIBUTE), ("attributeScores", SCORES)] {
        // The names of attributes are keys of a map, which have one name only.
        let attributes = body.get_mut(map).and_then(Value::as_object_mut);
        for (attribute, value) in attributes.into_iter().flatten() {
            rename(value, &format!("{map}.{attribute}."), &names)?;
        }
    }
    Ok(fields)
}

/// Gives the fields of an object their names in JSON.
fn rename(object: &mut Value, place: &str, names: &[Names]) -> Result<(), ApiError> {
    let Value::Object(fields) = object else { return Ok(()) };
    for &(defined, in_json) in names {
        let Some(value) = fields.remove(defined) else {
            continue;
        };
        if fields.contains_key(in_json) {
            let message = format!("expected one of the names `{in_json}` and `{defined}`, not both");
            return Err(ApiError::invalid(message).at(format!("{place}{in_json}")));
        }
        fields.insert(in_json.to_owned(), value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(body: &Value) -> Result<Value, String> {
        let text = body.to_string();
        match read_fields(text.as_bytes()) {
            Ok(mut fields) => Ok(fields.body_mut().clone()),
            Err(error) => Err(error.field.unwrap_or_default().into_owned()),
        }
    }

    #[test]
    fn fields_are_accepted_by_either_name() {
        let defined = json!({
            "comment": {"text": "a hat"}, "context": {"article_and_parent_comment": {}}, "do_not_store": true,
            "requested_attributes": {"A_B": {"score_type": "PROBABILITY", "score_threshold": 0.5}, "C": null},
            "attribute_scores": {"A_B": {"summary_score": {"value": 1}}}, "span_annotations": false,
            "drop_unsupported_attributes": true, "client_token": "c", "community_id": "d", "session_id": "e",
        });
        let in_json = json!({
            "comment": {"text": "a hat"}, "context": {"articleAndParentComment": {}}, "doNotStore": true,
            "requestedAttributes": {"A_B": {"scoreType": "PROBABILITY", "scoreThreshold": 0.5}, "C": null},
            "attributeScores": {"A_B": {"summaryScore": {"value": 1}}}, "spanAnnotations": false,
            "dropUnsupportedAttributes": true, "clientToken": "c", "communityId": "d", "sessionId": "e",
        });
        assert_eq!(read(&defined).as_ref(), Ok(&in_json));
        assert_eq!(read(&in_json).as_ref(), Ok(&in_json));
    }

    #[test]
    fn a_field_by_both_names_is_refused() {
        for (body, field) in [
            (json!({"do_not_store": true, "doNotStore": true}), "doNotStore"),
            (json!({"client_token": null, "clientToken": "c"}), "clientToken"),
            (
                json!({"requested_attributes": {"A": {"score_type": "B", "scoreType": "B"}}}),
                "requestedAttributes.A.scoreType",
            ),
            (
                json!({"context": {"article_and_parent_comment": {}, "articleAndParentComment": {}}}),
                "context.articleAndParentComment",
            ),
        ] {
            assert_eq!(read(&body), Err(field.to_owned()), "{body}");
        }
    }
}
