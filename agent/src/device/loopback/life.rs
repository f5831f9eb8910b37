//! Making and taking away what a loop device consists of: the blocking half of its life.
//!
//! All of this runs on a thread for blocking calls; most of it waits for the server in the course of a system call.

use super::in_flight::TakeOverError;
use super::kernel::MAX_TRANSFER_BYTES;
use super::loop_device::{AttachError, LoopDevice};
use super::mounts;
use crate::device::front_end::Site;
use crate::device::openers::{self, Claim};
use crate::kept::{Descriptors, Store};
use crate::words::with_causes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long users who open a device only briefly, such as udev's probes, are waited for.
const PATIENCE: Duration = Duration::from_secs(3);
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The name is no file name.
    #[error("{0:?} cannot be a device's name; use letters, digits, dots and dashes")]
    Name(String),
    /// The device is served already.
    #[error("{} is being served; stop the agent that does it first", .0.display())]
    Served(PathBuf),
    /// There is no FUSE.
    #[error("cannot open /dev/fuse; load the kernel's fuse module (modprobe fuse)")]
    NoFuse(#[source] io::Error),
    /// The agent does not run as root.
    #[error("a loop device takes root; run the agent as root or create the volume with --device nbd")]
    NotPermitted,
    /// The device is held open by somebody who does not serve it.
    #[error("{path} is kept open by a process that does not serve it; umount --force {path} ends that", path = .0.display())]
    Silent(PathBuf),
    /// There is a device, and it can't be taken over.
    #[error(
        "the device that an earlier agent left stays as it is, and whoever uses it waits; to take it away with I/O errors \
         for its users, blockmirror release --force"
    )]
    TakeOver(#[from] TakeOverError),
    /// No loop device could be attached.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Something else that the kernel refused.
    #[error("cannot {operation} {}", .path.display())]
    Io {
        /// What was to be done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl StartError {
    pub(super) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { operation, path: path.to_owned(), source }
    }
}

/// What could not be taken away.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The loop device is open. It detaches when it is closed for the last time; until then it gives I/O errors.
    #[error("{} is still {user}; it fails all access now and goes away when nobody has it open", .path.display())]
    InUse {
        /// The loop device.
        path: PathBuf,
        /// Who has it, in words.
        user: String,
    },
    /// The kernel does not come back from detaching the loop device.
    #[error("{} does not let go of its users; the agent's next start takes it away", .path.display())]
    Hangs {
        /// The loop device.
        path: PathBuf,
    },
    /// The kernel refused to detach the loop device.
    #[error("cannot detach {}", .path.display())]
    Detach {
        /// The loop device.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The names of all that belongs to a device.
#[derive(Clone)]
pub(super) struct Place {
    pub name: String,
    /// The file that the FUSE session is mounted on.
    pub mount_point: PathBuf,
    pub link: PathBuf,
    /// The list of loop devices that were left because somebody had them open.
    pub left: PathBuf,
}

impl Place {
    /// The names, and the folders that they are in. The mount point is written as the kernel writes it.
    fn new(name: &str, run_folder: &Path, device_folder: &Path) -> Result<Self, StartError> {
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0', '\n']) {
            return Err(StartError::Name(name.to_owned()));
        }
        for folder in [run_folder, device_folder] {
            fs::create_dir_all(folder).map_err(|source| StartError::io("make the folder", folder, source))?;
        }
        let run_folder = fs::canonicalize(run_folder)
            .map_err(|source| StartError::io("look up the folder", run_folder, source))?;
        let mount_point = run_folder.join(format!("{name}.fuse"));
        let left = run_folder.join(format!("{name}.left"));
        Ok(Self { name: name.to_owned(), mount_point, link: device_folder.join(name), left })
    }

    /// The loop devices that were left, as far as they still hold a file of ours.
    fn devices_left(&self) -> Vec<LoopDevice> {
        let list = fs::read_to_string(&self.left).unwrap_or_default();
        let devices = list.lines().filter_map(|line| LoopDevice::at(Path::new(line)));
        devices.filter(|device| holds(*device, self)).collect()
    }

    /// Notes which loop devices are left, for the next start. It only serves the words of status.
    fn note_left(&self, devices: &[LoopDevice]) {
        if devices.is_empty() {
            return remove(&self.left);
        }
        let lines: Vec<String> = devices.iter().map(|device| device.path().display().to_string()).collect();
        if let Err(error) = fs::write(&self.left, lines.join("\n")) {
            tracing::warn!(path = %self.left.display(), %error, "cannot note what is left of the loop device");
        }
    }

    /// The loop device that is attached to the file.
    fn device(&self) -> Result<Option<LoopDevice>, StartError> {
        let attached = LoopDevice::all_attached_to(&self.mount_point)
            .map_err(|source| StartError::io("list the loop devices in", Path::new("/sys/block"), source))?;
        Ok(self.linked().or(attached.first().copied()))
    }

    /// The loop device that the link leads to, if it holds the file. It does still when the file's path is gone.
    fn linked(&self) -> Option<LoopDevice> {
        let linked = fs::read_link(&self.link).ok().and_then(|target| LoopDevice::at(&target));
        linked.filter(|device| holds(*device, self))
    }

    fn label(&self) -> String {
        format!("blockmirror:{}", self.name)
    }
}

