//! The command line: one file a command.
//!
//! The settings file says what the service does, flags say how this process runs. Output goes
//! through the writers that are handed in.

mod adapters;
mod check;
mod checked;
mod demo;
mod eval;
mod explain;
mod feedback;
mod lines;
mod retrain;
mod run;
mod score;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::Sources;
use crate::fault::Faults;
use crate::stream::control::StreamError;

/// Streaming moderation filter: the probability that a comment is hateful, and a decision.
#[derive(Debug, Parser)]
#[command(version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Settings: the defaults, then the file given with --config, then the environment, then flags.
The environment form of the key `model.path` is MODERATORD__MODEL__PATH; lists are split at commas.
config/moderatord.toml in the source tree lists every key with its default and its meaning.

Exit codes: 0 success, 1 failure, 64 wrong usage, 78 wrong settings, model, adapter or topics.

Examples:
  moderatord demo
  moderatord check --config /etc/moderatord/moderatord.toml
  moderatord run --config /etc/moderatord/moderatord.toml
  moderatord score --model ./gemma-3-270m-it --text 'see you at the garden'
  MODERATORD__POLICY__REVIEW=0.3 moderatord score --config moderatord.toml --input comments.jsonl";

#[derive(Debug, Subcommand)]
enum Command {
    /// Watch the whole daemon at work on an embedded broker, with sample comments
    Demo(demo::DemoArgs),
    /// Serve: read comments from Kafka, write decisions
    Run(run::RunArgs),
    /// Score comments from the command line, a file or stdin: one decision a line, as JSON
    Score(score::ScoreArgs),
    /// Train a new adapter from labelled feedback, and promote it when it is better
    Retrain(retrain::RetrainArgs),
    /// Measure an adapter on labelled rows
    Eval(eval::EvalArgs),
    /// List, show, promote, roll back and collect adapter versions
    Adapters(adapters::AdaptersArgs),
    /// Score a decision again from what it names, and say whether it comes out the same
    Explain(explain::ExplainArgs),
    /// Check settings, model, adapter and labels, and report everything that is wrong at once
    Check(check::CheckArgs),
}

/// What every command that needs the model takes.
#[derive(Debug, Args)]
struct SettingsArgs {
    /// Settings file, in TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of the checkpoint, instead of the setting `model.path`
    #[arg(long, value_name = "FOLDER")]
    model: Option<String>,
    /// Folder of the LoRA adapter, instead of the setting `model.adapter`; '' for none
    #[arg(long, value_name = "FOLDER")]
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
}

impl Cli {
    /// Runs the command to its end.
    ///
    /// # Errors
    /// Whatever keeps it from its end; [`Exit::of`] says what that means to the caller.
    pub fn run(&self, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<Exit> {
        match &self.command {
            Command::Demo(args) => demo::run(args, out),
            Command::Run(args) => run::run(args),
            Command::Score(args) => score::run(args, out, err),
            Command::Retrain(args) => retrain::run(args, out, err),
            Command::Eval(args) => eval::run(args, out, err),
            Command::Adapters(args) => adapters::run(args, out),
            Command::Explain(args) => explain::run(args, out),
            Command::Check(args) => check::run(args, out),
        }
    }
}

/// How a command ended, for scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// All done.
    Success,
    /// Something failed, or part of the input could not be scored.
    Failure,
    /// The command line is wrong (EX_USAGE).
    Usage,
    /// Settings, model or adapter are wrong (EX_CONFIG): trying again does not help.
    Config,
}

impl Exit {
    /// What an error means to the caller.
    pub fn of(error: &anyhow::Error) -> Self {
        let causes = || error.chain();
        let needs_a_person = |cause: &(dyn std::error::Error + 'static)| {
            let stream = cause.downcast_ref::<StreamError>();
            cause.is::<Faults>() || stream.is_some_and(StreamError::needs_a_person)
        };
        if causes().any(needs_a_person) {
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
