//! Values under small numbers that are used again: how a completion finds what it completes.

/// A table of values, each under a number of its own until it is removed.
#[derive(Debug)]
pub(super) struct Slots<T> {
    values: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { values: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slots<T> {
    pub(super) fn insert(&mut self, value: T) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.values.push(None);
            self.values.len() - 1
        });
        assert!(self.values[index].is_none(), "a free slot is empty");
        self.values[index] = Some(value);
        index
    }

    pub(super) fn get_mut(&mut self, index: usize) -> &mut T {
        self.values[index].as_mut().expect("a number names a value until it is removed")
    }

    pub(super) fn remove(&mut self, index: usize) -> T {
        let value = self.values[index].take().expect("a number names a value until it is removed");
        self.free.push(index);
        value
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        self.values.iter().flatten()
    }

    pub(super) fn len(&self) -> usize {
        self.values.len() - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_used_again_after_its_value_left() {
        let mut slots = Slots::default();
        let (first, second) = (slots.insert('a'), slots.insert('b'));
        assert_eq!((slots.remove(first), slots.len()), ('a', 1));
        assert_eq!((slots.insert('c'), slots.len()), (first, 2));
        assert_eq!((*slots.get_mut(first), *slots.get_mut(second)), ('c', 'b'));
    }
}
