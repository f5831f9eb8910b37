//! A step of a job as a plain system call, on the thread that makes it.

use super::job::Step;
use rustix::io::Errno;
use std::io;
use std::os::fd::RawFd;

/// Makes the call. Its memory belongs to the job that the step came from, which the caller owns meanwhile.
///
/// # Errors
/// The kernel's.
pub(super) fn call(fd: RawFd, step: Step) -> io::Result<usize> {
    let result = match step {
        Step::Read { offset, start, length } => {
            // SAFETY: the job owns `length` bytes at `start`, and nobody else reads or writes them now.
            unsafe { libc::pread64(fd, start.cast(), length, signed(offset)?) }
        }
        Step::Write { offset, start, length, durable } => {
            let memory = libc::iovec { iov_base: start.cast_mut().cast(), iov_len: length };
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: the job owns `length` bytes at `start`, which the kernel only reads.
            unsafe { libc::pwritev2(fd, &raw const memory, 1, signed(offset)?, flags) }
        }
        Step::Fallocate { mode, range } => {
            let (offset, length) = (signed(range.offset)?, signed(range.length)?);
            // SAFETY: no memory is passed.
            unsafe { libc::fallocate64(fd, mode, offset, length) as isize }
        }
        // SAFETY: no memory is passed.
        Step::Sync => unsafe { libc::fdatasync(fd) as isize },
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn signed(bytes: u64) -> io::Result<i64> {
    i64::try_from(bytes).map_err(|_| Errno::INVAL.into())
}
