//! Kills, stops and continues the daemon as a process; a separate Kafka client checks its outputs.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::broker::{Broker, PATIENCE, script, variable};
use crate::common::process::{Start, send_signal};
use crate::common::{fixture, without_settings};
use crate::daemon::{Names, eventually};
use crate::soak::proxy::{JOIN_GROUP, Proxy};

/// Returns the settings of a daemon that serves the reference checkpoint, with properties of its Kafka clients.
pub fn settings(brokers: &str, names: &Names, instance: &str, properties: &str) -> String {
    format!(
        "[kafka]\nbrokers = [\"{}\"]\ngroup = \"{}\"\ninstance = \"{instance}\"\n\
         [kafka.properties]\n{properties}\
         [topics]\ncomments = \"{}\"\ndecisions = \"{}\"\ndead_letters = \"{}\"\n\
         [model]\npath = \"{}\"\n[prompt]\nmax_window_tokens = 64\n[batch]\nlinger = \"5ms\"\nmax_tokens = 256\n\
         [limits]\nevents = 1000\n[http]\nlisten = \"127.0.0.1:0\"\n",
        brokers.replace(',', "\", \""),
        names.group,
        names.comments,
        names.decisions,
        names.dead_letters,
        fixture("gemma3").display()
    )
}

/// A daemon as a process.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    pub fn start(folder: &Path, names: &Names, instance: &str) -> Self {
        Self::start_with(folder, names, instance, &[])
    }

    /// Starts a daemon with further settings, each given as an environment variable without the `MODERATORD__` prefix.
    pub fn start_with(folder: &Path, names: &Names, instance: &str, variables: &[(&str, &str)]) -> Self {
        let fast = "\"session.timeout.ms\" = 1500\n\"heartbeat.interval.ms\" = 300\n";
        let settings = settings(&variable("BROKERS"), names, instance, fast);
        let variables = variables
            .iter()
            .map(|(name, value)| (format!("MODERATORD__{name}"), (*value).to_owned()));
        let variables: Vec<(String, String)> = variables.collect();
        let variables: Vec<(&str, String)> = variables
            .iter()
            .map(|(name, value)| (name.as_str(), value.clone()))
            .collect();
        Self::spawn(folder, instance, &settings, &variables)
    }

    /// Starts a daemon with the given settings, and with variables added to its environment.
    pub fn spawn(folder: &Path, instance: &str, settings: &str, variables: &[(&str, String)]) -> Self {
        let file = folder.join(format!("{instance}.toml"));
        std::fs::write(&file, settings).unwrap();
        let log = folder.join(format!("{instance}.log"));
        let stderr = std::fs::File::options().create(true).append(true).open(&log).unwrap();
        let child = without_settings(env!("CARGO_BIN_EXE_moderatord"))
            .arg("run")
            .arg("--config")
            .arg(&file)
            // Two processes share two cores with the broker, so each gets one thread.
            .env("RAYON_NUM_THREADS", "1")
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .start()
            .unwrap();
        Self { child, log }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        send_signal(self.child.id(), name);
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until the process has ended, and returns its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the process has not ended: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A failed test must not leave the process running.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the key and value of one of several kinds of event, one in a hundred of which cannot be decoded.
pub fn event(id: usize) -> (String, Option<Vec<u8>>) {
    let value = match id % 100 {
        _ if is_broken(id) => match id / 100 % 4 {
            0 => b"no json".to_vec(),
            1 => b"\xff\xfe".to_vec(),
            2 => br#"{"content_id":"c"}"#.to_vec(),
            _ => br#"{"content_id":"c","text":{}}"#.to_vec(),
        },
        29 => return (format!("k{id}"), None),
        31 => format!(r#"{{"content_id":"c{id}","op":"delete"}}"#).into_bytes(),
        47 => format!(
            r#"{{"content_id":"c{id}","text":"{}"}}"#,
            "a longer word about the garden ".repeat(12)
        )
        .into_bytes(),
        _ => format!(r#"{{"content_id":"c{id}","text":"see you at the garden, number {id}"}}"#).into_bytes(),
    };
    (format!("k{id}"), Some(value))
}

/// Returns whether an [`event`] cannot be decoded.
pub fn is_broken(id: usize) -> bool {
    id % 100 == 17
}

/// Writes events in chunks, with a pause after each.
pub fn produce_slowly(topic: &str, ids: Range<usize>, partitions: usize, pause: Duration, chunk: usize) {
    let broker = Broker::apache();
    for begin in ids.clone().step_by(chunk) {
        let events: Vec<(i32, String, Option<Vec<u8>>)> = (begin..(begin + chunk).min(ids.end))
            .map(|id| {
                let (key, value) = event(id);
                (i32::try_from(id % partitions).unwrap(), key, value)
            })
            .collect();
        broker.produce(
            topic,
            events
                .iter()
                .map(|(partition, key, value)| (*partition, key.as_str(), value.as_deref())),
        );
        std::thread::sleep(pause);
    }
}

/// Sets a flag when it is dropped.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes 400 events per second until a test has seen enough, and returns how many it has written.
pub fn produce_until(is_enough: &AtomicBool, topic: &str, partitions: usize) -> usize {
    let mut count = 0;
    while !is_enough.load(Ordering::Relaxed) {
        produce_slowly(topic, count..count + 100, partitions, Duration::from_millis(250), 100);
        count += 100;
    }
    count
}

pub fn await_end(broker: &Broker, names: &Names, partitions: i32, count: i64) {
    let start = Instant::now();
    let mut seen = (0, start);
    loop {
        let committed: i64 = broker.committed(&names.group, &names.comments, partitions).iter().sum();
        if committed == count {
            return;
        }
        if committed != seen.0 {
            seen = (committed, Instant::now());
        }
        assert!(seen.1.elapsed() < PATIENCE, "only {committed} of {count} are committed");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Returns the verdict of an independent `read_committed` client.
pub fn judge(brokers: &str, names: &Names) -> serde_json::Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kafka/judge.py");
    let verdict = script(
        "python",
        &[
            path.to_str().unwrap(),
            "--brokers",
            brokers,
            "--comments",
            &names.comments,
            "--decisions",
            &names.decisions,
            "--dead-letters",
            &names.dead_letters,
            "--group",
            &names.group,
            "--settle",
            "35",
        ],
    );
    serde_json::from_str(&verdict).unwrap()
}

/// A pseudo-random number generator with a printable seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, limit: u64) -> u64 {
        // A linear congruential generator with the constants of Knuth's MMIX.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn every_comment_is_decided_exactly_once_despite_kills() {
    let seed = std::env::var("MODERATORD_TEST_SEED").map_or(1, |seed| seed.parse().unwrap());
    let kills = std::env::var("MODERATORD_TEST_KILLS").map_or(20, |kills| kills.parse().unwrap());
    // A process lives for 2.4 seconds on average, so that the load, which writes 400 comments per second, lasts until
    // about the last kill.
    let comments: usize = 1000 * kills;
    let broker = Broker::apache();
    let names = Names::create(&broker, "kills", 6);
    let folder = tempfile::tempdir().unwrap();
    let mut dice = Dice(seed);
    let mut log = String::new();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| produce_slowly(&names.comments, 0..comments, 6, Duration::from_millis(250), 100));
        for _ in 0..kills {
            let process = Process::start(folder.path(), &names, "one");
            // Kills happen at any time from startup to the middle of the stream.
            std::thread::sleep(Duration::from_millis(300 + dice.below(4200)));
            process.signal("KILL");
            log = process.log();
        }
        // On a busy machine, the load falls behind by more than `eventually` waits for.
        load.join().unwrap();
        let mut process = Process::start(folder.path(), &names, "one");
        await_end(&broker, &names, 6, i64::try_from(comments).unwrap());
        process.signal("TERM");
        assert_eq!(process.wait(), Some(0), "{}", process.log());
    });
    assert!(
        log.contains("serving"),
        "no daemon was serving when it was killed: {log}"
    );
    let verdict = judge(&broker.address(), &names);
    println!("seed {seed}, {kills} kills: {verdict}");
    assert_eq!(verdict["ok"], true, "{verdict}");
    assert_eq!(
        (&verdict["inputs"], &verdict["dead_lettered"]),
        (&comments.into(), &(comments / 100).into())
    );
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_zombie_cannot_write_to_partitions_that_another_has_taken_over() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "zombie", 4);
    let folder = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| produce_slowly(&names.comments, 0..6000, 4, Duration::from_millis(200), 100));
        let zombie = Process::start(folder.path(), &names, "zombie");
        let mut other = Process::start(folder.path(), &names, "other");
        eventually("both serve", || {
            [&zombie, &other]
                .iter()
                .all(|process| process.log().contains("assigned"))
        });
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(800));
            zombie.signal("STOP");
            // Longer than the session timeout, so that the other process takes over.
            std::thread::sleep(Duration::from_millis(3500));
            zombie.signal("CONT");
        }
        // The zombie returns after another process with the same instance name has taken its place.
        std::thread::sleep(Duration::from_millis(800));
        zombie.signal("STOP");
        let successor_folder = folder.path().join("successor");
        std::fs::create_dir(&successor_folder).unwrap();
        let successor = Process::start(&successor_folder, &names, "zombie");
        eventually("the successor serves", || successor.log().contains("serving"));
        std::thread::sleep(Duration::from_secs(1));
        zombie.signal("CONT");
        let mut twins = [zombie, successor];
        let mut ended = None;
        eventually("one of them ends", || {
            ended = (0..2).find(|&index| !twins[index].is_running());
            ended.is_some()
        });
        let ended = &mut twins[ended.unwrap()];
        assert_eq!(ended.wait(), Some(78), "{}", ended.log());
        assert!(ended.log().contains("fenced"), "{}", ended.log());
        await_end(&broker, &names, 4, 6000);
        let rest = twins.iter_mut().filter_map(|twin| twin.is_running().then_some(twin));
        for process in rest.chain([&mut other]) {
            assert!(process.is_running(), "{}", process.log());
            process.signal("TERM");
            assert_eq!(process.wait(), Some(0), "{}", process.log());
        }
    });
    let verdict = judge(&broker.address(), &names);
    assert_eq!(verdict["ok"], true, "{verdict}");
}

