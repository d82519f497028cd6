//! Receives micro-batches from the stream and from requests, in the order in which they are to be scored.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, TryRecvError, never};

use super::request::ScoreRequest;
use super::share::{FairShare, Work};
use crate::scorer::Row;
use crate::stream::batch::MicroBatch;
use crate::stream::record::Pending;

/// A micro-batch of one kind of work.
#[derive(Debug)]
pub(super) enum Batch {
    Stream(MicroBatch<Pending>),
    Requests(MicroBatch<ScoreRequest>),
}

impl Batch {
    pub(super) fn rows(&self) -> &[Row] {
        match self {
            Self::Stream(batch) => &batch.rows,
            Self::Requests(batch) => &batch.rows,
        }
    }

    pub(super) fn work(&self) -> Work {
        match self {
            Self::Stream(_) => Work::Stream,
            Self::Requests(_) => Work::Requests,
        }
    }

    /// Returns the own tokens of all rows together.
    pub(super) fn tokens(&self) -> usize {
        self.rows().iter().map(Row::own_tokens).sum()
    }
}

/// What a stage finds when it looks for work.
#[derive(Debug)]
pub(super) enum Received {
    Batch(Batch),
    /// Nothing has come in time.
    Nothing,
    /// No more work will come.
    Ended,
}

/// The channels that work comes from.
#[derive(Debug)]
pub(crate) struct Lanes {
    stream: Receiver<MicroBatch<Pending>>,
    requests: Receiver<MicroBatch<ScoreRequest>>,
    /// The kind of work without which the stage has no purpose.
    main: Work,
    fair: FairShare,
}

impl Lanes {
    /// Creates the lanes of a stage that scores the stream, until that ends, and requests beside it, whose share of the
    /// device is between 0 and 1.
    pub fn of_stream(
        stream: Receiver<MicroBatch<Pending>>,
        requests: Option<(Receiver<MicroBatch<ScoreRequest>>, f64)>,
    ) -> Self {
        let (requests, share) = requests.unwrap_or_else(|| (never(), 0.5));
        Self {
            stream,
            requests,
            main: Work::Stream,
            fair: FairShare::new(share),
        }
    }

    /// Creates the lanes of a stage that scores requests only, until no more come.
    pub fn of_requests(requests: Receiver<MicroBatch<ScoreRequest>>) -> Self {
        Self {
            stream: never(),
            requests,
            main: Work::Requests,
            fair: FairShare::new(0.5),
        }
    }

    /// Waits for the next micro-batch, but no longer than `timeout`. If `only` is given, the other kind of work waits.
    pub(super) fn receive(&mut self, timeout: Duration, only: Option<Work>) -> Received {
        let deadline = Instant::now() + timeout;
        loop {
            for work in self.fair.order() {
                if only.is_some_and(|only| only != work) {
                    continue;
                }
                let received = match work {
                    Work::Stream => self.stream.try_recv().map(Batch::Stream),
                    Work::Requests => self.requests.try_recv().map(Batch::Requests),
                };
                match received {
                    Ok(batch) => {
                        self.fair.begin(work, batch.tokens());
                        return Received::Batch(batch);
                    }
                    Err(TryRecvError::Empty) => {}
                    Err(TryRecvError::Disconnected) if work == self.main => return Received::Ended,
                    Err(TryRecvError::Disconnected) => self.requests = never(),
                }
            }
            let mut select = Select::new();
            if only != Some(Work::Requests) {
                select.recv(&self.stream);
            }
            if only != Some(Work::Stream) {
                select.recv(&self.requests);
            }
            if select.ready_deadline(deadline).is_err() {
                return Received::Nothing;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;

    fn requests(tokens: u32) -> MicroBatch<ScoreRequest> {
        let row = Row {
            tokens: (0..tokens).collect(),
            shared: 0,
        };
        MicroBatch {
            rows: vec![row],
            items: Vec::new(),
        }
    }

    fn stream(tokens: u32) -> MicroBatch<Pending> {
        MicroBatch {
            rows: requests(tokens).rows,
            items: Vec::new(),
        }
    }

    #[test]
    fn work_alternates_by_its_share_and_none_waits_for_the_other() {
        let (stream_sender, stream_receiver) = bounded(10);
        let (request_sender, request_receiver) = bounded(10);
        let mut lanes = Lanes::of_stream(stream_receiver, Some((request_receiver, 0.25)));
        (0..8).for_each(|_| stream_sender.send(stream(100)).unwrap());
        (0..4).for_each(|_| request_sender.send(requests(100)).unwrap());
        let mut receive = || match lanes.receive(Duration::ZERO, None) {
            Received::Batch(batch) => Some(batch.work()),
            _ => None,
        };
        let first: Vec<Work> = (0..8).filter_map(|_| receive()).collect();
        assert_eq!(
            first.iter().filter(|&&work| work == Work::Requests).count(),
            2,
            "{first:?}"
        );
        // Once one kind has nothing left, the other has the device to itself.
        let rest: Vec<Work> = std::iter::from_fn(receive).collect();
        assert_eq!(rest.len(), 4);
    }

    #[test]
    fn the_stage_ends_with_its_main_work() {
        let (stream_sender, stream_receiver) = bounded(1);
        let (request_sender, request_receiver) = bounded(1);
        let mut lanes = Lanes::of_stream(stream_receiver, Some((request_receiver, 0.5)));
        drop(request_sender);
        assert!(matches!(lanes.receive(Duration::ZERO, None), Received::Nothing));
        drop(stream_sender);
        assert!(matches!(lanes.receive(Duration::ZERO, None), Received::Ended));

        let (request_sender, request_receiver) = bounded(1);
        let mut lanes = Lanes::of_requests(request_receiver);
        assert!(matches!(lanes.receive(Duration::ZERO, None), Received::Nothing));
        drop(request_sender);
        assert!(matches!(lanes.receive(Duration::ZERO, None), Received::Ended));
    }

    #[test]
    fn one_kind_of_work_can_be_asked_for() {
        let (stream_sender, stream_receiver) = bounded(1);
        let (request_sender, request_receiver) = bounded(1);
        let mut lanes = Lanes::of_stream(stream_receiver, Some((request_receiver, 0.5)));
        stream_sender.send(stream(1)).unwrap();
        request_sender.send(requests(1)).unwrap();
        for only in [Work::Requests, Work::Stream] {
            match lanes.receive(Duration::ZERO, Some(only)) {
                Received::Batch(batch) => assert_eq!(batch.work(), only),
                other => panic!("{other:?}"),
            }
        }
    }
}
