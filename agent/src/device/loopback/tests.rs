//! The loop front end on the real kernel: file systems, discards, flushes, crashes.
//!
//! Everything that a test mounts or attaches has an owner whose `Drop` takes it away, so a test that fails leaves
//! nothing either. Tests skip themselves, with the reason, without root, FUSE, loop devices or a program they need.

use super::{Loopback, Options, StartError, StopError, clean_up_stale, mounts};
use crate::buffer::BufferPool;
use crate::device::Errno;
use crate::device::memory::Memory;
use blockmirror_protocol::ranges::ByteRange;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
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

macro_rules! require {
    ($($program:literal),*) => {
        if let Some(obstacle) = obstacle(&[$($program),*]) {
            eprintln!("skipped: {obstacle}");
            return;
        }
    };
}

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

/// Folders of a test's own.
struct Folders {
    folder: TempDir,
}

impl Folders {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn options(&self) -> Options {
        let folder = self.folder.path();
        Options { name: "data".to_owned(), run_folder: folder.join("run"), device_folder: folder.join("dev") }
    }

    fn mount_point(&self) -> PathBuf {
        self.folder.path().join("run/data.fuse")
    }

    fn clean_up(&self) -> Result<(), StartError> {
        let Options { name, run_folder, device_folder } = self.options();
        clean_up_stale(&name, &run_folder, &device_folder)
    }

    /// What is left on the host of devices in these folders.
    fn leftovers(&self) -> Vec<String> {
        let point = self.mount_point();
        let mut left = Vec::new();
        left.extend(
            (mounts::count_ours(&point).expect("a table of mounts") > 0).then(|| "a mount".to_owned()),
        );
        let devices = super::LoopDevice::all_attached_to(&point).expect("/sys/block");
        left.extend(devices.iter().map(|device| device.path().display().to_string()));
        for path in [point, self.options().device_folder.join("data")] {
            // A file under a dead mount is there, but says nothing about itself.
            let missing = fs::symlink_metadata(&path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
            left.extend((!missing).then(|| path.display().to_string()));
        }
        left
    }
}

type Stopped = Result<(), StopError>;

/// A volume that is being served on a thread of its own, as the agent does it.
struct Served {
    device: PathBuf,
    link: PathBuf,
    questions: tokio::sync::mpsc::UnboundedSender<oneshot::Sender<Option<String>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Stopped>>,
}

impl Served {
    fn start(folders: &Folders, memory: &Memory) -> Result<Self, StartError> {
        let (options, memory) = (folders.options(), memory.clone());
        let (started, wait) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let (questions, asked) = tokio::sync::mpsc::unbounded_channel();
        let thread = std::thread::spawn(move || serve(options, memory, &started, stopped, asked));
        let (device, link) = wait.recv().expect("the serving thread starts or says why not")?;
        Ok(Self { device, link, questions, stop: Some(stop), thread: Some(thread) })
    }

