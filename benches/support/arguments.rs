//! The arguments of a benchmark.
//!
//! A benchmark declares them before it does anything else. `--help` prints them, and unknown ones are refused, because
//! a benchmark that ignored them would measure something else than was asked for, for minutes.

use std::ffi::OsString;
use std::str::FromStr;
use std::sync::OnceLock;

use clap::error::Error;
use clap::{Arg, ArgAction, ArgMatches, Command};

/// The exit code for a wrong command line, as of `moderatord` and `./dev`.
const WRONG_USAGE: i32 = 64;

/// Ends a benchmark with exit code 0 once its arguments have been checked. Scripts check them this way before they
/// start or install anything.
const CHECK: &str = "check-arguments";

static GIVEN: OnceLock<ArgMatches> = OnceLock::new();

/// Reads the arguments of this process. Prints the help or what is wrong, and exits, if they ask for it or are wrong.
///
/// `command` is how the benchmark is called.
pub fn read_arguments(command: &'static str, about: &'static str, declared: Vec<Arg>) {
    match parse(command, about, declared, std::env::args_os()) {
        Ok(given) if given.get_flag(CHECK) => std::process::exit(0),
        Ok(given) => GIVEN.set(given).expect("arguments are read once"),
        Err(error) => {
            // A terminal that is gone changes nothing about the exit code.
            let _ = error.print();
            std::process::exit(exit_code(&error));
        }
    }
}

/// Parses a command line, whose first element is the program.
pub fn parse(
    command: &'static str,
    about: &'static str,
    declared: Vec<Arg>,
    line: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<ArgMatches, Error> {
    // `cargo bench` adds `--bench`.
    let hidden = ["bench", CHECK].map(|name| flag(name, "").hide(true));
    let command = Command::new(command).bin_name(command).about(about);
    command.args(declared).args(hidden).try_get_matches_from(line)
}

/// Returns 0 if the help was asked for, and 64 otherwise.
pub fn exit_code(error: &Error) -> i32 {
    if error.use_stderr() { WRONG_USAGE } else { 0 }
}

/// Declares `--NAME VALUE`. If it is given several times, the last one counts.
pub fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    let option = Arg::new(name).long(name).value_name(value).help(help);
    option.overrides_with(name)
}

/// Declares `--NAME VALUE` with a number of this type.
pub fn number<T>(name: &'static str, value: &'static str, help: &'static str) -> Arg
where
    T: FromStr<Err: std::error::Error + Send + Sync> + Copy + Send + Sync + 'static,
{
    option(name, value, help).value_parser(T::from_str)
}

/// Declares `--NAME VALUE`, which may be given several times.
pub fn repeated_option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    let option = Arg::new(name).long(name).value_name(value).help(help);
    option.action(ArgAction::Append)
}

/// Declares `--NAME`.
pub fn flag(name: &'static str, help: &'static str) -> Arg {
    let flag = Arg::new(name).long(name).help(help).action(ArgAction::SetTrue);
    flag.overrides_with(name)
}

/// Returns the value of an argument.
pub fn argument(name: &str) -> Option<String> {
    given().get_one(name).cloned()
}

/// Returns the value of an argument that was declared as a number of this type.
pub fn number_argument<T: Copy + Send + Sync + 'static>(name: &str) -> Option<T> {
    given().get_one(name).copied()
}

/// Returns the values of an argument that may be given several times.
pub fn arguments(name: &str) -> Vec<String> {
    given().get_many(name).unwrap_or_default().cloned().collect()
}

/// Returns whether an argument without a value is given.
pub fn has_flag(name: &str) -> bool {
    given().get_flag(name)
}

fn given() -> &'static ArgMatches {
    GIVEN.get().expect("the benchmark has read its arguments")
}
