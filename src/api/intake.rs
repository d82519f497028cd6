//! The texts that wait to be scored for callers of the API.
//!
//! Their number is bounded: a request whose texts do not all find a place is turned away at once, so that a caller
//! learns early, and those who wait do not wait for long.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use tokio::sync::oneshot;

use super::memory::HeldMemory;
use crate::stream::score::ScoreAnswer;

/// A text, until when its score is of use, and who waits for it.
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
    /// `None` after the end.
    submissions: Mutex<Option<Sender<Submission>>>,
    places: Arc<Places>,
    is_stopping: AtomicBool,
}

/// The reason why texts are not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Too many texts wait already.
    Full,
    /// No more texts are scored, because the process is stopping.
    Stopping,
}

/// The places of the texts that wait or are being scored.
#[derive(Debug)]
struct Places {
    taken: AtomicUsize,
    max: usize,
}

/// The place of one text, which is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    _memory: HeldMemory,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Places {
    /// Takes places for all texts of a request, or for none.
    fn take(places: &Arc<Self>, count: usize, memory: &HeldMemory) -> Option<Vec<Place>> {
        let taken = |taken: usize| taken.checked_add(count).filter(|&sum| sum <= places.max);
        let result = places.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken);
        result.ok()?;
        let place = |_| Place {
            places: Arc::clone(places),
            _memory: memory.clone(),
        };
        Some((0..count).map(place).collect())
    }
}

impl Intake {
    /// Creates the intake for at most so many texts, and the end from which they are read.
    pub fn new(max_waiting: usize) -> (Self, Receiver<Submission>) {
        // Whoever has a place has room in the channel, so nobody waits to hand in a text.
        let (submissions, received) = bounded(max_waiting);
        let places = Arc::new(Places {
            taken: AtomicUsize::new(0),
            max: max_waiting,
        });
        let intake = Self {
            submissions: Mutex::new(Some(submissions)),
            places,
            is_stopping: AtomicBool::new(false),
        };
        (intake, received)
    }

    /// Hands in the texts of a request, whose body takes this memory. Each receiver yields the answer to one of them, in their order; it fails if the
    /// text is dropped unscored.
    ///
    /// # Errors
    /// Returns the reason if the texts are not taken; then none of them is.
    pub fn submit(
        &self,
        texts: Vec<String>,
        deadline: Instant,
        memory: &HeldMemory,
    ) -> Result<Vec<oneshot::Receiver<ScoreAnswer>>, Refused> {
        if self.is_stopping.load(Ordering::Relaxed) {
            return Err(Refused::Stopping);
        }
        let places = Places::take(&self.places, texts.len(), memory).ok_or(Refused::Full)?;
        let submissions = self.submissions.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let submissions = submissions.ok_or(Refused::Stopping)?;
        let hand_in = |(text, place)| {
            let (answer, answered) = oneshot::channel();
            let submission = Submission {
                text,
                deadline,
                answer,
                place,
            };
            // The others of a request that meets the end of the process are dropped with their receivers.
            submissions.try_send(submission).map_err(|_| Refused::Stopping)?;
            Ok(answered)
        };
        texts.into_iter().zip(places).map(hand_in).collect()
    }

    /// Takes no more texts from here on. Those that were taken are still scored.
    pub fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
    }

    /// Closes the channel to the other end, which then ends once it has read what was taken.
    pub fn close(&self) {
        *self.submissions.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Returns how many texts wait or are being scored.
    pub fn waiting(&self) -> usize {
        self.places.taken.load(Ordering::Relaxed)
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

    #[test]
    fn a_request_gets_places_for_all_of_its_texts_or_for_none() {
        let (intake, received) = Intake::new(3);
        let deadline = Instant::now() + Duration::from_secs(60);
        let first = intake.submit(texts(2), deadline, &HeldMemory::default()).unwrap();
        assert_eq!((first.len(), intake.waiting()), (2, 2));
        assert_eq!(
            intake.submit(texts(2), deadline, &HeldMemory::default()).unwrap_err(),
            Refused::Full
        );
        assert_eq!(intake.waiting(), 2);
        assert!(intake.submit(texts(1), deadline, &HeldMemory::default()).is_ok());
        drop(received.recv().unwrap());
        assert_eq!(intake.waiting(), 2);
        assert!(intake.submit(texts(1), deadline, &HeldMemory::default()).is_ok());
    }

    #[test]
    fn a_text_is_obsolete_after_its_deadline_and_once_nobody_waits() {
        let (intake, received) = Intake::new(10);
        let now = Instant::now();
        let waiting = intake
            .submit(texts(2), now + Duration::from_secs(60), &HeldMemory::default())
            .unwrap();
        let [first, second] = [(); 2].map(|()| received.recv().unwrap());
        assert!(!first.is_obsolete(now) && first.is_obsolete(now + Duration::from_secs(60)));
        drop(waiting);
        assert!(second.is_obsolete(now));
    }

    #[test]
    fn a_text_holds_the_memory_of_its_body_until_it_is_dropped() {
        let (intake, received) = Intake::new(10);
        let memory = BodyMemory::new(10);
        let mut body = memory.begin();
        assert!(body.grow(8));
        let deadline = Instant::now() + Duration::from_secs(60);
        // The caller goes away, but its texts are still here.
        drop(intake.submit(texts(2), deadline, &body.hold()));
        assert!(!memory.begin().grow(8));
        drop(received.recv());
        assert!(!memory.begin().grow(8));
        drop(received.recv());
        assert!(memory.begin().grow(8));
    }

    #[test]
    fn once_it_stops_only_the_texts_that_were_taken_are_left() {
        let (intake, received) = Intake::new(2);
        let deadline = Instant::now() + Duration::from_secs(60);
        let taken = intake.submit(texts(1), deadline, &HeldMemory::default());
        intake.stop();
        assert_eq!(
            intake.submit(texts(1), deadline, &HeldMemory::default()).unwrap_err(),
            Refused::Stopping
        );
        intake.close();
        assert!(taken.is_ok() && received.recv().is_ok() && received.recv().is_err());
    }

    #[test]
    fn after_the_end_no_text_is_taken_and_no_place_is_lost() {
        let (intake, received) = Intake::new(2);
        drop(received);
        let refused = intake
            .submit(texts(2), Instant::now(), &HeldMemory::default())
            .unwrap_err();
        assert_eq!((refused, intake.waiting()), (Refused::Stopping, 0));
    }
}
