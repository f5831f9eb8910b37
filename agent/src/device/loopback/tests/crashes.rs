//! What a killed agent leaves, and how the next one deals with it.

use super::{
    Attachment, Folders, Mounted, Orders, Served, exercise_file_system, memory, obstacle, require, run,
    serve, site_in, text,
};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use tokio::sync::oneshot;

const CRASHING_FOLDER: &str = "BLOCKMIRROR_TEST_CRASHING_FOLDER";

/// Not a test: the process that the tests of crashes kill.
#[test]
fn serves_until_it_is_killed() {
    let Ok(folder) = std::env::var(CRASHING_FOLDER) else { return };
    let site = site_in(Path::new(&folder));
    let (started, wait) = mpsc::channel();
    let (_stop, stopped) = oneshot::channel();
    let (_questions, asked) = tokio::sync::mpsc::unbounded_channel();
    let orders = Orders { stopped, asked, report_end: mpsc::channel().0 };
    let thread = std::thread::spawn(move || serve(site, memory(), &started, orders));
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
            .args(["--exact", "device::loopback::tests::crashes::serves_until_it_is_killed", "--nocapture"])
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
    let old = Attachment::of(Path::new(&old_device));
    crashing.0.kill();

    let memory = memory();
    let served = Served::start(&folders, &memory).expect("a device");
    assert_ne!(served.path(), old_device);
    run("mkfs.ext4", &["-q", served.path()]);
    exercise_file_system(served.path());
    served.stop().expect("a clean stop");
    assert_eq!(folders.leftovers(), [""; 0]);
    assert!(old.file().is_some());
    drop(mounted);
    assert_eq!(old.file(), None, "it detached itself");
}

#[test]
fn a_device_whose_mount_went_with_the_crashed_agent_is_found_by_its_link() {
    require!();
    let folders = Folders::new();
    let mut crashing = CleanedUp(Crashing::start(&folders), &folders);
    // As when the agent had a tree of mounts of its own, which ends with it.
    run("umount", &["--lazy", text(&folders.mount_point())]);
    crashing.0.kill();
    let old = Attachment::of(Path::new(&crashing.0.device));
    assert_eq!(old.file().expect("a file"), Path::new("/"));
    folders.clean_up().expect("a clean-up");
    assert_eq!(old.file(), None);
    assert_eq!(folders.leftovers(), [""; 0]);
}
