//! Injects one fault after the other.

use std::collections::BTreeMap;
use std::time::Duration;

use super::NODES;
use super::clock::Clock;
use super::daemons::Daemons;
use super::faults::{FaultKind, PlannedFault};
use super::load::Load;
use super::memory::MemorySamples;
use super::observer::now;
use super::proxy::{Mode, Proxy};
use super::registry::SharedRegistry;
use super::waiting::{wait_for, wait_until};
use crate::cluster::Cluster;

/// The number of comments in a burst.
const BURST: usize = 400;

/// The daemon that is only paused, so that its memory shows whether it leaks.
pub const STEADY_DAEMON: usize = 0;
/// The daemon that is also killed, and whose clock jumps.
pub const HARRIED_DAEMON: usize = 1;

pub struct Injector<'a, E> {
    pub daemons: Daemons,
    pub cluster: &'a Cluster,
    pub proxy: Proxy,
    pub registry: SharedRegistry,
    pub clock: Option<Clock>,
    pub load: &'a Load<E>,
    /// By daemon and process.
    pub memory: BTreeMap<(usize, u32), MemorySamples>,
    /// Each fault with the time at which it began.
    pub injected: Vec<(i64, FaultKind)>,
}

impl<E: FnMut(usize) -> (String, Option<Vec<u8>>)> Injector<'_, E> {
    /// Starts daemons again that have ended, and samples their memory.
    pub fn tend(&mut self) {
        self.daemons.tend();
        for index in [STEADY_DAEMON, HARRIED_DAEMON] {
            if let Some(id) = self.daemons.process_id(index) {
                let samples = self.memory.entry((index, id));
                samples.or_insert_with(|| MemorySamples::new(id)).sample();
            }
        }
    }

    /// Injects a fault, ends it, and rests. Returns what it did.
    pub fn inject(&mut self, fault: PlannedFault) -> String {
        let PlannedFault {
            kind, lasts, target, ..
        } = fault;
        let begun = now();
        let node = usize::try_from(target).unwrap() % NODES + 1;
        let daemon = usize::try_from(target).unwrap() % 2;
        let what = match kind {
            FaultKind::NodeKilled => {
                self.cluster.command("kill", node);
                self.wait(lasts);
                let mut restart = self.cluster.begin_restart(node);
                wait_until(|| self.tend(), || restart.try_wait().unwrap().is_some());
                assert!(restart.wait().unwrap().success(), "node {node}");
                format!("node {node} killed, down for {lasts:.1?}")
            }
            FaultKind::NodePaused => {
                self.cluster.command("pause", node);
                self.wait(lasts);
                self.cluster.command("resume", node);
                format!("node {node} paused for {lasts:.1?}")
            }
            FaultKind::NetworkStalled | FaultKind::NetworkCut => {
                let mode = if kind == FaultKind::NetworkCut {
                    Mode::Cut
                } else {
                    Mode::Stall
                };
                self.proxy.set(mode);
                self.wait(lasts);
                self.proxy.set(Mode::Forward);
                format!("{} for {lasts:.1?}", kind.name())
            }
            FaultKind::DaemonPaused => {
                self.daemons.signal(daemon, "STOP");
                self.wait(lasts);
                self.daemons.signal(daemon, "CONT");
                format!("daemon {daemon} paused for {lasts:.1?}")
            }
            FaultKind::DaemonKilled => {
                self.daemons.kill(HARRIED_DAEMON);
                self.wait(lasts);
                format!("daemon {HARRIED_DAEMON} killed")
            }
            FaultKind::AdapterSwapped => {
                self.registry.swap();
                self.wait(lasts);
                "adapter swapped".to_owned()
            }
            FaultKind::RegistryGone | FaultKind::RegistryUnreadable => {
                if kind == FaultKind::RegistryGone {
                    self.registry.take_away();
                } else {
                    self.registry.make_unreadable();
                }
                self.wait(lasts);
                self.registry.bring_back();
                format!("{} for {lasts:.1?}", kind.name())
            }
            FaultKind::ClockJumped => {
                // Forwards and backwards, by seconds, minutes and half an hour.
                let seconds = [5, 90, 1800][node - 1] * if daemon == 0 { 1 } else { -1 };
                let Some(clock) = &self.clock else {
                    return "clock not changed, because libfaketime is not installed".to_owned();
                };
                clock.jump(seconds);
                self.wait(lasts);
                if let Some(clock) = &self.clock {
                    clock.jump(0);
                }
                format!("clock of daemon {HARRIED_DAEMON} {seconds:+} s for {lasts:.1?}")
            }
            FaultKind::Burst => {
                self.load.burst(BURST);
                self.wait(lasts);
                format!("{BURST} comments at once")
            }
        };
        self.injected.push((begun, kind));
        self.wait(fault.then_rest);
        what
    }

    fn wait(&mut self, time: Duration) {
        wait_for(time, || self.tend());
    }
}
