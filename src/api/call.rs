//! Answers a request: authenticates its caller, reads its body, lets an endpoint answer it, and counts it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::http::request::Parts;
use axum::http::{HeaderValue, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use metrics::{counter, histogram};
use serde::Serialize;
use tokio::sync::oneshot;

use super::body::TextField;
use super::error::{ApiError, Kind};
use super::intake::Intake;
use super::memory::BodyMemory;
use super::newest::NewestVersion;
use super::request::{RequestBody, check_origin, deadline, discard};
use super::tokens::Callers;
use crate::config::{ApiConfig, InputConfig};
use crate::decide::{CurrentJudge, deleted};
use crate::kafka::feedback::FeedbackWriter;
use crate::message::{Comment, Decision, Op};
use crate::ops::health::Health;
use crate::ops::metrics::{self as names, Exporter};
use crate::stream::score::ScoreAnswer;

/// The name of the caller in metrics as long as it is not known.
const UNKNOWN_CALLER: &str = "unknown";

/// The longest id of a community that all comments of a request share.
const MAX_ID_BYTES: usize = 1024;

/// Where the facts about the service come from.
pub(crate) struct StatusSources {
    pub health: Arc<Health>,
    pub metrics: Exporter,
    pub judge: Arc<CurrentJudge>,
    /// The newest version in the registry.
    pub newest: NewestVersion,
    /// The settings in force by key, without secrets.
    pub configuration: BTreeMap<String, String>,
}

/// What the endpoints share.
#[derive(Clone)]
pub(super) struct Shared(Arc<SharedParts>);

pub(super) struct SharedParts {
    pub config: ApiConfig,
    /// Where the fields of a comment are located, in the comment format.
    pub input: InputConfig,
    pub intake: Intake,
    pub callers: Arc<Callers>,
    pub bodies: BodyMemory,
    pub status: StatusSources,
    /// Where suggestions go; `None` if there is no topic for them.
    pub feedback: Option<FeedbackWriter>,
}

impl std::ops::Deref for Shared {
    type Target = SharedParts;

    fn deref(&self) -> &SharedParts {
        &self.0
    }
}

impl Shared {
    pub fn new(parts: SharedParts) -> Self {
        Self(Arc::new(parts))
    }

    /// Checks the number of texts in a request.
    ///
    /// # Errors
    /// Returns an error that names the limit if there are more.
    pub fn check_count(&self, count: usize) -> Result<(), ApiError> {
        let most = self.config.limits.comments;
        if count <= most {
            return Ok(());
        }
        let message = format!("{count} comments in one request, expected at most {most} (api.limits.comments)");
        Err(ApiError::new(Kind::TooLarge, message))
    }
}

/// Returns the answers, or `None` if a text was dropped.
async fn all(waiting: Vec<oneshot::Receiver<ScoreAnswer>>) -> Option<Vec<ScoreAnswer>> {
    let mut answers = Vec::with_capacity(waiting.len());
    for answer in waiting {
        answers.push(answer.await.ok()?);
    }
    Some(answers)
}

/// Returns an answer with a value as JSON.
pub(super) fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
        // Only a map whose keys are not texts has no JSON form.
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// How an API identifies its callers and writes its errors.
pub(super) struct Dialect {
    /// The endpoint, as in metrics.
    pub endpoint: &'static str,
    /// Finds the token of a request.
    pub token: fn(&Parts) -> Option<String>,
    /// Writes an error.
    pub error: fn(&ApiError) -> Response,
}

/// A request whose caller may use the API.
pub(super) struct Call {
    pub shared: Shared,
    caller: Arc<str>,
    pub body: RequestBody,
    pub deadline: Instant,
}

impl Call {
    /// Returns an answer with a value as JSON, which takes memory until it is sent.
    ///
    /// # Errors
    /// Returns an error if there is no memory for it.
    pub fn json(&self, value: &impl Serialize) -> Result<Response, ApiError> {
        let Ok(body) = serde_json::to_vec(value) else {
            return Ok(json(value));
        };
        let memory = self.shared.bodies.answer(&self.caller, body.len());
        let busy = || ApiError::new(Kind::Busy, "too many answers are being sent; try again");
        let body = memory.ok_or_else(busy)?.with(body);
        Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
    }

    /// Scores texts. Returns one answer for each, in their order.
    ///
    /// # Errors
    /// Returns an error if the texts are not taken, or not scored until the deadline.
    async fn score(&self, texts: Vec<String>) -> Result<Vec<ScoreAnswer>, ApiError> {
        let intake = &self.shared.intake;
        let waiting = intake.submit(&self.caller, texts, self.deadline, &self.body.memory)?;
        let answers = tokio::time::timeout_at(self.deadline.into(), all(waiting)).await;
        let dropped = || ApiError::new(Kind::Unavailable, "the service stopped before the text was scored");
        match answers {
            Ok(Some(answers)) => Ok(answers),
            Ok(None) if Instant::now() < self.deadline => Err(dropped()),
            Ok(None) | Err(_) => Err(ApiError::new(Kind::TimedOut, "the text was not scored in time")),
        }
    }

    /// Scores texts and decides on each as a comment of the community.
    ///
    /// # Errors
    /// Returns an error if the texts are not taken, not scored in time, or if one of them cannot be scored.
    pub async fn decide(&self, texts: Vec<TextField>, community_id: Option<String>) -> Result<Vec<Decision>, ApiError> {
        self.decide_comments(&comments(texts, community_id)?).await
    }

    /// Scores a text with parts of it, and decides on each as a comment of the community. Only the decision on the whole
    /// is counted.
    ///
    /// # Errors
    /// Fails like [`Call::decide`].
    pub async fn decide_with_parts(
        &self,
        whole: TextField,
        parts: Vec<TextField>,
        community_id: Option<String>,
    ) -> Result<(Decision, Vec<Decision>), ApiError> {
        let texts = std::iter::once(whole).chain(parts).collect();
        let decisions = self.decide_uncounted(&comments(texts, community_id)?).await?;
        let mut decisions = decisions.into_iter();
        let whole = decisions
            .next()
            .ok_or_else(|| ApiError::new(Kind::Unscorable, "the comment has no score"))?;
        count(&whole);
        Ok((whole, decisions.collect()))
    }

    /// Scores comments and decides on each, in their order. Deleted ones are not scored.
    ///
    /// # Errors
    /// Fails like [`Call::decide`]. The error's field is the JSON pointer to a comment in a list.
    pub async fn decide_comments(&self, comments: &[Comment]) -> Result<Vec<Decision>, ApiError> {
        let decisions = self.decide_uncounted(comments).await?;
        decisions.iter().for_each(count);
        Ok(decisions)
    }

    async fn decide_uncounted(&self, comments: &[Comment]) -> Result<Vec<Decision>, ApiError> {
        let texts = comments.iter().filter(|comment| comment.op != Op::Delete);
        let texts = texts.map(|comment| comment.text.clone()).collect();
        let mut answers = self.score(texts).await?.into_iter();
        let mut decisions = Vec::with_capacity(comments.len());
        for (index, comment) in comments.iter().enumerate() {
            if comment.op == Op::Delete {
                decisions.push(deleted(comment, None));
                continue;
            }
            let unscorable = |reason: &str| {
                let message = format!("the comment cannot be scored: {reason}");
                ApiError::new(Kind::Unscorable, message).at(format!("/{index}"))
            };
            let answer = answers.next().ok_or_else(|| unscorable("it has no answer"))?;
            let margin = answer.result.map_err(|reason| unscorable(&reason))?;
            decisions.push(answer.judge.decide(comment, margin, None, answer.at));
        }
        Ok(decisions)
    }
}

/// Makes comments of texts of one community.
fn comments(texts: Vec<TextField>, community_id: Option<String>) -> Result<Vec<Comment>, ApiError> {
    // Each decision repeats it, so a long one would make the answer far longer than the request.
    if let Some(bytes) = community_id
        .as_ref()
        .map(String::len)
        .filter(|&bytes| bytes > MAX_ID_BYTES)
    {
        let message = format!("the id of the community has {bytes} bytes, expected at most {MAX_ID_BYTES}");
        return Err(ApiError::invalid(message));
    }
    let comment = |text: TextField| Comment {
        event_id: None,
        content_id: None,
        revision: None,
        op: Op::Create,
        community_id: community_id.clone(),
        text: text.text,
        replaced_surrogates: text.replaced_surrogates,
    };
    Ok(texts.into_iter().map(comment).collect())
}

/// Records a decision in the metrics.
fn count(decision: &Decision) {
    if let Some(scoring) = &decision.scoring {
        histogram!(names::PROBABILITY).record(scoring.probability);
    }
    counter!(names::API_DECISIONS, "action" => decision.action.name()).increment(1);
}

/// Answers a request with what `endpoint` makes of it, or with its error.
pub(super) async fn answer(
    dialect: &Dialect,
    shared: Shared,
    request: Request<Body>,
    endpoint: impl AsyncFnOnce(Call) -> Result<Response, ApiError>,
) -> Response {
    let started = Instant::now();
    let mut caller: Arc<str> = UNKNOWN_CALLER.into();
    let (parts, mut body) = request.into_parts();
    let answered = async {
        let token = (dialect.token)(&parts).filter(|token| !token.is_empty());
        caller = shared.callers.caller(token.as_deref()).ok_or_else(|| match token {
            None => ApiError::new(
                Kind::TokenMissing,
                "no token was sent, expected that of a caller as `Authorization: Bearer TOKEN` (api.tokens)",
            ),
            Some(_) => ApiError::new(Kind::TokenUnknown, "the token is not that of a caller (api.tokens)"),
        })?;
        if shared.config.tokens.is_none() {
            check_origin(&parts.headers)?;
        }
        let body = RequestBody::read(
            shared.bodies.begin(&caller),
            &parts,
            &mut body,
            shared.config.limits.body_bytes,
        )
        .await?;
        let deadline = deadline(&parts, &shared.config.limits, Instant::now())?;
        let call = Call {
            shared,
            caller: Arc::clone(&caller),
            body,
            deadline,
        };
        endpoint(call).await
    };
    let answered = answered.await;
    // A client that waits to be told to send its body has not sent it.
    if answered.is_err() && !parts.headers.contains_key(header::EXPECT) {
        // Many clients read no answer before they have sent everything.
        discard(&mut body).await;
    }
    let answer = answered.unwrap_or_else(|error| {
        let mut answer = (dialect.error)(&error);
        for (name, value) in error.kind.headers() {
            answer.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        answer
    });
    let status = answer.status().as_u16().to_string();
    counter!(names::API_REQUESTS, "endpoint" => dialect.endpoint, "caller" => caller.to_string(), "status" => status)
        .increment(1);
    histogram!(names::API_SECONDS, "endpoint" => dialect.endpoint).record(started.elapsed());
    answer
}
