//! Measures the CPU time of the daemon without its model: the real pipeline with a scorer that answers immediately,
//! compared with a minimal loop that gives the same delivery guarantee. Prints ratios of CPU time within one run.
//!
//! `cargo bench --bench pipeline` (`-- --events N --rounds N --languages`). With `--languages`, the language of each comment
//! is judged, as for a model that lists its languages. The comments are made of nouns and verbs, without the frequent words
//! by which most English is recognised at once, so this is the most that it can cost.
//!
//! The bare loop is one consumer with the same client settings. It reads JSON, writes JSON of the same length as a
//! decision, and commits equally often. It does not tokenise, batch, decide, hash, count, keep outputs for a retry, or
//! limit what is in flight.
//!
//! It always measures at-least-once delivery on the embedded broker. If the variables of `tests/kafka/broker` are set,
//! it also measures exactly-once delivery on that Apache Kafka broker. Each broker runs in a separate process, so only
//! the CPU time of the clients counts. The outputs of every run are read back, and the benchmark panics unless there is
//! one for each event.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot run panics")]

mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use moderatord::classifier::canary;
use moderatord::config::{Config, Delivery, Sources, StreamConfig};
use moderatord::decide::{Calibration, CurrentJudge, JudgedModel};
use moderatord::hash::content_hash;
use moderatord::kafka::client::{Role, config};
use moderatord::kafka::topics::TopicFacts;
use moderatord::message::{Comment, CommentMargin, Decision, ModelIdentity, Op, SourceRecord};
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::ops::health::Health;
use moderatord::ops::metrics;
use moderatord::ops::metrics::Exporter;
use moderatord::prompt::{Prompter, Scope};
use moderatord::scorer::{Row, ScoreError, Scorer};
use moderatord::stream::pipeline::{Model, Pipeline, Settings};
use rayon::prelude::*;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::error::KafkaError;
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;
use serde::Deserialize;
use support::arguments::{flag, has_flag, number, number_argument, read_arguments};
use support::brokers::{Broker, serve_if_requested};
use support::comments::{event, texts};
use support::{cpu_time, median};

const PARTITIONS: i32 = 6;

/// The time limit of one run.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The bare loop commits after this many outputs at the latest, as the pipeline does.
const MAX_OUTPUTS: usize = 5_000;

/// The embedded broker keeps 5 MiB per partition, which holds about this many events or decisions.
const EVENTS: usize = 100_000;

fn main() {
    if serve_if_requested() {
        return;
    }
    read_arguments(
        "./dev bench pipeline",
        "Compares the CPU time of the stream without its model with that of a minimal loop",
        vec![
            number::<usize>("events", "N", "Number of events (default: 100000)"),
            number::<usize>("rounds", "N", "Number of rounds (default: 5)"),
            flag("languages", "Judge the language of each comment"),
            flag("profile", "Run only the pipeline, for a profiler"),
        ],
    );
    let events = number_argument("events").unwrap_or(EVENTS);
    let rounds = number_argument("rounds").unwrap_or(5);
    let mut out = std::io::stdout().lock();
    let metrics = metrics::install().unwrap();
    let prompter = Arc::new(prompter());
    let mut measure = |name: &str, broker: Broker| {
        let mut bench = Bench::prepare(broker, events, &prompter, &metrics);
        if has_flag("profile") {
            // Runs only the pipeline, for use with a profiler.
            (0..rounds).for_each(|_| drop(bench.pipeline()));
            return;
        }
        writeln!(out, "\n{name}: {}", bench.describe(rounds)).unwrap();
        bench.compare(rounds, &mut out);
    };
    measure("embedded broker, at least once", Broker::embedded());
    match Broker::apache() {
        Some(broker) => measure("Apache Kafka, exactly once", broker),
        None => writeln!(
            out,
            "\nApache Kafka: not measured, because MODERATORD_TEST_BROKERS is not set (see tests/kafka/broker)"
        )
        .unwrap(),
    }
}

/// One broker with the comments on it.
struct Bench<'a> {
    broker: Broker,
    comments: String,
    texts: Vec<String>,
    event_bytes: usize,
    /// The number of rows that the scorer will receive.
    rows: usize,
    prompter: &'a Arc<Prompter>,
    metrics: &'a Exporter,
}

/// The CPU time of one run in seconds, and the topic that it wrote to.
struct Run {
    cpu: f64,
    decisions: String,
}