    fn in_use(&self) -> Option<String> {
        let (answer, wait) = oneshot::channel();
        self.questions.send(answer).expect("the serving thread runs");
        wait.blocking_recv().expect("the serving thread answers")
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

fn serve(
    options: Options,
    memory: Memory,
    started: &Started,
    stopped: oneshot::Receiver<()>,
    mut asked: tokio::sync::mpsc::UnboundedReceiver<oneshot::Sender<Option<String>>>,
) -> Stopped {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
    let pool = BufferPool::new(64 << 20);
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let loopback = match Loopback::start(&options, Rc::new(memory), pool).await {
            Ok(loopback) => loopback,
            Err(error) => {
                started.send(Err(error)).expect("the test waits");
                return Ok(());
            }
        };
        let paths = (loopback.path(), loopback.link().to_owned());
        started.send(Ok(paths)).expect("the test waits");
        let answer_questions = async {
            while let Some(question) = asked.recv().await {
                let _ = question.send(loopback.in_use().await);
            }
        };
        tokio::select! {
            _ = stopped => {}
            () = answer_questions => {}
        }
        loopback.stop().await
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

#[test]
fn ext4_lives_on_it() {
    require!("mkfs.ext4", "e2fsck");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run("mkfs.ext4", &["-q", text(&served.link)]);
    exercise_file_system(served.path());
    run("e2fsck", &["-f", "-n", served.path()]);
    assert!(memory.seen().flushes > 0);
    served.stop().expect("a clean stop");
    assert_eq!(folders.leftovers(), [""; 0]);
}

#[test]
fn xfs_lives_on_it() {
    require!("mkfs.xfs", "xfs_repair");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run("mkfs.xfs", &["-q", served.path()]);
    exercise_file_system(served.path());
    run("xfs_repair", &["-n", served.path()]);
    served.stop().expect("a clean stop");
}

#[test]
fn the_loop_device_does_direct_io_and_shows_whose_it_is() {
    require!("losetup");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let shown =
        run("losetup", &["--noheadings", "--raw", "--output", "DIO,LOG-SEC,RO", "--list", served.path()]);
    assert_eq!(shown.split_whitespace().collect::<Vec<_>>(), ["1", "512", "0"]);
    let attached = fs::read_to_string(format!("/sys/block/{}/loop/backing_file", &served.path()[5..]));
    assert_eq!(Path::new(attached.expect("an attached file").trim()), folders.mount_point());
    assert_eq!(fs::read_link(&served.link).expect("a link"), served.device);
    assert_eq!(size_of_device(&served.device), SIZE_BYTES);
}

/// A block device's size, which its metadata does not tell.
fn size_of_device(path: &Path) -> u64 {
    File::open(path).expect("a device").seek(SeekFrom::End(0)).expect("a size")
}

#[test]
fn discards_and_zeroing_arrive_as_ranges() {
    require!("blkdiscard", "fallocate");
    let (folders, memory) = (Folders::new(), memory());
    memory.write(0, &[7; 40 << 20]);
    let served = Served::start(&folders, &memory).expect("a device");
    let at = |offset: u64, length: u64| [offset.to_string(), length.to_string()];
    let [offset, length] = at(MIB, 3 * MIB);
    run("blkdiscard", &["--offset", &offset, "--length", &length, served.path()]);
    let [offset, length] = at(10 * MIB, 5 * MIB);
    run(
        "fallocate",
        &["--zero-range", "--keep-size", "--offset", &offset, "--length", &length, served.path()],
    );
    let [offset, length] = at(20 * MIB, 6 * MIB);
    run("fallocate", &["--punch-hole", "--offset", &offset, "--length", &length, served.path()]);
    let [offset, length] = at(30 * MIB, MIB);
    run("blkdiscard", &["--zeroout", "--offset", &offset, "--length", &length, served.path()]);
    let zeroed = memory.seen().zeroed;
    let total = |offset: u64, length: u64, may_unmap| {
        let area = ByteRange::new(offset, length);
        let parts = zeroed.iter().filter(|(range, unmap)| area.contains(*range) && *unmap == may_unmap);
        parts.map(|(range, _)| range.length).sum::<u64>()
    };
    assert_eq!(total(MIB, 3 * MIB, true), 3 * MIB, "{zeroed:?}");
    assert_eq!(total(10 * MIB, 5 * MIB, false), 5 * MIB, "{zeroed:?}");
    assert_eq!(total(20 * MIB, 6 * MIB, true), 6 * MIB, "{zeroed:?}");
    assert_eq!(total(30 * MIB, MIB, false), MIB, "{zeroed:?}");
    assert!(memory.read(ByteRange::new(MIB, 3 * MIB)).iter().all(|byte| *byte == 0));
    assert!(memory.read(ByteRange::new(4 * MIB, 6 * MIB)).iter().all(|byte| *byte == 7));
    assert_eq!(memory.seen().writes, 0, "nothing was written to zero it");
}

#[test]
fn a_sync_of_the_device_arrives_as_a_flush() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let device = OpenOptions::new().write(true).open(&served.device).expect("a device");
    device.write_all_at(&[5; 8192], 4096).expect("a write");
    let before = memory.seen();
    device.sync_all().expect("a sync");
    let after = memory.seen();
    assert!(after.flushes > before.flushes, "{before:?} {after:?}");
    assert_eq!(&memory.read(ByteRange::new(4096, 8192))[..], [5; 8192]);
}

#[test]
fn errors_of_the_volume_reach_the_application() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&served.device);
    let device = device.expect("a device");
    let mut block = BufferPool::new(0).take(4096);
    for failure in [libc::EIO, libc::ENOSPC, 0, 4096] {
        memory.fail(Some(Errno(failure)));
        assert!(device.read_exact_at(&mut block, MIB).is_err(), "{failure}");
        assert!(device.write_all_at(&block, MIB).is_err(), "{failure}");
        assert!(device.sync_all().is_err(), "{failure}");
    }
    memory.fail(None);
    device.write_all_at(&block, MIB).expect("a write");
    device.sync_all().expect("a sync");
}

#[test]
fn many_random_writes_read_back_as_written() {
    require!("fio");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run(
        "fio",
        &[
            "--name=verify",
            &format!("--filename={}", served.path()),
            "--rw=randwrite",
            "--bsrange=512-2m",
            "--blockalign=512",
            "--size=64m",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
        ],
    );
    let seen = memory.seen();
    assert!(seen.writes > 0 && seen.reads > 0, "{seen:?}");
}

#[test]
fn a_read_only_volume_is_a_read_only_device() {
    require!("mkfs.ext4");
    let (folders, written) = (Folders::new(), memory());
    written.write(MIB, &[9; 4096]);
    let memory = written.copy(true);
    let served = Served::start(&folders, &memory).expect("a device");
    let mut block = [0; 4096];
    File::open(&served.device).expect("a device").read_exact_at(&mut block, MIB).expect("a read");
    assert_eq!(block, [9; 4096]);
    assert_eq!(size_of_device(&served.device), SIZE_BYTES);
    let ro = fs::read_to_string(format!("/sys/block/{}/ro", &served.path()[5..])).expect("an attribute");
    assert_eq!(ro.trim(), "1");
    let made = Command::new("mkfs.ext4").args(["-q", "-F", served.path()]).output().expect("mkfs.ext4");
    assert!(!made.status.success());
    let refused = OpenOptions::new().write(true).open(folders.mount_point()).expect_err("a refusal");
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    assert_eq!(memory.seen().writes, 0);
}

#[test]
fn the_file_itself_takes_aligned_requests_within_its_size_only() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let _served = Served::start(&folders, &memory).expect("a device");
    let file = OpenOptions::new().read(true).write(true).open(folders.mount_point()).expect("the file");
    let errno = |result: std::io::Result<usize>| result.expect_err("a refusal").raw_os_error();
    file.write_all_at(&[3; 1024], 512).expect("an aligned write");
    assert_eq!(errno(file.write_at(&[3; 100], 512)), Some(libc::EINVAL));
    assert_eq!(errno(file.write_at(&[3; 512], 100)), Some(libc::EINVAL));
    assert_eq!(errno(file.read_at(&mut [0; 100], 512)), Some(libc::EINVAL));
    assert_eq!(errno(file.write_at(&[3; 1024], SIZE_BYTES - 512)), Some(libc::ENOSPC));
    assert_eq!(file.read_at(&mut [0; 1024], SIZE_BYTES - 512).expect("a short read"), 512);
    assert_eq!(file.read_at(&mut [0; 1024], SIZE_BYTES).expect("an empty read"), 0);
    assert_eq!(file.metadata().expect("attributes").len(), SIZE_BYTES);
    assert_eq!(file.set_len(4096).expect_err("a refusal").raw_os_error(), Some(libc::EPERM));
    file.set_len(SIZE_BYTES).expect("no change");
    let mut large = BufferPool::new(0).take(3 << 20);
    file.read_exact_at(&mut large, 0).expect("a large read");
    assert!(large[512..1536].iter().all(|byte| *byte == 3) && large[1536] == 0);
}

