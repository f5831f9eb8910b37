//! Errors in words, and words of others made fit to be shown.

use crate::config::Name;
use blockmirror_protocol::units::HostId;
use std::borrow::Cow;
use std::error::Error;

/// The error and all its causes in one clause, the outermost first.
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// As [`with_causes`], with the name that the operator knows in place of a host's fingerprint.
#[must_use]
pub fn with_name(error: &dyn Error, host: HostId, name: &Name) -> String {
    with_causes(error).replace(&format!("host {host}"), name.as_str())
}

/// A text that peers, programs or files had a say in, as it may go to a log or a terminal: on one line, with nothing in it
/// that steers either, and of `limit` characters at most.
#[must_use]
pub fn printable(text: &str, limit: usize) -> Cow<'_, str> {
    let is_short = text.len() <= limit || text.chars().count() <= limit;
    if is_short && text.chars().all(|letter| shown(letter) == letter) {
        return Cow::Borrowed(text);
    }
    let kept = if is_short { limit } else { limit.saturating_sub(1) };
    let more = (!is_short).then_some('…');
    text.chars().take(kept).map(shown).chain(more).collect()
}

/// A text of JSON, with what [`printable`] doesn't show escaped; serde escapes no more than the first 32 characters.
#[must_use]
pub fn printable_json(text: &str) -> Cow<'_, str> {
    let steers = |letter: char| letter != '\n' && shown(letter) != letter;
    if !text.chars().any(steers) {
        return Cow::Borrowed(text);
    }
    let escaped = |letter: char| match steers(letter) {
        // All of them are below U+10000, and stand within strings.
        true => format!("\\u{:04x}", u32::from(letter)),
        false => letter.to_string(),
    };
    text.chars().map(escaped).collect()
}

/// What stands for a character: control characters, and those that end a line or turn its direction, are not shown.
fn shown(letter: char) -> char {
    match letter {
        '\n' | '\r' | '\t' => ' ',
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        letter if letter.is_control() => '\u{fffd}',
        letter => letter,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_of_others_steers_no_terminal_and_says_the_same() {
        let text = "größer\n\u{1b}]0;title\u{7}\u{9b}2J \u{202e}\u{61c}\u{7f}";
        let json = serde_json::to_string(text).unwrap();
        let shown = printable_json(&json);
        assert!(shown.chars().all(|letter| super::shown(letter) == letter), "{shown}");
        assert_eq!(serde_json::from_str::<String>(&shown).unwrap(), text);
        assert_eq!(printable_json("{\n  \"a\": 1\n}"), "{\n  \"a\": 1\n}");
    }

    #[test]
    fn a_text_of_others_is_shown_on_one_line_and_steers_nothing() {
        for (text, shown) in [
            ("plain, größer", "plain, größer"),
            ("two\nlines\ttabbed\r", "two lines tabbed "),
            ("\u{1b}]0;title\u{7}\u{9b}2J", "\u{fffd}]0;title\u{fffd}\u{fffd}2J"),
            ("\u{202e}drowssap", "\u{fffd}drowssap"),
        ] {
            assert_eq!(printable(text, 100), shown);
        }
        assert_eq!(printable("größer", 6), "größer");
        assert_eq!(printable("größer", 5), "größ…");
    }
}
