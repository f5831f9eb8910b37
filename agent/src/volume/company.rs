//! When a primary last heard from any other host, also before its agent's start: whoever finds an old primary serving alone
//! wants to know how old its content may be (L5).

use super::Volume;
use crate::config::PeerConfig;
use crate::control::api::Alone;
use crate::primary::Primary;
use crate::quantity::unix_seconds;
use blockmirror_protocol::peer::{Connection, Report};
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant, UNIX_EPOCH};
use tokio::task::spawn_local;

/// A file in the volume's state folder whose time of change says it.
const NOTE: &str = "heard";
/// How often it is noted.
const NOTE_TIME: Duration = Duration::from_secs(10);
const LOOK_TIME: Duration = Duration::from_secs(1);

impl Volume {
    /// Notes again and again that others are heard.
    pub(super) fn note_company(&self, primary: &Rc<Primary>) {
        let note = self.surroundings.state_folder.join(NOTE);
        let (company, me) = (self.company.clone(), Rc::downgrade(primary));
        spawn_local(async move {
            let path = note.clone();
            company.set(crate::blocking::spawn(move || last_noted(&path)).await.ok().flatten());
            let mut noted_at = None;
            while let Some(primary) = me.upgrade() {
                let connected = |report: &Report| report.connection == Connection::Connected;
                if primary.reports().1.values().any(connected) {
                    company.set(Some(unix_seconds()));
                    if noted_at.is_none_or(|at: Instant| at.elapsed() >= NOTE_TIME) {
                        noted_at = Some(Instant::now());
                        let path = note.clone();
                        // It is for the operator's eyes only.
                        drop(crate::blocking::spawn(move || fs::write(path, [])).await);
                    }
                }
                drop(primary);
                tokio::time::sleep(LOOK_TIME).await;
            }
        });
    }

    /// How alone a primary is; nothing where it has company, or never is to have any.
    pub(super) fn alone(&self, primary: &Primary, peers: &[PeerConfig]) -> Option<Alone> {
        let heard = primary.heard();
        let is_alone = heard.hosts == 1 || heard.is_awaited;
        (is_alone && !peers.is_empty() && primary.superseded().is_none()).then(|| Alone {
            heard_at_unix_seconds: self.company.get(),
            heard_seconds: self.company.get().map(|then| unix_seconds().saturating_sub(then)),
            hosts: heard.hosts,
            of: heard.of,
            majority: heard.majority,
            is_awaited: heard.is_awaited,
        })
    }
}

fn last_noted(note: &Path) -> Option<u64> {
    let modified = fs::metadata(note).ok()?.modified().ok()?;
    Some(modified.duration_since(UNIX_EPOCH).ok()?.as_secs())
}
