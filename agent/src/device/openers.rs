//! Who has a volume's devices open, in words for the operator who is to close them: file systems, swap space, other
//! devices, processes, NBD clients.
//!
//! Nothing is left out that would write: what the kernel keeps to itself (a file system that was unmounted lazily, a
//! mount in a container that can't be looked into) still has its claim on the device, and that is tried for when
//! nobody was found. Where the kernel's tables can't be read, that counts as use. What this process itself has open
//! does not count.
//!
//! Some stay: a mount, swap space, another device, an NBD client. A process that has the node open may be a probe that is
//! gone in a moment (udev, blkid, multipath, LVM), so whoever wants to take a device away looks again before it gives up
//! ([`look`]). When nobody is left, the device is claimed as a mount would claim it, until it is gone: nobody can mount it
//! in between.
//!
//! A table or a folder is read for every process, which takes milliseconds, and opening a device asks the server
//! behind it: none of this happens on a volume's thread.

use super::loopback::loop_device::LoopDevice;
use crate::blocking::blocking;
use crate::system::{self, Holder, Process};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long those are waited for who have a device open and may be gone in a moment.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take to find out who has a device open.
const LOOK_TIME: Duration = Duration::from_secs(5);
/// How often they are looked for.
pub const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// All of these, nobody twice.
pub(super) fn unique(found: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut openers: Vec<String> = Vec::new();
    for opener in found {
        if !openers.contains(&opener) {
            openers.push(opener);
        }
    }
    openers
}

/// Who uses a volume's devices.
#[derive(Debug, Default)]
pub struct Users {
    /// Who stays until it is told to go, in words.
    pub staying: Vec<String>,
    /// Who has the device open, perhaps just for a moment.
    pub passing: Vec<String>,
    /// Where there are none: the device of the kernel, claimed. Nobody else can mount it or use it for another device until this is
    /// dropped.
    pub claim: Option<Claim>,
}

impl Users {
    /// Whether nobody uses them.
    #[must_use]
    pub fn is_nobody(&self) -> bool {
        self.staying.is_empty() && self.passing.is_empty()
    }

    /// Whether all of them may be gone in a moment, where they were waited for this long: whoever wants to take the devices
    /// away looks again. Where somebody stays, nobody is waited for.
    #[must_use]
    pub fn may_pass(&self, waited: Duration) -> bool {
        self.staying.is_empty() && !self.passing.is_empty() && waited < PATIENCE
    }

    /// All of them, in words.
    #[must_use]
    pub fn words(&self) -> Vec<String> {
        [self.staying.as_slice(), &self.passing].concat()
    }
}

/// A device that is held exclusively.
#[derive(Debug)]
pub struct Claim(pub File);

/// Who has a device of the kernel open. Where nobody has, and `may_claim`, it is claimed: whoever mounts it meanwhile is told that
/// it is busy. So this is not for looking at often.
pub async fn look(node: PathBuf, may_claim: bool) -> Users {
    blocking(move || {
        let mut users = Users { staying: lasting(&node), passing: passing(&node), claim: None };
        if may_claim && users.is_nobody() {
            match claim(&node) {
                Ok(claim) => users.claim = claim,
                Err(Busy) => users.passing.push(OUT_OF_SIGHT.to_owned()),
            }
            // Whoever opened it before it was claimed.
            users.passing.extend(passing(&node));
        }
        users
    })
    .await
}

/// The same, soon: a device that does not answer counts as used (L5).
pub async fn look_soon(node: PathBuf, may_claim: bool) -> Users {
    soon(look(node, may_claim)).await
}

/// Who uses something, soon; where that can't be found out it counts as used (L5).
pub async fn soon(looking: impl Future<Output = Users>) -> Users {
    let untold = || "perhaps in use, which cannot be told: the device does not answer".to_owned();
    let looked = tokio::time::timeout(LOOK_TIME, looking).await;
    looked.unwrap_or_else(|_| Users { staying: vec![untold()], ..Users::default() })
}

/// How long those who may be gone in a moment have been waited for.
#[must_use]
pub fn waited(since: Option<Instant>) -> Duration {
    since.map_or(Duration::ZERO, |since| since.elapsed())
}

/// Since when those are waited for who have the device open; the first time, the log says for whom.
#[must_use]
pub fn wait_for(volume: &str, users: &[String], since: Option<Instant>) -> Instant {
    since.unwrap_or_else(|| {
        tracing::info!(%volume, "waiting for those who have the device open: {}", users.join(", "));
        Instant::now()
    })
}