/// The device that an earlier agent left, if it can be gone on with: its session lives, and a loop device is attached to its
/// file. What is left of another is ended.
pub(super) fn find_kept(site: &Site) -> Result<Option<(Place, LoopDevice, Descriptors)>, StartError> {
    let Some(kept) = site.store.get(&site.name) else { return Ok(None) };
    let place = Place::new(&site.name, &site.run_folder, &site.device_folder)?;
    if lives(&kept)
        && let Some(device) = place.device()?
    {
        return Ok(Some((place, device, kept)));
    }
    drop(kept);
    end_kept(&place, &site.store);
    Ok(None)
}

/// Whether a session goes on: nobody has ended it by force or unmounted it everywhere.
fn lives(kept: &Descriptors) -> bool {
    let mut watched = [PollFd::new(&kept.session, PollFlags::empty())];
    let polled = poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    polled.is_ok() && watched[0].revents().is_empty()
}

/// Ends the session of a device that is kept: its users get errors.
fn end_kept(place: &Place, store: &Store) {
    // The mount may be gone while its session goes on; then the last descriptor ends it.
    take_away(place);
    store.remove(&place.name);
}

/// Gives up the device that an earlier agent left of a volume that is to have none on this host, and logs `why`: its users
/// get errors. Does nothing where none is kept. Blocks.
pub fn give_up(site: &Site, why: &str) {
    let volume = &site.name;
    if !site.store.holds(volume) {
        return;
    }
    tracing::warn!(
        volume,
        "the loop device that the last agent left is taken away: {why}; its users get i/o errors"
    );
    let ended = Place::new(volume, &site.run_folder, &site.device_folder).and_then(|place| {
        end_kept(&place, &site.store);
        clean_up(&place)
    });
    if let Err(error) = ended {
        tracing::error!(volume, "{}", with_causes(&error));
    }
}

/// Who uses the device that an earlier agent left, in words. Does not open it. Blocks.
#[must_use]
pub fn users_of_kept(site: &Site) -> Vec<String> {
    let place = Place::new(&site.name, &site.run_folder, &site.device_folder);
    let device = place.and_then(|place| place.device()).ok().flatten();
    device.map_or_else(Vec::new, |device| openers::visible(&device.path()))
}

/// A device that an agent left which does not run.
pub struct LeftBehind {
    point: PathBuf,
    devices: Vec<LoopDevice>,
}

impl LeftBehind {
    /// The device of a volume in this run folder, if it is still there. Blocks, though not for the device.
    ///
    /// # Errors
    /// [`StartError::Io`] when it can't be looked for.
    pub fn find(name: &str, run_folder: &Path) -> Result<Option<Self>, StartError> {
        let Ok(run_folder) = fs::canonicalize(run_folder) else { return Ok(None) };
        let point = run_folder.join(format!("{name}.fuse"));
        let mounted = mounts::count_ours(&point)
            .map_err(|source| StartError::io("read", Path::new("/proc/self/mountinfo"), source))?;
        let devices = LoopDevice::all_attached_to(&point)
            .map_err(|source| StartError::io("list the loop devices in", Path::new("/sys/block"), source))?;
        Ok((mounted > 0 || !devices.is_empty()).then_some(Self { point, devices }))
    }

    /// Who uses it, in words.
    #[must_use]
    pub fn users(&self) -> Vec<String> {
        self.devices.iter().flat_map(|device| openers::visible(&device.path())).collect()
    }

    /// Ends its session, and detaches it: whoever uses it gets errors.
    ///
    /// # Errors
    /// [`StartError::Io`] when the kernel refuses that.
    pub fn end(self) -> Result<(), StartError> {
        while mounts::count_ours(&self.point).is_ok_and(|count| count > 0) {
            mounts::unmount_by_force(&self.point)
                .map_err(|source| StartError::io("unmount", &self.point, source))?;
        }
        for device in self.devices {
            device.detach().map_err(|source| StartError::io("detach", &device.path(), source))?;
        }
        remove(&self.point);
        Ok(())
    }
}

/// Sees to it that the link leads to a device that is gone on with. Gives the loop devices of earlier runs that somebody has
/// open still.
pub(super) fn link_again(place: &Place, device: LoopDevice) -> Vec<LoopDevice> {
    if fs::read_link(&place.link).ok() != Some(device.path()) {
        remove(&place.link);
        if let Err(error) = symlink(device.path(), &place.link) {
            tracing::warn!(path = %place.link.display(), %error, "cannot make the link");
        }
    }
    announce(device);
    place.devices_left().into_iter().filter(|left| *left != device).collect()
}

