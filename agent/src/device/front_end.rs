//! What a volume asks of its front ends, and which ones there are.
//!
//! Another front end is a module beside the others, a variant of [`DeviceKind`], and its line in [`registered`]: whoever
//! opens volumes, tells of them or stops them names none.

use super::openers::{Claim, Users};
use super::{Volume, loopback, nbd};
use crate::buffer::BufferPool;
use crate::config::{DeviceKind, VolumeConfig};
use crate::control::api::DeviceStatus;
use crate::kept::Store;
use std::error::Error;
use std::future::ready;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Something that is waited for on the volume's thread.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Where the devices of a volume are to appear.
#[derive(Clone)]
pub struct Site {
    /// The volume's name, usable as a file name.
    pub name: String,
    /// The volume.
    pub volume: [u8; 16],
    /// The folder for sockets and mount points; made where it is missing.
    pub run_folder: PathBuf,
    /// The folder for links to devices of the kernel; made where it is missing.
    pub device_folder: PathBuf,
    /// Where what outlives the process is kept.
    pub store: Arc<Store>,
}

/// One way in which a volume is served to applications. Everything happens on the volume's thread.
pub trait FrontEnd {
    /// Serves a volume, by what its configuration says. Where it can't be served now, that is told by its status; either it is
    /// tried again from within, or this says after which time to call it again.
    fn start<'a>(
        &'a mut self,
        config: &'a VolumeConfig,
        volume: Rc<dyn Volume>,
        pool: BufferPool,
    ) -> Pending<'a, Option<Duration>>;

    /// How each thing fares that applications can open, also one that can't be served; nothing before the start.
    fn statuses(&self) -> Vec<DeviceStatus>;

    /// Who has it open. Where nobody has, and `may_claim`, nobody can open it until the claim is dropped that the answer
    /// carries, if it can be claimed.
    fn users(&self, may_claim: bool) -> Pending<'_, Users>;

    /// Keeps others from using it until it is stopped.
    fn hold(&mut self, claim: Claim) {
        drop(claim);
    }

    /// Ends it; when this returns nobody is served any more. What it left to the next agent stays.
    fn stop(self: Box<Self>) -> Pending<'static, ()>;

    /// For the agent's end: leaves what is in use to the next agent, if that can be, so that its users wait rather than get
    /// errors (S1).
    fn leave(&mut self) -> Pending<'_, ()> {
        Box::pin(ready(()))
    }

    /// Who still has a device of an earlier run open, which gives errors only, in words.
    fn stale(&self) -> Pending<'_, Vec<String>> {
        Box::pin(ready(Vec::new()))
    }

    /// Takes away a device that the kernel keeps, also one that an earlier agent left and nobody serves. Gives who had it open
    /// and gets errors now. Where it is not `forced`, nobody may have; `since` is since when those are waited for who just
    /// look at it.
    fn release(
        &mut self,
        forced: bool,
        since: Option<Instant>,
    ) -> Pending<'_, Result<Vec<String>, NotReleased>> {
        let _ = (forced, since);
        Box::pin(ready(Err(NotReleased::Nothing)))
    }
}

/// Why a device is not taken away.
#[derive(Debug)]
pub enum NotReleased {
    /// There is none.
    Nothing,
    /// These have it open, in words.
    InUse(Vec<String>),
    /// These do as well, and may be gone in a moment.
    Passing(Vec<String>),
    /// It could not be.
    Failed(Box<dyn Error>),
}

/// A front end that there is.
pub struct Registration {
    /// Makes one, which serves nothing yet.
    pub new: fn(Site) -> Box<dyn FrontEnd>,
    /// Whether it shows a replica's content, too, which nobody can write.
    pub shows_replicas: bool,
    /// Takes away what an earlier agent left of a volume that is to have none, and logs why. Blocks.
    pub give_up: fn(&Site, &str),
}

/// The front end that serves devices of a kind.
#[must_use]
pub fn registered(kind: DeviceKind) -> Registration {
    match kind {
        DeviceKind::Nbd => {
            Registration { new: nbd::Exports::boxed, shows_replicas: true, give_up: |_, _| () }
        }
        DeviceKind::Loop => {
            Registration { new: loopback::Presence::boxed, shows_replicas: false, give_up: loopback::give_up }
        }
    }
}

/// Takes away whatever an earlier agent left of a volume that has devices of these kinds no more. Blocks.
pub fn give_up(kinds: &[DeviceKind], site: &Site, why: &str) {
    for kind in kinds {
        (registered(*kind).give_up)(site, why);
    }
}
