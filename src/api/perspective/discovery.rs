//! `GET /$discovery/rest`: the document from which Google's API clients build their methods.

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::Response;
use serde_json::Value;

use crate::api::call::{Shared, json};

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
    json(&document)
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