/// Users of a block device who stay: not those who have it open, perhaps just for a moment. Blocks.
#[must_use]
pub fn lasting(node: &Path) -> Vec<String> {
    find_lasting(node).unwrap_or_else(|error| vec![unknown(&error)])
}

/// Users of a block device, those included who have it open for a moment. Blocks; does not open the device.
#[must_use]
pub fn visible(node: &Path) -> Vec<String> {
    let mut found = lasting(node);
    found.extend(passing(node));
    found
}

/// Processes that have a block device open, perhaps just for a moment. Blocks; does not open the device.
#[must_use]
pub fn passing(node: &Path) -> Vec<String> {
    match parts(node) {
        Ok(parts) => parts.iter().flat_map(Part::processes).collect(),
        Err(error) => vec![unknown(&error)],
    }
}

const OUT_OF_SIGHT: &str =
    "in use out of sight, by a file system that was unmounted lazily or by a container";

fn unknown(error: &io::Error) -> String {
    format!("perhaps in use, which cannot be told: {error}")
}

/// Somebody has opened the device exclusively, as the kernel does for a mount.
struct Busy;

/// Opens a device exclusively. A device that can't be opened at all has no users to keep off.
fn claim(node: &Path) -> Result<Option<Claim>, Busy> {
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(node) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(Busy),
        opened => Ok(opened.ok().map(Claim)),
    }
}

/// A device or one of its partitions.
struct Part {
    number: u64,
    node: PathBuf,
    /// What is said of a user of a partition, so that it can be found.
    addition: String,
}

fn parts(node: &Path) -> io::Result<Vec<Part>> {
    let whole = fs::metadata(node)?.rdev();
    let parts = system::with_partitions(whole)?.into_iter().map(|number| {
        let node = system::device_path(number);
        let addition = match number == whole {
            true => String::new(),
            false => format!(", through its partition {}", node.display()),
        };
        Part { number, node, addition }
    });
    Ok(parts.collect())
}

fn find_lasting(node: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for part in parts(node)? {
        let users = [part.mounts()?, part.swap_space()?, part.holders()?, part.loop_devices()?];
        found.extend(users.into_iter().flatten().map(|user| user + &part.addition));
    }
    Ok(found)
}

impl Part {
    /// Mounts of each mount namespace; one that others have too is told once.
    fn mounts(&self) -> io::Result<Vec<String>> {
        let mut seen = Vec::new();
        let mut found = Vec::new();
        for (process, mounts) in system::mounts_everywhere()? {
            for mount in mounts {
                // Some file systems, like btrfs, have a number of their own: then the source tells.
                let is_ours = mount.number == self.number || mount.source == self.node;
                if !is_ours || seen.contains(&mount.at) {
                    continue;
                }
                let at = format!("mounted at {} ({})", mount.at.display(), mount.kind);
                found.push(match process {
                    None => at,
                    Some(process) => format!("{at} in the mount namespace of {}", in_words(process)),
                });
                seen.push(mount.at);
            }
        }
        Ok(found)
    }

    fn swap_space(&self) -> io::Result<Vec<String>> {
        let is_one = system::swap_areas()?.contains(&self.node);
        Ok(is_one.then(|| "used as swap space".to_owned()).into_iter().collect())
    }

    fn holders(&self) -> io::Result<Vec<String>> {
        let in_words = |holder: Holder| match holder.given_name {
            Some(name) => format!("used by /dev/mapper/{name}"),
            None => format!("used by /dev/{}", holder.kernel_name.replace('!', "/")),
        };
        Ok(system::holders(self.number)?.into_iter().map(in_words).collect())
    }

    /// A loop device holds what it is attached to without a claim, and no process has it open.
    fn loop_devices(&self) -> io::Result<Vec<String>> {
        let devices = LoopDevice::all_attached_to(&self.node)?;
        Ok(devices.into_iter().map(|device| format!("used by {}", device.path().display())).collect())
    }

    fn processes(&self) -> Vec<String> {
        let opened =
            system::processes().filter(|process| process.open_devices().any(|number| number == self.number));
        opened.map(|process| format!("open by {}{}", in_words(process), self.addition)).collect()
    }
}

/// A process in words.
pub(super) fn in_words(process: Process) -> String {
    match process.name() {
        Some(name) => format!("{name} (pid {})", process.0),
        None => format!("pid {}", process.0),
    }
}
