//! Loop devices: attaching a file to one, detaching it, finding out what one is attached to (loop(4)).
//!
//! Everything here may make the kernel read, write or ask about the attached file before it returns. Where that file is
//! served by this process, call it on another thread than the one that serves.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOOP_CLR_FD: u64 = 0x4c01;
const LOOP_GET_STATUS64: u64 = 0x4c05;
const LOOP_SET_DIRECT_IO: u64 = 0x4c08;
const LOOP_CONFIGURE: u64 = 0x4c0a;
const LOOP_CTL_GET_FREE: u64 = 0x4c82;

const READ_ONLY: u32 = 1;
const DIRECT_IO: u32 = 16;

/// The device's logical block size: every request is a multiple of it.
const BLOCK_BYTES: u32 = 512;

/// How often a device that was free is tried for, where others look for one at the same time.
const ATTEMPTS: u32 = 100;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(5);

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    own_device: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encryption: u32,
    encryption_key_bytes: u32,
    flags: u32,
    file_name: [u8; 64],
    cipher_name: [u8; 64],
    encryption_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_bytes: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = {
    assert!(size_of::<Info>() == 232);
    assert!(size_of::<Config>() == 304);
};

impl Info {
    fn new(file_name: &str, flags: u32) -> Self {
        Self {
            device: 0,
            inode: 0,
            own_device: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encryption: 0,
            encryption_key_bytes: 0,
            flags,
            file_name: name_field(file_name),
            cipher_name: [0; 64],
            encryption_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// A name as the kernel keeps it: cut to fit, with a zero byte at its end.
fn name_field(name: &str) -> [u8; 64] {
    let mut field = [0; 64];
    let length = name.len().min(field.len() - 1);
    field[..length].copy_from_slice(&name.as_bytes()[..length]);
    field
}

/// What failed in attaching a loop device.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no `/dev/loop-control`.
    #[error("cannot use /dev/loop-control; load the kernel's loop module (modprobe loop)")]
    NoLoop(#[source] io::Error),
    /// A device's node can't be opened.
    #[error("cannot open {path}; loop devices must be in /dev and accessible")]
    Open {
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused to attach the file.
    #[error("cannot attach {path} to the volume's file")]
    Configure {
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Others took each free device first.
    #[error("no loop device stayed free long enough; try again")]
    NoneFree,
}

/// A loop device, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopDevice {
    number: u32,
}

impl LoopDevice {
    /// Attaches a free loop device to `file`, with direct I/O. `label` is what `losetup` shows of the file's name.
    ///
    /// # Errors
    /// [`AttachError`]; nothing is attached then.
    pub fn attach(file: &File, label: &str, read_only: bool) -> Result<Self, AttachError> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control");
        let control = control.map_err(AttachError::NoLoop)?;
        let flags = DIRECT_IO | if read_only { READ_ONLY } else { 0 };
        for _ in 0..ATTEMPTS {
            let number = control_value(&control, LOOP_CTL_GET_FREE, 0).map_err(AttachError::NoLoop)?;
            let device = Self { number: u32::try_from(number).expect("a device's number is not negative") };
            if device.configure(file, label, flags)? {
                return Ok(device);
            }
            // Whoever looked for a device at the same time got this one.
            std::thread::sleep(BETWEEN_ATTEMPTS);
        }
        Err(AttachError::NoneFree)
    }

    /// Whether the file was attached; not if the device has been taken meanwhile.
    fn configure(self, file: &File, label: &str, flags: u32) -> Result<bool, AttachError> {
        let path = self.path();
        let write = flags & READ_ONLY == 0;
        let node = match OpenOptions::new().read(true).write(write).open(&path) {
            Ok(node) => node,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::EBUSY)) => {
                return Ok(false);
            }
            Err(source) => return Err(AttachError::Open { path, source }),
        };
        let fd = u32::try_from(file.as_raw_fd()).expect("an open descriptor is not negative");
        let config = Config { fd, block_bytes: BLOCK_BYTES, info: Info::new(label, flags), reserved: [0; 8] };
        // SAFETY: the call reads a `loop_config`, which `config` has the layout of and outlives.
        let result = unsafe { libc::ioctl(node.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
        if result == 0 {
            ensure_direct_io(&node, &path);
            return Ok(true);
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            source => Err(AttachError::Configure { path, source }),
        }
    }

    /// The device of a path, if it is a loop device's.
    #[must_use]
    pub fn at(path: &Path) -> Option<Self> {
        let number = path.to_str()?.strip_prefix("/dev/loop")?.parse().ok()?;
        Some(Self { number })
    }

    /// The device's path.
    #[must_use]
    pub fn path(self) -> PathBuf {
        format!("/dev/loop{}", self.number).into()
    }

    /// The device's folder in `/sys`.
    #[must_use]
    pub fn system_folder(self) -> PathBuf {
        format!("/sys/block/loop{}", self.number).into()
    }

    /// The path of the attached file, if one is attached. Asks nobody but the loop driver.
    #[must_use]
    pub fn attached_to(self) -> Option<PathBuf> {
        let mut bytes = std::fs::read(self.system_folder().join("loop/backing_file")).ok()?;
        while bytes.pop_if(|byte| *byte == b'\n').is_some() {}
        Some(std::ffi::OsString::from_vec(bytes).into())
    }

    /// Detaches the file: at once, or, where the device is open, when it is closed for the last time.
    ///
    /// # Errors
    /// What the kernel says; a device that isn't attached is no error.
    pub fn detach(self) -> io::Result<()> {
        Self::detach_by(&File::open(self.path())?)
    }

    /// As [`detach`](Self::detach), by an open descriptor of the device. Where that is the only one, nobody can open the
    /// device from here on.
    ///
    /// # Errors
    /// What the kernel says; a device that isn't attached is no error.
    pub fn detach_by(node: &File) -> io::Result<()> {
        match control_value(node, LOOP_CLR_FD, 0) {
            Err(error) if error.raw_os_error() != Some(libc::ENXIO) => Err(error),
            _ => Ok(()),
        }
    }

    /// The devices that are attached to the file of this path.
    ///
    /// # Errors
    /// When `/sys/block` can't be read.
    pub fn all_attached_to(file: &Path) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/sys/block")? {
            let device = Self::at(&Path::new("/dev").join(entry?.file_name()));
            found.extend(device.filter(|device| device.attached_to().is_some_and(|path| path == file)));
        }
        Ok(found)
    }
}

/// Makes sure of direct I/O, or says that there is none: without it everything is in the page cache twice.
fn ensure_direct_io(node: &File, path: &Path) {
    if has_direct_io(node) {
        return;
    }
    let set = control_value(node, LOOP_SET_DIRECT_IO, 1);
    if let Err(error) = set {
        tracing::warn!(path = %path.display(), %error, "the loop device has no direct I/O; it will be slow");
    }
}

fn has_direct_io(node: &File) -> bool {
    let mut info = Info::new("", 0);
    // SAFETY: the call writes a `loop_info64`, which `info` has the layout of.
    let result = unsafe { libc::ioctl(node.as_raw_fd(), LOOP_GET_STATUS64 as _, &raw mut info) };
    result == 0 && info.flags & DIRECT_IO != 0
}

/// A control call whose argument is a number.
fn control_value(node: &impl AsRawFd, request: u64, argument: libc::c_ulong) -> io::Result<i32> {
    let fd: RawFd = node.as_raw_fd();
    // SAFETY: the requests of this file that come through here take their argument by value and touch no memory.
    let result = unsafe { libc::ioctl(fd, request as _, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_and_ends_with_a_zero() {
        assert_eq!(&name_field("abc")[..4], b"abc\0");
        let long = name_field(&"x".repeat(100));
        assert_eq!((long[62], long[63]), (b'x', 0));
    }
}
