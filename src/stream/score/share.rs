//! Divides the device between two kinds of work: the stream, and requests from outside it.
//!
//! This is start-time fair queueing (Goyal, Vin and Cheng, 1996) with two flows, whose unit of work is a token. Each
//! micro-batch has a start tag: the virtual time at which its kind would begin it if every kind were served at exactly
//! its share. The kind with the earlier tag goes first. Only work that waits is ever chosen, so a kind gets the whole
//! device while the other has nothing to do, and gains no claim on later time by having been idle.

/// A kind of work that is waiting for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Comments of the stream.
    Stream,
    /// Texts of requests.
    Requests,
}

/// The shares of the device, and how much of it each kind has had.
#[derive(Debug)]
pub(super) struct FairShare {
    /// The share of each kind; they add up to 1.
    shares: [f64; 2],
    /// The virtual time at which each kind has finished what it has begun, in tokens.
    finished: [f64; 2],
    /// The start tag of the micro-batch that was begun last.
    now: f64,
}

impl FairShare {
    /// Creates shares of which `requests`, between 0 and 1, is that of the requests.
    pub(super) fn new(requests: f64) -> Self {
        Self {
            shares: [1.0 - requests, requests],
            finished: [0.0; 2],
            now: 0.0,
        }
    }

    /// Returns the two kinds in the order in which they are to be served if both wait.
    pub(super) fn order(&self) -> [Work; 2] {
        if self.start(Work::Requests) < self.start(Work::Stream) {
            [Work::Requests, Work::Stream]
        } else {
            [Work::Stream, Work::Requests]
        }
    }

    /// Records that a micro-batch with so many own tokens is begun.
    pub(super) fn begin(&mut self, work: Work, tokens: usize) {
        self.now = self.start(work);
        let kind = work as usize;
        self.finished[kind] = self.now + tokens as f64 / self.shares[kind];
    }

    /// Returns the start tag of a kind's next micro-batch.
    fn start(&self, work: Work) -> f64 {
        self.finished[work as usize].max(self.now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns how many of the tokens were of requests, if both kinds always wait with micro-batches of these sizes.
    fn share_of_requests(share: f64, [stream, requests]: [usize; 2]) -> f64 {
        let mut fair = FairShare::new(share);
        let mut done = [0usize; 2];
        for _ in 0..10_000 {
            let [first, _] = fair.order();
            let tokens = [stream, requests][first as usize];
            done[first as usize] += tokens;
            fair.begin(first, tokens);
        }
        done[1] as f64 / (done[0] + done[1]) as f64
    }

    #[test]
    fn each_kind_gets_its_share_whatever_the_sizes_of_its_micro_batches() {
        for share in [0.1, 0.5, 0.8] {
            for sizes in [[1000, 1000], [4000, 100], [37, 5000]] {
                let found = share_of_requests(share, sizes);
                assert!((found - share).abs() < 0.01, "{share} {sizes:?} {found}");
            }
        }
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let mut fair = FairShare::new(0.5);
        (0..1000).for_each(|_| fair.begin(Work::Stream, 100));
        // Requests arrive after a long time without any. They go first, but only until they have had as much.
        assert_eq!(fair.order()[0], Work::Requests);
        fair.begin(Work::Requests, 100);
        fair.begin(fair.order()[0], 100);
        let begun: Vec<Work> = (0..6)
            .map(|_| {
                let [first, _] = fair.order();
                fair.begin(first, 100);
                first
            })
            .collect();
        assert_eq!(begun.iter().filter(|&&work| work == Work::Requests).count(), 3);
    }
}
