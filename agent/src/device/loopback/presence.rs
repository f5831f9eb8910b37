//! The loop device of one volume as a front end: served, left to the next agent, left by an earlier one, or released. Where
//! no loop device is free, it is tried again until one is (X6).

use super::{Left, Loopback, StartError, give_up, users_of_kept};
use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::config::{DeviceKind, VolumeConfig};
use crate::control::api::DeviceStatus;
use crate::device::Volume;
use crate::device::front_end::{FrontEnd, NotReleased, Pending, Site};
use crate::device::openers::{BETWEEN_LOOKS, Claim, Users, look_soon, wait_for, waited};
use crate::words::with_causes;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long after an attempt to serve a loop device the next one follows; and after one that had to wait for somebody who keeps
/// the device open and does not answer.
const PAUSE: Duration = Duration::from_secs(1);
const SILENT_PAUSE: Duration = Duration::from_secs(20);
/// How long systemd may take to say whether the host is being shut down.
const SYSTEM_TIME: Duration = Duration::from_secs(2);
/// How long users of a device may take to go when the host is being shut down, less than a volume may take to stop; and how
/// often it is looked for them.
const SHUTDOWN_TIME: Duration = Duration::from_secs(25);
const SHUTDOWN_LOOKS: Duration = Duration::from_millis(200);

/// A volume's front end for loop devices.
pub struct Presence {
    site: Site,
    loopback: Option<Loopback>,
    /// A device that is left to the next agent.
    left: Option<Left>,
    /// An earlier agent left a device that can't be taken over: its users wait.
    is_unserved: bool,
    /// Held until it is stopped.
    claim: Option<Claim>,
    status: Option<DeviceStatus>,
}

impl Presence {
    /// One that serves nothing yet.
    #[must_use]
    pub fn boxed(site: Site) -> Box<dyn FrontEnd> {
        Box::new(Self { site, loopback: None, left: None, is_unserved: false, claim: None, status: None })
    }

    async fn serve(&mut self, volume: Rc<dyn Volume>, pool: BufferPool) -> Option<Duration> {
        let name = &self.site.name;
        let known = self.status.take().and_then(|status| status.error);
        let mut pause = None;
        let (path, error) = match Loopback::start(&self.site, volume, pool).await {
            Ok(loopback) => {
                let path = loopback.link().to_owned();
                self.loopback = Some(loopback);
                if known.is_some() {
                    tracing::info!(volume = %name, "the loop device is served: {}", path.display());
                }
                (path, None)
            }
            Err(error) => {
                let text = with_causes(&error);
                pause = match &error {
                    StartError::Name(_) | StartError::NotPermitted | StartError::TakeOver(_) => None,
                    StartError::Silent(_) => Some(SILENT_PAUSE),
                    _ => Some(PAUSE),
                };
                self.is_unserved = matches!(error, StartError::TakeOver(_));
                if known.as_ref() != Some(&text) {
                    let again = if pause.is_some() { "; it is tried again" } else { "" };
                    tracing::error!(volume = %name, "the loop device is not served: {text}{again}");
                }
                (self.site.device_folder.join(name), Some(text))
            }
        };
        let kind = DeviceKind::Loop;
        self.status = Some(DeviceStatus { kind, uri: None, path: Some(path), error, warning: None });
        pause
    }

    /// Leaves a device that is in use to the next agent, who answers what is asked from now on. One that nobody uses stays,
    /// to be stopped; whoever just looks at it is waited for.
    async fn leave_in_use(&mut self) {
        match &self.loopback {
            Some(loopback) if loopback.can_be_left().await => {}
            _ => return,
        }
        let Some(loopback) = self.loopback.take() else { return };
        let (name, path, store) = (&self.site.name, loopback.path(), self.site.store.clone());
        // Where systemd doesn't say, it is not.
        let asked = tokio::time::timeout(SYSTEM_TIME, blocking(move || store.is_the_last()));
        let is_the_last = asked.await.unwrap_or(false);
        let began = Instant::now();
        let mut since = None;
        let users = loop {
            let mut users = look_soon(path.clone(), true).await;
            if users.is_nobody() {
                self.claim = users.claim.take();
                self.loopback = Some(loopback);
                return;
            }
            let words = users.words();
            match is_the_last {
                false if users.may_pass(waited(since)) => {
                    since = Some(wait_for(name, &words, since));
                    tokio::time::sleep(BETWEEN_LOOKS).await;
                }
                false => break words,
                true if began.elapsed() >= SHUTDOWN_TIME => {
                    tracing::error!(
                        volume = name,
                        "the host is being shut down, and {} is still {}: that gets I/O errors now",
                        path.display(),
                        words.join(", ")
                    );
                    self.loopback = Some(loopback);
                    return;
                }
                true => tokio::time::sleep(SHUTDOWN_LOOKS).await,
            }
        };
        tracing::warn!(
            volume = name,
            "{} stays, as it is {}: whoever uses it waits until the agent is started again; to take it away instead, \
             close it before the agent is stopped, or blockmirror release {name} --force",
            path.display(),
            users.join(", ")
        );
        self.left = Some(loopback.leave().await);
    }

