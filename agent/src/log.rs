//! The agent's log: one line for each event, whatever was put into it.
//!
//! Peers, programs and files have a say in what is logged: reasons, names, paths. Their text passes through
//! [`words::printable`] here, once for all, so that nobody writes lines of the agent's or steers the terminal that the
//! log is read on (X1).

use crate::words;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{FormatFields, Writer, debug_fn};

/// No field of an event is longer, in characters.
const FIELD_LIMIT: usize = 4096;

/// Sends events to standard error, as `BLOCKMIRROR_LOG` says.
pub fn start() {
    let filter = EnvFilter::try_from_env("BLOCKMIRROR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .fmt_fields(Printable)
        .with_writer(std::io::stderr)
        .init();
}

/// Writes an event's message and fields: `message name=value name=value`.
struct Printable;

impl<'writer> FormatFields<'writer> for Printable {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> std::fmt::Result {
        let format = debug_fn(|writer, field, value| {
            let text = format!("{value:?}");
            let text = words::printable(&text, FIELD_LIMIT);
            if field.name() == "message" {
                write!(writer, "{text}")
            } else {
                write!(writer, "{field}={text}")
            }
        });
        format.delimited(" ").format_fields(writer, fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The text of a closed connection stood in the log as its peer had sent it, line ends included, before anybody had
    /// proved to have a key.
    #[test]
    fn a_peer_that_sends_line_ends_and_escapes_writes_no_line_of_ours() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .fmt_fields(Printable)
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .finish();
        let forged = "closed\n2026-01-01T00:00:00Z  INFO the agent stops\x1b[2J\u{202e}";
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(peer = forged, volume = %"data", "it says: {forged}");
        });
        let logged = String::from_utf8(lines.0.lock().expect("no panic").clone()).expect("text");
        assert_eq!(logged.lines().count(), 1, "{logged}");
        assert!(
            !logged.trim_end().contains(|letter: char| letter.is_control() || letter == '\u{202e}'),
            "{logged}"
        );
        assert!(logged.contains("it says: closed 2026") && logged.contains("volume=data"), "{logged}");
    }
}
