//! Scoring over HTTP, beside the stream or alone.
//!
//! ```text
//! server ─► call ─► intake ─► gather ─► scorer
//!             (a bounded queue  (micro-batches)
//!              for each caller)
//! ```
//!
//! A request is read on the thread of the server (`ops::http`), and its texts wait in the `intake` until the
//! `gather` thread has made rows of them. The scorer is that of the stream, so a comment has the same margin by either
//! way. Each endpoint translates between the forms of one API and [comments](crate::message::Comment) and their
//! [judge](crate::decide::Judge); none computes anything of its own.

mod tokens;
mod shares;
mod memory;
mod fair_queue;
mod intake;
mod error;
mod request;
mod gather;
mod body;
mod newest;
mod call;
mod score;
mod status;
mod openai;
mod perspective;
mod openapi;
mod page;
mod server;

pub(crate) use call::StatusSources;
pub(crate) use newest::NewestVersion;
pub(crate) use server::{ApiParts, ApiServer, Credentials};
