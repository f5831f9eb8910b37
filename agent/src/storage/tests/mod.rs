//! Both implementations on real files and devices, and what the tests need for that.

mod faulty;
mod opening;
mod operations;
mod probing;

use super::Storage;
use super::ring::Ring;
use super::threads::Threads;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use tempfile::TempDir;

/// Runs a test the way a volume's thread runs.
fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

/// Every implementation that this kernel allows.
fn storages() -> Vec<Rc<dyn Storage>> {
    let rings = Ring::of_every_kind();
    if rings.is_empty() {
        eprintln!("skipped: io_uring, which this kernel or container does not allow");
    }
    let mut storages: Vec<Rc<dyn Storage>> = Vec::new();
    storages.extend(rings.into_iter().map(|ring| ring as Rc<dyn Storage>));
    storages.push(Threads::new(None).expect("threads can be started"));
    storages
}

/// Runs a program; its error output when it fails.
fn command(program: &str, arguments: &[&str]) -> Result<String, String> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    match Command::new(program).args(arguments).env("PATH", path).output() {
        Err(error) => Err(format!("{program}: {error}")),
        Ok(output) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        }
        Ok(output) => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("the tests' paths are UTF-8")
}

/// A command that is run when the value goes away, whatever happened until then.
struct Undo(&'static str, Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        let arguments: Vec<&str> = self.1.iter().map(String::as_str).collect();
        if let Err(error) = command(self.0, &arguments) {
            eprintln!("not cleaned up: {error}");
        }
    }
}

/// A loop device on a sparse file.
struct LoopDevice {
    path: PathBuf,
    image: PathBuf,
    _detach: Undo,
    _folder: TempDir,
}

impl LoopDevice {
    /// None, with the reason printed, where devices can't be made.
    fn new(size_bytes: u64, sector_bytes: u32) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("image");
        std::fs::File::create(&image).and_then(|file| file.set_len(size_bytes)).expect("a sparse file");
        let sector = sector_bytes.to_string();
        match command("losetup", &["--find", "--show", "--sector-size", &sector, text(&image)]) {
            Ok(path) => {
                let detach = Undo("losetup", vec!["-d".to_owned(), path.clone()]);
                Some(Self { path: PathBuf::from(path), image, _detach: detach, _folder: folder })
            }
            Err(reason) => {
                eprintln!("skipped: a loop device with sectors of {sector_bytes} bytes: {reason}");
                None
            }
        }
    }
}

/// A mounted file system on a device whose sectors are as large as its blocks: 4096 bytes.
struct LargeSectors {
    _unmount: Undo,
    folder: TempDir,
    _device: LoopDevice,
}

impl LargeSectors {
    /// None, with the reason printed, where it can't be made.
    fn new() -> Option<Self> {
        let device = LoopDevice::new(32 << 20, 4096)?;
        let folder = tempfile::tempdir().expect("a folder");
        let (source, at) = (text(&device.path), text(folder.path()));
        let made = command("mkfs.ext4", &["-q", "-b", "4096", source]);
        if let Err(reason) = made.and_then(|_| command("mount", &[source, at])) {
            eprintln!("skipped: a file system on sectors of 4096 bytes: {reason}");
            return None;
        }
        let unmount = Undo("umount", vec![at.to_owned()]);
        Some(Self { _unmount: unmount, folder, _device: device })
    }
}

/// A generator of numbers that are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
