//! Tells the C library's allocator to keep freed memory for the next pass of a model.
//!
//! A pass on the CPU allocates and frees large buffers in quick succession. By default, glibc gives such memory back to
//! the operating system, which then clears the same pages for the next layer. With 8-bit weights, this took a third of
//! the time.

/// A buffer of at least this many bytes is mapped by itself, and returned to the system when it is freed. This is the
/// highest threshold that glibc accepts (`HEAP_MAX_SIZE / 2`).
const MAPPED_BYTES: i32 = 32 << 20;

/// By how many bytes the heap grows at once.
const GROWTH_BYTES: i32 = 64 << 20;

/// Keeps freed memory up to 1 GiB in the process. Does nothing with other C libraries than glibc.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        use nix::libc::{M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD, mallopt};
        for (parameter, value) in [
            (M_MMAP_THRESHOLD, MAPPED_BYTES),
            (M_TRIM_THRESHOLD, 1 << 30),
            (M_TOP_PAD, GROWTH_BYTES),
        ] {
            #[expect(unsafe_code, reason = "a foreign call")]
            // SAFETY: glibc guards the parameters of its allocator with a lock.
            let accepted = unsafe { mallopt(parameter, value) };
            debug_assert_eq!(accepted, 1, "{parameter} = {value}");
        }
    }
}

/// Returns freed memory to the system, after work that needed much more than the work to come.
pub(crate) fn release_freed_memory() {
    #[cfg(target_env = "gnu")]
    {
        #[expect(unsafe_code, reason = "a foreign call")]
        // SAFETY: the call has no preconditions; it touches only memory that is free.
        unsafe {
            nix::libc::malloc_trim(0);
        }
    }
}
