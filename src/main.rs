//! The `moderatord` binary: parses, runs one command, maps its result to an exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use moderatord::cli::{Cli, Exit};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => {
            // Help and version are answers, not mistakes; clap sends each to its stream.
            let exit = if message.use_stderr() {
                Exit::Usage
            } else {
                Exit::Success
            };
            return if message.print().is_ok() { exit } else { Exit::Failure }.into();
        }
    };
    let (mut out, mut err) = (io::stdout(), io::stderr());
    match cli.run(&mut out, &mut err) {
        Ok(exit) => exit.into(),
        Err(error) => {
            let exit = Exit::of(&error);
            // A reader that has left, such as `head`, is no fault of ours.
            if exit != Exit::Success {
                // Nothing is left to say it to when stderr itself fails.
                let _ = writeln!(err, "moderatord: {error:#}");
            }
            exit.into()
        }
    }
}
