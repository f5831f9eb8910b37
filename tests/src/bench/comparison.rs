//! Contestants, measured in turns: A B C A B C ..., so that what else happens on the machine meets all of them alike.

use super::quantity::{Quantity, Unit};
use super::statistics::{Summary, ratio};
use anyhow::Result;

/// What a contestant is in a comparison.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Blockmirror.
    Ours,
    /// A program that does the same work.
    Peer,
    /// What the machine can do without either.
    Limit,
    /// Measured and told, but not what a bar is about, for instance since it answers from the page cache.
    Aside,
}

/// What one turn gave.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// What was measured.
    pub values: Vec<(Quantity, f64)>,
    /// Why these values count for nothing, if they don't.
    pub invalid: Option<String>,
}

impl Turn {
    /// A turn that measured these.
    #[must_use]
    pub fn new(values: impl Into<Vec<(Quantity, f64)>>) -> Self {
        Self { values: values.into(), invalid: None }
    }

    /// The same, and one more.
    #[must_use]
    pub fn with(mut self, quantity: Quantity, value: f64) -> Self {
        self.values.push((quantity, value));
        self
    }

    /// The same, which counts for nothing if there is a reason.
    #[must_use]
    pub fn unless(mut self, invalid: Option<String>) -> Self {
        self.invalid = self.invalid.or(invalid);
        self
    }
}

/// Does its work once.
type Work<'a> = Box<dyn FnMut() -> Result<Turn> + 'a>;

/// Somebody who does the work.
pub struct Contestant<'a> {
    /// Its name.
    pub name: String,
    /// What it is.
    pub part: Part,
    /// Its turn, or why it has none.
    pub turn: Result<Work<'a>, String>,
}

impl<'a> Contestant<'a> {
    /// One that is there.
    pub fn new(name: impl Into<String>, part: Part, turn: impl FnMut() -> Result<Turn> + 'a) -> Self {
        Self { name: name.into(), part, turn: Ok(Box::new(turn)) }
    }

    /// One that isn't, for this reason.
    pub fn skipped(name: impl Into<String>, part: Part, reason: impl Into<String>) -> Self {
        Self { name: name.into(), part, turn: Err(reason.into()) }
    }
}

/// What a contestant measured of one quantity.
#[derive(Clone, Debug)]
pub struct Series {
    /// The contestant's name.
    pub contestant: String,
    /// What it is.
    pub part: Part,
    /// One value for each valid turn.
    pub values: Vec<f64>,
}

impl Series {
    /// What they amount to, where there is one.
    #[must_use]
    pub fn summary(&self) -> Option<Summary> {
        Summary::of(&self.values)
    }
}

/// All contestants in one quantity.
#[derive(Clone, Debug)]
pub struct Table {
    /// What was measured.
    pub quantity: Quantity,
    /// Who measured what, in the order of their turns.
    pub series: Vec<Series>,
}

impl Table {
    /// The median of a contestant.
    #[must_use]
    pub fn median(&self, contestant: &str) -> Option<f64> {
        self.series.iter().find(|series| series.contestant == contestant)?.summary().map(|all| all.median)
    }

    /// The median of the first contestant that is ours.
    #[must_use]
    pub fn ours(&self) -> Option<f64> {
        let ours = self.series.iter().find(|series| series.part == Part::Ours)?;
        ours.summary().map(|summary| summary.median)
    }

    /// The best peer and its median.
    #[must_use]
    pub fn best_peer(&self) -> Option<(&str, f64)> {
        let peers = self.series.iter().filter(|series| series.part == Part::Peer);
        let medians = peers.filter_map(|peer| Some((peer.contestant.as_str(), peer.summary()?.median)));
        let more_is_better = self.quantity.unit.more_is_better();
        medians.max_by(|one, other| {
            let order = one.1.total_cmp(&other.1);
            if more_is_better { order } else { order.reverse() }
        })
    }

    /// Ours as a multiple of a contestant's.
    #[must_use]
    pub fn ratio_to(&self, contestant: &str) -> Option<f64> {
        ratio(self.ours()?, self.median(contestant)?)
    }

    /// Ours as a multiple of the best peer's, and which one that is.
    #[must_use]
    pub fn ratio_to_best(&self) -> Option<(f64, &str)> {
        let (name, best) = self.best_peer()?;
        Some((ratio(self.ours()?, best)?, name))
    }
}

/// A comparison that has ended.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The group that it belongs to.
    pub group: &'static str,
    /// Where, if that makes a difference.
    pub place: &'static str,
    /// Which work was done.
    pub work: String,
    /// For each quantity, who measured what.
    pub tables: Vec<Table>,
    /// Who was not measured, and why.
    pub skipped: Vec<(String, String)>,
    /// Whose turns didn't count, and why.
    pub invalid: Vec<(String, String)>,
    /// Who failed, and how.
    pub failed: Vec<(String, String)>,
}

