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
//! **After a crash** the kernel fails all requests of the dead session, and the loop device stays attached to a dead
//! file. The next start takes all of that away ([`clean_up_stale`]) before it begins. A loop device that still has a
//! file system mounted can't be taken away; it detaches itself when that is unmounted, and a new one is used.

pub mod fuse;
pub mod kernel;
mod layout;
mod life;
pub mod loop_device;
mod mounts;

#[cfg(test)]
mod tests;

pub use life::{StartError, StopError, clean_up_stale};

use super::Volume;
use super::openers::Claim;
use crate::blocking::blocking;
use crate::buffer::BufferPool;
use life::Place;
use loop_device::LoopDevice;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::timeout;

/// How long it may take to detach a device, once in order and once by force.
const DETACH_TIME: Duration = Duration::from_secs(15);

/// Where a device is to appear.
#[derive(Clone, Debug)]
pub struct Options {
    /// The volume's name, usable as a file name.
    pub name: String,
    /// The folder for `NAME.fuse`, the file that the FUSE session is mounted on; made where it is missing.
    pub run_folder: PathBuf,
    /// The folder for the link `NAME`; made where it is missing.
    pub device_folder: PathBuf,
}

/// A volume that is served as a loop device. [`stop`](Self::stop) it: dropped without, it is as after a crash, and the
/// next start cleans up.
pub struct Loopback {
    place: Place,
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
    fn start(server: Rc<fuse::Server>, name: String) -> Self {
        let (alive, ended) = watch::channel(());
        let task = spawn_local(async move {
            serve(server, &name).await;
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
    /// Serves a volume from now on, after cleaning up what a crash may have left of it.
    ///
    /// Runs on the volume's thread, in a `LocalSet` that goes on running, on a runtime with I/O enabled. When the
    /// future is dropped before it has ended, what it made so far is left as after a crash.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left then.
    pub async fn start(
        options: &Options,
        volume: Rc<dyn Volume>,
        pool: BufferPool,
    ) -> Result<Self, StartError> {
        let read_only = volume.geometry().read_only;
        let options = options.clone();
        let (place, fuse, stale) = blocking(move || life::mount(&options, read_only)).await?;
        let attached = match fuse::Server::new(fuse, None, volume, pool) {
            Ok(server) => {
                let serving = Serving::start(server.clone(), place.name.clone());
                let (here, there) = (place.clone(), place.clone());
                match blocking(move || life::attach(&here, read_only)).await {
                    Ok(device) => {
                        server.make_public();
                        let linked = blocking(move || life::link(&there, device)).await;
                        linked.map(|device| (device, serving))
                    }
                    Err(error) => Err(error),
                }
            }
            Err(source) => Err(StartError::io("watch", Path::new("/dev/fuse"), source)),
        };
        match attached {
            Ok((device, serving)) => {
                tracing::info!(volume = place.name, device = %device.path().display(), "loop device is up");
                Ok(Self { place, device, stale, serving })
            }
            Err(error) => {
                blocking(move || life::take_away(&place)).await;
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

    /// Takes the device away. Whoever means to leave its users alone [looks](crate::device::openers::look) for them before,
    /// and hands on the claim that it got: then nobody mounts the device meanwhile.
    ///
    /// The volume must answer its requests until this has ended: the kernel writes what it holds back.
    ///
    /// # Errors
    /// [`StopError`] when something is left. Nothing is served any more even then: users of the device get I/O errors.
    pub async fn stop(self, claim: Option<Claim>) -> Result<(), StopError> {
        let Self { place, device, serving, .. } = self;
        let there = place.clone();
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
        result
    }
}
