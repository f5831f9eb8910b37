//! What is wrong with a configuration file: where, and what was probably meant.

use super::Name;
use std::io;
use std::path::{Path, PathBuf};

/// Something wrong in the configuration. Each message begins with the file and, where there is one, the line.
#[derive(Debug, thiserror::Error)]
pub enum Mistake {
    /// The file or folder cannot be read or written.
    #[error("{path}: cannot {operation} it", path = path.display())]
    Io {
        /// `read`, `write` and so on.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A key that means nothing.
    #[error("{path}:{line}: unknown key \"{key}\"{hint}", path = path.display(), hint = hint(nearest.as_deref()))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key's line, from 1.
        line: usize,
        /// The key.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
    },
    /// Not TOML, a key that is missing, or a value of a wrong type or out of its limits.
    #[error("{path}:{line}: {what}", path = path.display(), what = one_clause(cause))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The line of the value, or of the table that lacks it; from 1.
        line: usize,
        /// What the parser met.
        cause: Box<toml::de::Error>,
    },
    /// A value that cannot be written as TOML.
    #[error("{path}: this volume cannot be written as text", path = path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the writer met.
        source: toml::ser::Error,
    },
    /// The file's statements don't agree with each other, or with its name.
    #[error("{path}: {what}", path = path.display())]
    Contradictory {
        /// The file.
        path: PathBuf,
        /// Which ones.
        what: Contradiction,
    },
}

impl Mistake {
    /// The file or folder that is wrong.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Io { path, .. }
            | Self::UnknownKey { path, .. }
            | Self::Invalid { path, .. }
            | Self::Unwritable { path, .. }
            | Self::Contradictory { path, .. } => path,
        }
    }
}

/// Statements that cannot all be true.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Contradiction {
    /// Two peers share a name.
    #[error("the peer \"{0}\" is listed twice; remove one")]
    PeerTwice(Name),
    /// Two peers share a key.
    #[error("the peers \"{0}\" and \"{1}\" have the same host key; remove one")]
    SameKey(Name, Name),
    /// More than one host is the primary.
    #[error("more than one host is the primary; make all but one a replica")]
    TwoPrimaries,
    /// Replies can't wait for so many replicas.
    #[error(
        "on_replica_loss is \"block\" and min_replicas is {wanted}, but the replicas of a mode that replies wait for are \
         {count}; make min_replicas at least 1 and no more than those, or give more replicas the mode sync or semi-sync"
    )]
    TooFewReplicas {
        /// How many should be in sync.
        wanted: usize,
        /// How many could be.
        count: usize,
    },
    /// Certificates for an export that isn't there.
    #[error("nbd_tls is for the export over TCP, which needs nbd_listen; set that too, or remove nbd_tls")]
    TlsForNothing,
    /// A volume's file has another name.
    #[error("the file of the volume \"{0}\" is called \"{0}.toml\"; rename the file or the volume")]
    FileName(Name),
    /// Two files share an id.
    #[error("it has the same id as the volume \"{0}\"; remove one of the files")]
    SameId(Name),
    /// Two files share a backing.
    #[error("it has the same backing as the volume \"{0}\"; give it one of its own")]
    SameBacking(Name),
}

impl Mistake {
    /// The mistake that the TOML parser found in `text`, the content of `path`.
    pub(super) fn parse(path: &Path, text: &str, cause: toml::de::Error) -> Self {
        let start = cause.span().map_or(0, |span| span.start.min(text.len()));
        let line = 1 + text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count();
        let path = path.to_owned();
        if let Some((key, known)) = unknown_key(cause.message()) {
            let nearest = nearest(key, known).map(str::to_owned);
            return Self::UnknownKey { path, line, key: key.to_owned(), nearest };
        }
        Self::Invalid { path, line, cause: Box::new(cause) }
    }
}

/// The unknown key and the known ones, from the message of [`serde::de::Error::unknown_field`]. That message is the
/// only place where the known keys of the table at hand are told; the tests pin its form.
fn unknown_key(message: &str) -> Option<(&str, impl Iterator<Item = &str>)> {
    let (key, known) = message.strip_prefix("unknown field `")?.split_once('`')?;
    Some((key, known.split('`').skip(1).step_by(2)))
}

/// The known key that a mistyped one was probably meant to be.
fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|known| (strsim::jaro_winkler(key, known), known))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, known)| known)
}

fn hint(nearest: Option<&str>) -> String {
    match nearest {
        Some(known) => format!("; did you mean \"{known}\"?"),
        None => "; remove it".to_owned(),
    }
}

/// The parser's message on one line, its quotes as everywhere else.
fn one_clause(cause: &toml::de::Error) -> String {
    cause.message().replace('`', "\"").split_whitespace().collect::<Vec<_>>().join(" ")
}
