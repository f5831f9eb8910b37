//! The instants of a request's life at which a test ends the process. Without a test they are nothing.

/// Between two of these, a crash of the process changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Instant {
    /// The kernel is about to be asked for a request.
    Ready,
    /// A request is in its slot.
    Arrived,
    /// It is executed, and noted that it is answered.
    Answering,
    /// The answer was written.
    Answered,
}

/// Called at each of them.
#[cfg(not(test))]
pub(super) fn pass(_: Instant) {}

#[cfg(test)]
pub(super) use super::tests::pass;