impl<'a> Bench<'a> {
    fn prepare(mut broker: Broker, events: usize, prompter: &'a Arc<Prompter>, metrics: &'a Exporter) -> Self {
        let texts = texts(events);
        let records: Vec<(String, Vec<u8>)> = texts.iter().enumerate().map(|(id, text)| event(id, text)).collect();
        let comments = unique("comments");
        broker.create_topic(&comments, PARTITIONS);
        broker.produce(&comments, PARTITIONS, &records);
        Self {
            broker,
            comments,
            event_bytes: records.iter().map(|(_, value)| value.len()).sum::<usize>() / events,
            rows: texts.iter().map(|text| prompter.encode(text).unwrap().rows.len()).sum(),
            texts,
            prompter,
            metrics,
        }
    }

    fn describe(&self, rounds: usize) -> String {
        format!(
            "{} events of {} bytes on average in {PARTITIONS} partitions, {} threads, median of {rounds} rounds",
            self.texts.len(),
            self.event_bytes,
            std::thread::available_parallelism().map_or(1, usize::from)
        )
    }

    fn compare(&mut self, rounds: usize, out: &mut impl Write) {
        let (mut pipeline, mut bare, mut tokenising) = (Vec::new(), Vec::new(), Vec::new());
        let (mut decision_bytes, mut bare_bytes) = (0, 0);
        // Alternates between them, so that changes on this machine affect all three.
        for _ in 0..rounds {
            let run = self.bare();
            bare_bytes = self.verify(&run.decisions);
            bare.push(run.cpu);
            let run = self.pipeline();
            decision_bytes = self.verify(&run.decisions);
            pipeline.push(run.cpu);
            tokenising.push(self.tokenise());
        }
        let ratios: Vec<f64> = pipeline.iter().zip(&bare).map(|(ours, bare)| ours / bare).collect();
        let spread = (
            ratios.iter().copied().fold(f64::MAX, f64::min),
            ratios.iter().copied().fold(0.0, f64::max),
        );
        let (pipeline, bare, tokenising) = (median(pipeline), median(bare), median(tokenising));
        writeln!(
            out,
            "each run wrote one output per event, of {decision_bytes} bytes on average (bare loop: {bare_bytes})"
        )
        .unwrap();
        for (name, ratio) in [
            ("whole pipeline", pipeline),
            ("tokenisation alone", tokenising),
            ("pipeline without tokenisation", pipeline - tokenising),
        ] {
            writeln!(out, "{name:<46}{:>7.2}x", ratio / bare).unwrap();
        }
        writeln!(
            out,
            "CPU time relative to the bare loop; the whole pipeline took {:.2}x to {:.2}x in single rounds",
            spread.0, spread.1
        )
        .unwrap();
    }

