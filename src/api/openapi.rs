//! `GET /openapi.json`: the description of the API in the form of OpenAPI.
//!
//! Answers are described by their types, a comment by the settings that say where its fields are, and Perspective's form by
//! the document that Google's clients read, so that each is described once.

use axum::body::Bytes;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use utoipa::OpenApi;

use super::error::Kind;
use super::{openai, perspective, score};
use crate::config::{ApiConfig, FieldLocation, FieldLocations, InputFields};
use crate::message::Decision;

/// What the macros describe; [`document`] adds what depends on the settings, and what all endpoints have in common.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "moderatord",
        description = "Scores comments: the probability that each is hateful, and a decision."
    ),
    paths(score::score, openai::moderations),
    components(schemas(Decision, score::Problem))
)]
struct Described;

/// Why a request can fail, with when it does.
const FAILURES: [(Kind, &str); 8] = [
    (Kind::Invalid, "the body is not what the endpoint expects"),
    (Kind::TokenUnknown, "the token is missing or unknown"),
    (Kind::SlowBody, "the body did not arrive in time"),
    (
        Kind::TooLarge,
        "the body, or the number of comments in it, is over its limit",
    ),
    (
        Kind::Unscorable,
        "this text cannot be scored; trying again does not help",
    ),
    (
        Kind::Busy,
        "the caller's share of the queue, or of the memory for bodies, is used up; try again after `Retry-After`",
    ),
    (Kind::Unavailable, "the service is stopping"),
    (Kind::TimedOut, "not scored in time"),
];

/// The path of our own endpoint.
const SCORE: &str = "/v1/score";

/// The part of a decision that says whether it has a score.
const SCORING: &str = "/components/schemas/Decision/allOf/0";

/// The document, as the endpoint answers it.
#[derive(Clone)]
pub(super) struct OpenApiDocument(Bytes);

impl OpenApiDocument {
    /// Describes the API with these settings.
    pub fn new(config: &ApiConfig, fields: &InputFields) -> Self {
        Self(document(config, fields).to_string().into())
    }

    /// Answers with the document.
    pub fn answer(self) -> Response {
        ([(header::CONTENT_TYPE, "application/json")], self.0).into_response()
    }
}

fn document(config: &ApiConfig, fields: &InputFields) -> Value {
    // The types of the macros have a JSON form, which is easier to extend than they are.
    let mut document = serde_json::to_value(Described::openapi()).unwrap_or_default();
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    document["components"]["schemas"]["Comment"] = comment(fields);
    describe_body(
        &mut document["paths"]["/v1/moderations"]["post"]["requestBody"],
        openai::described_request(),
    );
    let score = &mut document["paths"][SCORE]["post"];
    describe_body(&mut score["requestBody"], one_or_many("Comment"));
    describe_body(&mut score["responses"]["200"], one_or_many("Decision"));
    // A deletion has no score, which the macro cannot say of fields without a name of their own.
    let scored = json!({"$ref": "#/components/schemas/Scoring"});
    let deleted = json!({"type": "object", "properties": {"action": {"const": "delete"}}});
    if let Some(part) = document.pointer_mut(SCORING) {
        *part = json!({"anyOf": [scored, deleted]});
    }
    for (name, method) in perspective::described_methods() {
        document["paths"][name] = json!({"post": method});
    }
    for (name, schema) in perspective::described_schemas() {
        document["components"]["schemas"][name] = schema;
    }
    let paths = document["paths"].as_object_mut().into_iter().flat_map(Map::iter_mut);
    for (path, methods) in paths {
        describe_failures(&mut methods["post"]["responses"], path);
        methods["post"]["requestBody"]["required"] = true.into();
        if config.tokens.is_some() {
            // Each entry of the list is enough by itself.
            methods["post"]["security"] = if is_perspective(path) {
                json!([{"key": []}, {"googleKey": []}, {"bearer": []}])
            } else {
                json!([{"bearer": []}])
            };
        }
    }
    if config.tokens.is_some() {
        document["components"]["securitySchemes"] = json!({
            "bearer": {"type": "http", "scheme": "bearer", "description": "The token of the caller."},
            "key": {"type": "apiKey", "in": "query", "name": "key", "description": "The token of the caller."},
            "googleKey": {"type": "apiKey", "in": "header", "name": "X-Goog-Api-Key", "description": "The token of the caller."},
        });
    }
    document
}

