//! Runs the real pipeline with a scripted scorer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use moderatord::classifier::canary;
use moderatord::config::{
    BatchConfig, CacheConfig, Config, Delivery, InputConfig, LimitsConfig, Normalize, PolicyConfig, Sources,
};
use moderatord::decide::{Calibration, CurrentJudge, JudgedModel};
use moderatord::kafka::topics;
use moderatord::message::ModelIdentity;
use moderatord::model::files::checkpoint::Checkpoint;
use moderatord::ops::health::Health;
use moderatord::prompt::Prompter;
use moderatord::scorer::{Begun, Row, Running, ScoreError, Scorer};
use moderatord::stream::control::StreamError;
use moderatord::stream::pipeline::{Model, Pipeline, Settings};
use moderatord::stream::score::Replacement;

use crate::broker::{Broker, PATIENCE, unique};
use crate::common::{fixture, prompt_config};

/// The names of a test's topics and consumer group.
#[derive(Clone)]
pub struct Names {
    pub comments: String,
    pub decisions: String,
    pub dead_letters: String,
    pub group: String,
}

impl Names {
    pub fn new(test: &str) -> Self {
        let name = |kind: &str| unique(&format!("{test}-{kind}"));
        Self {
            comments: name("comments"),
            decisions: name("decisions"),
            dead_letters: name("dead"),
            group: name("group"),
        }
    }

    /// Creates all three topics with the given number of partitions.
    pub fn create(broker: &Broker, test: &str, partitions: i32) -> Self {
        let names = Self::new(test);
        for topic in [&names.comments, &names.decisions, &names.dead_letters] {
            broker.create_topic(topic, partitions);
        }
        names
    }
}

/// The settings that a stream is started with, for tests to change.
pub struct Setup {
    pub names: Names,
    pub delivery: Delivery,
    pub variables: Vec<(String, String)>,
    pub limits: LimitsConfig,
    /// The cache is off by default, because most tests count what the scorer is given.
    pub cache_entries: usize,
    pub max_bytes: usize,
    pub max_windows: usize,
    /// Starts the stream as if it could not read the settings of the output topics.
    pub hides_limits: bool,
}

impl Setup {
    pub fn new(broker: &Broker, names: &Names) -> Self {
        Self {
            names: names.clone(),
            delivery: broker.delivery(),
            variables: Vec::new(),
            limits: LimitsConfig {
                events: 10_000,
                bytes: 64 << 20,
            },
            cache_entries: 0,
            max_bytes: 1 << 20,
            max_windows: 8,
            hides_limits: false,
        }
    }

    /// Sets a setting by the name of its environment variable, without the `MODERATORD__` prefix.
    pub fn set(&mut self, name: &str, value: &str) -> &mut Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn config(&self, broker: &Broker) -> Config {
        let delivery = match self.delivery {
            Delivery::ExactlyOnce => "exactly_once",
            Delivery::AtLeastOnce => "at_least_once",
        };
        let fixed = [
            ("MODEL__PATH", "unused"),
            ("KAFKA__BROKERS", &broker.address()),
            ("KAFKA__GROUP", &self.names.group),
            ("KAFKA__INSTANCE", &unique("instance")),
            ("KAFKA__COMMIT_INTERVAL", "20ms"),
            ("TOPICS__COMMENTS", &self.names.comments),
            ("TOPICS__DECISIONS", &self.names.decisions),
            ("TOPICS__DEAD_LETTERS", &self.names.dead_letters),
            ("DELIVERY", delivery),
            // A test's next daemon has another name, and would wait for the session of the one before it.
            ("KAFKA__STATIC_MEMBERSHIP", "false"),
            // On the embedded broker, joining a group takes one second less than the session timeout.
            ("KAFKA__PROPERTIES__SESSION_TIMEOUT_MS", "3000"),
            ("KAFKA__PROPERTIES__HEARTBEAT_INTERVAL_MS", "300"),
            ("KAFKA__PROPERTIES__FETCH_WAIT_MAX_MS", "10"),
        ];
        let own = self
            .variables
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let sources = Sources {
            environment: fixed
                .into_iter()
                .chain(own)
                .map(|(name, value)| (format!("MODERATORD__{name}").into(), value.into()))
                .collect(),
            ..Sources::default()
        };
        Config::load(&sources).unwrap()
    }

    pub fn start(&self, broker: &Broker, scorer: impl Scorer + 'static) -> Daemon {
        self.try_start(broker, scorer).unwrap()
    }

    pub fn try_start(&self, broker: &Broker, scorer: impl Scorer + 'static) -> Result<Daemon, StreamError> {
        self.start_with_swap(broker, scorer, crossbeam_channel::never())
    }

    /// Starts a stream whose scorer can be replaced through a channel.
    pub fn start_with_swap(
        &self,
        broker: &Broker,
        scorer: impl Scorer + 'static,
        swap: crossbeam_channel::Receiver<Replacement>,
    ) -> Result<Daemon, StreamError> {
        let config = self.config(broker);
        // Helps to find the cause of a failed test.
        if std::env::var_os("MODERATORD_TEST_LOG").is_some() {
            moderatord::ops::log::start(&config.log);
        }
        let stream = config.require_stream().unwrap();
        // The embedded broker does not describe topics, and does not say so either.
        let mut facts = if broker.is_apache() {
            topics::check(&stream).unwrap()
        } else {
            topics::count_partitions(&stream).unwrap()
        };
        if self.hides_limits {
            (facts.decision_limits, facts.dead_letter_limits) = Default::default();
        }
        let settings = Settings {
            topics: facts,
            input: InputConfig {
                max_bytes: self.max_bytes,
                ..config.input
            },
            stream,
            batch: BatchConfig {
                max_tokens: 512,
                linger: Duration::from_millis(5),
            },
            cache: CacheConfig {
                entries: self.cache_entries,
            },
            limits: self.limits,
        };
        let prompter = Arc::new(prompter(self.max_windows));
        let model = Model {
            canary: canary::rows(&prompter).unwrap(),
            prompter,
            judge: Arc::new(judge()),
            swap,
            scorer: Box::new(scorer),
        };
        let health = Arc::new(Health::new(PATIENCE));
        let pipeline = Pipeline::start(&settings, model, &health)?;
        Ok(Daemon { pipeline, health })
    }
}

