//! Loop devices: the kernel's on a file, and on files that peers serve by FUSE, as Blockmirror does.

use super::Bench;
use super::peers::{Export, qemu_cache};
use super::place::Place;
use super::processes::{Server, command, say};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device. Dropped, it is detached.
pub struct LoopDevice {
    /// Where it is.
    pub path: PathBuf,
}

impl LoopDevice {
    /// Attaches one to a file, with direct I/O.
    ///
    /// # Errors
    /// When that fails, or the kernel does without direct I/O.
    pub fn attach(file: &Path) -> Result<Self> {
        let path = say(command("losetup", ["--find", "--show", "--direct-io=on"]).arg(file))?;
        let device = Self { path: PathBuf::from(path.trim()) };
        let name = device.path.file_name().context("a device has a name")?;
        let direct = fs::read_to_string(Path::new("/sys/block").join(name).join("loop/dio"))?;
        ensure!(direct.trim() == "1", "the loop device does without direct I/O");
        Ok(device)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // What can't be detached now is when the bench's folder goes.
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// A loop device on a file that a program serves by FUSE. In this order: the device goes before the server.
pub struct FuseLoop {
    /// The device.
    pub device: LoopDevice,
    /// Unmounts the file.
    _mount: FuseMount,
    _server: Server,
    _export: Option<Export>,
}

struct FuseMount(PathBuf);

impl Drop for FuseMount {
    fn drop(&mut self) {
        // It may be unmounted by its server.
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

fn is_served(file: &Path, size_bytes: u64) -> bool {
    file.metadata().is_ok_and(|found| found.len() == size_bytes)
}

/// A loop device on the file that nbdfuse makes of an NBD export.
///
/// # Errors
/// When it doesn't come up.
pub fn nbdfuse(bench: &Bench, name: &str, export: Export, size_bytes: u64) -> Result<FuseLoop> {
    let point = bench.run_path(&format!("{name}.fuse"));
    fs::create_dir_all(&point)?;
    let file = point.join("nbd");
    let mut nbdfuse = Command::new("nbdfuse");
    nbdfuse.arg(&point).arg(&export.uri);
    let server = Server::start(name, &mut nbdfuse, &bench.run_path(&format!("{name}.log")))?;
    let mount = FuseMount(point);
    let server = server.ready(|| is_served(&file, size_bytes))?;
    let device = LoopDevice::attach(&file)?;
    Ok(FuseLoop { device, _mount: mount, _server: server, _export: Some(export) })
}

/// A loop device on the file that qemu-storage-daemon exports by FUSE.
///
/// # Errors
/// When it doesn't come up.
pub fn qemu_fuse(bench: &Bench, place: &Place, name: &str, file: &Path) -> Result<FuseLoop> {
    let size_bytes = file.metadata()?.len();
    let point = bench.run_path(&format!("{name}.fuse"));
    fs::write(&point, "")?;
    let [_, aio] = qemu_cache(place);
    let direct = if place.is_direct { "on" } else { "off" };
    let mut daemon = command("qemu-storage-daemon", ["--blockdev"]);
    daemon.arg(format!(
        "driver=file,node-name=disk,filename={},aio={aio},cache.direct={direct}",
        file.display()
    ));
    daemon.arg("--export");
    daemon.arg(format!("type=fuse,id=fuse,node-name=disk,mountpoint={},writable=on", point.display()));
    let server = Server::start(name, &mut daemon, &bench.run_path(&format!("{name}.log")))?;
    let mount = FuseMount(point.clone());
    let server = server.ready(|| is_served(&point, size_bytes))?;
    let device = LoopDevice::attach(&point)?;
    Ok(FuseLoop { device, _mount: mount, _server: server, _export: None })
}
