//! A client that keeps memory which others wait for, and neither takes its answers nor sends on what it began.
//!
//! The memory that clients share (`budget`) could be kept for ever by a few who begin long writes and stop, or who stop
//! to read. Once such a client has moved no byte for [`LIMIT`] while somebody else waits, it is given up. Nobody is as
//! long as nobody waits, so a client that a debugger holds is served on.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, Sleep};

/// How long a client may move nothing; looked at when it is over, so that it can be up to twice as long.
const LIMIT: Duration = Duration::from_secs(60);

/// How far one client had come when it was last looked at.
#[derive(Default)]
pub(super) struct Stall {
    timer: Option<Pin<Box<Sleep>>>,
    moved_bytes: u64,
}

impl Stall {
    /// Ready when the client is to be given up. It has moved so many bytes since it came, and others wait if it is
    /// `wanted`.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, moved_bytes: u64, wanted: bool) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| {
            self.moved_bytes = moved_bytes;
            Box::pin(tokio::time::sleep(LIMIT))
        });
        while timer.as_mut().poll(cx).is_ready() {
            if has_stalled(&mut self.moved_bytes, moved_bytes) && wanted {
                return Poll::Ready(());
            }
            timer.as_mut().reset(Instant::now() + LIMIT);
        }
        Poll::Pending
    }
}

/// Whether nothing has moved since this was asked before.
fn has_stalled(before: &mut u64, now: u64) -> bool {
    std::mem::replace(before, now) == now
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn a_client_is_given_up_where_nothing_moved_and_others_wait() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _entered = runtime.enter();
        let over = || Some(Box::pin(tokio::time::sleep_until(Instant::now() - LIMIT)));
        let mut context = Context::from_waker(Waker::noop());
        for (before, now, wanted, given_up) in
            [(5, 5, true, true), (5, 5, false, false), (5, 6, true, false), (5, 6, false, false)]
        {
            let mut stall = Stall { timer: over(), moved_bytes: before };
            let seen = stall.poll(&mut context, now, wanted).is_ready();
            assert_eq!(seen, given_up, "{before} {now} {wanted}");
            assert_eq!(stall.moved_bytes, now);
            assert!(stall.poll(&mut context, now, wanted).is_ready() == given_up, "the next look is later");
        }
        assert!(Stall::default().poll(&mut context, 0, true).is_pending(), "the time begins now");
    }
}
