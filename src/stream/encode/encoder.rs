//! Encodes a single record: decodes its event, looks its text up in the cache, and tokenises it.

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::SystemTime;

use crate::config::InputConfig;
use crate::message::{Comment, Op};
use crate::prompt::{Prompt, Prompter};
use crate::scorer::Row;
use crate::stream::cache::{Lookup, ScoreCache};
use crate::stream::decode::{DecodeError, decode, require_content_id};
use crate::stream::record::{
    CommentRecord, Finished, FirstOfText, Outcome, Pending, Record, Rejection, RejectionStage,
};
use crate::stream::text_key::TextKey;

/// Encodes records. It is immutable and shared by the threads of the stage.
pub struct RecordEncoder {
    pub input: InputConfig,
    pub prompter: Arc<Prompter>,
    /// Finds comments whose text was scored already, or is about to be.
    pub cache: Arc<ScoreCache>,
}

/// The result of encoding one record.
pub enum Encoded {
    /// The comment must be scored.
    Rows(Pending, Vec<Row>),
    /// The comment waits for the margin of another one with the same text.
    Waits,
    /// The margin of the text is known.
    Known(Finished),
    /// The record needs no model.
    Done(Finished),
    /// The comment cannot be encoded, and neither can those with the same text that wait for it.
    Failed(CommentRecord, Vec<CommentRecord>, Rejection),
}

/// The result of decoding one record.
enum Decoded {
    /// A comment whose text is ready to be tokenised.
    Comment(DecodedComment),
    /// The record needs no model.
    Done(Outcome),
}

struct DecodedComment {
    comment: Comment,
    /// The normalised text, unless that is the comment's own.
    normalized: Option<String>,
    /// The key of the normalised text, if texts are looked up.
    key: Option<TextKey>,
}

impl RecordEncoder {
    /// Encodes one record, which is read at `now`.
    pub fn encode(&self, record: Record, now: SystemTime) -> Encoded {
        let decoded = guarded(|| self.decode(&record));
        let decoded = decoded.unwrap_or_else(|rejection| Decoded::Done(Outcome::Rejected(rejection)));
        let DecodedComment {
            comment,
            normalized,
            key,
        } = match decoded {
            Decoded::Comment(comment) => comment,
            Decoded::Done(outcome) => return Encoded::Done(Finished { record, outcome }),
        };
        let mut comment = CommentRecord { record, comment };
        if let Some(key) = key {
            match self.cache.look_up(key, comment, now) {
                Lookup::Known(finished) => return Encoded::Known(finished),
                Lookup::Waits => return Encoded::Waits,
                Lookup::First(first) => comment = first,
            }
        }
        let text = normalized.as_deref().unwrap_or(&comment.comment.text);
        match guarded(|| self.tokenize(text)).and_then(|prompt| prompt) {
            Ok(prompt) => {
                let facts = prompt.facts();
                let rows = prompt.rows;
                let pending = Pending {
                    source: comment,
                    first: key.map(|key| FirstOfText {
                        key,
                        rows: rows.clone(),
                    }),
                    facts,
                };
                Encoded::Rows(pending, rows)
            }
            Err(rejection) => {
                // Tokenising depends on nothing but the text, so it fails for those that wait as well.
                let waiting = key.map(|key| self.cache.finish(key, None));
                Encoded::Failed(comment, waiting.unwrap_or_default(), rejection)
            }
        }
    }

    /// Reads a comment from a record, and normalises its text.
    fn decode(&self, record: &Record) -> Decoded {
        if record.has_broken_headers {
            return Decoded::Done(Outcome::Rejected(Rejection {
                reason: "bad_headers",
                message: "the name of a header is not UTF-8".to_owned(),
                stage: RejectionStage::Decode,
            }));
        }
        let Some(value) = &record.value else {
            return Decoded::Done(Outcome::Tombstone);
        };
        let fields = &self.input.fields;
        let decoded = decode(value, &record.headers, fields, self.input.max_bytes)
            .and_then(|comment| require_content_id(&comment, fields).map(|()| comment));
        let comment = match decoded {
            Ok(comment) => comment,
            Err(error) => return Decoded::Done(Outcome::Rejected(undecodable(&error))),
        };
        if comment.op == Op::Delete {
            return Decoded::Done(Outcome::Deleted(comment));
        }
        let normalized = self.prompter.normalize(&comment.text);
        let key = self.cache.is_on().then(|| TextKey::of(&normalized));
        let normalized = match normalized {
            Cow::Owned(text) => Some(text),
            Cow::Borrowed(_) => None,
        };
        Decoded::Comment(DecodedComment {
            comment,
            normalized,
            key,
        })
    }

    fn tokenize(&self, text: &str) -> Result<Prompt, Rejection> {
        self.prompter.encode_normalized(text).map_err(|error| Rejection {
            reason: "unscorable",
            message: error.to_string(),
            stage: RejectionStage::Score,
        })
    }
}

/// Calls `encode`. A panic in a library becomes the rejection of one record, and the daemon continues.
fn guarded<T>(encode: impl FnOnce() -> T) -> Result<T, Rejection> {
    catch_unwind(AssertUnwindSafe(encode)).map_err(|_| Rejection {
        reason: "encoder_panicked",
        message: "decoding or tokenising the event panicked, which is a bug".to_owned(),
        stage: RejectionStage::Decode,
    })
}

fn undecodable(error: &DecodeError) -> Rejection {
    Rejection {
        reason: error.reason(),
        message: error.to_string(),
        stage: RejectionStage::Decode,
    }
}
