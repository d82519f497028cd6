//! Configures the log on stderr.

use std::io::IsTerminal;

use tracing::error;
use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat, LogLevel};

/// Starts logging to stderr in the configured format and at the configured level. Later calls change neither.
pub fn start(config: &LogConfig) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(config.level))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // An error means that logging has already been started, as in tests that run several commands.
    let _ = match config.format {
        LogFormat::Human => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
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
