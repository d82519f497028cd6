//! `moderatord demo`: runs the whole daemon on an embedded broker with sample comments.

mod counter;
mod samples;
mod view;

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use crossbeam_channel::never;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;
use serde_json::json;

use super::Exit;
use super::run::{assemble_model, stream_settings};
use crate::config::{Config, Sources};
use crate::kafka::QuietContext;
use crate::kafka::embedded::{CLIENT_PROPERTIES, EmbeddedBroker};
use crate::kafka::topics::TopicFacts;
use crate::ops::health::Health;
use crate::ops::log;
use crate::serving::{ModelSource, ServingError};
use crate::stream::pipeline::Pipeline;
use counter::{Count, OutputCounter, SENT_AT, now_us};
use view::{DemoFacts, LiveView};

const COMMENTS: &str = "comments";
const DECISIONS: &str = "decisions";
const DEAD_LETTERS: &str = "comments.dead-letters";
const PARTITIONS: i32 = 3;

/// Time between two updates of the view, which also check for the end of the run.
const TICK: Duration = Duration::from_millis(200);

/// Maximum number of events in flight.
const MAX_OUTSTANDING: u64 = 2000;

/// Outputs that are still missing count as lost if no other output has arrived for this long.
const LOSS_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct DemoArgs {
    /// Number of events after which to stop and print a summary [default: run until Ctrl-C]
    #[arg(long, value_name = "N")]
    events: Option<u64>,
    /// Events to produce per second; 0 means as fast as possible
    #[arg(long, value_name = "R", default_value_t = 50.0)]
    rate: f64,
    /// Print only the summary, as a single JSON object
    #[arg(long)]
    json: bool,
    /// Checkpoint folder [default: the bundled model]
    #[arg(long, value_name = "FOLDER")]
    model: Option<String>,
}

const AFTER_HELP: &str = "\
Starts a Kafka broker in this process and prints its address, so that other clients can connect:
  kcat -b ADDRESS -C -t decisions
Sample comments pass through the same pipeline as in `run`, with delivery at_least_once, because the
embedded broker does not implement transactions. A separate consumer reads the outputs, counts lost
and duplicated ones, and measures the time from sending an event to reading its decision.

The bundled model is small: it distinguishes open hostility from small talk, and little else.";

pub(super) fn run(args: &DemoArgs, out: &mut dyn Write) -> anyhow::Result<Exit> {
    if !(args.rate >= 0.0 && args.rate.is_finite()) {
        bail!("--rate is {}, expected 0 or more events per second", args.rate);
    }
    let broker = EmbeddedBroker::start().context("cannot start the embedded broker")?;
    for topic in [COMMENTS, DECISIONS, DEAD_LETTERS] {
        let created = broker.create_topic(topic, PARTITIONS);
        created.with_context(|| format!("cannot create the topic {topic}"))?;
    }
    let config = Config::load(&sources(&broker.address(), args.model.as_deref()))?;
    log::start_for_command(&config.log);
    let brokers = broker.address();
    if !args.json {
        writeln!(
            out,
            "broker    {brokers} (topics {COMMENTS}, {DECISIONS}, {DEAD_LETTERS})"
        )?;
        out.flush()?;
    }
    let source = ModelSource::new(config.model.clone(), config.prompt.clone());
    let loaded = match source.load_version(None, None) {
        Ok(loaded) => loaded,
        Err(ServingError::Load(error)) => bail!(error),
        Err(error) => bail!(error),
    };
    let description = loaded.classifier.description().to_owned();
    let (ready, warm) = source.warm_up(loaded, config.batch.max_tokens)?;
    let stream = config.require_stream()?;
    let topics = TopicFacts {
        comments: PARTITIONS,
        decisions: PARTITIONS,
        dead_letters: PARTITIONS,
        ..TopicFacts::default()
    };
    let settings = stream_settings(stream, topics, warm.max_tokens, &config);
    let model = assemble_model(ready, &config, never());
    let health = Arc::new(Health::new(LOSS_TIMEOUT));
    let pipeline = Pipeline::start(&settings, model, &health)?;
    let demo = Demo {
        brokers: &brokers,
        model: &description,
        events: args.events,
        rate: args.rate,
        is_json: args.json,
        counter: OutputCounter::default(),
        produced: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    };
    demo.run(pipeline, out)
}

