//! The faults that the chaos test injects, and the order in which it does so.

use std::time::Duration;

use crate::process::Dice;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    NodeKilled,
    NodePaused,
    NetworkStalled,
    NetworkCut,
    DaemonPaused,
    DaemonKilled,
    AdapterSwapped,
    RegistryGone,
    RegistryUnreadable,
    ClockJumped,
    Burst,
}

impl FaultKind {
    pub const ALL: [Self; 11] = [
        Self::NodeKilled,
        Self::NodePaused,
        Self::NetworkStalled,
        Self::NetworkCut,
        Self::DaemonPaused,
        Self::DaemonKilled,
        Self::AdapterSwapped,
        Self::RegistryGone,
        Self::RegistryUnreadable,
        Self::ClockJumped,
        Self::Burst,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::NodeKilled => "node killed",
            Self::NodePaused => "node paused",
            Self::NetworkStalled => "network stalled",
            Self::NetworkCut => "network cut",
            Self::DaemonPaused => "daemon paused",
            Self::DaemonKilled => "daemon killed",
            Self::AdapterSwapped => "adapter swapped",
            Self::RegistryGone => "registry gone",
            Self::RegistryUnreadable => "registry unreadable",
            Self::ClockJumped => "clock jumped",
            Self::Burst => "burst of comments",
        }
    }
}

/// A fault with everything that is random about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedFault {
    pub kind: FaultKind,
    /// How long it lasts.
    pub lasts: Duration,
    /// The time from its end to the next fault.
    pub then_rest: Duration,
    /// A number for the kind to choose its target by.
    pub target: u64,
}

/// Draws faults without end: every round contains each kind once, in a random order.
pub struct Plan {
    dice: Dice,
    round: Vec<FaultKind>,
    rounds: usize,
}

impl Plan {
    /// Returns the plan of a seed. Faults last for two to eight seconds, and from the third round on, now and then for
    /// up to a minute, which is longer than the session and the transaction timeouts.
    pub fn new(seed: u64) -> Self {
        Self {
            dice: Dice(seed),
            round: Vec::new(),
            rounds: 0,
        }
    }

    /// Returns how many rounds are complete.
    pub fn complete_rounds(&self) -> usize {
        self.rounds - usize::from(!self.round.is_empty())
    }

    pub fn draw(&mut self) -> PlannedFault {
        if self.round.is_empty() {
            self.round = FaultKind::ALL.to_vec();
            self.rounds += 1;
        }
        let index = self.dice.below(self.round.len() as u64);
        let kind = self.round.swap_remove(usize::try_from(index).unwrap());
        let is_long = self.dice.below(5) == 0 && self.rounds > 2;
        let lasts = if is_long {
            30_000 + self.dice.below(30_000)
        } else {
            2_000 + self.dice.below(6_000)
        };
        PlannedFault {
            kind,
            lasts: Duration::from_millis(lasts),
            then_rest: Duration::from_millis(2_000 + self.dice.below(2_000)),
            target: self.dice.below(1 << 20),
        }
    }
}

#[test]
fn a_plan_depends_on_its_seed_only_and_leaves_no_kind_out() {
    let draw = |seed| -> Vec<PlannedFault> {
        let mut plan = Plan::new(seed);
        std::iter::repeat_with(|| plan.draw()).take(44).collect()
    };
    let faults = draw(1);
    assert_eq!(faults, draw(1));
    assert_ne!(faults, draw(2));
    for round in faults.chunks(11) {
        let mut kinds: Vec<_> = round.iter().map(|fault| fault.kind).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, FaultKind::ALL);
    }
    let long = |faults: &[PlannedFault]| faults.iter().filter(|fault| fault.lasts.as_secs() >= 30).count();
    assert_eq!(long(&faults[..22]), 0);
    assert!(long(&faults[22..]) > 0);
}
