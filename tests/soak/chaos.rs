//! Injects faults of every kind under a steady load, for as long as wanted.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use super::clock::Clock;
use super::daemons::{DaemonSpec, Daemons};
use super::faults::Plan;
use super::injector::{Injector, STEADY_DAEMON};
use super::load::{Load, PARTITIONS};
use super::observer::{Contender, Observer};
use super::proxy::Proxy;
use super::registry::SharedRegistry;
use super::waiting::{OnDrop, await_finished, await_steady};
use super::{NODES, tables};
use crate::broker::Broker;
use crate::cluster::Cluster;
use crate::daemon::Names;
use crate::process::{Dice, event, is_broken, judge, settings};

/// Comments in a second, besides bursts.
const RATE: u32 = 40;
/// The largest record in bytes that the output topics accept.
const MAX_OUTPUT_BYTES: &str = "4000";
/// The size of ids and events in bytes that make a larger one.
const OVERSIZE: usize = 9000;

#[test]
#[ignore = "needs Apache Kafka and minutes: tests/soak/run"]
fn under_faults_of_every_kind_each_comment_is_decided_once_and_in_order() {
    let duration = std::env::var("MODERATORD_TEST_DURATION").unwrap_or_else(|_| "2m".to_owned());
    let duration = humantime::parse_duration(&duration).unwrap();
    let seed = std::env::var("MODERATORD_TEST_SEED").map_or(1, |seed| seed.parse().unwrap());
    println!("seed {seed}, at least {duration:?}");
    let cluster = Cluster::start(NODES);
    let broker = cluster.broker();
    let names = create_topics(&broker);
    let proxy = Proxy::start(&cluster.variable("PROXY_BROKERS"));
    let folder = tempfile::tempdir().unwrap();
    let clock = Clock::new(folder.path());
    let specs = daemon_specs(
        folder.path(),
        &cluster.variable("PROXY_BROKERS"),
        &names,
        clock.as_ref(),
    );
    let registry = SharedRegistry::create(folder.path(), &specs[STEADY_DAEMON].settings);
    let observer = Observer::start(
        &broker,
        &names.comments,
        vec![Contender {
            name: "daemons",
            outputs: vec![names.decisions.clone(), names.dead_letters.clone()],
        }],
    );
    let mut dice = Dice(seed);
    let (is_chaotic, refused, broken) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let load = Load::new(&names.comments, RATE, |id| {
        if is_chaotic.load(Ordering::Relaxed) && dice.below(100) == 0 {
            refused.fetch_add(1, Ordering::Relaxed);
            return oversize_event(id, &mut dice);
        }
        if is_broken(id) {
            broken.fetch_add(1, Ordering::Relaxed);
        }
        event(id)
    });
    let mut injector = Injector {
        daemons: Daemons::start(folder.path(), specs),
        cluster: &cluster,
        proxy,
        registry,
        clock,
        load: &load,
        memory: BTreeMap::new(),
        injected: Vec::new(),
    };
    std::thread::scope(|scope| {
        let (client, load) = (broker.client(), &load);
        scope.spawn(move || load.run(client));
        let stopping = OnDrop(|| load.stop());
        await_steady(&observer, || injector.tend());
        is_chaotic.store(true, Ordering::Relaxed);
        let start = Instant::now();
        let mut plan = Plan::new(seed);
        // At least one round, so that a short test leaves no kind out.
        while start.elapsed() < duration || plan.complete_rounds() == 0 {
            let (at, fault) = (start.elapsed().as_secs_f64(), plan.draw());
            println!("{at:>7.1} s  {}", injector.inject(fault));
        }
        drop(stopping);
        await_finished(&observer, || load.written(), || injector.tend());
    });

    println!("\n{}", tables::faults(&injector.injected, &observer));
    if injector.clock.is_none() {
        println!("No clock jumped, because libfaketime is not installed (package faketime).\n");
    }
    println!("{}", tables::memory(&injector.memory));
    println!(
        "{} comments, of which {} were broken and {} had an output that was refused; without an output: {}, with a \
         second one: {}",
        observer.comments(),
        broken.load(Ordering::Relaxed),
        refused.load(Ordering::Relaxed),
        observer.unfinished(0),
        observer.duplicated(0)
    );
    let daemons = &mut injector.daemons;
    for exit in &daemons.exits {
        println!("a daemon ended: {exit}");
    }
    let lost_or_twice = observer.unfinished(0) + observer.duplicated(0);
    assert_eq!(lost_or_twice, 0, "{}", daemons.log_tails());
    assert_eq!(daemons.exits, Vec::<String>::new(), "{}", daemons.log_tails());
    assert_eq!(daemons.stop(), [Some(0), Some(0)], "{}", daemons.log_tails());
    let verdict = judge(&broker.address(), &names);
    println!("judge: {verdict}");
    assert_eq!(verdict["inputs"], load.written());
    let dead_letters = broken.load(Ordering::Relaxed) + refused.load(Ordering::Relaxed);
    assert_eq!(verdict["dead_lettered"], dead_letters);
}

fn create_topics(broker: &Broker) -> Names {
    let names = Names::new("chaos");
    let log_append_time = [("message.timestamp.type", "LogAppendTime")];
    broker.create_topic_with(&names.comments, PARTITIONS, &log_append_time);
    for topic in [&names.decisions, &names.dead_letters] {
        broker.create_topic_with(topic, PARTITIONS, &[("max.message.bytes", MAX_OUTPUT_BYTES)]);
    }
    names
}

fn daemon_specs(folder: &Path, brokers: &str, names: &Names, clock: Option<&Clock>) -> Vec<DaemonSpec> {
    let spec = |instance, variables| DaemonSpec {
        instance,
        settings: settings(brokers, names, instance, "") + &SharedRegistry::settings(folder),
        variables,
    };
    let clock = clock.map(Clock::variables).unwrap_or_default();
    vec![spec("steady", Vec::new()), spec("harried", clock)]
}

/// Returns an event whose decision, or whose dead letter, is larger than its topic accepts.
fn oversize_event(id: usize, dice: &mut Dice) -> (String, Option<Vec<u8>>) {
    let is_valid = dice.below(2) == 0;
    // Random letters, so that compression cannot make the record small enough.
    let letter = |_| char::from(b'a' + u8::try_from(dice.below(26)).unwrap());
    let letters: String = (0..OVERSIZE).map(letter).collect();
    let value = if is_valid {
        format!(r#"{{"content_id":"{letters}","text":"hello"}}"#)
    } else {
        letters
    };
    (format!("k{id}"), Some(value.into_bytes()))
}
