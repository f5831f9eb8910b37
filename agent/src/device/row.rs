//! How many requests a front end takes in a row before they go to the disk.
//!
//! Taking a request costs some microseconds, and what was taken reaches the disk only when the storage has its turn. So
//! the first request goes on by itself, for the disk to work on while more are taken; then two, four and up to
//! [`LONGEST`], because each turn is a call into the kernel.

/// The longest row.
const LONGEST: usize = 8;

/// How many of the requests that wait go on together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Row {
    taken: usize,
    limit: usize,
}

impl Row {
    /// The first row after nothing was there to be taken.
    pub(super) fn first() -> Self {
        Self { taken: 0, limit: 1 }
    }

    /// A request was taken.
    pub(super) fn take(&mut self) {
        self.taken += 1;
    }

    /// Whether those that were taken are to go on before another one is.
    pub(super) fn is_complete(&self) -> bool {
        self.taken >= self.limit
    }

    /// Begins the next row; those that were taken go on now.
    pub(super) fn next(&mut self) {
        let limit = if self.is_complete() { LONGEST.min(self.limit * 2) } else { self.limit };
        *self = Self { taken: 0, limit };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many are taken in each of some rows, when there are always more.
    fn lengths(row: &mut Row, rows: usize) -> Vec<usize> {
        let mut lengths = Vec::new();
        for _ in 0..rows {
            let mut length = 0;
            while !row.is_complete() {
                row.take();
                length += 1;
            }
            row.next();
            lengths.push(length);
        }
        lengths
    }

    #[test]
    fn the_first_goes_on_by_itself_and_then_more_and_more() {
        assert_eq!(lengths(&mut Row::first(), 6), [1, 2, 4, 8, 8, 8]);
    }

    #[test]
    fn a_row_that_was_cut_short_is_no_reason_for_a_longer_one() {
        let mut row = Row::first();
        lengths(&mut row, 2);
        row.take();
        row.next();
        assert_eq!(lengths(&mut row, 2), [4, 8]);
    }
}