    /// Runs the daemon's pipeline until everything is committed.
    fn pipeline(&mut self) -> Run {
        let stream = self.stream();
        let defaults = self.config(&stream.group, &stream.topics.decisions);
        let settings = Settings {
            topics: TopicFacts {
                comments: PARTITIONS,
                decisions: PARTITIONS,
                dead_letters: PARTITIONS,
                ..TopicFacts::default()
            },
            input: defaults.input,
            batch: defaults.batch,
            cache: defaults.cache,
            limits: defaults.limits,
            stream,
        };
        let canary = canary::rows(self.prompter).unwrap();
        let scored = Arc::new(AtomicUsize::new(0));
        let model = Model {
            scorer: Box::new(InstantScorer {
                canary: canary.clone(),
                scored: Arc::clone(&scored),
            }),
            canary,
            prompter: Arc::clone(self.prompter),
            judge: Arc::new(judge()),
            swap: crossbeam_channel::never(),
        };
        let deadline = Instant::now() + TIMEOUT;
        let pipeline = Pipeline::start(&settings, model, &Arc::new(Health::new(TIMEOUT))).unwrap();
        let wait = |holds: &dyn Fn() -> bool| {
            while !holds() {
                assert!(Instant::now() < deadline && !pipeline.is_ending());
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        wait(&|| pipeline.is_assigned());
        let start = cpu_time();
        wait(&|| scored.load(Ordering::Relaxed) >= self.rows);
        pipeline.drain(deadline);
        pipeline.join().unwrap();
        // The daemon does this every few seconds.
        self.metrics.run_upkeep();
        Run {
            cpu: (cpu_time() - start).as_secs_f64(),
            decisions: settings.stream.topics.decisions,
        }
    }

    /// Runs the bare loop, which reads, decodes, encodes, writes and commits.
    fn bare(&mut self) -> Run {
        let stream = self.stream();
        let mut consumer_config = config(&stream, Role::Consumer);
        // The pipeline looks up the first offset instead.
        consumer_config.set("auto.offset.reset", "earliest");
        let consumer: BaseConsumer = consumer_config.create().unwrap();
        let producer: BaseProducer = config(&stream, Role::Producer).create().unwrap();
        let is_transactional = stream.delivery == Delivery::ExactlyOnce;
        if is_transactional {
            producer.init_transactions(TIMEOUT).unwrap();
        }
        consumer.subscribe(&[&self.comments]).unwrap();
        let deadline = Instant::now() + TIMEOUT;
        let mut decision = template();
        let mut group = BareGroup::default();
        let (mut start, mut read) = (None, 0);
        while read < self.texts.len() {
            assert!(Instant::now() < deadline, "timed out after reading {read} events");
            if let Some(message) = consumer.poll(Duration::from_millis(5)) {
                let message = message.unwrap();
                start.get_or_insert_with(cpu_time);
                read += 1;
                let event: Event = serde_json::from_slice(message.payload().unwrap()).unwrap();
                assert!(!event.text.is_empty());
                decision.event_id = Some(event.event_id);
                decision.content_id = Some(event.content_id);
                decision.revision = Some(event.revision);
                decision.community_id = Some(event.community_id);
                let source = decision.source.as_mut().unwrap();
                (source.partition, source.offset) = (message.partition(), message.offset());
                let json = serde_json::to_vec(&decision).unwrap();
                if group.outputs == 0 && is_transactional {
                    producer.begin_transaction().unwrap();
                }
                let mut record = BaseRecord::to(&stream.topics.decisions)
                    .partition(message.partition())
                    .key(message.key().unwrap())
                    .payload(&json);
                while let Err((error, back)) = producer.send(record) {
                    assert_eq!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull));
                    record = back;
                    producer.poll(Duration::from_millis(2));
                }
                group.outputs += 1;
                group.next[usize::try_from(message.partition()).unwrap()] = Some(message.offset() + 1);
                group.due.get_or_insert_with(|| Instant::now() + stream.commit_interval);
            }
            let is_due = group.due.is_some_and(|due| due <= Instant::now());
            if is_due || group.outputs >= MAX_OUTPUTS || read == self.texts.len() {
                producer.flush(TIMEOUT).unwrap();
                let offsets = group.offsets(&self.comments);
                if is_transactional {
                    let metadata = consumer.group_metadata().unwrap();
                    producer
                        .send_offsets_to_transaction(&offsets, &metadata, TIMEOUT)
                        .unwrap();
                    producer.commit_transaction(TIMEOUT).unwrap();
                } else {
                    consumer.commit(&offsets, CommitMode::Sync).unwrap();
                }
                group = BareGroup::default();
            }
        }
        drop((consumer, producer));
        Run {
            cpu: (cpu_time() - start.unwrap()).as_secs_f64(),
            decisions: stream.topics.decisions,
        }
    }

    /// Measures tokenisation alone. It runs on all cores as in the pipeline, because hyper-threads that share a core
    /// slow each other down.
    fn tokenise(&self) -> f64 {
        let start = cpu_time();
        self.texts.par_chunks(64).for_each(|texts| {
            for text in texts {
                std::hint::black_box(self.prompter.encode(text).unwrap());
            }
        });
        (cpu_time() - start).as_secs_f64()
    }

    /// Checks that each event has exactly one decision and returns the average size of the decisions.
    fn verify(&self, decisions: &str) -> usize {
        #[derive(Deserialize)]
        struct Sourced {
            source: SourceRecord,
        }
        let (mut count, mut bytes, mut sources) = (0, 0, BTreeSet::new());
        self.broker.read(decisions, PARTITIONS, |value| {
            let Sourced { source } = serde_json::from_slice(value).unwrap();
            count += 1;
            bytes += value.len();
            sources.insert((source.partition, source.offset));
        });
        let expected = self.texts.len();
        assert_eq!(
            (count, sources.len()),
            (expected, expected),
            "decisions and distinct decisions"
        );
        bytes / count
    }

    /// Returns the default stream settings with a new group and a new topic.
    fn stream(&mut self) -> StreamConfig {
        let decisions = unique("decisions");
        self.broker.create_topic(&decisions, PARTITIONS);
        self.config(&unique("group"), &decisions).require_stream().unwrap()
    }

