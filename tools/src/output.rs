//! What the operator sees: lines and JSON on standard output, failures on standard error, progress on a terminal.

use blockmirror_agent::control::api::{Failure, FailureKind, Progress};
use blockmirror_agent::quantity::{Seconds, Size};
use blockmirror_agent::words::{printable, printable_json};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

/// Why a command ended early.
pub enum Error {
    /// What was asked for did not work.
    Failure(Failure),
    /// The operator interrupted it; what there is to say of that.
    Interrupted(Failure),
    /// Standard output or the runtime failed.
    Io(io::Error),
}

/// The exit code of a command that was interrupted: what a shell gives for a program that the signal ends.
const INTERRUPTED: u8 = 130;

impl Error {
    /// Tells the operator, or a program that asked for JSON, on standard error and gives the exit code. A reader that went
    /// away has what it wanted.
    pub fn report(self, json: bool) -> ExitCode {
        let (failure, signalled) = match self {
            Self::Io(error) if error.kind() == io::ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
            Self::Io(error) => (Failure::from_error(FailureKind::Failed, &error), None),
            Self::Failure(failure) => (failure, None),
            Self::Interrupted(failure) => (failure, Some(INTERRUPTED)),
        };
        match serde_json::to_string(&failure) {
            // Where nobody reads that, there is nobody to tell.
            Ok(text) if json => drop(writeln!(io::stderr(), "{}", printable_json(&text))),
            _ => warn(&failure.message),
        }
        ExitCode::from(signalled.unwrap_or(failure.kind.exit_code()))
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// No line that is shown is longer, in characters.
const LINE_LIMIT: usize = 1 << 16;

/// One line on standard error. Where nobody reads that either, there is nobody to tell.
pub fn warn(message: &str) {
    let message = printable(message, LINE_LIMIT);
    let _ = writeln!(io::stderr(), "blockmirror: {message}");
}

/// Standard output. Each call is flushed, so that a reader sees whole lines at once.
pub struct Output {
    stream: io::Stdout,
}

impl Default for Output {
    fn default() -> Self {
        Self { stream: io::stdout() }
    }
}

impl Output {
    /// Whether a person looks at it.
    pub fn is_terminal(&self) -> bool {
        self.stream.is_terminal()
    }

    /// Writes bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// Writes one line. What others had a say in, as peers and programs, steers no terminal.
    pub fn line(&mut self, line: &str) -> io::Result<()> {
        self.bytes(format!("{}\n", printable(line, LINE_LIMIT)).as_bytes())
    }

    /// Writes several lines at once.
    pub fn lines(&mut self, lines: &[String]) -> io::Result<()> {
        let line = |line: &String| format!("{}\n", printable(line, LINE_LIMIT));
        self.bytes(lines.iter().map(line).collect::<String>().as_bytes())
    }

    /// Writes an answer as indented JSON.
    pub fn json(&mut self, answer: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string_pretty(answer)?;
        self.bytes(format!("{}\n", printable_json(&text)).as_bytes())
    }

    /// Writes an answer as JSON on a line of its own.
    pub fn json_line(&mut self, answer: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string(answer)?;
        self.bytes(format!("{}\n", printable_json(&text)).as_bytes())
    }
}

/// Rows with their columns aligned, two spaces apart.
pub fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// A bar on standard error, where that is a terminal, for work that takes long.
pub struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// A bar that shows nothing yet but the name of the work.
    pub fn new(work: &str) -> Self {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {msg}").expect("the template is right");
        let bar = ProgressBar::new(1).with_style(style).with_prefix(work.to_owned());
        Self { bar }
    }

    /// Shows how far the work is.
    pub fn show(&self, progress: &Progress) {
        let Progress { done_bytes, total_bytes, rate, eta_seconds } = *progress;
        self.bar.set_length(total_bytes.max(1));
        self.bar.set_position(done_bytes.min(total_bytes));
        let left =
            eta_seconds.map_or_else(|| "not moving".to_owned(), |left| format!("{} left", Seconds(left)));
        self.bar.set_message(format!(
            "{} of {}, {}/s, {left}",
            Size(done_bytes),
            Size(total_bytes),
            Size(rate)
        ));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_with_their_text() {
        let rows = [vec!["a", "long", "x"], vec!["bcd", "é", ""], vec!["e"]];
        let rows = rows.map(|row| row.into_iter().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(aligned(&rows), ["a    long  x", "bcd  é", "e"]);
    }
}