#[test]
fn starting_and_stopping_many_times_leaves_nothing() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    for _ in 0..20 {
        let served = Served::start(&folders, &memory).expect("a device");
        assert!(served.link.exists());
        served.stop().expect("a clean stop");
        assert_eq!(folders.leftovers(), [""; 0]);
    }
}

#[test]
fn a_device_that_is_served_is_not_started_again_nor_cleaned_up() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    assert!(matches!(Served::start(&folders, &memory), Err(StartError::Served(_))));
    assert!(matches!(folders.clean_up(), Err(StartError::Served(_))));
    File::open(&served.link).expect("the device is still there");
    served.stop().expect("a clean stop");
}

#[test]
fn a_link_that_cannot_be_made_leaves_nothing() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let foreign = folders.options().device_folder.join("data");
    fs::create_dir_all(&foreign).expect("a folder where the link should be");
    let error = Served::start(&folders, &memory).err().expect("a refusal");
    assert!(matches!(error, StartError::Io { operation: "make the link", .. }), "{error:?}");
    fs::remove_dir(&foreign).expect("the folder is untouched");
    assert_eq!(folders.leftovers(), [""; 0]);
}

#[test]
fn who_uses_a_device_is_known_before_and_after_it_is_stopped() {
    require!("mkfs.ext4");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    assert_eq!(served.in_use(), None);
    run("mkfs.ext4", &["-q", served.path()]);
    let opened = File::open(&served.device).expect("a device");
    let user = served.in_use().expect("a user");
    assert!(user.contains(&format!("process {} ", std::process::id())), "{user}");
    drop(opened);
    let mounted = Mounted::new(served.path());
    let expected = format!("mounted on {}", mounted.path().display());
    assert_eq!(served.in_use(), Some(expected.clone()));
    let device = served.device.clone();
    let error = served.stop().expect_err("the device is in use");
    assert!(
        matches!(&error, StopError::InUse { user, path } if *user == expected && *path == device),
        "{error}"
    );
    assert!(File::open(device).expect("it is there").read_exact_at(&mut [0; 4096], 100 * MIB).is_err());
    drop(mounted);
    assert_eq!(folders.leftovers(), [""; 0]);
}

