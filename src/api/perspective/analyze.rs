//! `POST /v1alpha1/comments:analyze`: the scores of a comment.

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::error::{Cause, language_not_supported};
use super::request::{ANALYZE, Languages, check_context, comment};
use super::spans::{Span, sentences};
use crate::api::body::{Fields, TextField};
use crate::api::call::{Call, Shared, answer, json as json_answer};
use crate::api::error::{ApiError, Kind};
use crate::message::{Competence, Decision};

/// The type of all scores.
const PROBABILITY: &str = "PROBABILITY";

/// An attribute that is asked for.
struct Requested {
    name: String,
    /// Scores below this are not returned.
    threshold: f64,
}

pub(in crate::api) async fn analyze(State(shared): State<Shared>, request: Request<Body>) -> Response {
    answer(&ANALYZE, shared, request, analyze_comment).await
}

async fn analyze_comment(call: Call) -> Result<Response, ApiError> {
    let fields = Fields::read(&call.body.bytes)?;
    let comment = comment(&fields, call.shared.input.max_bytes)?;
    check_context(&fields)?;
    let requested = requested_attributes(&call.shared, &fields)?;
    let drops_unsupported = fields.flag("/dropUnsupportedAttributes")?;
    let languages = Languages::read(&fields, &comment.text)?;
    let judge = call.shared.status.judge.get();
    let is_excluded = judge.policy.languages().is_some_and(|known| languages.excludes(known));
    if let (true, false, Some(first)) = (is_excluded, drops_unsupported, requested.first()) {
        return Err(language_not_supported(&first.name, &languages));
    }
    let spans = if fields.flag("/spanAnnotations")? {
        sentences(&comment.text)
    } else {
        Vec::new()
    };
    call.shared.check_count(1 + spans.len())?;
    let parts = spans.iter().map(|span| TextField {
        text: span.text.clone(),
        replaced_surrogates: 0,
    });
    let texts = std::iter::once(comment.clone()).chain(parts).collect();
    let decisions = call.decide(texts, fields.optional_text("/communityId")?).await?;
    let (whole, parts) = decisions
        .split_first()
        .ok_or_else(|| ApiError::new(Kind::Unscorable, "the comment has no score"))?;

    // In another script or language, a probability would mean nothing, so there is none.
    let competence = whole.scoring.as_ref().and_then(|scoring| scoring.competence);
    let is_supported = !is_excluded && competence != Some(Competence::OutOfScope);
    if let (false, false, Some(first)) = (is_supported, drops_unsupported, requested.first()) {
        return Err(language_not_supported(&first.name, &languages));
    }
    let mut scores = Map::new();
    for attribute in requested {
        // There is one classifier, so that every attribute has its probability.
        let value = probability(whole);
        if is_supported && value >= attribute.threshold {
            let spans = span_scores(&spans, parts);
            let mut score = json!({"summaryScore": score(value)});
            if !spans.is_empty() {
                score["spanScores"] = spans.into();
            }
            scores.insert(attribute.name, score);
        }
    }
    let mut body = json!({"attributeScores": scores, "decision": whole});
    languages.describe(&mut body);
    if let Some(token) = fields.optional_text("/clientToken")? {
        body["clientToken"] = token.into();
    }
    Ok(json_answer(&body))
}

/// Reads the attributes that are asked for.
fn requested_attributes(shared: &Shared, fields: &Fields<'_>) -> Result<Vec<Requested>, ApiError> {
    let missing = || Cause::NoRequestedAttributes.error("Missing requested_attributes");
    let Some(Value::Object(attributes)) = fields.value("/requestedAttributes") else {
        return Err(missing());
    };
    if attributes.is_empty() {
        return Err(missing());
    }
    let read = |(name, settings): (&String, &Value)| {
        if !shared.config.attributes.contains_key(name) {
            let message = format!("Unknown requested attribute: {name}");
            return Err(ApiError::new(Kind::Unsupported, message));
        }
        match settings.get("scoreType").and_then(Value::as_str) {
            None | Some(PROBABILITY | "SCORE_TYPE_UNSPECIFIED") => {}
            Some(other) => {
                let message = format!("Requested score type {other} is not supported by attribute {name}");
                return Err(ApiError::new(Kind::Unsupported, message));
            }
        }
        let threshold = match settings.get("scoreThreshold") {
            None | Some(Value::Null) => 0.0,
            Some(value) => value.as_f64().ok_or_else(|| {
                let place = format!("requestedAttributes.{name}.scoreThreshold");
                ApiError::invalid("expected a number").at(place)
            })?,
        };
        Ok(Requested {
            name: name.clone(),
            threshold,
        })
    };
    attributes.iter().map(read).collect()
}

fn span_scores(spans: &[Span], decisions: &[Decision]) -> Vec<Value> {
    let span_score = |(span, decision): (&Span, &Decision)| json!({"begin": span.place.start, "end": span.place.end, "score": score(probability(decision))});
    spans.iter().zip(decisions).map(span_score).collect()
}

fn score(value: f64) -> Value {
    json!({"value": value, "type": PROBABILITY})
}

/// Returns the probability of a comment that was scored.
fn probability(decision: &Decision) -> f64 {
    decision.scoring.as_ref().map_or(0.0, |scoring| scoring.probability)
}