    fn config(&self, group: &str, decisions: &str) -> Config {
        let flag = |key, value: &str| (key, value.to_owned(), "bench");
        let mut flags = vec![
            flag("model.path", "unused"),
            flag("kafka.brokers", self.broker.address()),
            flag("kafka.group", group),
            flag("kafka.instance", "bench"),
            flag("topics.comments", &self.comments),
            flag("topics.decisions", decisions),
            flag("topics.dead_letters", "unused"),
        ];
        if !self.broker.is_apache() {
            flags.extend([
                flag("delivery", "at_least_once"),
                // On the embedded broker, joining a group takes as long as the session timeout.
                flag("kafka.properties.session.timeout.ms", "3000"),
                flag("kafka.properties.heartbeat.interval.ms", "300"),
                // The embedded broker does not end a waiting fetch when new data arrives.
                flag("kafka.properties.fetch.wait.max.ms", "10"),
            ]);
        }
        let sources = Sources {
            flags,
            ..Sources::default()
        };
        Config::load(&sources).unwrap()
    }
}

/// The outputs that the bare loop commits together.
#[derive(Default)]
struct BareGroup {
    outputs: usize,
    next: [Option<i64>; PARTITIONS as usize],
    due: Option<Instant>,
}

impl BareGroup {
    fn offsets(&self, topic: &str) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for (partition, next) in (0..).zip(self.next) {
            if let Some(next) = next {
                list.add_partition_offset(topic, partition, Offset::Offset(next))
                    .unwrap();
            }
        }
        list
    }
}

/// The fields of an event that the bare loop needs.
#[derive(Deserialize)]
struct Event {
    event_id: String,
    content_id: String,
    revision: i64,
    community_id: String,
    text: String,
}

/// A scorer that answers immediately with a fixed margin.
struct InstantScorer {
    canary: Vec<Row>,
    /// The number of rows scored so far, without the canary's.
    scored: Arc<AtomicUsize>,
}

impl Scorer for InstantScorer {
    fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
        if rows != self.canary {
            self.scored.fetch_add(rows.len(), Ordering::Relaxed);
        }
        Ok(vec![-1.0; rows.len()])
    }
}

/// Returns a prompter with the default frame and a small vocabulary. Tokenising with a published vocabulary can take
/// more or less time.
fn prompter() -> Prompter {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gemma3");
    let checkpoint = Checkpoint::open(&fixture).unwrap();
    let sources = Sources {
        flags: vec![("model.path", "unused".to_owned(), "bench")],
        ..Sources::default()
    };
    let scope = has_flag("languages").then(|| Scope::new(vec!["en".to_owned()]).unwrap());
    Prompter::new(
        &checkpoint.tokenizer_path(),
        checkpoint.tokenizer(),
        &Config::load(&sources).unwrap().prompt,
        checkpoint.config().vocab_size,
        // Nothing is scored, so the fixture's small number of positions is not a limit.
        usize::MAX,
    )
    .unwrap()
    .with_scope(scope)
}

fn judge() -> CurrentJudge {
    let hash = |of: &str| content_hash(of.as_bytes());
    let sources = Sources {
        flags: vec![("model.path", "unused".to_owned(), "bench")],
        ..Sources::default()
    };
    let identity = ModelIdentity {
        base: hash("base"),
        adapter: hash("adapter"),
        adapter_version: None,
        prompt: hash("prompt"),
        calibration: String::new(),
        normalizer: "nfc-1".to_owned(),
        device: "cpu".to_owned(),
        dtype: "f32".to_owned(),
        quantization: "none".to_owned(),
    };
    let model = JudgedModel {
        identity,
        calibration: Calibration::Identity,
        derived: Default::default(),
        defaults: Default::default(),
    };
    CurrentJudge::new(Config::load(&sources).unwrap().policy, model)
}

/// Returns a decision of the usual size that the bare loop fills in.
fn template() -> Decision {
    let comment = Comment {
        event_id: None,
        content_id: None,
        revision: None,
        op: Op::Create,
        community_id: None,
        text: "a comment".to_owned(),
        replaced_surrogates: 0,
    };
    let scored = CommentMargin {
        margin: -1.0,
        windows: 1,
        truncated: false,
        competence: None,
    };
    let source = SourceRecord {
        topic_id: None,
        topic: unique("comments"),
        partition: 0,
        offset: 0,
    };
    judge().get().decide(&comment, scored, Some(&source), SystemTime::now())
}

/// Returns a name that the broker has not seen before.
fn unique(name: &str) -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_millis();
    format!("bench-{name}-{now}-{}", COUNT.fetch_add(1, Ordering::Relaxed))
}