const CRASHING_FOLDER: &str = "BLOCKMIRROR_TEST_CRASHING_FOLDER";

/// Not a test: the process that the tests of crashes kill.
#[test]
fn serves_until_it_is_killed() {
    let Ok(folder) = std::env::var(CRASHING_FOLDER) else { return };
    let folder = PathBuf::from(folder);
    let options = Options {
        name: "data".to_owned(),
        run_folder: folder.join("run"),
        device_folder: folder.join("dev"),
    };
    let (started, wait) = mpsc::channel();
    let (_stop, stopped) = oneshot::channel();
    let (_questions, asked) = tokio::sync::mpsc::unbounded_channel();
    let thread = std::thread::spawn(move || serve(options, memory(), &started, stopped, asked));
    let (device, _) = wait.recv().expect("an answer").expect("a device");
    println!("\ndevice {}", device.display());
    let _ = thread.join();
}

/// Another process that serves a device until it is killed.
struct Crashing {
    child: Child,
    device: String,
}

impl Crashing {
    fn start(folders: &Folders) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "device::loopback::tests::serves_until_it_is_killed", "--nocapture"])
            .env(CRASHING_FOLDER, folders.folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a child");
        let mut lines =
            BufReader::new(child.stdout.take().expect("its output")).lines().map_while(Result::ok);
        let device = lines.find_map(|line| Some(line.strip_prefix("device ")?.to_owned()));
        Self { child, device: device.expect("the child says which device it serves") }
    }

    fn kill(&mut self) {
        self.child.kill().expect("a kill");
        self.child.wait().expect("an end");
    }
}

/// Kills the child and takes away what it leaves.
struct CleanedUp<'a>(Crashing, &'a Folders);

impl Drop for CleanedUp<'_> {
    fn drop(&mut self) {
        let _ = (self.0.child.kill(), self.0.child.wait());
        let _ = self.1.clean_up();
    }
}

#[test]
fn what_a_crash_leaves_is_cleaned_up_by_the_next_start() {
    require!();
    let folders = Folders::new();
    let mut crashing = CleanedUp(Crashing::start(&folders), &folders);
    crashing.0.kill();
    assert_eq!(folders.leftovers().len(), 4, "a mount, a device, a file, a link: {:?}", folders.leftovers());
    folders.clean_up().expect("a clean-up");
    assert_eq!(folders.leftovers(), [""; 0]);

    crashing.0 = Crashing::start(&folders);
    crashing.0.kill();
    let memory = memory();
    let served = Served::start(&folders, &memory).expect("a device");
    OpenOptions::new().write(true).open(&served.link).expect("the new device").sync_all().expect("a sync");
    served.stop().expect("a clean stop");
    assert_eq!(folders.leftovers(), [""; 0]);
}

#[test]
fn a_file_system_still_mounted_after_a_crash_keeps_its_device_and_the_volume_gets_another() {
    require!("mkfs.ext4");
    let folders = Folders::new();
    let mut crashing = CleanedUp(Crashing::start(&folders), &folders);
    let old_device = crashing.0.device.clone();
    run("mkfs.ext4", &["-q", &old_device]);
    let mounted = Mounted::new(&old_device);
    crashing.0.kill();

    let memory = memory();
    let served = Served::start(&folders, &memory).expect("a device");
    assert_ne!(served.path(), old_device);
    run("mkfs.ext4", &["-q", served.path()]);
    exercise_file_system(served.path());
    served.stop().expect("a clean stop");
    assert_eq!(folders.leftovers(), [""; 0]);
    let old_name = &old_device[5..];
    assert!(Path::new("/sys/block").join(old_name).join("loop/backing_file").exists());
    drop(mounted);
    assert!(!Path::new("/sys/block").join(old_name).join("loop/backing_file").exists(), "it detached itself");
}