/// Cleans up, makes the mount point and mounts. From here on the returned `/dev/fuse` must be served. Gives the loop
/// devices of earlier runs, too, that somebody has open still.
pub(super) fn mount(site: &Site, read_only: bool) -> Result<(Place, File, Vec<LoopDevice>), StartError> {
    let place = Place::new(&site.name, &site.run_folder, &site.device_folder)?;
    let stale = clean_up(&place)?;
    let point = &place.mount_point;
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(point);
    made.map_err(|source| StartError::io("make the file", point, source))?;
    let fuse = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/fuse");
    let mounted = fuse.map_err(no_fuse).and_then(|fuse| {
        mounts::mount_file(&fuse, &place.label(), point, read_only, MAX_TRANSFER_BYTES)
            .map_err(|source| StartError::io("mount the volume's file on", point, source))?;
        Ok(fuse)
    });
    match mounted {
        Ok(fuse) => Ok((place, fuse, stale)),
        Err(error) => {
            remove(point);
            Err(error)
        }
    }
}

/// Attaches a loop device to the served file.
pub(super) fn attach(place: &Place, read_only: bool) -> Result<LoopDevice, StartError> {
    let point = &place.mount_point;
    let file = OpenOptions::new().read(true).write(!read_only).open(point);
    let file = file.map_err(|source| StartError::io("open the volume's file", point, source))?;
    // Before Linux 6.18 the loop driver goes by the size that the kernel has in its memory, and of a root that nobody asked
    // for its attributes it has none: the device would be empty.
    file.metadata().map_err(|source| StartError::io("look at the volume's file", point, source))?;
    // The device holds the file when this one is closed.
    Ok(LoopDevice::attach(&file, &place.label(), read_only)?)
}

/// Has udev look at a device once more, now that its link is there: it says to systemd that both are one.
fn announce(device: LoopDevice) {
    if let Err(error) = fs::write(device.system_folder().join("uevent"), "change") {
        tracing::debug!(device = %device.path().display(), %error, "udev is not told of the link");
    }
}

/// Links to the loop device, or detaches it.
pub(super) fn link(place: &Place, device: LoopDevice) -> Result<LoopDevice, StartError> {
    if let Err(source) = symlink(device.path(), &place.link) {
        if let Err(error) = device.detach() {
            tracing::warn!(device = %device.path().display(), %error, "cannot detach the loop device");
        }
        wait_until(|| !holds(device, place));
        return Err(StartError::io("make the link", &place.link, source));
    }
    announce(device);
    Ok(device)
}

/// Takes a device away, gently where that is possible. The server still serves.
pub(super) fn detach(place: &Place, device: LoopDevice, claim: Option<Claim>) -> Result<(), StopError> {
    if fs::read_link(&place.link).is_ok_and(|target| target == device.path()) {
        remove(&place.link);
    }
    let result = release(place, device, claim);
    if result.is_ok() {
        unmount_gently(place);
    }
    take_away(place);
    result
}

/// Detaches the loop device from the file, if it is still attached to it. A device that is claimed stays so until those who
/// opened it meanwhile have gone: a mount must not slip in.
fn release(place: &Place, device: LoopDevice, claim: Option<Claim>) -> Result<(), StopError> {
    let path = device.path();
    let attached = || holds(device, place);
    if !attached() {
        return Ok(());
    }
    let failed = |source| StopError::Detach { path: path.clone(), source };
    match claim {
        None => device.detach().map_err(failed)?,
        Some(Claim(node)) => {
            LoopDevice::detach_by(&node).map_err(failed)?;
            if !openers::passing(&path).is_empty() {
                wait_until(|| openers::passing(&path).is_empty());
                // It is the only one now, or the device goes when the last one closes it.
                LoopDevice::detach_by(&node).map_err(failed)?;
            }
        }
    }
    if wait_until(|| !attached()) {
        return Ok(());
    }
    let user = user_of(device);
    let mut left = place.devices_left();
    left.push(device);
    place.note_left(&left);
    Err(StopError::InUse { path, user })
}

/// Whether a device that was ours still holds our file. Once the mount was taken out of the tree of files, by hand or
/// because the tree was the crashed agent's own, the kernel gives the file's path as that of a root.
fn holds(device: LoopDevice, place: &Place) -> bool {
    device.attached_to().is_some_and(|file| file == place.mount_point || file == Path::new("/"))
}

/// Who uses a device, in words.
fn user_of(device: LoopDevice) -> String {
    match openers::visible(&device.path()) {
        nobody if nobody.is_empty() => "open somewhere".to_owned(),
        users => users.join(", "),
    }
}

