//! Configures the log on stderr.

use std::io::{IsTerminal, Write};
use std::sync::OnceLock;

use tracing::error;
use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat, LogLevel};
use crate::fault::Faults;

/// The format in which the log was started.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// Starts logging to stderr in the configured format and at the configured level. Later calls change neither.
pub fn start(config: &LogConfig) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(config.level))
        .with_ansi(std::io::stderr().is_terminal())
        // A line that cannot be written is lost. Reporting that on the same stderr would panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr);
    // An error means that logging has already been started, as in tests that run several commands.
    let started = match config.format {
        LogFormat::Human => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    if started.is_ok() {
        FORMAT.get_or_init(|| config.format);
    }
    // The message of a panic is left out, because it may quote the data that a library was processing, such as a
    // comment.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current();
        error!(
            place,
            thread = thread.name().unwrap_or("unnamed"),
            "a thread panicked, which is a bug"
        );
    }));
}

/// Starts logging for a command that ends by itself.
///
/// The progress messages of a service would be noise there, so the level `info` logs only warnings and errors. All
/// other levels are used as they are.
pub(crate) fn start_for_command(config: &LogConfig) {
    let level = match config.level {
        LogLevel::Info => LogLevel::Warn,
        level => level,
    };
    start(&LogConfig {
        level,
        ..config.clone()
    });
}

/// Reports the error that ends a command: as text, or as log lines if the log is in JSON, one for each fault.
pub fn report_failure(error: &anyhow::Error, err: &mut dyn Write) {
    if FORMAT.get() == Some(&LogFormat::Json) {
        for message in messages(error) {
            error!("{message}");
        }
    } else {
        // If stderr itself fails, the error cannot be reported anywhere.
        let _ = writeln!(err, "moderatord: {error:#}");
    }
}

/// Returns the text of an error with its causes, or one text for each fault if the last cause is a list of faults.
fn messages(error: &anyhow::Error) -> Vec<String> {
    let mut contexts = String::new();
    for cause in error.chain() {
        if let Some(faults) = cause.downcast_ref::<Faults>() {
            return faults.iter().map(|fault| format!("{contexts}{fault}")).collect();
        }
        contexts += &format!("{cause}: ");
    }
    vec![format!("{error:#}")]
}

/// Returns a filter that applies the level to our own messages only.
///
/// Libraries never log more than warnings, because their other messages may contain the text of comments.
fn filter(level: LogLevel) -> EnvFilter {
    let (own, libraries) = match level {
        LogLevel::Error => ("error", "error"),
        LogLevel::Warn => ("warn", "warn"),
        LogLevel::Info => ("info", "warn"),
        LogLevel::Debug => ("debug", "warn"),
        LogLevel::Trace => ("trace", "warn"),
    };
    EnvFilter::new(format!("{libraries},moderatord={own}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_becomes_a_message_of_its_own() {
        use crate::fault::Fault;
        use anyhow::{Context, anyhow};
        let check = |error: anyhow::Error, expected: &[&str]| assert_eq!(messages(&error), expected);
        let mut faults = Faults::from(Fault::setting("batch.linger", "too long"));
        faults.push(Fault::other("no topic"));
        check(faults.clone().into(), &["batch.linger: too long", "no topic"]);
        let wrapped = Err::<(), _>(faults).context("cannot load").unwrap_err();
        check(
            wrapped,
            &["cannot load: batch.linger: too long", "cannot load: no topic"],
        );
        check(anyhow!("inner\nline").context("outer"), &["outer: inner\nline"]);
    }

    #[test]
    fn libraries_log_nothing_below_warnings() {
        for level in [LogLevel::Error, LogLevel::Info, LogLevel::Trace] {
            let text = filter(level).to_string();
            let mut directives = text
                .split(',')
                .filter(|directive| !directive.starts_with("moderatord="));
            assert!(directives.all(|level| ["warn", "error"].contains(&level)), "{text}");
        }
    }
}
