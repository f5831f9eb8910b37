//! The loop front end on the real kernel: file systems, discards, flushes, crashes.
//!
//! Everything that a test mounts or attaches has an owner whose `Drop` takes it away, so a test that fails leaves
//! nothing either. Tests skip themselves, with the reason, without root, FUSE, loop devices or a program they need.

mod crashes;
mod deaths;
mod devices;
mod life;
mod opened;

pub(in crate::device::loopback) use deaths::pass;

use super::loop_device::LoopDevice;
use super::{Loopback, StartError, StopError, clean_up_stale, mounts};
use crate::buffer::BufferPool;
use crate::device::front_end::Site;
use crate::device::memory::Memory;
use crate::device::openers;
use crate::kept::Store;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use tempfile::TempDir;
use tokio::sync::oneshot;

const SIZE_BYTES: u64 = 512 << 20;
const MIB: u64 = 1 << 20;

/// Why a test can't run here, if it can't.
fn obstacle(programs: &[&str]) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    let missing_device =
        ["/dev/fuse", "/dev/loop-control"].into_iter().find(|path| !Path::new(path).exists());
    let missing_program = programs.iter().find(|name| {
        let found = Command::new("sh").args(["-c", "command -v \"$0\"", name]).output();
        !found.expect("a shell").status.success()
    });
    missing_device.or(missing_program.copied()).map(|missing| format!("needs {missing}"))
}

/// Ends a test that can't run here.
macro_rules! require {
    ($($program:literal),*) => {
        if let Some(obstacle) = obstacle(&[$($program),*]) {
            eprintln!("skipped: {obstacle}");
            return;
        }
    };
}

use require;

/// Runs a program to its end and gives back what it said; it must succeed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect(program);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are text")
}

/// A device in this folder that does not outlive its process.
fn site_in(folder: &Path) -> Site {
    Site {
        name: "data".to_owned(),
        volume: [7; 16],
        run_folder: folder.join("run"),
        device_folder: folder.join("dev"),
        store: Store::nowhere(),
    }
}

/// Folders of a test's own.
struct Folders {
    folder: TempDir,
}

impl Folders {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn site(&self) -> Site {
        let folder = self.folder.path();
        site_in(folder)
    }

    fn mount_point(&self) -> PathBuf {
        self.folder.path().join("run/data.fuse")
    }

    fn clean_up(&self) -> Result<(), StartError> {
        let Site { name, run_folder, device_folder, .. } = self.site();
        clean_up_stale(&name, &run_folder, &device_folder)
    }

    /// What is left on the host of devices in these folders.
    fn leftovers(&self) -> Vec<String> {
        let point = self.mount_point();
        let mut left = Vec::new();
        left.extend(
            (mounts::count_ours(&point).expect("a table of mounts") > 0).then(|| "a mount".to_owned()),
        );
        let devices = LoopDevice::all_attached_to(&point).expect("/sys/block");
        left.extend(devices.iter().map(|device| device.path().display().to_string()));
        for path in [point, self.site().device_folder.join("data")] {
            // A file under a dead mount is there, but says nothing about itself.
            let missing = fs::symlink_metadata(&path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
            left.extend((!missing).then(|| path.display().to_string()));
        }
        left
    }
}

/// A loop device's being attached to one file. Others may attach a device to theirs as soon as it is free, so what is
/// attached now says nothing about that; the kernel counts a device's changes of content (`diskseq`).
struct Attachment {
    device: LoopDevice,
    sequence: String,
}

impl Attachment {
    fn of(device: &Path) -> Self {
        let device = LoopDevice::at(device).expect("a loop device");
        Self { device, sequence: Self::sequence(device) }
    }

    fn sequence(device: LoopDevice) -> String {
        fs::read_to_string(device.system_folder().join("diskseq")).expect("a count")
    }

    /// The path of the file, as long as it is attached.
    fn file(&self) -> Option<PathBuf> {
        let file = self.device.attached_to()?;
        (Self::sequence(self.device) == self.sequence).then_some(file)
    }
}

type Stopped = Result<(), StopError>;

/// A volume that is being served on a thread of its own, as the agent does it.
struct Served {
    device: PathBuf,
    link: PathBuf,
    ended: mpsc::Receiver<()>,
    questions: tokio::sync::mpsc::UnboundedSender<Question>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Stopped>>,
}

impl Served {
    fn start(folders: &Folders, memory: &Memory) -> Result<Self, StartError> {
        let (site, memory) = (folders.site(), memory.clone());
        let (started, wait) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let (report_end, ended) = mpsc::channel();
        let (questions, asked) = tokio::sync::mpsc::unbounded_channel();
        let orders = Orders { stopped, asked, report_end };
        let thread = std::thread::spawn(move || serve(site, memory, &started, orders));
        let (device, link) = wait.recv().expect("the serving thread starts or says why not")?;
        Ok(Self { device, link, ended, questions, stop: Some(stop), thread: Some(thread) })
    }