/// Unmounts the file once the kernel has let go of it, which it does a moment after it has detached the device.
fn unmount_gently(place: &Place) {
    let point = &place.mount_point;
    let busy = || matches!(mounts::unmount(point), Err(error) if error.raw_os_error() == Some(libc::EBUSY));
    if !wait_until(|| !busy()) {
        tracing::warn!(file = %point.display(), "the volume's file is in use; ending its session by force");
    }
}

/// Takes the mount and its file away, whoever uses them.
pub(super) fn take_away(place: &Place) {
    unmount_all(place);
    remove(&place.mount_point);
}

/// Ends by force what is still mounted.
fn unmount_all(place: &Place) {
    while mounts::count_ours(&place.mount_point).is_ok_and(|count| count > 0) {
        if let Err(error) = mounts::unmount_by_force(&place.mount_point) {
            tracing::warn!(file = %place.mount_point.display(), %error, "cannot unmount the volume's file");
            return;
        }
    }
}

/// Takes away what an agent that crashed left of a device. Does nothing where nothing is left.
///
/// A loop device that somebody still has open is told to detach when that ends, which is logged. Blocks: must not be
/// called on a volume's thread.
///
/// # Errors
/// [`StartError::Served`] when the device is no left-over, [`StartError::Name`], or [`StartError::Io`].
pub fn clean_up_stale(name: &str, run_folder: &Path, device_folder: &Path) -> Result<(), StartError> {
    clean_up(&Place::new(name, run_folder, device_folder)?).map(drop)
}

/// Who has one of these devices of earlier runs open.
pub(super) fn users_of_stale(place: &Place, stale: &[LoopDevice]) -> Vec<String> {
    stale.iter().filter(|device| holds(**device, place)).map(|device| user_of(*device)).collect()
}

/// Gives the loop devices that are left because somebody has them open.
fn clean_up(place: &Place) -> Result<Vec<LoopDevice>, StartError> {
    let point = &place.mount_point;
    let mounted = mounts::count_ours(point)
        .map_err(|source| StartError::io("read", Path::new("/proc/self/mountinfo"), source))?;
    if mounted > 0 {
        must_be_dead(point)?;
    }
    let mut devices = LoopDevice::all_attached_to(point)
        .map_err(|source| StartError::io("list the loop devices in", Path::new("/sys/block"), source))?;
    devices.extend(place.linked().filter(|linked| !devices.contains(linked)));
    // Only a link to a loop device is one of ours.
    if fs::read_link(&place.link).is_ok_and(|target| LoopDevice::at(&target).is_some()) {
        remove(&place.link);
    }
    let left = place.devices_left().into_iter().filter(|device| !devices.contains(device));
    devices.extend(left.collect::<Vec<_>>());
    devices.retain(|device| !detach_stale(place, *device));
    place.note_left(&devices);
    take_away(place);
    Ok(devices)
}

/// A session that goes on is somebody's. A dead one answers "not connected", and nothing at all to whoever asks only for
/// cached attributes.
fn must_be_dead(point: &Path) -> Result<(), StartError> {
    let (tell, told) = mpsc::channel();
    let file = point.to_owned();
    // Where nobody answers, the thread waits until somebody does, or ends the session.
    std::thread::spawn(move || tell.send(File::open(file).is_ok()));
    match told.recv_timeout(PATIENCE) {
        Ok(true) => Err(StartError::Served(point.to_owned())),
        Ok(false) => Ok(()),
        Err(_) => Err(StartError::Silent(point.to_owned())),
    }
}

/// Says whether the device is gone.
fn detach_stale(place: &Place, device: LoopDevice) -> bool {
    let path = device.path();
    let volume = &place.name;
    if let Err(error) = device.detach() {
        tracing::warn!(volume, device = %path.display(), %error, "cannot detach the old loop device");
        return false;
    }
    // Whoever has it open for a moment is waited for; those who stay are not.
    let attached = || holds(device, place);
    wait_until(|| !attached() || !openers::lasting(&path).is_empty());
    let user = attached().then(|| user_of(device));
    let is_gone = user.is_none();
    match user {
        None => {
            tracing::info!(volume, device = %path.display(), "detached the loop device of an earlier run")
        }
        Some(user) => tracing::warn!(
            volume,
            device = %path.display(),
            "the loop device of an earlier run is still {user}; it gives I/O errors until it is closed there, \
             and the volume gets a new one"
        ),
    }
    is_gone
}

/// Whether a condition comes true while there is patience left.
fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove the file");
        }
        _ => {}
    }
}

fn no_fuse(error: io::Error) -> StartError {
    if error.kind() == io::ErrorKind::PermissionDenied {
        StartError::NotPermitted
    } else {
        StartError::NoFuse(error)
    }
}
