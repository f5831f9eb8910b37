//! Who uses a block device: file systems, swap, other devices, processes.
//!
//! All is read as text and link targets from `/proc` and `/sys`. No file of another process is opened or asked about:
//! among them may be files of a file system that is on the very device.

use super::mounts;
use std::fs;
use std::path::{Path, PathBuf};

/// Someone who uses the device at `node` (`/dev/loop0`), whose folder in `/sys` is `system_folder`; in words.
///
/// Reads a file and a folder for every process: milliseconds, so not on a volume's thread.
#[must_use]
pub fn find(node: &Path, system_folder: &Path) -> Option<String> {
    find_lasting(node, system_folder).or_else(|| processes().find_map(|process| opened(&process, node)))
}

/// As [`find`], but only users who stay: not those who have it open, perhaps just for a moment.
#[must_use]
pub fn find_lasting(node: &Path, system_folder: &Path) -> Option<String> {
    held(system_folder).or_else(|| swapped_to(node)).or_else(|| {
        let number = fs::read_to_string(system_folder.join("dev")).unwrap_or_default();
        // Each process may have a view of the tree of its own.
        processes().find_map(|process| mounted(&process, node, number.trim()))
    })
}

fn processes() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| is_process(path))
}

fn is_process(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
}

fn held(system_folder: &Path) -> Option<String> {
    let holder = fs::read_dir(system_folder.join("holders")).ok()?.next()?.ok()?;
    Some(format!("used by the device {}", holder.file_name().display()))
}

fn swapped_to(node: &Path) -> Option<String> {
    let swaps = fs::read_to_string("/proc/swaps").ok()?;
    let used = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    used.map(Path::new).any(|path| path == node).then(|| "used as swap space".to_owned())
}

fn mounted(process: &Path, node: &Path, number: &str) -> Option<String> {
    let table = fs::read(process.join("mountinfo")).ok()?;
    let mount = mounts::parse(&table).find(|mount| mount.device == number || mount.source == node)?;
    Some(format!("mounted on {}", mount.point.display()))
}

fn opened(process: &Path, node: &Path) -> Option<String> {
    let mut descriptors = fs::read_dir(process.join("fd")).ok()?.flatten();
    descriptors.find(|descriptor| fs::read_link(descriptor.path()).is_ok_and(|target| target == node))?;
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    let id = process.file_name().unwrap_or_default();
    Some(format!("open in process {} ({})", id.display(), name.trim()))
}
