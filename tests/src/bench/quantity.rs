//! What is measured, and how it is written for people.

use serde_json::{Value, json};

/// A unit, which also says whether more is better.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Requests per second.
    RequestsPerSecond,
    /// Bytes per second.
    BytesPerSecond,
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
    /// A part of a whole, or a multiple.
    Times,
}

impl Unit {
    /// Whether the larger of two values is the better one.
    #[must_use]
    pub fn more_is_better(self) -> bool {
        matches!(self, Self::RequestsPerSecond | Self::BytesPerSecond)
    }

    /// A value with its unit, in three or four digits.
    #[must_use]
    pub fn show(self, value: f64) -> String {
        match self {
            Self::RequestsPerSecond => format!("{}/s", scaled(value, 1000.0, &["", "k", "M"])),
            Self::BytesPerSecond => scaled(value, 1000.0, &[" B/s", " kB/s", " MB/s", " GB/s"]),
            Self::Seconds if value < 1e-3 => format!("{:.1} us", value * 1e6),
            Self::Seconds if value < 1.0 => format!("{:.2} ms", value * 1e3),
            Self::Seconds => format!("{value:.2} s"),
            Self::Bytes => scaled(value, 1024.0, &[" B", " KiB", " MiB", " GiB"]),
            Self::Times => format!("{value:.4}"),
        }
    }

    /// The name that the JSON carries.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RequestsPerSecond => "requests/second",
            Self::BytesPerSecond => "bytes/second",
            Self::Seconds => "seconds",
            Self::Bytes => "bytes",
            Self::Times => "times",
        }
    }
}

fn scaled(mut value: f64, step: f64, names: &[&str]) -> String {
    let mut name = 0;
    while value >= step && name + 1 < names.len() {
        value /= step;
        name += 1;
    }
    let digits = if value >= 100.0 || name == 0 { 0 } else { 1 };
    format!("{value:.digits$}{}", names[name])
}

/// Something that a turn measures.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quantity {
    /// What it is called, such as `speed` or `p99`.
    pub name: &'static str,
    /// Its unit.
    pub unit: Unit,
    /// Whether it only adds to another one, and is left out of the last table.
    pub is_detail: bool,
}

impl Quantity {
    /// A quantity.
    #[must_use]
    pub const fn new(name: &'static str, unit: Unit) -> Self {
        Self { name, unit, is_detail: false }
    }

    /// One that only adds to another.
    #[must_use]
    pub const fn detail(name: &'static str, unit: Unit) -> Self {
        Self { name, unit, is_detail: true }
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({ "name": self.name, "unit": self.unit.name() })
    }
}

/// Requests per second.
pub const RATE: Quantity = Quantity::new("rate", Unit::RequestsPerSecond);
/// Bytes per second.
pub const SPEED: Quantity = Quantity::new("speed", Unit::BytesPerSecond);
/// How long something took, in seconds.
pub const TIME: Quantity = Quantity::new("time", Unit::Seconds);
/// The middle of all latencies of a turn, in seconds.
pub const P50: Quantity = Quantity::detail("p50", Unit::Seconds);
/// The latency that one request in a hundred exceeded, in seconds.
pub const P99: Quantity = Quantity::detail("p99", Unit::Seconds);
/// Resident memory, in bytes.
pub const MEMORY: Quantity = Quantity::new("memory", Unit::Bytes);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_with_few_digits() {
        let rows = [
            (Unit::RequestsPerSecond, 12_345.0, "12.3k/s"),
            (Unit::RequestsPerSecond, 123_456.0, "123k/s"),
            (Unit::BytesPerSecond, 640e6, "640 MB/s"),
            (Unit::BytesPerSecond, 2.04e9, "2.0 GB/s"),
            (Unit::Seconds, 57.3e-6, "57.3 us"),
            (Unit::Seconds, 0.012, "12.00 ms"),
            (Unit::Seconds, 3.5, "3.50 s"),
            (Unit::Bytes, 64.0 * 1024.0 * 1024.0, "64.0 MiB"),
            (Unit::Times, 1.048_76, "1.0488"),
        ];
        for (unit, value, shown) in rows {
            assert_eq!(unit.show(value), shown);
        }
    }
}
