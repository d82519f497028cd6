//! The command line, with one file per command.
//!
//! The settings file describes the service, and flags control a single process. Commands write to the writers that they
//! are given.

mod adapters;
mod check;
mod checked;
mod demo;
mod eval;
mod explain;
mod feedback;
mod fetch;
mod input;
mod lines;
mod named;
mod retrain;
mod run;
mod score;
mod serve;
mod table;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, ConfigDraft, Sources};
use crate::fault::Faults;
use crate::ops::log;
use crate::ops::notify::Notifier;
use crate::registry::LostRegistry;
use crate::serving::ServingError;
use crate::stream::control::StreamError;

/// A streaming moderation filter for Kafka: scores comments with a Gemma classifier and decides on each.
#[derive(Debug, Parser)]
#[command(version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Settings are read from the defaults, the file given with --config, the environment and flags. Later
sources override earlier ones. The environment variable for `model.path` is MODERATORD__MODEL__PATH;
a list is written as one string with commas. config/moderatord.toml in the source tree describes
every setting and its default.

Exit codes:
  0   success
  1   failure
  64  invalid command line
  78  invalid settings, model, adapter or topics, a lost registry, or a gap in the comments topic

Examples:
  moderatord demo
  moderatord check --config /etc/moderatord/moderatord.toml
  moderatord run --config /etc/moderatord/moderatord.toml
  moderatord score --model ./gemma-3-270m-it --text 'see you at the garden'
  MODERATORD__POLICY__REVIEW=0.3 moderatord score --config moderatord.toml --input comments.jsonl";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the whole daemon on an embedded Kafka broker with sample comments
    Demo(demo::DemoArgs),
    /// Run the daemon: consume comments from Kafka and publish decisions
    Run(run::RunArgs),
    /// Score comments over HTTP, without Kafka
    Serve(serve::ServeArgs),
    /// Score comments from the command line, a file or stdin, and print one JSON decision per line
    Score(score::ScoreArgs),
    /// Train a new adapter on labelled feedback, and promote it if it is better
    Retrain(retrain::RetrainArgs),
    /// Evaluate an adapter on labelled comments
    Eval(eval::EvalArgs),
    /// List, inspect, promote, roll back and clean up adapter versions
    Adapters(adapters::AdaptersArgs),
    /// Score the comment of a decision again, and report whether the result is the same
    Explain(explain::ExplainArgs),
    /// Download a model or an adapter from the Hugging Face hub
    Fetch(fetch::FetchArgs),
    /// Check the settings, model, adapter, labels and topics, and report all problems at once
    Check(check::CheckArgs),
}

/// The flags shared by all commands that load a model.
///
/// They are global, so that a command with subcommands accepts them after a subcommand as well as before it.
#[derive(Debug, Args)]
struct SettingsArgs {
    /// Settings file in TOML format
    #[arg(long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Checkpoint folder or hf:// name; overrides `model.path`
    #[arg(long, value_name = "FOLDER", global = true)]
    model: Option<String>,
    /// LoRA adapter folder or hf:// name, or '' for no adapter; overrides `model.adapter`
    #[arg(long, value_name = "FOLDER", global = true)]
    adapter: Option<String>,
}

impl SettingsArgs {
    fn sources(&self) -> Sources {
        let model = self.model.clone().map(|path| ("model.path", path, "--model"));
        let adapter = self.adapter.clone().map(|path| ("model.adapter", path, "--adapter"));
        Sources {
            flags: model.into_iter().chain(adapter).collect(),
            ..Sources::process(self.config.clone())
        }
    }

    /// Reads the settings for a command that ends by itself, and starts its log, in whose format faults are reported.
    /// Models that are set by name are found in the cache.
    ///
    /// # Errors
    /// Returns [`Faults`] if the settings are not valid, or an error if a model cannot be downloaded.
    fn load(&self) -> anyhow::Result<Config> {
        let draft = ConfigDraft::read(&self.sources());
        if let Some(config) = &draft.log {
            log::start_for_command(config);
        }
        let mut config = draft.finish()?;
        named::resolve(&mut config.model, &Notifier::default())?;
        Ok(config)
    }
}

impl Cli {
    /// Runs the command until it ends.
    ///
    /// # Errors
    /// Returns an error if the command fails. [`Exit::of`] derives the exit code from it.
    pub fn run(&self, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<Exit> {
        match &self.command {
            Command::Demo(args) => demo::run(args, out),
            Command::Run(args) => run::run(args),
            Command::Serve(args) => serve::run(args),
            Command::Score(args) => score::run(args, out, err),
            Command::Retrain(args) => retrain::run(args, out, err),
            Command::Eval(args) => eval::run(args, out, err),
            Command::Adapters(args) => adapters::run(args, out),
            Command::Explain(args) => explain::run(args, out),
            Command::Fetch(args) => fetch::run(args, out),
            Command::Check(args) => check::run(args, out),
        }
    }
}

/// The exit status of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The command succeeded (0).
    Success,
    /// Something failed, or part of the input could not be scored (1).
    Failure,
    /// The command line is invalid (64, EX_USAGE).
    Usage,
    /// The settings, model, adapter, registry or topics need attention, so retrying does not help (78, EX_CONFIG).
    Config,
}

impl Exit {
    /// Returns the exit status for an error of [`Cli::run`].
    ///
    /// A broken pipe counts as success: a reader such as `head` closes the pipe once it has read enough.
    pub fn of(error: &anyhow::Error) -> Self {
        let causes = || error.chain();
        let requires_operator = |cause: &(dyn std::error::Error + 'static)| {
            let stream = cause.downcast_ref::<StreamError>();
            let serving = cause.downcast_ref::<ServingError>();
            cause.is::<Faults>()
                || cause.is::<LostRegistry>()
                || serving.is_some_and(|error| matches!(error, ServingError::Load(_) | ServingError::Lost(_)))
                || stream.is_some_and(StreamError::requires_operator)
        };
        if causes().any(requires_operator) {
            Self::Config
        } else if causes().any(is_broken_pipe) {
            Self::Success
        } else {
            Self::Failure
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Success => 0,
            Exit::Failure => 1,
            Exit::Usage => 64,
            Exit::Config => 78,
        })
    }
}

fn is_broken_pipe(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
