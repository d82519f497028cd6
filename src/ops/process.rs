//! Sets up the process itself: the limit on open files, the signal for file sizes, and an exit without exit handlers.

#![expect(
    unsafe_code,
    reason = "nix offers the disposition of a signal and `_exit` only as unsafe functions"
)]

use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use tracing::warn;

/// Makes a write beyond a file size limit fail with an error instead of ending the process.
///
/// By default, SIGXFSZ ends a process whose log or registry reaches a limit that was set with `ulimit -f`.
pub fn ignore_file_size_signal() {
    // SAFETY: ignoring a signal installs no handler that could run at an unsafe time.
    let ignored = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
    debug_assert_eq!(ignored.map(drop), Ok(()), "SIGXFSZ can be ignored");
}

/// Raises the limit on open files as far as the process is allowed to, and returns the limit.
///
/// The lower limit exists for programs that use `select`, which this one does not.
pub(crate) fn raise_open_files_limit() -> u64 {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok(hard)
    });
    raised.unwrap_or_else(|error: Errno| {
        warn!(%error, "cannot raise the limit on open files");
        open_files_limit().unwrap_or(FALLBACK_OPEN_FILES)
    })
}

/// Returns the limit on open files.
pub(crate) fn open_files_limit() -> Option<u64> {
    getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft)
}

/// Linux's default limit on open files, for a system that does not report the limit.
const FALLBACK_OPEN_FILES: u64 = 1024;

/// Ends the process at once, without running exit handlers.
///
/// Those of OpenSSL free state that the threads of librdkafka are still using, which can crash the process and so
/// replace its exit code.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions. It ends all threads before anything of theirs is freed.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_on_open_files_is_raised_to_the_highest_allowed() {
        let limit = raise_open_files_limit();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE), Ok((limit, limit)));
        assert_eq!(open_files_limit(), Some(limit));
    }
}
