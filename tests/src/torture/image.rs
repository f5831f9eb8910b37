//! What a file system holds of the writer's records.

use super::record::{Cell, Place, SLOT_BLOCKS, SLOTS, cell, first_record};
use crate::machines::content::BLOCK_BYTES;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    /// For each slot of the files that are there, its blocks.
    pub slots: BTreeMap<Place, Vec<Cell>>,
    /// For each replaced file that is there, the record, if it is whole and nothing else is there.
    pub wholes: BTreeMap<Place, Option<u64>>,
    /// For each log that is there, the whole records that it begins with.
    pub logs: BTreeMap<Place, Vec<u64>>,
    /// Names that the writer never gives.
    pub foreign: Vec<String>,
}

impl Image {
    /// Reads a folder; a missing one is empty.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let mut image = Self::default();
        let entries = match fs::read_dir(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(image),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // A file that was to replace another and didn't says nothing.
            if !name.ends_with(".new") {
                image.take(&name, &fs::read(entry.path())?);
            }
        }
        Ok(image)
    }

    fn take(&mut self, name: &str, content: &[u8]) {
        let slots = name.strip_prefix("slots-").and_then(|number| number.parse().ok());
        if let Some(file) = slots {
            self.take_slots(file, content);
            return;
        }
        match Place::of_file(name) {
            Some(place @ Place::Whole(_)) => {
                let whole = first_record(content).filter(|(_, length)| *length == content.len());
                self.wholes.insert(place, whole.map(|(number, _)| number));
            }
            Some(place) => {
                self.logs.insert(place, records(content));
            }
            None => self.foreign.push(name.to_owned()),
        }
    }

    fn take_slots(&mut self, file: u64, content: &[u8]) {
        let blocks: Vec<&[u8]> = content.chunks(BLOCK_BYTES as usize).collect();
        for slot in 0..SLOTS {
            let cells = (0..SLOT_BLOCKS).map(|index| {
                // What lies behind the file's end was never written.
                let block = blocks.get((slot * SLOT_BLOCKS + index) as usize);
                block.map_or(Cell::Blank, |block| cell(block, index))
            });
            self.slots.insert(Place::Slot { file, slot }, cells.collect());
        }
    }

    /// The numbers of all records of which anything was found.
    pub fn numbers(&self) -> impl Iterator<Item = u64> + '_ {
        let cells = self.slots.values().flatten().filter_map(|cell| match cell {
            Cell::Of(number) => Some(*number),
            Cell::Blank | Cell::Damaged => None,
        });
        cells.chain(self.wholes.values().flatten().copied()).chain(self.logs.values().flatten().copied())
    }
}

/// The whole records that a log begins with.
fn records(mut content: &[u8]) -> Vec<u64> {
    let mut numbers = Vec::new();
    while let Some((number, length)) = first_record(content) {
        numbers.push(number);
        content = &content[length..];
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::record;

    #[test]
    fn a_folder_is_read_for_what_it_holds() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, content: &[u8]| {
            fs::write(folder.path().join(name), content).expect("a file");
        };
        let mut slots = vec![0; (SLOT_BLOCKS * BLOCK_BYTES) as usize];
        slots.extend(record::blocks(5, 2));
        write("slots-1", &slots);
        write("whole-2", &record::stream(6, 1000));
        write("whole-4", &record::stream(7, 1000)[..500]);
        write("whole-4.new", b"");
        let mut log = record::stream(8, 10);
        log.extend(record::stream(9, 0));
        log.extend(&record::stream(10, 10)[..30]);
        write("log-3", &log);
        write("core", b"");
        let image = Image::read(folder.path()).expect("it can be read");
        let slot = |slot| &image.slots[&Place::Slot { file: 1, slot }];
        assert_eq!(slot(1)[..3], [Cell::Of(5), Cell::Of(5), Cell::Blank]);
        assert_eq!((slot(0)[0], slot(2)[0]), (Cell::Blank, Cell::Blank));
        assert_eq!(image.wholes, BTreeMap::from([(Place::Whole(2), Some(6)), (Place::Whole(4), None)]));
        assert_eq!(image.logs, BTreeMap::from([(Place::Log(3), vec![8, 9])]));
        assert_eq!(image.foreign, ["core"]);
        assert_eq!(Image::read(&folder.path().join("none")).expect("it is empty"), Image::default());
    }
}
