//! Features that only a real broker has: retention, size limits, permissions, encryption, and restarts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use moderatord::kafka::topics;
use moderatord::kafka::topics::TopicsError;
use moderatord::stream::control::StreamError;

use crate::broker::{Broker, OutputRecord, script, unique, variable};
use crate::daemon::{Names, Scripted, Setup, eventually};
use crate::flow::{assert_each_once, await_committed, comment};

fn comments(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|id| comment(id, "hello")).collect()
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_committed_offset_that_retention_has_deleted_stops_the_daemon() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "gap", 2);
    let values = comments(100);
    let records = || {
        (0..)
            .zip(&values)
            .map(|(id, value)| (id % 2, "k", Some(value.as_slice())))
    };
    broker.produce(&names.comments, records());
    let setup = Setup::new(&broker, &names);
    let daemon = setup.start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[50, 50]);
    daemon.stop().unwrap();
    broker.produce(&names.comments, records());
    broker.delete_before(&names.comments, 1, 80);

    let daemon = setup.start(&broker, Scripted::by_length());
    let error = daemon.pipeline.join().unwrap_err();
    assert!(error.requires_operator());
    let StreamError::Gap(gaps) = &error else {
        panic!("{error}")
    };
    assert_eq!(
        gaps.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["partition 1: offset 50 is next, but retention has deleted everything before 80 (30 offsets)"]
    );
    // Nothing was read, not even from the partition without a gap.
    assert_eq!(broker.committed(&names.group, &names.comments, 2), [50, 50]);

    let mut setup = Setup::new(&broker, &names);
    setup.set("KAFKA__ON_GAP", "continue");
    let daemon = setup.start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[100, 100]);
    daemon.stop().unwrap();
    let sources: Vec<_> = broker.read(&names.decisions).iter().map(|read| read.source()).collect();
    let expected = (0..100)
        .map(|offset| (0, offset))
        .chain((0..50).chain(80..100).map(|offset| (1, offset)));
    assert_eq!(sources, expected.collect::<Vec<_>>());
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_group_that_starts_at_latest_resumes_where_it_started() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "latest", 1);
    let values = comments(30);
    let records = || values.iter().map(|value| (0, "k", Some(value.as_slice())));
    broker.produce(&names.comments, records());
    let mut setup = Setup::new(&broker, &names);
    setup.set("KAFKA__START", "latest");
    let daemon = setup.start(&broker, Scripted::by_length());
    // The start is committed although nothing was read, so that records that arrive while no daemon runs are not lost.
    await_committed(&broker, &names, &[30]);
    daemon.stop().unwrap();
    broker.produce(&names.comments, records());
    let daemon = setup.start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[60]);
    daemon.stop().unwrap();
    let offsets: Vec<_> = broker
        .read(&names.decisions)
        .iter()
        .map(|read| read.source().1)
        .collect();
    assert_eq!(offsets, (30..60).collect::<Vec<_>>());
}

