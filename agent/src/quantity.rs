//! Sizes, durations and shares as the operator types and reads them.
//!
//! Sizes count in powers of 1024 everywhere: `4096`, `256M`, `1.5G`. What is printed for people is rounded to one
//! decimal; what is saved ([`Size::exact`]) reads back as the same number of bytes.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

/// The units of sizes, smallest first; each is 1024 of the one before.
const UNITS: [char; 4] = ['K', 'M', 'G', 'T'];

/// Bytes. Shown as `100G`, or with one decimal where that is not exact: `12.3M`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Size(pub u64);

/// A text that is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not a size; write a whole number of bytes, or a number with K, M, G or T (powers of 1024)"
)]
pub struct NotASize(pub String);

impl Size {
    /// The shortest text that reads back as the same number of bytes: `64M`, `1536M`, `4097`.
    #[must_use]
    pub fn exact(self) -> String {
        let unit =
            (1..=UNITS.len()).rev().find(|unit| self.0 != 0 && self.0.is_multiple_of(1 << (10 * unit)));
        match unit {
            Some(unit) => format!("{}{}", self.0 >> (10 * unit), UNITS[unit - 1]),
            None => self.0.to_string(),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut unit = (1..=UNITS.len()).rev().find(|unit| self.0 >> (10 * unit) > 0).unwrap_or(0);
        if unit == 0 || self.0.is_multiple_of(1 << (10 * unit)) {
            return f.pad(&match unit {
                0 => self.0.to_string(),
                _ => format!("{}{}", self.0 >> (10 * unit), UNITS[unit - 1]),
            });
        }
        let mut tenths = tenths_of(self.0, unit);
        if tenths >= 10240 && unit < UNITS.len() {
            unit += 1;
            tenths = tenths_of(self.0, unit);
        }
        f.pad(&format!("{}.{}{}", tenths / 10, tenths % 10, UNITS[unit - 1]))
    }
}

/// How many tenths of a unit so many bytes are, rounded.
fn tenths_of(bytes: u64, unit: usize) -> u128 {
    let unit_bytes = 1u128 << (10 * unit);
    (u128::from(bytes) * 10 + unit_bytes / 2) / unit_bytes
}

impl FromStr for Size {
    type Err = NotASize;

    fn from_str(text: &str) -> Result<Self, NotASize> {
        parse_size(text).map(Size).ok_or_else(|| NotASize(text.to_owned()))
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let last = text.chars().last()?.to_ascii_uppercase();
    let (number, shift) = match UNITS.iter().position(|unit| *unit == last) {
        Some(index) => (&text[..text.len() - 1], 10 * (index + 1)),
        None => (text, 0),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (number, None),
    };
    let whole = u128::from(parse_digits(whole)?) << shift;
    let part = match fraction {
        None => 0,
        Some(digits) => {
            let scaled = u128::from(parse_digits(digits)?) << shift;
            let scale = 10u128.checked_pow(u32::try_from(digits.len()).ok()?)?;
            // A fraction of a byte is a mistake, not something to round.
            scaled.is_multiple_of(scale).then(|| scaled / scale)?
        }
    };
    u64::try_from(whole + part).ok()
}

/// Digits only: the standard parser would let a sign through.
fn parse_digits(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.exact())
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A length of time in whole seconds. Typed as `90s`, `10m`, `1h` or `2d`; shown in at most two units: `1h 5m`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Seconds(pub u64);

/// A text that is not a length of time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a length of time; write a number with s, m, h or d, such as 90s or 10m")]
pub struct NotSeconds(pub String);

impl FromStr for Seconds {
    type Err = NotSeconds;