/// Returns the settings of the demo. They ignore the user's files and environment, so that it works the same
/// way everywhere.
fn sources(brokers: &str, model: Option<&str>) -> Sources {
    let flag = |key, value: &str| (key, value.to_owned(), "demo");
    let [(session, session_value), (wait, wait_value)] = CLIENT_PROPERTIES;
    debug_assert_eq!((session, wait), ("session.timeout.ms", "fetch.wait.max.ms"));
    let model = model.map(|model| flag("model.path", model));
    let stream = vec![
        flag("kafka.brokers", brokers),
        flag("kafka.instance", "demo"),
        flag("kafka.properties.session.timeout.ms", session_value),
        flag("kafka.properties.fetch.wait.max.ms", wait_value),
        flag("topics.comments", COMMENTS),
        flag("topics.decisions", DECISIONS),
        flag("topics.dead_letters", DEAD_LETTERS),
        flag("delivery", "at_least_once"),
        // The samples repeat, so the demo would show the speed of the cache instead of the model's.
        flag("cache.entries", "0"),
    ];
    Sources {
        flags: stream.into_iter().chain(model).collect(),
        ..Sources::default()
    }
}

struct Demo<'a> {
    brokers: &'a str,
    model: &'a str,
    events: Option<u64>,
    rate: f64,
    is_json: bool,
    counter: OutputCounter,
    produced: AtomicU64,
    stop: AtomicBool,
}