impl Outcome {
    /// The table of a quantity, empty where nobody measured it.
    #[must_use]
    pub fn table(&self, quantity: Quantity) -> Table {
        let found = self.tables.iter().find(|table| table.quantity == quantity);
        found.cloned().unwrap_or(Table { quantity, series: Vec::new() })
    }

    fn note(&mut self, contestant: &Contestant<'_>, turn: Turn) {
        if let Some(reason) = turn.invalid {
            return self.invalid.push((contestant.name.clone(), reason));
        }
        for (quantity, value) in turn.values {
            let table = match self.tables.iter().position(|table| table.quantity == quantity) {
                Some(at) => &mut self.tables[at],
                None => {
                    self.tables.push(Table { quantity, series: Vec::new() });
                    self.tables.last_mut().expect("one was just put there")
                }
            };
            match table.series.iter_mut().find(|series| series.contestant == contestant.name) {
                Some(series) => series.values.push(value),
                None => table.series.push(Series {
                    contestant: contestant.name.clone(),
                    part: contestant.part,
                    values: vec![value],
                }),
            }
        }
    }
}

/// Lets everybody have their turns. One who fails is out, and the others go on; an interrupt ends it.
pub fn take_turns(mut contestants: Vec<Contestant<'_>>, turns: usize, mut outcome: Outcome) -> Outcome {
    for contestant in &contestants {
        if let Err(reason) = &contestant.turn {
            outcome.skipped.push((contestant.name.clone(), reason.clone()));
        }
    }
    contestants.retain(|contestant| contestant.turn.is_ok());
    for _ in 0..turns {
        contestants.retain_mut(|contestant| {
            if super::processes::go_on().is_err() {
                return false;
            }
            let turn = contestant.turn.as_mut().expect("those without a turn are gone");
            match turn() {
                Ok(turn) => outcome.note(contestant, turn),
                Err(error) => {
                    outcome.failed.push((contestant.name.clone(), format!("{error:#}")));
                    return false;
                }
            }
            true
        });
    }
    outcome
}

/// Whether a unit's values are told in the order that is usual for it.
#[must_use]
pub fn arrow(unit: Unit) -> &'static str {
    if unit.more_is_better() { "more is better" } else { "less is better" }
}

#[cfg(test)]
mod tests {
    use super::super::quantity::{RATE, TIME};
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn turns_alternate_and_one_who_fails_is_out() {
        let order = RefCell::new(String::new());
        let turn = |name: char, fails_at: usize| {
            let order = &order;
            let mut count = 0;
            move || {
                order.borrow_mut().push(name);
                count += 1;
                anyhow::ensure!(count != fails_at, "no more");
                Ok(Turn::new([(RATE, count as f64)]))
            }
        };
        let contestants = vec![
            Contestant::new("a", Part::Ours, turn('a', 0)),
            Contestant::new("b", Part::Peer, turn('b', 2)),
            Contestant::skipped("c", Part::Peer, "not installed"),
            Contestant::new("d", Part::Aside, turn('d', 0)),
        ];
        let outcome = take_turns(contestants, 3, Outcome::default());
        assert_eq!(order.into_inner(), "abdabdad");
        let table = outcome.table(RATE);
        assert_eq!(table.ours(), Some(2.0));
        assert_eq!(table.best_peer(), Some(("b", 1.0)), "what stands aside is no peer");
        assert_eq!(table.ratio_to("d"), Some(1.0));
        assert_eq!(outcome.skipped, [("c".to_owned(), "not installed".to_owned())]);
        assert_eq!(outcome.failed, [("b".to_owned(), "no more".to_owned())]);
    }

    #[test]
    fn the_best_peer_is_the_fastest_one() {
        let row = |contestant: &str, part, value| Series {
            contestant: contestant.to_owned(),
            part,
            values: vec![value],
        };
        let series = vec![row("a", Part::Ours, 2.0), row("b", Part::Peer, 4.0), row("c", Part::Peer, 8.0)];
        let table = |quantity| Table { quantity, series: series.clone() };
        assert_eq!(table(RATE).ratio_to_best(), Some((0.25, "c")));
        assert_eq!(table(TIME).ratio_to_best(), Some((0.5, "b")));
    }

    #[test]
    fn a_turn_that_does_not_count_leaves_no_value() {
        let turn = || Ok(Turn::new([(RATE, 1.0)]).unless(Some("it fell behind".to_owned())));
        let outcome = take_turns(vec![Contestant::new("a", Part::Ours, turn)], 2, Outcome::default());
        assert_eq!(outcome.table(RATE).ours(), None);
        assert_eq!(outcome.invalid.len(), 2);
    }
}