pub struct Daemon {
    pub pipeline: Pipeline,
    pub health: Arc<Health>,
}

impl Daemon {
    /// Drains the stream and waits until it has ended.
    pub fn stop(self) -> Result<(), StreamError> {
        self.pipeline.drain(Instant::now() + PATIENCE);
        self.pipeline.join()
    }
}

pub type Script = Box<dyn FnMut(&[Row]) -> Result<Vec<f32>, ScoreError> + Send>;

/// A scorer whose results a test defines.
pub struct Scripted(pub Script);

impl Scripted {
    /// Returns a scorer whose margins grow with the length of the row.
    pub fn by_length() -> Self {
        Self(Box::new(|rows| Ok(rows.iter().map(margin).collect())))
    }

    pub fn new(script: impl FnMut(&[Row]) -> Result<Vec<f32>, ScoreError> + Send + 'static) -> Self {
        Self(Box::new(script))
    }
}

/// Returns whether these are the canary's rows, which an idle scorer scores from time to time.
pub fn is_canary(rows: &[Row]) -> bool {
    static ROWS: std::sync::OnceLock<Vec<Row>> = std::sync::OnceLock::new();
    rows == ROWS.get_or_init(|| canary::rows(&prompter(8)).unwrap())
}

pub fn margin(row: &Row) -> f32 {
    row.tokens.len() as f32 / 100.0
}

impl Scorer for Scripted {
    fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
        (self.0)(rows)
    }
}

/// A scripted scorer that works asynchronously through a queue, one batch after another, as a GPU does.
pub struct Queued {
    work: crossbeam_channel::Sender<Work>,
    begun: Arc<AtomicUsize>,
}

struct Work {
    rows: Vec<Row>,
    answer: crossbeam_channel::Sender<Result<Vec<f32>, ScoreError>>,
}

struct Answer(crossbeam_channel::Receiver<Result<Vec<f32>, ScoreError>>);

impl Queued {
    /// Wraps a scripted scorer; `begun` counts the batches that were begun.
    pub fn new(mut scorer: Scripted, begun: &Arc<AtomicUsize>) -> Self {
        let (work, queue) = crossbeam_channel::unbounded::<Work>();
        std::thread::spawn(move || {
            for Work { rows, answer } in queue {
                let _ = answer.send(scorer.score(&rows));
            }
        });
        Self {
            work,
            begun: Arc::clone(begun),
        }
    }

    fn push(&self, rows: &[Row]) -> Answer {
        let (answer, answers) = crossbeam_channel::bounded(1);
        let rows = rows.to_vec();
        self.work.send(Work { rows, answer }).unwrap();
        Answer(answers)
    }
}

impl Scorer for Queued {
    fn score(&mut self, rows: &[Row]) -> Result<Vec<f32>, ScoreError> {
        self.push(rows).0.recv().unwrap()
    }

    fn begin(&mut self, rows: &[Row]) -> Result<Begun, ScoreError> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        Ok(Begun::Running(Box::new(self.push(rows))))
    }
}

impl Running for Answer {
    fn is_done(&self) -> bool {
        !self.0.is_empty()
    }

    fn margins(self: Box<Self>) -> Result<Vec<f32>, ScoreError> {
        self.0.recv().unwrap()
    }
}

pub fn prompter(max_windows: usize) -> Prompter {
    let checkpoint = Checkpoint::open(&fixture("gemma3")).unwrap();
    let config = moderatord::config::PromptConfig {
        normalize: Normalize::Full,
        max_window_tokens: Some(64),
        max_windows: Some(max_windows),
        ..prompt_config()
    };
    Prompter::new(
        &checkpoint.tokenizer_path(),
        checkpoint.tokenizer(),
        &config,
        checkpoint.config().vocab_size,
        checkpoint.config().max_position_embeddings,
    )
    .unwrap()
}

pub fn judge() -> CurrentJudge {
    let policy = PolicyConfig {
        from_adapter: false,
        not_in_scope: Default::default(),
        thresholds: Default::default(),
        communities: Default::default(),
    };
    CurrentJudge::new(policy, judged("scripted"))
}

/// Returns a model identity with the given base model.
pub fn judged(base: &str) -> JudgedModel {
    let none = || "none".to_owned();
    let identity = ModelIdentity {
        base: base.into(),
        adapter: none(),
        adapter_version: None,
        prompt: none(),
        calibration: "identity".into(),
        normalizer: none(),
        device: "cpu".into(),
        dtype: "f32".into(),
        quantization: none(),
    };
    JudgedModel {
        identity,
        calibration: Calibration::Identity,
        derived: Default::default(),
        defaults: Default::default(),
    }
}

/// Waits until a condition holds, and panics if it takes too long.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
