//! The front ends of one volume: started together, stopped together, each with its own fate in the status. What can't be
//! served is tried again until it can (X6). Which front ends there are is said in [`crate::device::front_end`].

use super::changes::{Event, failed, refused};
use super::{Answer, OpenRole, Surroundings};
use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::config::{DeviceKind, VolumeConfig};
use crate::control::api::{DeviceStatus, Failure};
use crate::device::Volume;
use crate::device::front_end::{self, FrontEnd, NotReleased, Site, registered};
use crate::device::openers::{BETWEEN_LOOKS, Claim, Users, soon, wait_for};
use crate::words::with_causes;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Why devices are not taken away now.
pub(super) enum NotNow {
    /// These have one open, perhaps just for a moment.
    InUse(Vec<String>),
    /// They can't be.
    Refused(Failure),
}

/// One front end, whether it serves the volume or not.
struct Device {
    kind: DeviceKind,
    front_end: Box<dyn FrontEnd>,
    /// When it is to be started again that could not serve the volume.
    pause: Option<Duration>,
    /// How often it was started.
    attempts: u32,
}

impl Device {
    async fn start(&mut self, config: &VolumeConfig, volume: Rc<dyn Volume>, pool: &BufferPool) {
        self.attempts += 1;
        self.pause = self.front_end.start(config, volume, pool.clone()).await;
    }
}

/// The front ends of a volume that was opened; none before.
#[derive(Default)]
pub(super) struct Devices(Vec<Device>);

impl Devices {
    /// One front end of each kind, which serve nothing yet.
    fn new(site: &Site) -> Self {
        let device =
            |kind| Device { kind, front_end: (registered(kind).new)(site.clone()), pause: None, attempts: 0 };
        Self(DeviceKind::ALL.map(device).into())
    }

    /// Serves a primary's devices.
    pub(super) async fn start(
        config: &VolumeConfig,
        surroundings: &Surroundings,
        volume: Rc<dyn Volume>,
        pool: &BufferPool,
    ) -> Self {
        let is_configured = |kind: &DeviceKind| config.devices.contains(kind);
        give_up(config, surroundings, "it has none any more", |kind| !is_configured(&kind)).await;
        Self::start_those(config, surroundings, volume, pool, is_configured).await
    }

    /// Serves a replica's read-only export, by whatever shows one.
    pub(super) async fn start_export(
        config: &VolumeConfig,
        surroundings: &Surroundings,
        export: Rc<dyn Volume>,
        pool: &BufferPool,
    ) -> Self {
        // Before anything is written under a device that is open (L5).
        give_up_devices(config, surroundings, "this host is a replica now").await;
        let shows_replicas = |kind: &DeviceKind| registered(*kind).shows_replicas;
        Self::start_those(config, surroundings, export, pool, shows_replicas).await
    }

    async fn start_those(
        config: &VolumeConfig,
        surroundings: &Surroundings,
        volume: Rc<dyn Volume>,
        pool: &BufferPool,
        serves: impl Fn(&DeviceKind) -> bool,
    ) -> Self {
        let mut devices = Self::new(&surroundings.site(config));
        for device in devices.0.iter_mut().filter(|device| serves(&device.kind)) {
            device.start(config, volume.clone(), pool).await;
        }
        devices
    }

    pub(super) fn statuses(&self) -> Vec<DeviceStatus> {
        self.0.iter().flat_map(|device| device.front_end.statuses()).collect()
    }

    /// Who still has a device of an earlier run, in words.
    pub(super) async fn stale(&self) -> Vec<String> {
        let mut stale = Vec::new();
        for device in &self.0 {
            stale.extend(device.front_end.stale().await);
        }
        stale
    }

    /// Who has a device open; devices that nobody uses can be stopped.
    pub(super) async fn users(&self) -> Users {
        self.look().await.0
    }

    /// The same; where nobody has, none can be opened any more until all are stopped.
    pub(super) async fn hold(&mut self) -> Users {
        let (users, claims) = self.look().await;
        if users.is_nobody() {
            for (device, claim) in self.0.iter_mut().zip(claims) {
                claim.into_iter().for_each(|claim| device.front_end.hold(claim));
            }
        }
        users
    }

    /// Who has a device open; and where nobody has, a claim on each that can be claimed.
    async fn look(&self) -> (Users, Vec<Option<Claim>>) {
        let (mut users, mut claims) = (Users::default(), Vec::new());
        for device in &self.0 {
            let found = soon(device.front_end.users(users.is_nobody())).await;
            users.staying.extend(found.staying);
            users.passing.extend(found.passing);
            claims.push(found.claim);
        }
        (users, claims)
    }