/// A static member that is expelled while it joins again finds out by the answer to its request to join. It must not
/// continue with the partitions where it was, because another process has read and committed them in the meantime.
///
/// If both processes claim a partition, librdkafka's assignor seems to leave it to the one whose name comes last, so that
/// is the one that is expelled here.
#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_member_that_is_expelled_while_it_joins_again_starts_over() {
    let broker = Broker::apache();
    let proxy = Proxy::start(&variable("PROXY_BROKERS"));
    let names = Names::create(&broker, "expelled", 4);
    let folder = tempfile::tempdir().unwrap();
    let count = || -> i64 { broker.committed(&names.group, &names.comments, 4).iter().sum() };
    let is_enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| produce_until(&is_enough, &names.comments, 4));
        // If the test fails, the load must end as well.
        let end_load = SetOnDrop(&is_enough);
        let through_proxy = [("KAFKA__BROKERS", variable("PROXY_BROKERS"))];
        let through_proxy = through_proxy.each_ref().map(|(name, value)| (*name, value.as_str()));
        let mut expelled = Process::start_with(folder.path(), &names, "zombie", &through_proxy);
        eventually("the only member commits", || count() > 0);
        proxy.hold(JOIN_GROUP);
        let mut other = Process::start(folder.path(), &names, "other");
        eventually("the only member joins again", || proxy.held_count() > 0);
        eventually("the other one has all partitions", || {
            other.log().contains("assigned partitions=[0, 1, 2, 3]")
        });
        let before = count();
        eventually("the other one commits", || count() > before + 100);
        proxy.release();
        drop(end_load);
        await_end(&broker, &names, 4, i64::try_from(load.join().unwrap()).unwrap());
        let log = expelled.log();
        assert!(log.contains("assignment lost"), "{log}");
        for process in [&mut expelled, &mut other] {
            process.signal("TERM");
            assert_eq!(process.wait(), Some(0), "{}", process.log());
        }
    });
    let verdict = judge(&broker.address(), &names);
    assert_eq!(verdict["ok"], true, "{verdict}");
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_second_signal_ends_at_once_and_loses_nothing() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "twice", 2);
    let folder = tempfile::tempdir().unwrap();
    produce_slowly(&names.comments, 0..8000, 2, Duration::ZERO, 8000);
    let mut process = Process::start(folder.path(), &names, "one");
    eventually("some are committed", || {
        broker.committed(&names.group, &names.comments, 2)[0] > 0
    });
    process.signal("TERM");
    process.signal("INT");
    // The drain either finished between the two signals or was cut short by the second one.
    assert!(matches!(process.wait(), Some(0 | 1)), "{}", process.log());
    let mut process = Process::start(folder.path(), &names, "one");
    await_end(&broker, &names, 2, 8000);
    process.signal("TERM");
    assert_eq!(process.wait(), Some(0), "{}", process.log());
    let verdict = judge(&broker.address(), &names);
    assert_eq!(verdict["ok"], true, "{verdict}");
}
