//! Descriptors that outlive the process (S1): a device whose descriptor is still open somewhere waits for the next agent,
//! and the file system on it sees a pause.
//!
//! Under systemd, since its version 254, they lie in its descriptor store; elsewhere in a process of ours, the keeper
//! ([`keeper`]). The rest of the agent does not know which. A volume that has nothing kept goes down with the process.

pub mod keeper;
mod passing;
mod systemd;
#[cfg(test)]
mod tests;

use crate::words::with_causes;
use keeper::Keeper;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

/// What is kept of one loop device.
#[derive(Debug)]
pub struct Descriptors {
    /// The open `/dev/fuse`: as long as one copy of it is open, its session goes on.
    pub session: OwnedFd,
    /// The memory with the requests that are not answered.
    pub table: OwnedFd,
}

impl Descriptors {
    /// Copies of them.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { session: self.session.try_clone()?, table: self.table.try_clone()? })
    }

    /// Tells the two apart, in whatever order they came: one is a device, the other a file.
    fn sort(descriptors: Vec<OwnedFd>) -> Option<Self> {
        let [one, other] = <[OwnedFd; 2]>::try_from(descriptors).ok()?;
        let is_device = |descriptor: &OwnedFd| {
            let mode = rustix::fs::fstat(descriptor).map(|status| status.st_mode);
            mode.is_ok_and(|mode| rustix::fs::FileType::from_raw_mode(mode).is_char_device())
        };
        match (is_device(&one), is_device(&other)) {
            (true, false) => Some(Self { session: one, table: other }),
            (false, true) => Some(Self { session: other, table: one }),
            _ => None,
        }
    }

    fn both(&self) -> [std::os::fd::BorrowedFd<'_>; 2] {
        [self.session.as_fd(), self.table.as_fd()]
    }
}

/// How long after an attempt to start a keeper the next one follows.
const PAUSE: Duration = Duration::from_secs(1);

/// Where descriptors are kept, and which. Calls wait for another process, though not for long.
pub struct Store {
    state: Mutex<State>,
}

struct State {
    place: Place,
    held: HashMap<String, Descriptors>,
}

impl State {
    fn is_safe(&self, name: &str) -> bool {
        let is_missing = matches!(&self.place, Place::Keeper(keeper) if keeper.is_missing());
        self.held.contains_key(name) && !is_missing
    }
}

enum Place {
    /// Nothing outlives this process.
    Nowhere,
    Systemd,
    Keeper(Keeper),
}

impl Store {
    /// One that keeps nothing.
    #[must_use]
    pub fn nowhere() -> Arc<Self> {
        Self::new(Place::Nowhere, HashMap::new())
    }

