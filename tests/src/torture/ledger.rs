//! What the writer said, and what a copy of the volume may therefore hold.
//!
//! A copy is right if there is a moment at which a power cut would have left just that: whatever was durable before
//! it is there and whole, and nothing is there that was begun later. The moment is not known, but two things are: it
//! came after the beginning of every record of which anything is found, and not before the copy's *floor*, up to which
//! the copy is known to have everything. That is what [`Ledger::check`] holds a copy against.
//!
//! Moments are counted in what the writer said, so none of this depends on a clock.

use super::image::Image;
use super::record::{Cell, Place, SLOT_BLOCKS};
use super::writer::Line;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A moment: how much the writer had said.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Moment(pub u64);

/// A record, or the removal of a log.
#[derive(Clone, Copy, Debug)]
struct Change {
    number: u64,
    /// How many blocks of a slot it covers.
    blocks: u64,
    removes: bool,
    durable: Option<Moment>,
}

/// What a place held when all of it was last known, and what was said about it since.
#[derive(Clone, Debug, Default)]
struct History {
    /// The blocks of a slot; empty where all are blank.
    cells: Vec<Cell>,
    /// The record of a replaced file, or those of a log.
    records: Vec<u64>,
    changes: Vec<Change>,
}

/// What the writer was promised.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    now: Moment,
    places: BTreeMap<Place, History>,
    begun: HashMap<u64, (Place, Moment)>,
    next_number: u64,
}

/// What a check went through.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Checked {
    /// How many places had to hold something certain.
    pub certain: u64,
    /// How many records had been lost, as they may: begun, and neither durable nor found.
    pub lost: u64,
    /// How much the writer had said by the earliest moment that explains the copy.
    pub moment: Moment,
}

impl Ledger {
    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Moment {
        self.now
    }

    /// A number that was never used, nor any above it.
    #[must_use]
    pub fn unused_number(&self) -> u64 {
        self.next_number
    }

    /// Notes what the writer said.
    ///
    /// # Errors
    /// When it makes no sense.
    pub fn note(&mut self, line: Line) -> Result<(), String> {
        self.now.0 += 1;
        match line {
            Line::Begin { number, place, blocks } => self.begin(number, place, blocks, false),
            Line::Remove { number, place } => self.begin(number, place, 0, true),
            Line::Durable(number) => {
                let (place, _) =
                    self.begun.get(&number).ok_or_else(|| format!("{number} was never begun"))?;
                let changes = &mut self.places.get_mut(place).expect("it was begun there").changes;
                let change = changes.iter_mut().rev().find(|change| change.number == number);
                change.expect("it was begun there").durable = Some(self.now);
                Ok(())
            }
        }
    }

    fn begin(&mut self, number: u64, place: Place, blocks: u64, removes: bool) -> Result<(), String> {
        if self.begun.insert(number, (place, self.now)).is_some() {
            return Err(format!("{number} was begun before"));
        }
        // The name of a log is a number like those of records, times the number of threads.
        self.next_number = self.next_number.max(number + 2);
        let change = Change { number, blocks, removes, durable: None };
        self.places.entry(place).or_default().changes.push(change);
        Ok(())
    }

    /// Whether a copy may hold this, if it has everything up to `floor`.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self, image: &Image, floor: Moment) -> Result<Checked, String> {
        if let Some(name) = image.foreign.first() {
            return Err(format!("{name} is there, which nobody wrote"));
        }
        let mut moment = floor;
        for number in image.numbers() {
            let (_, begun) = self.begun.get(&number).ok_or_else(|| {
                format!("a record {number} is there, which was never begun or was lost for good before")
            })?;
            moment = moment.max(*begun);
        }
        let mut checked = Checked { moment, ..Checked::default() };
        let found = image.slots.keys().chain(image.wholes.keys()).chain(image.logs.keys());
        for place in found.chain(self.places.keys()).copied().collect::<BTreeSet<Place>>() {
            let blank = History::default();
            let history = self.places.get(&place).unwrap_or(&blank);
            let judged = match place {
                Place::Slot { .. } => history.check_slot(image.slots.get(&place), moment),
                Place::Whole(_) => history.check_whole(image.wholes.get(&place), moment),
                Place::Log(_) => history.check_log(image.logs.get(&place), moment),
            };
            let is_certain = judged.map_err(|wrong| self.explain(place, &wrong, floor, moment))?;
            checked.certain += u64::from(is_certain);
        }
        let there: BTreeSet<u64> = image.numbers().collect();
        let changes = self.places.values().flat_map(|history| &history.changes);
        let is_lost =
            |change: &&Change| change.durable.is_none() && !change.removes && !there.contains(&change.number);
        checked.lost = changes.filter(is_lost).count() as u64;
        Ok(checked)
    }

    fn explain(&self, place: Place, wrong: &str, floor: Moment, moment: Moment) -> String {
        let changes = self.places.get(&place).map_or(&[][..], |history| &history.changes);
        let tell = |change: &Change| {
            let begun = self.begun.get(&change.number).map_or(0, |(_, begun)| begun.0);
            let durable = change.durable.map_or_else(|| "never".to_owned(), |moment| moment.0.to_string());
            format!("{} begun at {begun}, durable at {durable}", change.number)
        };
        let last: Vec<String> = changes.iter().rev().take(8).map(tell).collect();
        format!(
            "{place}: {wrong}; what was durable at {} must be there, the copy has all up to {}, it is {} now; last: {}",
            moment.0,
            floor.0,
            self.now.0,
            last.join("; ")
        )
    }

    /// From now on this is what there is: a copy holds it durably, and all others that will be looked at follow that
    /// one. What was begun and is not in it is lost for good. Gives how many records were begun since the last time.
    pub fn settle(&mut self, image: &Image) -> u64 {
        let begun = self.places.values().map(|history| history.changes.len() as u64).sum();
        self.places.clear();
        self.now.0 += 1;
        let there: HashMap<u64, Place> = {
            let slots = image.slots.iter().flat_map(|(place, cells)| {
                cells.iter().filter_map(|cell| match cell {
                    Cell::Of(number) => Some((*number, *place)),
                    Cell::Blank | Cell::Damaged => None,
                })
            });
            let wholes = image.wholes.iter().filter_map(|(place, number)| Some(((*number)?, *place)));
            let logs =
                image.logs.iter().flat_map(|(place, numbers)| numbers.iter().map(|number| (*number, *place)));
            slots.chain(wholes).chain(logs).collect()
        };
        self.begun = there.into_iter().map(|(number, place)| (number, (place, Moment(0)))).collect();
        for (place, cells) in &image.slots {
            self.places.entry(*place).or_default().cells.clone_from(cells);
        }
        let wholes = image.wholes.iter().map(|(place, number)| (place, number.iter().copied().collect()));
        let logs = image.logs.iter().map(|(place, numbers)| (place, numbers.clone()));
        for (place, records) in wholes.chain(logs) {
            self.places.entry(*place).or_default().records = records;
        }
        begun
    }
}