    /// Who has the device open to stay. Whoever looks for a free loop device, as other tests do, opens one that was
    /// taken meanwhile, and a process that is being started has for a moment what its parent has; these are waited for.
    fn openers(&self) -> Vec<String> {
        let own = format!("(pid {})", std::process::id());
        let passes = |user: &String| {
            user.starts_with("open by ") && !user.starts_with("open by sleep ") && !user.contains(&own)
        };
        loop {
            let (answer, wait) = oneshot::channel();
            self.questions.send(Question::Openers(answer)).expect("the serving thread runs");
            let found = wait.blocking_recv().expect("the serving thread answers");
            if !found.iter().any(passes) {
                return found;
            }
        }
    }

    /// Claims the device, which is stopped by that claim then. Those who pass by are waited for.
    fn claim(&self) {
        loop {
            let (answer, wait) = oneshot::channel();
            self.questions.send(Question::Claim(answer)).expect("the serving thread runs");
            if wait.blocking_recv().expect("the serving thread answers") {
                return;
            }
        }
    }

    fn stop(mut self) -> Stopped {
        self.end().expect("it was not stopped before")
    }

    fn end(&mut self) -> Option<Stopped> {
        let _ = self.stop.take()?.send(());
        Some(self.thread.take()?.join().expect("the serving thread does not panic"))
    }

    fn path(&self) -> &str {
        text(&self.device)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.end() {
            eprintln!("{error}");
        }
    }
}

type Started = mpsc::Sender<Result<(PathBuf, PathBuf), StartError>>;

enum Question {
    /// Who has the device open.
    Openers(oneshot::Sender<Vec<String>>),
    /// Whether nobody has, and it is claimed from now on.
    Claim(oneshot::Sender<bool>),
}

/// What passes between a test and the thread that serves for it.
struct Orders {
    stopped: oneshot::Receiver<()>,
    asked: tokio::sync::mpsc::UnboundedReceiver<Question>,
    report_end: mpsc::Sender<()>,
}

fn serve(site: Site, memory: Memory, started: &Started, orders: Orders) -> Stopped {
    let Orders { stopped, mut asked, report_end } = orders;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let pool = BufferPool::new(64 << 20);
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let loopback = match Loopback::start(&site, Rc::new(memory), pool).await {
            Ok(loopback) => loopback,
            Err(error) => {
                started.send(Err(error)).expect("the test waits");
                return Ok(());
            }
        };
        let paths = (loopback.path(), loopback.link().to_owned());
        started.send(Ok(paths)).expect("the test waits");
        let mut claim = None;
        let answer_questions = async {
            while let Some(question) = asked.recv().await {
                match question {
                    Question::Openers(answer) => {
                        let _ = answer.send(openers::look(loopback.path(), true).await.words());
                    }
                    Question::Claim(answer) => {
                        let users = openers::look(loopback.path(), true).await;
                        let is_free = users.is_nobody();
                        claim = users.claim.filter(|_| is_free);
                        let _ = answer.send(claim.is_some());
                    }
                }
            }
        };
        let watch_the_end = async {
            loopback.ended().await;
            let _ = report_end.send(());
            std::future::pending().await
        };
        tokio::select! {
            _ = stopped => {}
            () = answer_questions => {}
            () = watch_the_end => {}
        }
        loopback.stop(claim).await
    })
}

fn memory() -> Memory {
    Memory::new(SIZE_BYTES, false, BufferPool::new(64 << 20))
}

/// A mounted file system, unmounted when dropped.
struct Mounted {
    folder: TempDir,
}

impl Mounted {
    fn new(device: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        run("mount", &[device, text(folder.path())]);
        Self { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

/// Makes files, reads them back after the file system was unmounted, and has them checked.
fn exercise_file_system(device: &str) {
    let content: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    {
        let mounted = Mounted::new(device);
        for number in 0..50 {
            fs::write(mounted.path().join(format!("small {number}")), number.to_string())
                .expect("a small file");
        }
        let mut large = File::create(mounted.path().join("large")).expect("a file");
        large.write_all(&content).expect("a large file");
        large.sync_all().expect("a sync");
    }
    let mounted = Mounted::new(device);
    assert_eq!(fs::read(mounted.path().join("small 49")).expect("a small file"), b"49");
    assert!(fs::read(mounted.path().join("large")).expect("a large file") == content);
}