/// The client does not notice that a topic was recreated, and would continue at the old offset.
#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_recreated_topic_stops_the_daemon_or_is_read_from_its_beginning() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "recreated", 1);
    let values = comments(100);
    let records = || values.iter().map(|value| (0, "k", Some(value.as_slice())));
    let mut setup = Setup::new(&broker, &names);
    broker.produce(&names.comments, records());
    let daemon = setup.start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[100]);
    let first: Vec<String> = decided_offsets(&broker, &names).into_keys().collect();

    // While the daemon runs; the new topic soon reaches beyond the old offset.
    broker.recreate_topic(&names.comments, 1);
    for _ in 0..4 {
        broker.produce(&names.comments, records());
    }
    let error = daemon.pipeline.join().unwrap_err();
    assert!(matches!(error, StreamError::Gap(_)), "{error}");
    assert!(error.to_string().contains("recreated"), "{error}");
    // And at the next start, unless the brokers have deleted the group's offsets with the topic. Then all of the new topic
    // is read.
    let daemon = setup.start(&broker, Scripted::by_length());
    let deadline = Instant::now() + Duration::from_secs(15);
    while !daemon.pipeline.has_ended() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    if daemon.pipeline.has_ended() {
        let error = daemon.pipeline.join().unwrap_err().to_string();
        assert!(error.contains("recreated"), "{error}");
    } else {
        await_committed(&broker, &names, &[400]);
        daemon.stop().unwrap();
    }

    setup.set("KAFKA__ON_GAP", "continue");
    let daemon = setup.start(&broker, Scripted::by_length());
    // The first daemon may have committed offset 400 already, so only the decisions tell.
    eventually("all of the second topic is decided", || {
        let decided = decided_offsets(&broker, &names);
        decided
            .iter()
            .any(|(id, offsets)| !first.contains(id) && offsets.len() == 400)
    });
    // Once more, while the daemon runs with this setting.
    broker.recreate_topic(&names.comments, 1);
    broker.produce(&names.comments, records());
    await_committed(&broker, &names, &[100]);
    daemon.stop().unwrap();

    let topics = decided_offsets(&broker, &names);
    let decisions = broker.read(&names.decisions);
    let ids: BTreeSet<String> = decisions
        .iter()
        .map(|decision| decision.json()["decision_id"].to_string())
        .collect();
    // Every record of all three topics was decided, and no two of them share an id. What was read of the second topic
    // before the daemon noticed it counts for the first one, and is decided again.
    let complete = |count: i64| {
        let is_complete = |offsets: &&BTreeSet<i64>| (0..count).all(|offset| offsets.contains(&offset));
        topics.values().filter(is_complete).count()
    };
    assert_eq!((topics.len(), complete(100)), (3, 3));
    assert!(complete(400) >= 1);
    assert_eq!(ids.len(), topics.values().map(BTreeSet::len).sum::<usize>());
}

/// Returns the offsets that decisions name, by the id of the topic.
fn decided_offsets(broker: &Broker, names: &Names) -> BTreeMap<String, BTreeSet<i64>> {
    let mut offsets: BTreeMap<String, BTreeSet<i64>> = BTreeMap::new();
    for decision in broker.read(&names.decisions) {
        let source = &decision.json()["source"];
        let id = source["topic_id"].as_str().unwrap().to_owned();
        offsets
            .entry(id)
            .or_default()
            .insert(source["offset"].as_i64().unwrap());
    }
    offsets
}

/// `kafka.start` applies to the first start of the group: what is written to a partition that is added later must not be
/// skipped because the daemon discovers the partition only after the records.
#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn with_start_latest_partitions_that_are_added_later_lose_nothing() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "growing", 2);
    let values = comments(20);
    let to = |partition: i32| values.iter().map(move |value| (partition, "k", Some(value.as_slice())));
    for partition in 0..2 {
        broker.produce(&names.comments, to(partition));
    }
    let mut setup = Setup::new(&broker, &names);
    setup.set("KAFKA__START", "latest");
    let daemon = setup.start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[20, 20]);

    // The output topics do not grow along.
    broker.grow_topic(&names.comments, 4);
    for partition in 0..4 {
        broker.produce(&names.comments, to(partition));
    }
    await_committed(&broker, &names, &[40, 40, 20, 20]);
    daemon.stop().unwrap();
    // Nor are records lost that arrive while no daemon runs.
    broker.grow_topic(&names.comments, 5);
    broker.produce(&names.comments, to(4));
    let daemon = setup.start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[40, 40, 20, 20, 20]);
    daemon.stop().unwrap();

    let mut sources: Vec<(i32, i64)> = broker.read(&names.decisions).iter().map(OutputRecord::source).collect();
    sources.sort_unstable();
    let offsets = |partition| if partition < 2 { 20..40 } else { 0..20 };
    let expected: Vec<(i32, i64)> = (0..5)
        .flat_map(|partition| offsets(partition).map(move |offset| (partition, offset)))
        .collect();
    assert_eq!(sources, expected);
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn an_output_too_large_for_its_topic_is_reduced_to_coordinates() {
    let broker = Broker::apache();
    let names = Names::new("oversize");
    broker.create_topic(&names.comments, 1);
    let small = [("max.message.bytes", "4000")];
    broker.create_topic_with(&names.decisions, 1, &small);
    broker.create_topic_with(&names.dead_letters, 1, &small);
    // Random letters, so that compression cannot make the record small enough.
    let mut noise = 1u64;
    let mut letters = || -> String {
        std::iter::repeat_with(|| {
            noise = noise
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            char::from(b'a' + u8::try_from((noise >> 33) % 26).unwrap())
        })
        .take(9000)
        .collect()
    };
    let no_json = letters();
    let long_id = format!(r#"{{"content_id":"{}","text":"hello"}}"#, letters());
    let plain = comments(40);
    let values = plain.iter().enumerate().map(|(id, value)| match id {
        7 => no_json.as_bytes(),
        21 => long_id.as_bytes(),
        _ => value.as_slice(),
    });
    broker.produce(&names.comments, values.map(|value| (0, "k", Some(value))));
    let daemon = Setup::new(&broker, &names).start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[40]);
    daemon.stop().unwrap();
    let (decisions, letters) = (broker.read(&names.decisions), broker.read(&names.dead_letters));
    assert_each_once(&decisions, &letters, &[40]);
    let found: Vec<_> = letters
        .iter()
        .map(|letter| {
            let header = |name: &str| letter.headers[name].clone();
            (
                letter.source().1,
                letter.value.is_none(),
                header("__connect.errors.exception.class.name"),
                header("moderatord.value.bytes"),
            )
        })
        .collect();
    assert_eq!(
        found,
        [
            (7, true, "not_json".to_owned(), "9000".to_owned()),
            (21, true, "output_refused".to_owned(), long_id.len().to_string())
        ]
    );
}

