//! The texts that wait to be scored for callers of the API.
//!
//! Their number is bounded: a request whose texts do not all find a place is turned away at once, so that a caller
//! learns early, and those who wait do not wait for long. `shares` says who finds a place, and `fair_queue` whose text
//! is next.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, unbounded};
use tokio::sync::oneshot;

use super::fair_queue::FairQueue;
use super::memory::HeldMemory;
use super::shares::Shares;
use crate::stream::score::ScoreAnswer;

/// A text, until when its score is of use, and who waits for it.
#[derive(Debug)]
pub(super) struct Submission {
    pub text: String,
    pub deadline: Instant,
    pub answer: oneshot::Sender<ScoreAnswer>,
    pub place: Place,
}

impl Submission {
    /// Returns whether nobody needs the score any more.
    pub fn is_obsolete(&self, now: Instant) -> bool {
        now >= self.deadline || self.answer.is_closed()
    }
}

/// Where requests hand in their texts.
pub(super) struct Intake {
    state: Arc<Mutex<State>>,
    is_stopping: AtomicBool,
}

/// The end from which texts are read.
pub(super) struct Submissions {
    state: Arc<Mutex<State>>,
    arrivals: Receiver<()>,
}

/// The reason why texts are not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Too many texts wait already, and the caller's share of them is used up.
    ShareUsed,
    /// No more texts are scored, because the process is stopping.
    Stopping,
}

#[derive(Debug)]
struct State {
    /// The places of the texts that wait or are being scored.
    places: Shares,
    /// The texts that wait.
    waiting: FairQueue<Submission>,
    /// Gets one message for each text that waits, so that the other end can wait for texts and for the scorer. `None`
    /// after the end.
    arrivals: Option<Sender<()>>,
}

/// The place of one text, which is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    state: Arc<Mutex<State>>,
    caller: Arc<str>,
    _memory: HeldMemory,
}

impl Place {
    /// Returns the caller that the place was taken for.
    pub fn caller(&self) -> &Arc<str> {
        &self.caller
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.state).places.give_back(&self.caller, 1);
    }
}

/// Locks the state. No place may be dropped until it is unlocked again.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Intake {
    /// Creates the intake for this many texts, and the end from which they are read.
    pub fn new(max_waiting: usize) -> (Self, Submissions) {
        // The places bound the number of messages.
        let (arrived, arrivals) = unbounded();
        let state = Arc::new(Mutex::new(State {
            places: Shares::new(max_waiting),
            waiting: FairQueue::default(),
            arrivals: Some(arrived),
        }));
        let submissions = Submissions {
            state: Arc::clone(&state),
            arrivals,
        };
        let intake = Self {
            state,
            is_stopping: AtomicBool::new(false),
        };
        (intake, submissions)
    }

    /// Hands in the texts of a caller's request, whose body takes this memory. Each receiver yields the answer to one
    /// of them, in their order; it fails if the text is dropped unscored.
    ///
    /// # Errors
    /// Returns the reason if the texts are not taken; then none of them is.
    pub fn submit(
        &self,
        caller: &Arc<str>,
        texts: Vec<String>,
        deadline: Instant,
        memory: &HeldMemory,
    ) -> Result<Vec<oneshot::Receiver<ScoreAnswer>>, Refused> {
        if self.is_stopping.load(Ordering::Relaxed) {
            return Err(Refused::Stopping);
        }
        let mut state = lock(&self.state);
        let arrivals = state.arrivals.clone().ok_or(Refused::Stopping)?;
        if !state.places.take(caller, texts.len()) {
            return Err(Refused::ShareUsed);
        }
        let hand_in = |text| {
            let (answer, answered) = oneshot::channel();
            let place = Place {
                state: Arc::clone(&self.state),
                caller: Arc::clone(caller),
                _memory: memory.clone(),
            };
            let submission = Submission {
                text,
                deadline,
                answer,
                place,
            };
            state.waiting.push(caller, submission);
            // Cannot fail: the other end takes the sender away before it ends.
            let _ = arrivals.send(());
            answered
        };
        Ok(texts.into_iter().map(hand_in).collect())
    }

    /// Takes no more texts from here on. Those that were taken are still scored.
    pub fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
    }

    /// Ends the other end once it has read what was taken.
    pub fn close(&self) {
        lock(&self.state).arrivals = None;
    }

    /// Returns how many texts wait or are being scored.
    pub fn waiting(&self) -> usize {
        lock(&self.state).places.taken()
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.close();
    }
}

impl Submissions {
    /// Yields one message for each text that waits. [`Submissions::take`] is to be called once for each.
    pub fn arrivals(&self) -> &Receiver<()> {
        &self.arrivals
    }

    /// Takes the text that is next.
    pub fn take(&self) -> Option<Submission> {
        lock(&self.state).waiting.take()
    }

    /// Charges a caller for the tokens of a text that was taken. The text of another caller then goes first.
    pub fn charge(&self, caller: &str, tokens: usize) {
        lock(&self.state).waiting.charge(caller, tokens);
    }
}

impl Drop for Submissions {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.arrivals = None;
        let left = std::mem::take(&mut state.waiting);
        drop(state);
        // Their callers learn that they are not scored.
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::memory::BodyMemory;
    use super::*;

    fn texts(count: usize) -> Vec<String> {
        vec!["a comment".to_owned(); count]
    }

