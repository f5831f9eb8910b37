//! A volume as a loop device, for hosts without the nbd module: `/dev/blockmirror/NAME -> /dev/loopN`.
//!
//! The volume is served as the one file of a FUSE mount ([`fuse`]), and a loop device is attached to that file with
//! direct I/O, so that the page cache above the loop device is the only one. Four things make up a device, made in this
//! order and undone in the reverse one: the mount and the file that it is mounted on, the serving task, the loop
//! device, the link.
//!
//! **Who waits for whom.** The kernel asks our server in the middle of many system calls: opening and closing the
//! file, attaching (size, rights, geometry, the partition table), detaching (dirty pages are written), unmounting. Each
//! is made on a thread for blocking calls while the volume's thread serves, and none on the volume's thread. The one
//! thing that the volume's thread does itself is to answer.
//!
//! **The agent's end is a pause** (S1). The kernel waits for answers as long as the session's descriptor is open
//! somewhere. So the descriptor is kept where it outlives the process ([`crate::kept`]), together with the table of requests
//! that are not answered ([`in_flight`]). The mount, the loop device and the link outlive it by themselves. The next start
//! takes all of it over: it answers what is in the table, and goes on. It is handed over to be kept before the link is
//! made, so nobody knows the device by its name while a crash would end it.
//!
//! **Where nothing was kept**, or the session has ended, the kernel fails all requests, and the loop device stays attached
//! to a dead file. The next start takes all of that away ([`clean_up_stale`]) before it begins. A loop device that still has a
//! file system mounted can't be taken away; it detaches itself when that is unmounted, and a new one is used.

pub mod fuse;
pub mod in_flight;
mod instants;
pub mod kernel;
mod layout;
mod life;
pub mod loop_device;
mod mounts;
mod presence;

#[cfg(test)]
mod tests;

pub use life::{LeftBehind, StartError, StopError, clean_up_stale, give_up, users_of_kept};
pub use presence::Presence;

use super::front_end::Site;
use super::openers::Claim;
use super::{Geometry, Volume};
use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::kept::{Descriptors, Store};
use in_flight::{Identity, Table, TakeOverError};
use life::Place;
use loop_device::LoopDevice;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::timeout;

/// How long it may take to detach a device, once in order and once by force.
const DETACH_TIME: Duration = Duration::from_secs(15);

/// How long requests that are under way may take when the agent ends.
const SETTLE_TIME: Duration = Duration::from_secs(2);

fn identity(site: &Site, geometry: Geometry) -> Identity {
    let Geometry { size_bytes, read_only, .. } = geometry;
    Identity { volume: site.volume, size_bytes, read_only }
}

/// A volume that is served as a loop device. [`stop`](Self::stop) it, or [`leave`](Self::leave) it to the next agent: dropped
/// without, it is as after a crash.
pub struct Loopback {
    place: Place,
    store: Arc<Store>,
    /// Gone once it has ended: nothing keeps the session open then, and whoever waits for an answer gets an error.
    server: Weak<fuse::Server>,
    device: LoopDevice,
    /// Loop devices of earlier runs that somebody had open still.
    stale: Vec<LoopDevice>,
    serving: Serving,
}

/// The serving task, ended when this is dropped.
struct Serving {
    task: JoinHandle<()>,
    /// Closed when the task has ended.
    ended: watch::Receiver<()>,
}

impl Serving {
    fn start(server: Rc<fuse::Server>, name: String, store: Arc<Store>) -> Self {
        let (alive, ended) = watch::channel(());
        let task = spawn_local(async move {
            serve(server, &name).await;
            // Whoever waits for an answer is told that there is none.
            blocking(move || store.remove(&name)).await;
            drop(alive);
        });
        Self { task, ended }
    }