fn acl(arguments: &[&str]) {
    let folder = variable("KAFKA_DIR");
    let fixed = ["acl", &folder, "--add", "--allow-principal", "User:moderatord"];
    script("broker", &[&fixed, arguments].concat());
}

fn sasl(names: &Names, mechanism: &str) -> Setup {
    let mut setup = Setup::new(&Broker::apache(), names);
    setup
        .set("KAFKA__BROKERS", &variable("SASL_BROKERS"))
        .set("KAFKA__PROPERTIES__SECURITY_PROTOCOL", "sasl_plaintext")
        .set("KAFKA__PROPERTIES__SASL_MECHANISM", mechanism)
        .set("KAFKA__PROPERTIES__SASL_USERNAME", &variable("SASL_USER"))
        .set("KAFKA__PROPERTIES__SASL_PASSWORD", &variable("SASL_PASSWORD"));
    setup
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn topics_without_permission_are_named_before_anything_is_read() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "closed", 1);
    let ask = || topics::check(&sasl(&names, "PLAIN").config(&broker).require_stream().unwrap());
    let faults = || match ask() {
        Err(TopicsError::Faults(faults)) => faults.iter().map(ToString::to_string).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let found = faults();
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(
        found.iter().all(|fault| fault.contains("not visible to this user")),
        "{found:?}"
    );
    acl(&["--operation", "read", "--topic", &names.comments]);
    acl(&["--operation", "write", "--topic", &names.dead_letters]);
    acl(&["--operation", "describe", "--topic", &names.decisions]);
    let found = faults();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("topics.decisions = "), "{found:?}");
    assert!(
        found[0].ends_with("no permission to write to this topic, expected an ACL that allows WRITE"),
        "{found:?}"
    );
    acl(&["--operation", "write", "--topic", &names.decisions]);
    ask().unwrap();
    // A missing permission for the transactional id is only found when the stream starts and first uses it.
    let config = sasl(&names, "PLAIN");
    let error = config
        .try_start(&broker, Scripted::by_length())
        .map(|_| ())
        .unwrap_err();
    assert!(
        error.requires_operator() && error.to_string().starts_with("not allowed to begin transactions: "),
        "{error}"
    );
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn missing_topics_are_named_and_not_created() {
    let broker = Broker::apache();
    let names = Names::new("absent");
    let ask = || topics::check(&Setup::new(&broker, &names).config(&broker).require_stream().unwrap());
    for _ in 0..2 {
        let Err(TopicsError::Faults(faults)) = ask() else {
            panic!()
        };
        assert_eq!(faults.iter().count(), 3);
        assert!(faults.to_string().contains("the topic does not exist, "), "{faults}");
    }
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_stream_over_sasl_runs_with_minimal_permissions() {
    let broker = Broker::apache();
    for mechanism in ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] {
        let names = Names::create(&broker, "sasl", 1);
        acl(&["--operation", "read", "--topic", &names.comments]);
        acl(&["--operation", "read", "--group", &names.group]);
        acl(&[
            "--operation",
            "write",
            "--topic",
            &names.decisions,
            "--topic",
            &names.dead_letters,
        ]);
        let ids = [
            "--transactional-id",
            &names.group,
            "--resource-pattern-type",
            "prefixed",
        ];
        acl(&[&["--operation", "write"], &ids[..]].concat());
        let values = comments(20);
        broker.produce(
            &names.comments,
            values.iter().map(|value| (0, "k", Some(value.as_slice()))),
        );
        let daemon = sasl(&names, mechanism).start(&broker, Scripted::by_length());
        await_committed(&broker, &names, &[20]);
        daemon.stop().unwrap();
        assert_each_once(&broker.read(&names.decisions), &[], &[20]);
    }
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_stream_runs_over_tls() {
    let broker = Broker::apache();
    let names = Names::create(&broker, "tls", 1);
    let values = comments(20);
    broker.produce(
        &names.comments,
        values.iter().map(|value| (0, "k", Some(value.as_slice()))),
    );
    let mut setup = Setup::new(&broker, &names);
    setup
        .set("KAFKA__BROKERS", &variable("TLS_BROKERS"))
        .set("KAFKA__PROPERTIES__SECURITY_PROTOCOL", "ssl")
        .set("KAFKA__PROPERTIES__SSL_CA_LOCATION", &variable("TLS_CA"));
    let daemon = setup.start(&broker, Scripted::by_length());
    await_committed(&broker, &names, &[20]);
    daemon.stop().unwrap();
    assert_each_once(&broker.read(&names.decisions), &[], &[20]);
}

/// A Kafka node for one test, killed when the test succeeds.
struct Node(tempfile::TempDir);

impl Node {
    fn command(&self, command: &str) {
        script("broker", &[command, self.0.path().to_str().unwrap()]);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.command("kill");
        }
    }
}

