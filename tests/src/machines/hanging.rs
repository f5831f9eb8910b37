//! A file whose server can be stopped: whoever reads, writes or asks about it then waits until it goes on. It stands for a
//! disk or a file server that hangs. It may also fail to read one sector.

use super::folder::Folder;
use super::patience::{until, wait_until_stopped};
use super::programs::{run, text};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One at a time: programs that look at all loop devices wait for one that hangs.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A file system whose calls can be made to hang. Needs root and `qemu-storage-daemon`. The server goes on, and ends, when this is dropped: before the
/// hosts that may wait for it.
pub struct Hanging {
    _alone: MutexGuard<'static, ()>,
    server: Child,
    file: PathBuf,
    /// Loop devices on the file.
    devices: Vec<PathBuf>,
}

impl Hanging {
    /// A file of so many bytes, all zero, that answers.
    ///
    /// # Panics
    /// When it can't be served.
    #[must_use]
    pub fn new(folder: &Folder, name: &str, size_bytes: u64) -> Self {
        let image = |path: &Path| format!("driver=file,filename={},node-name=n,cache.direct=on", text(path));
        Self::of(folder, name, size_bytes, image)
    }

    /// The same, where each read fails that this sector of 512 bytes is part of. Writes succeed.
    ///
    /// # Panics
    /// When it can't be served.
    #[must_use]
    pub fn with_bad_sector(folder: &Folder, name: &str, size_bytes: u64, sector: u64) -> Self {
        let image = |path: &Path| {
            format!(
                "driver=blkdebug,node-name=n,inject-error.0.event=none,inject-error.0.iotype=read,\
                 inject-error.0.errno=5,inject-error.0.sector={sector},image.driver=file,image.cache.direct=on,\
                 image.filename={}",
                text(path)
            )
        };
        Self::of(folder, name, size_bytes, image)
    }

    fn of(folder: &Folder, name: &str, size_bytes: u64, node: impl Fn(&Path) -> String) -> Self {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let (image, file) = (folder.join(&format!("{name}.served")), folder.join(name));
        for path in [&image, &file] {
            File::create(path).and_then(|file| file.set_len(size_bytes)).expect("an image");
        }
        let node = node(&image);
        let export = format!("type=fuse,id=e,node-name=n,mountpoint={},writable=on", text(&file));
        let server = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node, "--export", &export])
            .stdin(Stdio::null())
            .spawn()
            .expect("the server starts");
        let hanging = Self { _alone: alone, server, file, devices: Vec::new() };
        until("the file is served", || {
            let mounts = fs::read_to_string("/proc/self/mountinfo").expect("the table of mounts");
            mounts.contains(text(&hanging.file)).then_some(()).ok_or(mounts)
        });
        hanging
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// A loop device on the file, with direct I/O: it hangs as the file does, and whoever waits for it can be killed.
    ///
    /// # Panics
    /// When it can't be attached.
    #[must_use]
    pub fn device(&mut self) -> PathBuf {
        let said = run("losetup", &["--find", "--show", "--direct-io=on", text(&self.file)]);
        let device = PathBuf::from(String::from_utf8_lossy(&said.stdout).trim());
        assert!(said.status.success(), "{said:?}");
        self.devices.push(device.clone());
        device
    }

    /// From here on nothing answers.
    ///
    /// # Panics
    /// When the server is gone.
    pub fn stall(&self) {
        self.signal(Signal::STOP);
        wait_until_stopped(self.server.id());
    }

    /// All that waited is answered.
    ///
    /// # Panics
    /// When the server is gone.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.server), signal).expect("it is our process");
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        // What fails here was gone already.
        let _ = kill_process(Pid::from_child(&self.server), Signal::CONT);
        for device in &self.devices {
            run("losetup", &["--detach", text(device)]);
        }
        run("umount", &["--lazy", text(&self.file)]);
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
