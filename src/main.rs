//! The `moderatord` binary: parses the command line, runs one command and maps its result to an exit code.

use std::io;
use std::process::ExitCode;

use clap::Parser;
use moderatord::cli::{Cli, Exit};
use moderatord::ops::{log, memory, process};

fn main() -> ExitCode {
    process::ignore_file_size_signal();
    memory::keep_freed_memory();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => {
            // clap also returns the output of --help and --version as an error; only real errors go to stderr.
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
            // A closed pipe is not a failure: a reader such as `head` closes it once it has read enough.
            if exit != Exit::Success {
                log::report_failure(&error, &mut err);
            }
            exit.into()
        }
    }
}