    /// For the agent's end: leaves what is in use to the next agent, where that can be. The rest is to be stopped.
    pub(super) async fn leave(&mut self) {
        for device in &mut self.0 {
            device.front_end.leave().await;
        }
    }

    /// Takes the device away that the kernel keeps. Gives who had it open and gets errors now; where it is not forced, nobody
    /// may have, and whoever just looks at it is waited for: since then, if this was tried before.
    async fn release(
        &mut self,
        config: &VolumeConfig,
        surroundings: &Surroundings,
        force: bool,
        since: Option<Instant>,
    ) -> Result<Vec<String>, NotNow> {
        // Also where the volume is not open: an earlier agent may have left one.
        let mut unopened;
        let devices = match self.0.is_empty() {
            true => {
                unopened = Self::new(&surroundings.site(config));
                &mut unopened
            }
            false => self,
        };
        for device in &mut devices.0 {
            return match device.front_end.release(force, since).await {
                Err(NotReleased::Nothing) => continue,
                Ok(users) => Ok(users),
                Err(NotReleased::Passing(users)) => Err(NotNow::InUse(users)),
                Err(NotReleased::InUse(users)) => Err(NotNow::Refused(refused(format!(
                    "the device is in use: {}; close it first, or with --force its users get i/o errors",
                    users.join(", ")
                )))),
                Err(NotReleased::Failed(error)) => Err(NotNow::Refused(failed(with_causes(&*error)))),
            };
        }
        Err(NotNow::Refused(refused(format!("{} has no loop device on this host now", config.name))))
    }

    /// Stops all of them, those first that were started last.
    pub(super) async fn stop(self) {
        for device in self.0.into_iter().rev() {
            device.front_end.stop().await;
        }
    }
}

impl super::Volume {
    /// Sees to it that front ends that could not serve the volume are started again.
    pub(super) fn await_devices(&self) {
        for device in &self.devices.0 {
            self.await_device(device);
        }
    }

    fn await_device(&self, device: &Device) {
        if let Some(pause) = device.pause {
            self.later(pause, Event::StartDevice(device.kind, device.attempts));
        }
    }

    /// Takes away the device that the kernel keeps. The answer is who had it open. `since` is since when it waits for those
    /// who have it open, where it has waited already.
    pub(super) async fn release(&mut self, force: bool, answer: Answer<Vec<String>>, since: Option<Instant>) {
        let config = self.config.borrow().clone();
        let released = match &self.role {
            OpenRole::Changing(_) => Err(NotNow::Refused(self.not_open())),
            _ => self.devices.release(&config, &self.surroundings, force, since).await,
        };
        let answered = match released {
            Ok(users) => Ok(users),
            Err(NotNow::Refused(failure)) => Err(failure),
            Err(NotNow::InUse(users)) => {
                let since = wait_for(config.name.as_str(), &users, since);
                return self.later(BETWEEN_LOOKS, Event::Release(force, answer, Some(since)));
            }
        };
        drop(answer.send(answered));
    }

    /// It is time for another attempt, if there was none since this one.
    pub(super) async fn start_device_again(&mut self, kind: DeviceKind, attempt: u32) {
        let OpenRole::Primary(primary, _) = &self.role else { return };
        let is_due = |device: &&mut Device| {
            device.kind == kind && device.pause.is_some() && device.attempts == attempt
        };
        let Some(device) = self.devices.0.iter_mut().find(is_due) else { return };
        if primary.superseded().is_some() {
            return;
        }
        let (config, primary) = (self.config.borrow().clone(), primary.clone());
        device.start(&config, primary, &self.pool).await;
        let devices = &self.devices.0;
        devices.iter().filter(|device| device.kind == kind).for_each(|device| self.await_device(device));
    }
}

impl Surroundings {
    fn site(&self, config: &VolumeConfig) -> Site {
        Site {
            name: config.name.to_string(),
            volume: config.id.0,
            run_folder: self.run_folder.clone(),
            device_folder: self.device_folder.clone(),
            store: self.store.clone(),
        }
    }
}

/// Takes away the devices that an earlier agent left, where the volume is to have none.
pub(super) async fn give_up_devices(config: &VolumeConfig, surroundings: &Surroundings, why: &'static str) {
    give_up(config, surroundings, why, |_| true).await;
}

async fn give_up(
    config: &VolumeConfig,
    surroundings: &Surroundings,
    why: &'static str,
    concerns: impl Fn(DeviceKind) -> bool,
) {
    let site = surroundings.site(config);
    let kinds: Vec<DeviceKind> = DeviceKind::ALL.into_iter().filter(|kind| concerns(*kind)).collect();
    // Most volumes have left nothing, and wait for no thread to hear that.
    if site.store.holds(&site.name) && !kinds.is_empty() {
        blocking(move || front_end::give_up(&kinds, &site, why)).await;
    }
}
