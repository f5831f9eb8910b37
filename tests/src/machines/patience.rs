//! Waiting for conditions. The deadline bounds how long a failure takes to be seen; nothing is measured by it.

use std::fs;
use std::time::{Duration, Instant};

/// How long a condition is waited for before its test fails. A lost link is noticed after 8 s, and is dialled again
/// after 10 s at most; a busy machine needs some more.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// How long to wait between looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(30);

/// Looks until there is something, and gives it.
///
/// # Panics
/// When it takes too long; the message says what was waited for, and what the last look saw.
pub fn until<Seen>(what: &str, mut look: impl FnMut() -> Result<Seen, String>) -> Seen {
    let began = Instant::now();
    loop {
        match look() {
            Ok(seen) => return seen,
            Err(last) if began.elapsed() > DEADLINE => panic!("waited in vain until {what}; last: {last}"),
            Err(_) => std::thread::sleep(BETWEEN_LOOKS),
        }
    }
}

/// Waits until a process that was sent the signal to stop has done so. Until then each of its threads goes on with what it
/// is at.
///
/// # Panics
/// When it goes on for too long.
pub fn wait_until_stopped(process: u32) {
    until("the process has stopped", || {
        let threads = fs::read_dir(format!("/proc/{process}/task")).map_err(|error| error.to_string())?;
        for thread in threads {
            let path = thread.map_err(|error| error.to_string())?.path().join("stat");
            let stat = fs::read_to_string(&path).map_err(|error| error.to_string())?;
            // The name, in brackets, may have spaces.
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            if state != Some('T') {
                return Err(format!("{} is in the state {state:?}", path.display()));
            }
        }
        Ok(())
    });
}
