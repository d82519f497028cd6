//! What HTTP costs: the CPU time of `moderatord serve` for a comment while it is saturated, compared with that of the
//! scorer alone, in this process, which tokenises the same texts and scores them in full micro-batches.

use std::time::{Duration, Instant};

use moderatord::classifier::Classifier;
use moderatord::config::{Config, Sources};
use moderatord::scorer::{Row, Scorer};
use serde_json::{Value, json};

use crate::load::saturate;
use crate::server::Server;
use crate::support::{cpu_time, median};

/// So many callers fill micro-batches.
const CALLERS: usize = 256;

/// How long each side is measured in a turn, and how many turns there are. Many short ones keep both sides alike when
/// something else runs on the machine.
const TIME: Duration = Duration::from_secs(3);
const TURNS: usize = 7;

/// The CPU seconds for 1,000 comments, one value for each turn.
pub struct Overhead {
    name: String,
    served: Vec<f64>,
    alone: Vec<f64>,
}

impl Overhead {
    /// Measures both in turns, with settings in TOML.
    pub fn measure(name: &str, settings: &str, texts: &[String]) -> Self {
        let server = Server::ours(settings, texts);
        let mut alone = Alone::load(settings, server.budget());
        let mut overhead = Self {
            name: name.to_owned(),
            served: Vec::new(),
            alone: Vec::new(),
        };
        alone.score(texts, TIME / 3);
        for _ in 0..TURNS {
            overhead.served.push(saturate(&server, CALLERS, TIME).cpu);
            overhead.alone.push(alone.score(texts, TIME));
        }
        println!("{}", overhead.line());
        overhead
    }

    /// Returns how much more CPU time a comment takes over HTTP, relative to the scorer alone.
    fn ratio(&self) -> f64 {
        median(self.ratios())
    }

    /// Returns the ratio of each turn.
    fn ratios(&self) -> Vec<f64> {
        let turns = self.served.iter().zip(&self.alone);
        turns.map(|(served, alone)| served / alone).collect()
    }

    pub fn line(&self) -> String {
        let mut ratios = self.ratios();
        ratios.sort_by(f64::total_cmp);
        let percent = |ratio: f64| (ratio - 1.0) * 100.0;
        format!(
            "{}: over HTTP, a comment takes {:+.1} % of CPU time compared with the scorer alone ({:+.1} % to {:+.1} % in \
             single turns).",
            self.name,
            percent(self.ratio()),
            percent(ratios[0]),
            percent(ratios[TURNS - 1]),
        )
    }

    pub fn json(&self) -> Value {
        json!({
            "name": self.name,
            "ratio": self.ratio(),
            "served_cpu_s_per_1000": self.served,
            "scorer_alone_cpu_s_per_1000": self.alone,
        })
    }
}

/// The scorer in this process.
struct Alone {
    classifier: Classifier,
    budget: usize,
}

impl Alone {
    fn load(settings: &str, budget: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("moderatord.toml");
        std::fs::write(&file, settings).unwrap();
        let sources = Sources {
            file: Some(file),
            ..Sources::default()
        };
        let config = Config::load(&sources).unwrap();
        let classifier = Classifier::load(&config.model, &config.prompt).unwrap();
        Self { classifier, budget }
    }

    /// Scores texts in full micro-batches for some time. Returns the CPU seconds for 1,000 of them.
    fn score(&mut self, texts: &[String], time: Duration) -> f64 {
        let prompter = self.classifier.prompter();
        let (start, cpu) = (Instant::now(), cpu_time());
        let (mut rows, mut tokens) = (Vec::<Row>::new(), 0);
        let (mut waiting, mut scored) = (0, 0);
        for text in texts.iter().cycle() {
            if start.elapsed() >= time {
                break;
            }
            let next = prompter.encode(text).unwrap().rows;
            let next_tokens: usize = next.iter().map(Row::own_tokens).sum();
            if tokens + next_tokens > self.budget && !rows.is_empty() {
                self.classifier.score(&rows).unwrap();
                scored += waiting;
                waiting = 0;
                rows.clear();
                tokens = 0;
            }
            rows.extend(next);
            tokens += next_tokens;
            waiting += 1;
        }
        (cpu_time() - cpu).as_secs_f64() / scored as f64 * 1000.0
    }
}