#[test]
#[ignore = "needs Apache Kafka: tests/kafka/suite"]
fn a_real_broker_that_is_killed_and_restarted_loses_nothing() {
    let node = Node(tempfile::tempdir().unwrap());
    node.command("start");
    let exported = std::fs::read_to_string(node.0.path().join("env")).unwrap();
    let address = exported
        .lines()
        .find_map(|line| line.strip_prefix("export MODERATORD_TEST_BROKERS="));
    let broker = Broker::Apache(address.unwrap().to_owned());
    let names = Names::create(&broker, &unique("killed"), 3);
    let values = comments(9000);
    broker.produce(
        &names.comments,
        (0..)
            .zip(&values)
            .map(|(id, value)| (id % 3, "k", Some(value.as_slice()))),
    );
    let mut setup = Setup::new(&broker, &names);
    setup.limits.events = 300;
    let daemon = setup.start(
        &broker,
        Scripted::new(|rows| {
            std::thread::sleep(std::time::Duration::from_millis(2) * u32::try_from(rows.len()).unwrap());
            Ok(rows.iter().map(crate::daemon::margin).collect())
        }),
    );
    for end in ["kill", "stop"] {
        let before: i64 = broker.committed(&names.group, &names.comments, 3).iter().sum();
        eventually("more is committed", || {
            broker.committed(&names.group, &names.comments, 3).iter().sum::<i64>() > before + 300
        });
        node.command(end);
        std::thread::sleep(std::time::Duration::from_secs(1));
        node.command("restart");
    }
    await_committed(&broker, &names, &[3000; 3]);
    daemon.stop().unwrap();
    assert_each_once(&broker.read(&names.decisions), &[], &[3000; 3]);
}
