//! What was measured: a table for each comparison as soon as it has ended, JSON with every single value, and at the end
//! the bars, as Markdown.

use super::comparison::{Outcome, Part, Series, Table, arrow};
use super::statistics::ratio;
use serde_json::{Value, json};
use std::fmt::Write;

/// What a ratio must be.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Wanted {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
    /// Anything: it is only told.
    Told,
}

/// A bar, and what was reached.
#[derive(Clone, Debug)]
pub struct Bar {
    /// What it is about.
    pub about: String,
    /// What was divided by what.
    pub measure: String,
    /// What it must be.
    pub wanted: Wanted,
    /// What it is; nothing where something is missing for it.
    pub reached: Option<f64>,
}

impl Bar {
    fn wanted_words(&self) -> String {
        match self.wanted {
            Wanted::AtLeast(least) => format!("at least {least}"),
            Wanted::AtMost(most) => format!("at most {most}"),
            Wanted::Told => "stated".to_owned(),
        }
    }

    fn verdict(&self) -> &'static str {
        match (self.wanted, self.reached) {
            (_, None) => "not measured",
            (Wanted::Told, Some(_)) => "-",
            (Wanted::AtLeast(least), Some(reached)) if reached >= least => "met",
            (Wanted::AtMost(most), Some(reached)) if reached <= most => "met",
            _ => "not met",
        }
    }

    fn reached_words(&self) -> String {
        self.reached.map_or_else(|| "-".to_owned(), |reached| format!("{reached:.3}"))
    }

    fn json(&self) -> Value {
        json!({
            "about": self.about,
            "measure": self.measure,
            "wanted": self.wanted_words(),
            "reached": self.reached,
            "verdict": self.verdict(),
        })
    }
}

/// Everything that was measured so far.
#[derive(Default)]
pub struct Report {
    /// The comparisons that have ended.
    pub outcomes: Vec<Outcome>,
    /// The bars, in the order of their groups.
    pub bars: Vec<Bar>,
    /// What else there is to say, for people.
    pub notes: Vec<String>,
    /// Groups that could not be run, and why.
    pub failed: Vec<(String, String)>,
}

impl Report {
    /// Whether everything that was meant to run did.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.failed.is_empty() && self.outcomes.iter().all(|outcome| outcome.failed.is_empty())
    }

    /// The bars as Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = String::from("| what | measure | bar | reached | |\n|---|---|---|---|---|\n");
        for bar in &self.bars {
            let (about, measure) = (&bar.about, &bar.measure);
            let (wanted, reached, verdict) = (bar.wanted_words(), bar.reached_words(), bar.verdict());
            let _ = writeln!(text, "| {about} | {measure} | {wanted} | {reached} | {verdict} |");
        }
        text.push_str("\n| work | contestant | quantity | median | least | most | ours is |\n");
        text.push_str("|---|---|---|---|---|---|---|\n");
        for outcome in &self.outcomes {
            for table in outcome.tables.iter().filter(|table| !table.quantity.is_detail) {
                for row in rows(table) {
                    let title = title(outcome);
                    let _ = writeln!(text, "| {title} | {} |", row.join(" | "));
                }
            }
        }
        for note in &self.notes {
            let _ = writeln!(text, "\n{note}");
        }
        text
    }

    /// Everything as JSON.
    #[must_use]
    pub fn json(&self, machine: &Value, settings: &Value, is_over: bool) -> Value {
        json!({
            "schema": "blockmirror/bench/v1",
            "machine": machine,
            "settings": settings,
            "interrupted": is_over,
            "comparisons": self.outcomes.iter().map(outcome_json).collect::<Vec<_>>(),
            "bars": self.bars.iter().map(Bar::json).collect::<Vec<_>>(),
            "notes": self.notes,
            "failed": self.failed,
        })
    }
}

/// A comparison for people, one row for each contestant.
#[must_use]
pub fn show(outcome: &Outcome) -> String {
    let mut text = format!("\n{}\n", title(outcome));
    for table in &outcome.tables {
        let _ = writeln!(text, "  {} ({})", table.quantity.name, arrow(table.quantity.unit));
        for row in rows(table) {
            let [name, _, median, least, most, ratio] = row;
            let _ =
                writeln!(text, "    {name:28} {median:>12}   {:26} {ratio}", format!("{least} .. {most}"));
        }
    }
    let reasons = [("skipped", &outcome.skipped), ("invalid", &outcome.invalid), ("FAILED", &outcome.failed)];
    for (what, list) in reasons {
        for (name, reason) in list {
            let _ = writeln!(text, "    {name:28} {what}: {reason}");
        }
    }
    text
}

fn title(outcome: &Outcome) -> String {
    match outcome.place {
        "" => format!("{}: {}", outcome.group, outcome.work),
        place => format!("{}, {place}: {}", outcome.group, outcome.work),
    }
}

/// Contestant, quantity, median, least, most, and ours as a multiple of it.
fn rows(table: &Table) -> Vec<[String; 6]> {
    let ours = table.ours();
    let row = |series: &Series| {
        let summary = series.summary()?;
        let show = |value| table.quantity.unit.show(value);
        let ratio = ours.and_then(|ours| ratio(ours, summary.median)).filter(|_| series.part != Part::Ours);
        Some([
            series.contestant.clone(),
            table.quantity.name.to_owned(),
            show(summary.median),
            show(summary.least),
            show(summary.most),
            ratio.map(|ratio| format!("{ratio:.2} x{}", aside(series.part))).unwrap_or_default(),
        ])
    };
    table.series.iter().filter_map(row).collect()
}

fn aside(part: Part) -> &'static str {
    if part == Part::Aside { ", not counted" } else { "" }
}

fn outcome_json(outcome: &Outcome) -> Value {
    let series = |table: &Table| -> Vec<Value> {
        let one = |series: &Series| {
            json!({
                "contestant": series.contestant,
                "part": format!("{:?}", series.part).to_lowercase(),
                "median": series.summary().map(|summary| summary.median),
                "values": series.values,
            })
        };
        table.series.iter().map(one).collect()
    };
    let tables: Vec<Value> = outcome
        .tables
        .iter()
        .map(|table| json!({ "quantity": table.quantity.json(), "series": series(table) }))
        .collect();
    json!({
        "group": outcome.group,
        "place": outcome.place,
        "work": outcome.work,
        "tables": tables,
        "skipped": outcome.skipped,
        "invalid": outcome.invalid,
        "failed": outcome.failed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_says_whether_it_is_met() {
        let rows = [
            (Wanted::AtLeast(1.0), Some(1.0), "met"),
            (Wanted::AtLeast(1.2), Some(1.1), "not met"),
            (Wanted::AtMost(1.15), Some(1.1), "met"),
            (Wanted::AtMost(1.15), Some(1.2), "not met"),
            (Wanted::Told, Some(0.1), "-"),
            (Wanted::AtMost(1.0), None, "not measured"),
        ];
        for (wanted, reached, verdict) in rows {
            let bar = Bar { about: String::new(), measure: String::new(), wanted, reached };
            assert_eq!(bar.verdict(), verdict, "{wanted:?} {reached:?}");
        }
    }
}
