//! What the daemon says of itself: the log on stderr.

use std::io::IsTerminal;

use tracing::error;
use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat, LogLevel};

/// Sends the log to stderr from now on, as the settings say. Only the first call has an effect.
pub fn start(config: &LogConfig) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(config.level))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // An error means that a log is there already, as in tests that start twice.
    let _ = match config.format {
        LogFormat::Human => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
    // A panic's own words may quote what a library was working on, such as a comment.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current();
        error!(
            place,
            thread = thread.name().unwrap_or("unnamed"),
            "panicked, which is a bug"
        );
    }));
}

/// As [`start`], for a command that ends by itself: a service's lifecycle is noise there, so `info`
/// shows warnings only, and `debug` shows all of it.
pub fn start_for_command(config: &LogConfig) {
    let level = match config.level {
        LogLevel::Info => LogLevel::Warn,
        level => level,
    };
    start(&LogConfig {
        level,
        ..config.clone()
    });
}

/// The level is ours alone: what libraries trace may hold a comment's text, and nobody here can
/// promise that it does not.
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
    fn libraries_are_never_louder_than_warnings() {
        for level in [LogLevel::Error, LogLevel::Info, LogLevel::Trace] {
            let text = filter(level).to_string();
            let mut directives = text
                .split(',')
                .filter(|directive| !directive.starts_with("moderatord="));
            assert!(directives.all(|level| ["warn", "error"].contains(&level)), "{text}");
        }
    }
}
