//! Errors that applications were given, or that a replica's disk gave: counted, and kept for status also when the disk is
//! well again. They end with a comparison that finds nothing, or with the agent.

use crate::control::api::Errors;
use std::cell::RefCell;
use std::time::Instant;

/// What failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An application's read.
    Read,
    /// An application's write, trim or zeroing.
    Write,
    /// An application's flush.
    Flush,
    /// What a replica was sent, or asked about its content.
    Copy,
}

/// The errors of one volume. Errors that applications got, since the volume was opened.
#[derive(Default)]
pub struct Troubles(RefCell<Option<Noted>>);

struct Noted {
    first: Instant,
    last: Instant,
    errors: Errors,
}

impl Troubles {
    /// Something failed; whether for lack of space, and the error in words.
    pub fn note(&self, kind: Kind, found_no_room: bool, text: &str) {
        let now = Instant::now();
        let mut noted = self.0.borrow_mut();
        let noted = noted.get_or_insert_with(|| Noted { first: now, last: now, errors: Errors::default() });
        noted.last = now;
        let errors = &mut noted.errors;
        *match kind {
            Kind::Read => &mut errors.reads,
            Kind::Write => &mut errors.writes,
            Kind::Flush => &mut errors.flushes,
            Kind::Copy => &mut errors.copies,
        } += 1;
        errors.no_room += u64::from(found_no_room);
        text.clone_into(&mut errors.last);
    }

    /// For status: what there was since the agent's start, or since it was last forgotten.
    #[must_use]
    pub fn errors(&self) -> Option<Errors> {
        self.0.borrow().as_ref().map(|noted| Errors {
            first_seconds: noted.first.elapsed().as_secs(),
            last_seconds: noted.last.elapsed().as_secs(),
            ..noted.errors.clone()
        })
    }

    /// The content was found to be whole.
    pub fn forget(&self) {
        self.0.take();
    }
}
