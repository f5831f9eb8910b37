//! Tokens, as the operator hands them over: from standard input or a file. Whoever has one can join, and an argument of a
//! command is there for every user of the host to read.

use blockmirror_agent::control::api::{Failure, FailureKind};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

/// What stands for standard input.
const STANDARD_INPUT: &str = "-";
/// No token is longer than this, in bytes.
const LIMIT_BYTES: u64 = 64 << 10;

/// The token that is given, or the first line of where it is.
///
/// # Errors
/// [`Failure`] when it can't be read, or there is none.
pub fn read(given: Option<&str>, file: Option<&Path>) -> Result<String, Failure> {
    let failure = |place: &str, error: &io::Error| {
        Failure::new(FailureKind::Failed, format!("cannot read the token from {place}: {error}"))
    };
    let (place, line) = match (given, file) {
        (Some(given), _) if given != STANDARD_INPUT => return Ok(given.trim().to_owned()),
        (None, Some(path)) if path != Path::new(STANDARD_INPUT) => {
            let place = path.display().to_string();
            let line = File::open(path).and_then(first_line).map_err(|error| failure(&place, &error))?;
            (place, line)
        }
        _ => {
            let place = "standard input".to_owned();
            let line = first_line(io::stdin()).map_err(|error| failure(&place, &error))?;
            (place, line)
        }
    };
    match line.trim() {
        "" => Err(Failure::new(FailureKind::Usage, format!("there is no token in {place}"))),
        token => Ok(token.to_owned()),
    }
}

fn first_line(source: impl Read) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(source.take(LIMIT_BYTES)).read_line(&mut line)?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_the_first_line_of_where_it_is() {
        assert_eq!(first_line(&b" bm1-x \nmore\n"[..]).unwrap(), " bm1-x \n");
        assert_eq!(first_line(&b"bm1-x"[..]).unwrap(), "bm1-x");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "\n").unwrap();
        assert!(read(None, Some(&path)).unwrap_err().message.contains("there is no token in"));
        std::fs::write(&path, "bm1-y\n").unwrap();
        assert_eq!(read(None, Some(&path)).unwrap(), "bm1-y");
        assert_eq!(read(Some(" bm1-z\n"), None).unwrap(), "bm1-z");
        assert_eq!(read(None, Some(&folder.path().join("none"))).unwrap_err().kind, FailureKind::Failed);
    }
}
