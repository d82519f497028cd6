//! `moderatord serve`: scores comments over HTTP, without Kafka.

use clap::Args;

use super::checked::Streaming;
use super::{Exit, SettingsArgs, run};

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    settings: SettingsArgs,
}

const AFTER_HELP: &str = r#"Serves the API of the section `api` in the settings, with the same model, registry, policy and
metrics as `moderatord run`, and ignores the settings of Kafka.

On SIGTERM or SIGINT, the requests that were taken are answered within `shutdown.grace`. On SIGHUP, the
policy, the tokens and the certificates are read again, and the registry is checked for a new version.

Exit codes are those of `moderatord run`.

Examples:
  moderatord serve --config /etc/moderatord/moderatord.toml
  MODERATORD__API__LISTEN=127.0.0.1:8080 moderatord serve
  curl localhost:8080/v1/score -d '{"text": "see you at the garden"}'"#;

pub(super) fn run(args: &ServeArgs) -> anyhow::Result<Exit> {
    run::serve(&args.settings, Streaming::Never)
}
