//! `GET /$discovery/rest`: the document from which Google's API clients build their methods.

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::Response;
use serde_json::{Value, json};

use crate::api::call::{Shared, json as json_answer};

/// The document, in Google's discovery format, for the two methods.
const DOCUMENT: &str = include_str!("discovery.json");

/// Answers with the document, with this server as the root of all methods.
pub(in crate::api) async fn discovery(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let scheme = if shared.config.tls.is_some() { "https" } else { "http" };
    let root = format!("{scheme}://{}/", host.unwrap_or("localhost"));
    let mut document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
    for key in ["rootUrl", "baseUrl"] {
        document[key] = root.clone().into();
    }
    json_answer(&document)
}

/// Returns the path of each method with its description in OpenAPI's form.
pub(in crate::api) fn described_methods() -> Vec<(String, Value)> {
    let document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
    let methods = document["resources"]["comments"]["methods"]
        .as_object()
        .into_iter()
        .flatten();
    let described = |(name, method): (&String, &Value)| {
        let content = |side: &str| json!({"application/json": {"schema": as_open_api(&method[side])}});
        let described = json!({
            "operationId": name,
            "summary": method["description"],
            "requestBody": {"required": true, "content": content("request")},
            "responses": {"200": {"description": "The result.", "content": content("response")}},
        });
        (format!("/{}", method["path"].as_str().unwrap_or_default()), described)
    };
    methods.map(described).collect()
}

/// Returns the types of Perspective's form, by name, in OpenAPI's form.
pub(in crate::api) fn described_schemas() -> Vec<(String, Value)> {
    let document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
    let schemas = document["schemas"].as_object().into_iter().flatten();
    schemas
        .map(|(name, schema)| (name.clone(), as_open_api(schema)))
        .collect()
}

/// Translates a schema of a discovery document, which is an old form of JSON Schema.
fn as_open_api(schema: &Value) -> Value {
    match schema {
        Value::Object(fields) => {
            let field = |(name, value): (&String, &Value)| match (name.as_str(), value) {
                // A name for generators of clients, and a type that is none.
                ("id", Value::String(_)) => None,
                ("type", Value::String(kind)) if kind == "any" => None,
                ("$ref", Value::String(other)) => Some((name.clone(), format!("#/components/schemas/{other}").into())),
                _ => Some((name.clone(), as_open_api(value))),
            };
            Value::Object(fields.iter().filter_map(field).collect())
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_both_methods() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let methods = &document["resources"]["comments"]["methods"];
        assert_eq!(methods["analyze"]["path"], "v1alpha1/comments:analyze");
        assert_eq!(methods["suggestscore"]["path"], "v1alpha1/comments:suggestscore");
        for method in ["analyze", "suggestscore"] {
            for side in ["request", "response"] {
                let schema = methods[method][side]["$ref"].as_str().unwrap();
                assert!(document["schemas"][schema].is_object(), "{schema}");
            }
        }
    }
}
