//! Long tests on a cluster of three nodes, under a steady load and under faults. They measure from the outside: a client
//! of its own notes when each comment was appended and when its output became visible.
//!
//! Part of the test binary `stream`, because another one would take as long to link. `README.md` says how to run them.

mod bare;
mod clock;
mod daemons;
mod faults;
mod injector;
mod load;
mod memory;
mod observer;
pub mod proxy;
mod registry;
mod tables;
mod waiting;

mod chaos;
mod pauses;

/// The nodes of a cluster.
const NODES: usize = 3;