/// Returns whether a path is that of one of Perspective's methods.
fn is_perspective(path: &str) -> bool {
    path.contains(':')
}

/// Describes a body in JSON.
fn describe_body(body: &mut Value, schema: Value) {
    body["content"] = json!({"application/json": {"schema": schema}});
}

/// Describes a value of a type, or a list of such values.
fn one_or_many(name: &str) -> Value {
    let one = json!({"$ref": format!("#/components/schemas/{name}")});
    json!({"oneOf": [one, {"type": "array", "items": one}]})
}

/// Adds the answers of requests that fail.
fn describe_failures(responses: &mut Value, path: &str) {
    for (kind, description) in FAILURES {
        let (status, description) = if is_perspective(path) && kind == Kind::TokenUnknown {
            // Google answers a wrong key like any wrong request.
            (StatusCode::FORBIDDEN, "the token is missing")
        } else {
            (kind.status(), description)
        };
        let response = &mut responses[status.as_str()];
        *response = json!({"description": description});
        if path == SCORE {
            let problem = json!({"$ref": "#/components/schemas/Problem"});
            response["content"] = json!({"application/problem+json": {"schema": problem}});
        }
    }
}

/// Describes a comment, whose fields are where the settings say.
fn comment(fields: &InputFields) -> Value {
    let mut comment = object();
    comment["description"] = "A comment. Fields that are not described here are ignored.".into();
    let id = |what: &str| json!({"type": ["string", "integer", "null"], "description": what});
    let operations: Vec<&str> = fields.ops.keys().map(String::as_str).collect();
    let operations = format!(
        "One of: {}. A comment without one is a new comment.",
        operations.join(", ")
    );
    let text =
        json!({"type": ["string", "null"], "description": "The text to score; needed unless the comment was deleted."});
    let revision = json!({"type": ["integer", "string", "null"], "format": "int64", "description": "The revision of the content."});
    for (locations, schema) in [
        (&fields.event_id, id("The id of the event.")),
        (&fields.content_id, id("The id of the content.")),
        (&fields.revision, revision),
        (&fields.op, json!({"description": operations})),
        (&fields.community_id, id("The community, which selects the thresholds.")),
        (&fields.text, text),
    ] {
        place(&mut comment, locations, &schema);
    }
    comment
}

fn object() -> Value {
    json!({"type": "object", "properties": {}})
}

/// Adds a field to the description of a comment, at each of its locations in the body.
fn place(comment: &mut Value, locations: &FieldLocations, schema: &Value) {
    for location in locations.iter() {
        let FieldLocation::Pointer(pointer) = location else {
            continue;
        };
        let mut parent = &mut *comment;
        let mut names = pointer
            .split('/')
            .skip(1)
            .map(|name| name.replace("~1", "/").replace("~0", "~"))
            .peekable();
        while let Some(name) = names.next() {
            let is_last = names.peek().is_none();
            let properties = &mut parent["properties"];
            let property = &mut properties[name];
            if property.is_null() {
                *property = if is_last { schema.clone() } else { object() };
            }
            parent = property;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_is_described_where_the_settings_say_that_it_is() {
        let fields = InputFields {
            text: ["/post/body~1text", "/post/title", "header:text"].into(),
            ..InputFields::default()
        };
        let described = comment(&fields);
        let properties = &described["properties"];
        assert_eq!(properties["post"]["properties"]["body/text"]["type"][0], "string");
        assert_eq!(properties["post"]["properties"]["title"]["type"][0], "string");
        assert!(properties["text"].is_null() && properties["header:text"].is_null());
        assert_eq!(properties["content_id"]["type"], json!(["string", "integer", "null"]));
    }
}