    fn new(place: Place, held: HashMap<String, Descriptors>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State { place, held }) })
    }

    /// The store of an agent with this run folder, which it has claimed, with all that an earlier one left there.
    ///
    /// # Errors
    /// When there is a keeper that does not answer, or is of a version that is not understood: what it keeps would be lost.
    pub fn open(run: &Path) -> io::Result<Arc<Self>> {
        let is_there = systemd::is_there();
        let handed = if is_there { systemd::take() } else { HashMap::new() };
        if is_there && systemd::has_store() {
            let store = Self::new(Place::Systemd, handed);
            // What an agent left there that was not started by such a systemd.
            let (mut keeper, held) = Keeper::find(run, false)?;
            for (name, descriptors) in held {
                if !store.holds(&name) {
                    store.put(&name, descriptors)?;
                }
                keeper.remove(&name)?;
            }
            keeper.let_go();
            return Ok(store);
        }
        let (keeper, held) = Keeper::find(run, is_there)?;
        let store = Self::new(Place::Keeper(keeper), held);
        store.watch();
        // What a version left in a store that would not outlive a stop.
        for (name, descriptors) in handed {
            if !store.holds(&name)
                && let Err(error) = store.put(&name, descriptors)
            {
                if !store.holds(&name) {
                    return Err(error);
                }
                tracing::warn!(name, "the loop device does not outlive the agent yet: {error}");
                continue;
            }
            systemd::remove(&name)?;
        }
        Ok(store)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the lock panics")
    }

    /// The names of all that is kept.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.lock().held.keys().cloned().collect()
    }

    /// Whether something is kept under this name.
    #[must_use]
    pub fn holds(&self, name: &str) -> bool {
        self.lock().held.contains_key(name)
    }

    /// Whether what is kept under this name outlives this process as things are: a keeper that ended may not have been
    /// replaced. Waits for one that is just being started.
    #[must_use]
    pub fn is_safe(&self, name: &str) -> bool {
        self.lock().is_safe(name)
    }

    /// As [`Store::is_safe`], as far as that can be told without waiting.
    #[must_use]
    pub fn seems_safe(&self, name: &str) -> bool {
        self.state.try_lock().map_or(true, |state| state.is_safe(name))
    }

    /// Copies of what is kept under this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Descriptors> {
        self.lock().held.get(name)?.try_clone().ok()
    }

    /// Keeps these from now on, in place of what was kept under that name.
    ///
    /// # Errors
    /// When they can't be kept: they go down with the process. Where no keeper can be had, that is tried again.
    pub fn put(self: &Arc<Self>, name: &str, descriptors: Descriptors) -> io::Result<()> {
        let put = {
            let mut state = self.lock();
            let State { place, held } = &mut *state;
            let put = match place {
                Place::Nowhere => return Ok(()),
                Place::Systemd => systemd::put(name, &descriptors),
                Place::Keeper(keeper) => keeper.put(name, &descriptors, held),
            };
            let missing = match place {
                Place::Keeper(keeper) if keeper.is_missing() => Some(keeper.connection()),
                _ => None,
            };
            if put.is_ok() || missing.is_some() {
                held.insert(name.to_owned(), descriptors);
            }
            put.map_err(|error| (error, missing))
        };
        match put {
            Ok(()) => self.watch(),
            Err((error, None)) => return Err(error),
            Err((error, Some(connection))) => {
                self.replace_after(connection, || std::thread::sleep(PAUSE));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Keeps nothing under this name any more.
    pub fn remove(&self, name: &str) {
        let mut state = self.lock();
        if state.held.remove(name).is_none() {
            return;
        }
        let is_empty = state.held.is_empty();
        let removed = match &mut state.place {
            Place::Nowhere => Ok(()),
            Place::Systemd => systemd::remove(name),
            Place::Keeper(keeper) => {
                let removed = keeper.remove(name);
                if is_empty {
                    // It ends by itself.
                    keeper.let_go();
                }
                removed
            }
        };
        if let Err(error) = removed {
            tracing::warn!(
                name,
                "the device's descriptors can't be taken out of where they are kept: {error}"
            );
        }
    }

    /// Whether the host is being shut down, as far as that can be known: then nothing comes after this agent.
    #[must_use]
    pub fn is_the_last(&self) -> bool {
        let is_systemd = match &self.lock().place {
            Place::Nowhere => false,
            Place::Systemd => true,
            Place::Keeper(keeper) => keeper.leaves_unit(),
        };
        is_systemd && systemd::is_stopping()
    }

    /// Notices when the keeper ends before its time, as when the kernel ran out of memory: another one takes its place.
    fn watch(self: &Arc<Self>) {
        let end = match &mut self.lock().place {
            Place::Keeper(keeper) => keeper.connection_to_watch(),
            Place::Nowhere | Place::Systemd => None,
        };
        let Some((end, connection)) = end else { return };
        self.replace_after(connection, move || keeper::wait_for_end(&end));
    }

    /// Replaces the keeper of this connection when that has ended.
    fn replace_after(self: &Arc<Self>, connection: u64, wait: impl FnOnce() + Send + 'static) {
        let store = Arc::downgrade(self);
        let watch = move || {
            wait();
            if let Some(store) = Weak::upgrade(&store) {
                store.replace_keeper(connection);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("keeper-watch".to_owned()).spawn(watch) {
            tracing::warn!("nothing watches the keeper: {error}");
        }
    }

    /// The keeper at the other end of this connection is gone: another one takes its place, as soon as one can be had.
    fn replace_keeper(self: &Arc<Self>, connection: u64) {
        let mut failures = Failures::default();
        loop {
            match self.start_another(connection) {
                Replaced::Needless => return,
                Replaced::Done => break,
                // Its own connection counts from here on.
                Replaced::NotYet(error) => failures.tell(&error),
            }
            std::thread::sleep(PAUSE);
        }
        if failures.count > 0 {
            tracing::info!("there is a keeper again: loop devices outlive the agent");
        }
        self.watch();
    }

    fn start_another(&self, connection: u64) -> Replaced {
        let mut state = self.lock();
        let State { place: Place::Keeper(keeper), held } = &mut *state else { return Replaced::Needless };
        if keeper.is_replaced(connection) {
            return Replaced::Needless;
        }
        if held.is_empty() {
            keeper.let_go();
            return Replaced::Needless;
        }
        if !keeper.is_missing() {
            tracing::warn!("the keeper of the devices' descriptors has ended; another one takes its place");
        }
        match keeper.start_anew(held) {
            Ok(()) => Replaced::Done,
            Err(error) => Replaced::NotYet(with_causes(&error)),
        }
    }
}

/// What came of an attempt to replace a keeper.
enum Replaced {
    Needless,
    Done,
    NotYet(String),
}

/// Attempts that failed: the first one, and one that fails for something else, are news.
#[derive(Default)]
struct Failures {
    count: u32,
    last: String,
}

impl Failures {
    fn tell(&mut self, error: &str) {
        self.count += 1;
        if self.last != error {
            tracing::error!(
                "no keeper can be had: loop devices do not outlive the agent: {error}; it is tried again"
            );
            error.clone_into(&mut self.last);
        }
    }
}