    fn from_str(text: &str) -> Result<Self, NotSeconds> {
        let unit_seconds = match text.chars().last() {
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3600,
            Some('d') => 86400,
            _ => return Err(NotSeconds(text.to_owned())),
        };
        parse_digits(&text[..text.len() - 1])
            .and_then(|number| number.checked_mul(unit_seconds))
            .map(Self)
            .ok_or_else(|| NotSeconds(text.to_owned()))
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, minutes, hours, days) =
            (self.0 % 60, self.0 / 60 % 60, self.0 / 3600 % 24, self.0 / 86400);
        let (large, small) = match self.0 {
            0..60 => ((seconds, "s"), (0, "")),
            // From ten minutes on, seconds are noise.
            60..600 => ((minutes, "m"), (seconds, "s")),
            600..3600 => ((minutes, "m"), (0, "")),
            3600..86400 => ((hours, "h"), (minutes, "m")),
            _ => ((days, "d"), (hours, "h")),
        };
        let text = match small {
            (0, _) => format!("{}{}", large.0, large.1),
            (number, unit) => format!("{}{} {number}{unit}", large.0, large.1),
        };
        f.pad(&text)
    }
}

/// How many per cent of `total` are done, rounded down, so that 100 means all of it; nothing to do is 100.
#[must_use]
pub fn per_cent(done: u64, total: u64) -> u64 {
    if done >= total {
        return 100;
    }
    u64::try_from(u128::from(done) * 100 / u128::from(total)).expect("a share of less than all is below 100")
}

/// The time of day, `14:03:11 UTC`, of a moment in seconds since 1970.
#[must_use]
pub fn clock(unix_seconds: u64) -> String {
    let second = unix_seconds % 86_400;
    format!("{:02}:{:02}:{:02} UTC", second / 3600, second / 60 % 60, second % 60)
}

/// The time of day, in seconds since 1970; 0 on a host whose clock says that it is earlier.
#[must_use]
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_size_is_read_in_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4K", 4096),
            ("256M", 256 << 20),
            ("100G", 100 << 30),
            ("100g", 100 << 30),
            ("1.5G", 3 << 29),
            ("0.25K", 256),
            ("16384T", 1 << 54),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "G",
            "-1",
            "+1",
            "1.5",
            "1.1K",
            ".5G",
            "1.G",
            "1 G",
            "1GB",
            "1GiB",
            "1e3",
            "99999999999T",
            "é",
            "18446744073709551616",
        ] {
            assert_eq!(text.parse::<Size>(), Err(NotASize(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_size_is_shown_whole_or_with_one_decimal() {
        for (bytes, shown, exact) in [
            (0, "0", "0"),
            (1023, "1023", "1023"),
            (4096, "4K", "4K"),
            (4097, "4.0K", "4097"),
            (100 << 30, "100G", "100G"),
            (3 << 29, "1.5G", "1536M"),
            ((12 << 20) + 1, "12.0M", "12582913"),
            ((1 << 20) - 1, "1.0M", "1048575"),
            (1 << 54, "16384T", "16384T"),
            (u64::MAX, "16777216.0T", "18446744073709551615"),
        ] {
            assert_eq!((Size(bytes).to_string().as_str(), Size(bytes).exact().as_str()), (shown, exact));
        }
    }

    proptest! {
        #[test]
        fn an_exact_size_reads_back(bytes in any::<u64>(), shift in 0u32..60) {
            let size = Size(bytes >> shift << (shift / 2));
            prop_assert_eq!(size.exact().parse(), Ok(size));
        }

        #[test]
        fn a_share_is_below_all_until_all_is_done(done in any::<u64>(), total in any::<u64>()) {
            prop_assert_eq!(per_cent(done, total) == 100, done >= total);
        }
    }

    #[test]
    fn a_length_of_time_is_read_and_shown() {
        for (text, seconds) in [("90s", 90), ("10m", 600), ("1h", 3600), ("2d", 172_800), ("0s", 0)] {
            assert_eq!(text.parse(), Ok(Seconds(seconds)), "{text}");
        }
        for text in ["", "s", "10", "-1s", "1.5h", "1h30m", "é", "18446744073709551615h"] {
            assert_eq!(text.parse::<Seconds>(), Err(NotSeconds(text.to_owned())), "{text}");
        }
        for (seconds, shown) in [
            (0, "0s"),
            (59, "59s"),
            (90, "1m 30s"),
            (180, "3m"),
            (601, "10m"),
            (3900, "1h 5m"),
            (7200, "2h"),
            (180_000, "2d 2h"),
        ] {
            assert_eq!(Seconds(seconds).to_string(), shown);
        }
    }
}