impl History {
    /// Where to begin to look, and what must be there: the last change that was durable before the moment, of those
    /// that count.
    fn certain(&self, moment: Moment, counts: impl Fn(&Change) -> bool) -> (Option<&Change>, &[Change]) {
        let is_certain = |change: &Change| counts(change) && change.durable.is_some_and(|at| at <= moment);
        match self.changes.iter().rposition(is_certain) {
            Some(at) => (Some(&self.changes[at]), &self.changes[at + 1..]),
            None => (None, &self.changes),
        }
    }

    fn check_slot(&self, found: Option<&Vec<Cell>>, moment: Moment) -> Result<bool, String> {
        let mut is_certain = false;
        for index in 0..SLOT_BLOCKS {
            let cell = found.map_or(Cell::Blank, |cells| cells[index as usize]);
            let covers = |change: &Change| change.blocks > index;
            let (last, later) = self.certain(moment, covers);
            let base = self.cells.get(index as usize).copied().unwrap_or(Cell::Blank);
            let before = last.map_or(base, |last| Cell::Of(last.number));
            is_certain |= last.is_some();
            let mut later = later.iter().filter(|change| covers(change));
            let is_right = cell == before
                || match cell {
                    Cell::Of(number) => later.any(|change| change.number == number),
                    // A write that was under way may have left anything.
                    Cell::Damaged => later.next().is_some(),
                    Cell::Blank => false,
                };
            if !is_right {
                return Err(format!("block {index} holds {cell:?} instead of {before:?}"));
            }
        }
        Ok(is_certain)
    }

    fn check_whole(&self, found: Option<&Option<u64>>, moment: Moment) -> Result<bool, String> {
        let (last, later) = self.certain(moment, |_| true);
        let before = last.map(|last| last.number).or_else(|| self.records.first().copied());
        let is_right = match found {
            None => before.is_none(),
            Some(None) => return Err(format!("it is damaged; {before:?} was there before")),
            Some(Some(number)) => {
                Some(*number) == before || later.iter().any(|change| change.number == *number)
            }
        };
        if is_right {
            return Ok(last.is_some());
        }
        Err(format!("it holds {found:?} instead of {before:?}"))
    }

    fn check_log(&self, found: Option<&Vec<u64>>, moment: Moment) -> Result<bool, String> {
        let removal = self.changes.iter().find(|change| change.removes);
        let is_removed =
            removal.is_some_and(|removal| removal.durable.is_some_and(|durable| durable <= moment));
        let appended = self.changes.iter().filter(|change| !change.removes);
        let order: Vec<u64> =
            self.records.iter().copied().chain(appended.clone().map(|change| change.number)).collect();
        let is_certain = |change: &Change| change.durable.is_some_and(|durable| durable <= moment);
        let certain = match appended.clone().collect::<Vec<_>>().iter().rposition(|change| is_certain(change))
        {
            Some(at) => self.records.len() + at + 1,
            None => self.records.len(),
        };
        match found {
            Some(_) if is_removed => Err("it was removed".to_owned()),
            None if removal.is_some() || certain == 0 => Ok(is_removed),
            None => Err(format!("it is missing; records {:?} must be there", &order[..certain])),
            Some(found) if !order.starts_with(found) => {
                Err(format!("it holds {found:?}, which is no beginning of {order:?}"))
            }
            Some(found) if found.len() < certain => {
                Err(format!("it holds {} records of {certain} that must be there: {found:?}", found.len()))
            }
            Some(_) => Ok(certain > self.records.len()),
        }
    }
}

#[cfg(test)]
mod tests;
