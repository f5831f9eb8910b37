//! Where bytes come from: what is read of a backing, for front ends of either role and for the machines.

use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::device::{Answer, Errno};
use crate::storage::file::{File, Part};
use crate::storage::{self, Storage};
use crate::troubles::{Kind, Troubles};
use blockmirror_protocol::ranges::ByteRange;
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;

/// How much of a held range is read at once for a compare, in bytes.
const DIGEST_BYTES: u64 = 1 << 20;

/// The BLAKE3 digest of a range of a backing.
pub(crate) async fn digest(
    storage: &dyn Storage,
    backing: &Rc<File>,
    pool: &BufferPool,
    range: ByteRange,
) -> Result<[u8; 32], storage::Error> {
    let mut hasher = blake3::Hasher::new();
    for piece in range.split_at_multiples(DIGEST_BYTES) {
        hasher.update(&storage::read(storage, backing, pool, piece).await?);
    }
    Ok(*hasher.finalize().as_bytes())
}

/// How the last read of a volume went.
#[derive(Default)]
pub(crate) struct Reads {
    have_failed: Cell<bool>,
    troubles: RefCell<Rc<Troubles>>,
}

impl Reads {
    /// Failures are counted there from now on.
    pub(crate) fn count_in(&self, troubles: Rc<Troubles>) {
        *self.troubles.borrow_mut() = troubles;
    }

    /// Where failures are counted.
    pub(crate) fn troubles(&self) -> Rc<Troubles> {
        self.troubles.borrow().clone()
    }

    /// The answer to a read. Clients try again and again, and whoever logs waits for it: a failure is an error in the
    /// log once, until a read succeeds.
    pub(crate) fn answer(&self, outcome: storage::Outcome) -> Result<Answer, Errno> {
        let is_news = self.is_news(outcome.is_err());
        outcome.map(|buffer| Answer::Data(buffer.expect("a read gives its buffer back"))).map_err(|error| {
            let text = crate::words::with_causes(&error);
            self.troubles.borrow().note(Kind::Read, false, &text);
            if is_news {
                tracing::error!("{text}");
            } else {
                tracing::debug!("{text}");
            }
            Errno(libc::EIO)
        })
    }

    /// Whether a read failed, and the one before it did not.
    pub(crate) fn is_news(&self, has_failed: bool) -> bool {
        !self.have_failed.replace(has_failed) && has_failed
    }
}

/// Which parts of a range are allocated.
pub(crate) async fn allocation(backing: &File, range: ByteRange) -> Result<Answer, Errno> {
    let look = move |file: &File| file.allocation(range).take(256).collect::<io::Result<Vec<Part>>>();
    let file = backing.share();
    let parts = if file.knows_its_holes() { look(&file) } else { blocking(move || look(&file)).await };
    match parts {
        Ok(parts) => Ok(Answer::Allocation(parts)),
        Err(error) => Err(Errno(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}
