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

/// What a request asks for.
struct Asked {
    comment: TextField,
    spans: Vec<Span>,
    attributes: Vec<Requested>,
    languages: Languages,
    /// Whether attributes that do not support the language are left out instead of refused.
    drops_unsupported: bool,
    community_id: Option<String>,
    client_token: Option<String>,
}

impl Asked {
    /// Reads a request. The parsed body takes far more memory than its bytes, so it does not outlive this.
    fn read(call: &Call) -> Result<Self, ApiError> {
        let fields = Fields::read(&call.body.bytes)?;
        let comment = comment(&fields, call.shared.input.max_bytes)?;
        check_context(&fields)?;
        let spans = if fields.flag("/spanAnnotations")? {
            sentences(&comment.text)
        } else {
            Vec::new()
        };
        Ok(Self {
            attributes: requested_attributes(&call.shared, &fields)?,
            languages: Languages::read(&fields, &comment.text)?,
            drops_unsupported: fields.flag("/dropUnsupportedAttributes")?,
            community_id: fields.optional_text("/communityId")?,
            client_token: fields.optional_text("/clientToken")?,
            comment,
            spans,
        })
    }

    /// Checks whether the attributes support the language of the comment. Returns whether they do.
    ///
    /// # Errors
    /// Returns an error if they do not, unless such attributes are to be left out.
    fn check_support(&self, is_supported: bool) -> Result<bool, ApiError> {
        match self.attributes.first() {
            Some(first) if !is_supported && !self.drops_unsupported => {
                Err(language_not_supported(&first.name, &self.languages))
            }
            _ => Ok(is_supported),
        }
    }
}

async fn analyze_comment(call: Call) -> Result<Response, ApiError> {
    let asked = Asked::read(&call)?;
    let judge = call.shared.status.judge.get();
    let known = judge.policy.languages();
    let is_known = asked.check_support(!known.is_some_and(|known| asked.languages.excludes(known)))?;
    call.shared.check_count(1 + asked.spans.len())?;
    let parts = asked.spans.iter().map(|span| TextField {
        text: span.text.clone(),
        replaced_surrogates: 0,
    });
    let texts = std::iter::once(asked.comment.clone()).chain(parts).collect();
    let decisions = call.decide(texts, asked.community_id.clone()).await?;
    let (whole, parts) = decisions
        .split_first()
        .ok_or_else(|| ApiError::new(Kind::Unscorable, "the comment has no score"))?;

    // In another script or language, a probability would mean nothing, so there is none.
    let competence = whole.scoring.as_ref().and_then(|scoring| scoring.competence);
    let is_supported = asked.check_support(is_known && competence != Some(Competence::OutOfScope))?;
    let mut scores = Map::new();
    for attribute in asked.attributes {
        // There is one classifier, so that every attribute has its probability.
        let value = probability(whole);
        if is_supported && value >= attribute.threshold {
            let spans = span_scores(&asked.spans, parts);
            let mut score = json!({"summaryScore": score(value)});
            if !spans.is_empty() {
                score["spanScores"] = spans.into();
            }
            scores.insert(attribute.name, score);
        }
    }
    let mut body = json!({"attributeScores": scores, "decision": whole});
    asked.languages.describe(&mut body);
    if let Some(token) = asked.client_token {
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