    /// Takes away what an earlier agent left.
    async fn release_kept(&mut self, forced: bool) -> Result<Vec<String>, NotReleased> {
        if !self.site.store.holds(&self.site.name) {
            return Err(NotReleased::Nothing);
        }
        // It is not opened to be looked at: nobody would answer.
        let users = self.users_of_kept().await;
        if !users.is_empty() && !forced {
            return Err(NotReleased::InUse(users));
        }
        let site = self.site.clone();
        blocking(move || give_up(&site, "the operator wants that")).await;
        self.is_unserved = false;
        Ok(users)
    }

    /// Takes away what is served, or what an earlier agent left.
    async fn take_away(&mut self, forced: bool, since: Option<Instant>) -> Result<Vec<String>, NotReleased> {
        let Some(served) = &self.loopback else { return self.release_kept(forced).await };
        let looked = look_soon(served.path(), true).await;
        let users = looked.words();
        if !users.is_empty() && !forced {
            return Err(match looked.may_pass(waited(since)) {
                true => NotReleased::Passing(users),
                false => NotReleased::InUse(users),
            });
        }
        let Some(loopback) = self.loopback.take() else { return Ok(users) };
        match loopback.stop(looked.claim).await {
            Err(error) if users.is_empty() => return Err(NotReleased::Failed(error.into())),
            Err(error) => tracing::warn!(volume = %self.site.name, "{}", with_causes(&error)),
            Ok(()) => {}
        }
        Ok(users)
    }

    async fn users_of_kept(&self) -> Vec<String> {
        let site = self.site.clone();
        blocking(move || users_of_kept(&site)).await
    }
}

impl FrontEnd for Presence {
    fn start<'a>(
        &'a mut self,
        _: &'a VolumeConfig,
        volume: Rc<dyn Volume>,
        pool: BufferPool,
    ) -> Pending<'a, Option<Duration>> {
        Box::pin(self.serve(volume, pool))
    }

    fn statuses(&self) -> Vec<DeviceStatus> {
        let Some(mut status) = self.status.clone() else { return Vec::new() };
        if let Some(loopback) = &self.loopback {
            if loopback.has_ended() {
                status.error = Some("its connection was aborted; restart the agent".to_owned());
            }
            if !loopback.seems_kept() {
                status.warning = Some(
                    "it does not outlive the agent, as nothing keeps it: before the agent is stopped, unmount it"
                        .to_owned(),
                );
            }
        }
        vec![status]
    }

    fn users(&self, may_claim: bool) -> Pending<'_, Users> {
        Box::pin(async move {
            let mut users = match &self.loopback {
                Some(loopback) => look_soon(loopback.path(), may_claim).await,
                None => Users::default(),
            };
            if self.is_unserved {
                users.staying.extend(self.users_of_kept().await);
            }
            users
        })
    }

    fn hold(&mut self, claim: Claim) {
        self.claim = Some(claim);
    }

    fn stop(self: Box<Self>) -> Pending<'static, ()> {
        Box::pin(async move {
            if let Some(left) = self.left {
                left.settle().await;
            }
            if let Some(loopback) = self.loopback
                && let Err(error) = loopback.stop(self.claim).await
            {
                tracing::warn!("{}", with_causes(&error));
            }
        })
    }

    fn leave(&mut self) -> Pending<'_, ()> {
        Box::pin(self.leave_in_use())
    }

    fn stale(&self) -> Pending<'_, Vec<String>> {
        Box::pin(async move {
            match &self.loopback {
                Some(loopback) => loopback.stale().await,
                None => Vec::new(),
            }
        })
    }

    fn release(
        &mut self,
        forced: bool,
        since: Option<Instant>,
    ) -> Pending<'_, Result<Vec<String>, NotReleased>> {
        Box::pin(async move {
            let users = self.take_away(forced, since).await?;
            if let Some(status) = &mut self.status {
                status.error =
                    Some("it was released; it is served again when the agent is restarted".to_owned());
            }
            Ok(users)
        })
    }
}