    async fn ended(&self) {
        // Nothing is ever sent: what this waits for is that the task drops its side.
        while self.ended.clone().changed().await.is_ok() {}
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(server: Rc<fuse::Server>, name: &str) {
    if let Err(error) = server.serve().await {
        let error: &dyn std::error::Error = &error;
        tracing::error!(volume = name, error, "the loop device is no longer served");
    }
}

impl Loopback {
    /// Serves a volume from now on: as the device that an earlier agent left, or else as a new one, after cleaning up what a
    /// crash may have left.
    ///
    /// Runs on the volume's thread, in a `LocalSet` that goes on running, on a runtime with I/O enabled. When the
    /// future is dropped before it has ended, what it made so far is left as after a crash.
    ///
    /// # Errors
    /// [`StartError`]. Nothing is left then, but for [`StartError::TakeOver`]: the device that is there stays as it is.
    pub async fn start(site: &Site, volume: Rc<dyn Volume>, pool: BufferPool) -> Result<Self, StartError> {
        let there = site.clone();
        if let Some((place, device, kept)) = blocking(move || life::find_kept(&there)).await? {
            let gone_on = Self::go_on(site, place, device, kept, volume.clone(), pool.clone()).await;
            let Err(StartError::TakeOver(TakeOverError::Other(what))) = gone_on else { return gone_on };
            let there = site.clone();
            blocking(move || life::give_up(&there, what)).await;
        }
        Self::make(site, volume, pool).await
    }

    /// Serves a device that an earlier agent left.
    async fn go_on(
        site: &Site,
        place: Place,
        device: LoopDevice,
        kept: Descriptors,
        volume: Rc<dyn Volume>,
        pool: BufferPool,
    ) -> Result<Self, StartError> {
        let identity = identity(site, volume.geometry());
        let Descriptors { session, table } = kept;
        let (table, left) = blocking(move || Table::take_over(table, identity)).await?;
        let unanswered = left.iter().filter(|request| request.is_awaited).count();
        let server = fuse::Server::new(session.into(), table, left, volume, pool);
        let server = server.map_err(|source| StartError::io("watch", Path::new("/dev/fuse"), source))?;
        server.make_public();
        let store = site.store.clone();
        let serving = Serving::start(server.clone(), place.name.clone(), store.clone());
        let there = place.clone();
        let stale = blocking(move || life::link_again(&there, device)).await;
        tracing::info!(
            volume = place.name,
            device = %device.path().display(),
            unanswered,
            "the loop device goes on where the last agent left it"
        );
        Ok(Self { place, store, server: Rc::downgrade(&server), device, stale, serving })
    }

    /// Makes a device.
    async fn make(site: &Site, volume: Rc<dyn Volume>, pool: BufferPool) -> Result<Self, StartError> {
        let geometry = volume.geometry();
        let (read_only, identity) = (geometry.read_only, identity(site, geometry));
        let (site, store) = (site.clone(), site.store.clone());
        let (place, fuse, stale) = blocking(move || life::mount(&site, read_only)).await?;
        let made = match Table::new(identity) {
            Ok(table) => fuse::Server::new(fuse, table, Vec::new(), volume, pool)
                .map_err(|source| StartError::io("watch", Path::new("/dev/fuse"), source)),
            Err(source) => Err(StartError::io("get memory for requests of", &place.link, source)),
        };
        let attached = match made {
            Ok(server) => {
                let serving = Serving::start(server.clone(), place.name.clone(), store.clone());
                let (here, there) = (place.clone(), place.clone());
                match blocking(move || life::attach(&here, read_only)).await {
                    Ok(device) => {
                        server.make_public();
                        keep(&place, &store, &server).await;
                        let linked = blocking(move || life::link(&there, device)).await;
                        linked.map(|device| (device, server, serving))
                    }
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        match attached {
            Ok((device, server, serving)) => {
                tracing::info!(volume = place.name, device = %device.path().display(), "loop device is up");
                Ok(Self { place, store, server: Rc::downgrade(&server), device, stale, serving })
            }
            Err(error) => {
                blocking(move || {
                    life::take_away(&place);
                    store.remove(&place.name);
                })
                .await;
                Err(error)
            }
        }
    }

    /// The loop device, `/dev/loopN`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.device.path()
    }

    /// The link to it, `DEVICE_FOLDER/NAME`.
    #[must_use]
    pub fn link(&self) -> &Path {
        &self.place.link
    }

    /// Who still has the loop device of an earlier run open, in words: it gives errors only, and is in the way of the new
    /// one.
    pub async fn stale(&self) -> Vec<String> {
        if self.stale.is_empty() {
            return Vec::new();
        }
        let (place, stale) = (self.place.clone(), self.stale.clone());
        blocking(move || life::users_of_stale(&place, &stale)).await
    }

    /// Waits until requests are no longer answered, because somebody has aborted the FUSE connection by hand or the
    /// kernel's requests make no sense. Then nothing is left to do but to [`stop`](Self::stop) it.
    pub async fn ended(&self) {
        self.serving.ended().await;
    }

    /// The same, without waiting for it.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.serving.ended.has_changed().is_err()
    }

    /// Whether the device outlives this process.
    pub async fn can_be_left(&self) -> bool {
        let (store, name) = (self.store.clone(), self.place.name.clone());
        blocking(move || store.is_safe(&name)).await
    }

    /// The same, as far as that can be told at once.
    #[must_use]
    pub fn seems_kept(&self) -> bool {
        self.store.seems_safe(&self.place.name)
    }

    /// Takes no more requests, and leaves the device as it is to the next agent. What is under way is answered if it
    /// succeeds; all else waits.
    pub async fn leave(self) -> Left {
        let server = self.server.upgrade();
        if let Some(server) = &server {
            server.leave();
        }
        self.serving.task.abort();
        self.serving.ended().await;
        Left(server)
    }

    /// Takes the device away. Whoever means to leave its users alone [looks](crate::device::openers::look) for them before,
    /// and hands on the claim that it got: then nobody mounts the device meanwhile.
    ///
    /// The volume must answer its requests until this has ended: the kernel writes what it holds back.
    ///
    /// # Errors
    /// [`StopError`] when something is left. Nothing is served any more even then: users of the device get I/O errors.
    pub async fn stop(self, claim: Option<Claim>) -> Result<(), StopError> {
        let Self { place, store, device, serving, .. } = self;
        let (there, name) = (place.clone(), place.name.clone());
        let mut detaching = pin!(blocking(move || life::detach(&there, device, claim)));
        let result = match timeout(DETACH_TIME, &mut detaching).await {
            Ok(result) => result,
            Err(_) => {
                // What is asked of the volume is not answered. The end of the session gives it errors, and then the
                // device can be detached.
                let path = device.path();
                tracing::warn!(device = %path.display(), "requests are not answered; ending the session by force");
                blocking(move || life::take_away(&place)).await;
                timeout(DETACH_TIME, detaching).await.unwrap_or(Err(StopError::Hangs { path }))
            }
        };
        serving.task.abort();
        // Waited for, so that the descriptor is closed when this returns.
        serving.ended().await;
        blocking(move || store.remove(&name)).await;
        result
    }
}

/// A device that is left to the next agent, while the volume ends what it has of its requests.
pub struct Left(Option<Rc<fuse::Server>>);

impl Left {
    /// Waits for that, though not for long: what the volume does not end, the next agent does once more.
    pub async fn settle(self) {
        let Some(server) = self.0 else { return };
        if timeout(SETTLE_TIME, server.is_idle()).await.is_err() {
            tracing::warn!("requests that the volume did not end are left to the next agent");
        }
    }
}

/// Hands a device's descriptors over, to outlive this process.
async fn keep(place: &Place, store: &Arc<Store>, server: &fuse::Server) {
    let (name, store, descriptors) = (place.name.clone(), store.clone(), server.to_keep());
    let kept = blocking(move || descriptors.and_then(|descriptors| store.put(&name, descriptors))).await;
    if let Err(error) = kept {
        tracing::warn!(volume = place.name, "the loop device does not outlive the agent: {error}");
    }
}