    fn submit(
        intake: &Intake,
        texts: Vec<String>,
        deadline: Instant,
        memory: &HeldMemory,
    ) -> Result<Vec<oneshot::Receiver<ScoreAnswer>>, Refused> {
        intake.submit(&"forum".into(), texts, deadline, memory)
    }

    /// Returns the next text, or `None` after the end. Fails if nothing has arrived.
    fn take(submissions: &Submissions) -> Option<Submission> {
        match submissions.arrivals().try_recv() {
            Ok(()) => Some(submissions.take().unwrap()),
            Err(error) => {
                assert!(error.is_disconnected(), "nothing has arrived");
                None
            }
        }
    }

    #[test]
    fn a_request_gets_places_for_all_of_its_texts_or_for_none() {
        let (intake, received) = Intake::new(3);
        let deadline = Instant::now() + Duration::from_secs(60);
        let first = submit(&intake, texts(2), deadline, &HeldMemory::default()).unwrap();
        assert_eq!((first.len(), intake.waiting()), (2, 2));
        assert_eq!(
            submit(&intake, texts(2), deadline, &HeldMemory::default()).unwrap_err(),
            Refused::ShareUsed
        );
        assert_eq!(intake.waiting(), 2);
        assert!(submit(&intake, texts(1), deadline, &HeldMemory::default()).is_ok());
        drop(take(&received).unwrap());
        assert_eq!(intake.waiting(), 2);
        assert!(submit(&intake, texts(1), deadline, &HeldMemory::default()).is_ok());
    }

    #[test]
    fn a_text_is_obsolete_after_its_deadline_and_once_nobody_waits() {
        let (intake, received) = Intake::new(10);
        let now = Instant::now();
        let waiting = submit(&intake, texts(2), now + Duration::from_secs(60), &HeldMemory::default()).unwrap();
        let [first, second] = [(); 2].map(|()| take(&received).unwrap());
        assert!(!first.is_obsolete(now) && first.is_obsolete(now + Duration::from_secs(60)));
        drop(waiting);
        assert!(second.is_obsolete(now));
    }

    #[test]
    fn a_text_holds_the_memory_of_its_body_until_it_is_dropped() {
        let (intake, received) = Intake::new(10);
        let memory = BodyMemory::new(10);
        let begin = || memory.begin(&"forum".into());
        let mut body = begin();
        assert!(body.grow(8));
        let deadline = Instant::now() + Duration::from_secs(60);
        // The caller goes away, but its texts are still here.
        drop(submit(&intake, texts(2), deadline, &body.hold()));
        assert!(!begin().grow(8));
        drop(take(&received));
        assert!(!begin().grow(8));
        drop(take(&received));
        assert!(begin().grow(8));
    }

    #[test]
    fn once_it_stops_only_the_texts_that_were_taken_are_left() {
        let (intake, received) = Intake::new(2);
        let deadline = Instant::now() + Duration::from_secs(60);
        let taken = submit(&intake, texts(1), deadline, &HeldMemory::default());
        intake.stop();
        assert_eq!(
            submit(&intake, texts(1), deadline, &HeldMemory::default()).unwrap_err(),
            Refused::Stopping
        );
        intake.close();
        assert!(taken.is_ok() && take(&received).is_some() && take(&received).is_none());
    }

    #[test]
    fn after_the_end_no_text_is_taken_and_no_place_is_lost() {
        let (intake, received) = Intake::new(2);
        drop(received);
        let refused = submit(&intake, texts(2), Instant::now(), &HeldMemory::default()).unwrap_err();
        assert_eq!((refused, intake.waiting()), (Refused::Stopping, 0));
    }

    #[test]
    fn the_other_end_ends_without_the_intake() {
        let (intake, received) = Intake::new(2);
        let taken = submit(&intake, texts(1), Instant::now(), &HeldMemory::default());
        drop(intake);
        assert!(taken.is_ok() && take(&received).is_some() && take(&received).is_none());
    }

    #[test]
    fn a_caller_that_has_filled_the_queue_neither_keeps_others_out_nor_makes_them_wait() {
        let (intake, received) = Intake::new(4);
        let deadline = Instant::now() + Duration::from_secs(60);
        let [forum, game] = ["forum", "game"].map(Arc::from);
        let submit = |caller, count| intake.submit(caller, texts(count), deadline, &HeldMemory::default());
        let mut answers = submit(&forum, 4).unwrap();
        assert_eq!(submit(&forum, 1).unwrap_err(), Refused::ShareUsed);
        answers.extend(submit(&game, 2).unwrap());
        assert_eq!(submit(&game, 1).unwrap_err(), Refused::ShareUsed);
        assert_eq!(intake.waiting(), 6);
        let order: Vec<_> = (0..6)
            .map(|_| {
                let submission = take(&received).unwrap();
                received.charge(submission.place.caller(), 10);
                submission.place.caller().to_string()
            })
            .collect();
        assert_eq!(order, ["forum", "game", "forum", "game", "forum", "forum"]);
        assert_eq!(intake.waiting(), 0);
    }

    #[test]
    fn texts_that_nobody_reads_any_more_are_dropped() {
        let (intake, received) = Intake::new(2);
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut answers = submit(&intake, texts(2), deadline, &HeldMemory::default()).unwrap();
        drop(received);
        assert!(answers.iter_mut().all(|answer| answer.try_recv().is_err()));
        assert_eq!(intake.waiting(), 0);
    }
}
