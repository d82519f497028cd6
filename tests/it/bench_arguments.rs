//! The arguments of benchmarks, whose own executables have no unit tests.

use arguments::{exit_code, flag, number, option, parse, repeated_option};
use clap::ArgMatches;
use clap::error::Error;

#[path = "../../benches/support/arguments.rs"]
#[allow(dead_code, reason = "only a benchmark reads the arguments of its process")]
mod arguments;

fn read(line: &[&str]) -> Result<ArgMatches, Error> {
    let declared = vec![
        number::<usize>("rounds", "N", "Number of rounds"),
        option("daemon", "PATH", "Build to measure"),
        repeated_option("set", "KEY=VALUE", "Setting"),
        flag("save", "Write the figures"),
    ];
    parse("./dev bench cpu", "Measures", declared, [&["bench"], line].concat())
}

#[test]
fn declared_arguments_and_those_of_cargo_are_accepted() {
    let given = read(&[
        "--rounds",
        "1",
        "--set",
        "a=1",
        "--set=b=2",
        "--rounds=3",
        "--bench",
        "--save",
    ])
    .unwrap();
    assert_eq!(given.get_one::<usize>("rounds"), Some(&3));
    assert_eq!(
        given.get_many::<String>("set").unwrap().collect::<Vec<_>>(),
        ["a=1", "b=2"]
    );
    assert!(given.get_flag("save"));
    let given = read(&["--bench"]).unwrap();
    assert!(given.get_one::<usize>("rounds").is_none() && !given.get_flag("save"));
}

#[test]
fn other_arguments_are_refused_by_name_and_the_help_is_no_failure() {
    for (line, named) in [
        (&["--round", "3"][..], "unexpected argument '--round'"),
        (&["fast"], "unexpected argument 'fast'"),
        (&["--rounds", "many"], "invalid value 'many' for '--rounds <N>'"),
        (&["--rounds"], "a value is required for '--rounds <N>'"),
        (&["--rounds", "--save"], "a value is required for '--rounds <N>'"),
    ] {
        let error = read(line).unwrap_err();
        assert_eq!(exit_code(&error), 64, "{line:?}");
        let text = error.to_string();
        assert!(text.contains(named), "{text}");
        // clap does not show the usage for an argument without a valid value.
        let shows_usage = text.contains("Usage: ./dev bench cpu");
        assert!(shows_usage || !named.starts_with("unexpected"), "{text}");
    }
    for line in [["--help"], ["-h"]] {
        let help = read(&line).unwrap_err();
        assert_eq!(exit_code(&help), 0);
        let text = help.to_string();
        assert!(
            text.contains("--rounds <N>") && !text.contains("--check-arguments"),
            "{text}"
        );
    }
}
