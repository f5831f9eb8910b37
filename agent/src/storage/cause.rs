//! What kind of thing went wrong, where somebody acts on that: the one place that knows the kernel's numbers for it.

use std::io;

/// Why the kernel refused something, as far as it makes a difference.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// There is no room, or this process may not take more of it. It can be tried again when some was made.
    NoSpace,
    /// The device has no disk, or not any more.
    Absent,
    /// Something else.
    Other,
}

impl Cause {
    /// The cause of an error.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Self::NoSpace,
            Some(libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => Self::Absent,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_numbers_are_told_apart_and_what_is_no_number_of_its_is_something_else() {
        for (number, cause) in [
            (libc::ENOSPC, Cause::NoSpace),
            (libc::EDQUOT, Cause::NoSpace),
            (libc::ENXIO, Cause::Absent),
            (libc::ENOMEDIUM, Cause::Absent),
            (libc::EIO, Cause::Other),
            (libc::EROFS, Cause::Other),
        ] {
            assert_eq!(Cause::of(&io::Error::from_raw_os_error(number)), cause, "{number}");
        }
        assert_eq!(Cause::of(&io::ErrorKind::StorageFull.into()), Cause::Other);
    }
}
