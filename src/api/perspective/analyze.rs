//! `POST /v1alpha1/comments:analyze`: the scores of a comment.

use std::ops::Range;

use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::error::{Cause, language_not_supported};
use super::names::read_fields;
use super::request::{ANALYZE, Languages, check_context, comment};
use super::spans::{Span, sentences, utf16_length};
use crate::api::body::{Fields, TextField};
use crate::api::call::{Call, Shared, answer};
use crate::api::error::{ApiError, Kind};
use crate::message::{Competence, Decision};
use crate::prompt::language;

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
        let fields = read_fields(&call.body.bytes)?;
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
    let mut asked = Asked::read(&call)?;
    let judge = call.shared.status.judge.get();
    let known = judge.policy.languages();
    let is_known = asked.check_support(!known.is_some_and(|known| asked.languages.excludes(known)))?;
    let (sentences, most) = (asked.spans.len(), call.shared.config.limits.comments);
    if sentences >= most {
        let message = format!(
            "{sentences} sentences to annotate, expected less than {most} (api.limits.comments); leave out spanAnnotations"
        );
        return Err(ApiError::new(Kind::TooLarge, message));
    }
    let parts = asked.spans.iter().map(|span| TextField {
        text: span.text.clone(),
        replaced_surrogates: 0,
    });
    let (whole, parts) = call
        .decide_with_parts(asked.comment.clone(), parts.collect(), asked.community_id.clone())
        .await?;

    // In another script or language, a probability would mean nothing, so there is none.
    let competence = whole.scoring.as_ref().and_then(|scoring| scoring.competence);
    let is_in_scope = competence != Some(Competence::OutOfScope);
    if !is_in_scope {
        // Whatever the request says, this is the language that the attribute does not support.
        asked.languages = Languages::Detected(language(&asked.comment.text));
    }
    let is_supported = asked.check_support(is_known && is_in_scope)?;
    let mut scores = Map::new();
    for attribute in asked.attributes {
        // There is one classifier, so that every attribute has its probability.
        let value = probability(&whole);
        if is_supported && value >= attribute.threshold {
            // Without annotations, there is one span, as in the original.
            let spans = match &asked.spans[..] {
                [] => vec![span_score(&(0..utf16_length(&asked.comment.text)), value)],
                spans => span_scores(spans, &parts),
            };
            scores.insert(
                attribute.name,
                json!({"summaryScore": score(value), "spanScores": spans}),
            );
        }
    }
    let mut body = json!({"attributeScores": scores, "decision": whole});
    asked.languages.describe(&mut body);
    if let Some(token) = asked.client_token {
        body["clientToken"] = token.into();
    }
    call.json(&body)
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
        let place = |field: &str| format!("requestedAttributes.{name}{field}");
        if !(settings.is_object() || settings.is_null()) {
            return Err(ApiError::invalid("expected an object").at(place("")));
        }
        match settings.get("scoreType") {
            None | Some(Value::Null) => {}
            Some(Value::String(kind)) if [PROBABILITY, "SCORE_TYPE_UNSPECIFIED"].contains(&kind.as_str()) => {}
            Some(Value::String(other)) => {
                let message = format!("Requested score type {other} is not supported by attribute {name}");
                return Err(ApiError::new(Kind::Unsupported, message));
            }
            Some(_) => return Err(ApiError::invalid("expected a text").at(place(".scoreType"))),
        }
        let threshold = match settings.get("scoreThreshold") {
            None | Some(Value::Null) => 0.0,
            Some(value) => value
                .as_f64()
                .ok_or_else(|| ApiError::invalid("expected a number").at(place(".scoreThreshold")))?,
        };
        Ok(Requested {
            name: name.clone(),
            threshold,
        })
    };
    attributes.iter().map(read).collect()
}

fn span_scores(spans: &[Span], decisions: &[Decision]) -> Vec<Value> {
    let pairs = spans.iter().zip(decisions);
    pairs
        .map(|(span, decision)| span_score(&span.place, probability(decision)))
        .collect()
}

fn span_score(place: &Range<usize>, value: f64) -> Value {
    json!({"begin": place.start, "end": place.end, "score": score(value)})
}

fn score(value: f64) -> Value {
    json!({"value": value, "type": PROBABILITY})
}

/// Returns the probability of a comment that was scored.
fn probability(decision: &Decision) -> f64 {
    decision.scoring.as_ref().map_or(0.0, |scoring| scoring.probability)
}
