//! What the stages of `run` share: a record on its way, who owns its partition, how much is in flight,
//! and how it all ends.
//!
//! No Kafka, no model; times are passed in.

pub mod control;
pub mod in_flight;
pub mod offsets;
pub mod ownership;
pub mod progress;
pub mod record;

pub use control::{Control, Gap, StreamError};
pub use in_flight::{InFlight, Permit};
pub use offsets::Lanes;
pub use ownership::{Epoch, Ownership};
pub use progress::Progress;
pub use record::{Finished, Header, Outcome, Place, Record, Rejection, RejectionStage};