impl Demo<'_> {
    /// Produces events, counts the outputs and shows them until the end of the run.
    fn run(&self, pipeline: Pipeline, out: &mut dyn Write) -> anyhow::Result<Exit> {
        let duration = std::thread::scope(|scope| {
            let counting = scope.spawn(|| self.counter.run(self.brokers, DECISIONS, DEAD_LETTERS, PARTITIONS));
            let producing = scope.spawn(|| self.produce(&pipeline));
            let shown = self.show(&pipeline, out);
            self.stop.store(true, Ordering::Relaxed);
            pipeline.drain(Instant::now() + Duration::from_secs(10));
            while !pipeline.has_ended() {
                std::thread::sleep(Duration::from_millis(10));
            }
            // Leaves time to count the outputs that were written while draining.
            std::thread::sleep(TICK);
            self.counter.stop();
            let joined = (counting.join(), producing.join());
            for (name, thread) in [("counting", joined.0), ("producing", joined.1)] {
                match thread {
                    Ok(result) => result.with_context(|| format!("{name} failed"))?,
                    Err(_) => bail!("{name} panicked"),
                }
            }
            shown
        })?;
        pipeline.join()?;
        self.print_summary(duration, out)
    }

    fn produce(&self, pipeline: &Pipeline) -> anyhow::Result<()> {
        // Joining the group takes seconds, which would count as latency for events that are sent earlier.
        while !pipeline.is_assigned() && !pipeline.is_ending() && !self.stop.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.brokers).set("linger.ms", "1");
        let producer: BaseProducer<QuietContext> = config
            .create_with_context(QuietContext)
            .context("cannot create the producer")?;
        let start = Instant::now();
        for number in 0..self.events.unwrap_or(u64::MAX) {
            while self.rate > 0.0 && start.elapsed().as_secs_f64() * self.rate < number as f64 {
                producer.poll(Duration::from_millis(2));
                if self.stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            // The embedded broker drops records that are not read soon.
            while number.saturating_sub(self.counter.count().finished()) >= MAX_OUTSTANDING
                && !self.stop.load(Ordering::Relaxed)
            {
                producer.poll(Duration::from_millis(2));
            }
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let sample = samples::sample(number);
            let sent_at = now_us().to_string();
            let headers = OwnedHeaders::new().insert(Header {
                key: SENT_AT,
                value: Some(&sent_at),
            });
            let partition = i32::try_from(number % u64::from(PARTITIONS.unsigned_abs())).unwrap_or(0);
            let mut record = BaseRecord::to(COMMENTS)
                .partition(partition)
                .key(&sample.key)
                .headers(headers);
            record.payload = sample.value.as_ref();
            while let Err((error, refused)) = producer.send(record) {
                if error.rdkafka_error_code() != Some(RDKafkaErrorCode::QueueFull) {
                    return Err(error).context("cannot produce");
                }
                producer.poll(Duration::from_millis(10));
                record = refused;
            }
            self.produced.fetch_add(1, Ordering::Relaxed);
            producer.poll(Duration::ZERO);
        }
        producer.flush(LOSS_TIMEOUT).context("cannot produce the last events")
    }

    /// Shows the outputs until the end of the run. Returns the time from the first event to the last output.
    fn show(&self, pipeline: &Pipeline, out: &mut dyn Write) -> anyhow::Result<Duration> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime")?;
        runtime.block_on(async {
            let mut start = Instant::now();
            let is_live = !self.is_json && std::io::stdout().is_terminal();
            let mut interrupt = std::pin::pin!(tokio::signal::ctrl_c());
            let mut ticks = tokio::time::interval(TICK);
            let (mut view, mut progress) = (LiveView::default(), (0, start));
            let mut rate = CommentRate::default();
            loop {
                tokio::select! {
                    _ = &mut interrupt => return Ok(progress.1.saturating_duration_since(start)),
                    _ = ticks.tick() => {}
                }
                let count = self.counter.count();
                let (finished, now) = (count.finished(), Instant::now());
                if self.produced.load(Ordering::Relaxed) == 0 {
                    (start, progress.1) = (now, now);
                }
                if finished > progress.0 {
                    progress = (finished, now);
                }
                if is_live {
                    let facts = DemoFacts {
                        brokers: self.brokers,
                        model: self.model,
                        produced: self.produced.load(Ordering::Relaxed),
                        elapsed: now - start,
                        rate: rate.update(finished, now),
                    };
                    view.draw(&facts, &count, columns(), out)?;
                } else if !self.is_json {
                    rate.print_line(&count, now, out)?;
                }
                drop(count);
                let is_complete = self.events.is_some_and(|events| finished >= events);
                if is_complete || pipeline.is_ending() || now - progress.1 > LOSS_TIMEOUT {
                    return Ok(progress.1.saturating_duration_since(start));
                }
            }
        })
    }

    fn print_summary(&self, duration: Duration, out: &mut dyn Write) -> anyhow::Result<Exit> {
        let count = self.counter.count();
        let produced = self.produced.load(Ordering::Relaxed);
        let lost = produced.saturating_sub(count.finished());
        let round = |value: f64| (value * 10.0).round() / 10.0;
        let (p50, p99) = (round(count.latency_ms(0.5)), round(count.latency_ms(0.99)));
        let rate = round(count.finished() as f64 / duration.as_secs_f64().max(1e-3));
        if self.is_json {
            let summary = json!({
                "produced": produced,
                "decided": count.decided,
                "dead_lettered": count.dead_lettered,
                "lost": lost,
                "duplicated": count.duplicated,
                "p50_ms": p50,
                "p99_ms": p99,
                "comments_per_second": rate,
            });
            writeln!(out, "{summary}")?;
        } else {
            writeln!(
                out,
                "\nproduced {produced}, decided {}, dead letters {}, lost {lost}, duplicated {}\n\
                 latency p50 {p50} ms, p99 {p99} ms, {rate} comments per second",
                count.decided, count.dead_lettered, count.duplicated
            )?;
        }
        Ok(if lost == 0 && count.duplicated == 0 {
            Exit::Success
        } else {
            Exit::Failure
        })
    }
}

/// Returns the width of the terminal in columns.
fn columns() -> usize {
    usize::from(console::Term::stdout().size().1)
}

/// The recent number of comments per second, updated about once a second.
#[derive(Debug, Default)]
struct CommentRate {
    last: Option<(u64, Instant)>,
    value: f64,
}

impl CommentRate {
    fn update(&mut self, finished: u64, now: Instant) -> f64 {
        let (before, then) = *self.last.get_or_insert((finished, now));
        if now - then >= Duration::from_secs(1) {
            self.value = (finished - before) as f64 / (now - then).as_secs_f64();
            self.last = Some((finished, now));
        }
        self.value
    }

    /// Prints one line per second, for an output that is not a terminal.
    fn print_line(&mut self, count: &Count, now: Instant, out: &mut dyn Write) -> std::io::Result<()> {
        let before = self.last;
        let rate = self.update(count.finished(), now);
        if before.is_some() && self.last != before {
            let latest = count.latest.back().map(view::line).unwrap_or_default();
            let (decided, dead) = (count.decided, count.dead_lettered);
            writeln!(out, "decided {decided}, dead letters {dead}, {rate:.0}/s {latest}")?;
            out.flush()?;
        }
        Ok(())
    }
}
