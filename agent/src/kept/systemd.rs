//! systemd's descriptor store (sd_notify(3) `FDSTORE`, systemd.service(5) `FileDescriptorStoreMax`): what lies in it is
//! handed to the unit's next process.
//!
//! What was handed over at the start is still in the store, and is not put there again. systemd does not watch the
//! descriptors (`FDPOLL=0`): it would be woken for each request.

use super::{Descriptors, passing};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::collections::HashMap;
use std::env;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// What the names of our descriptors begin with.
const PREFIX: &str = "loop.";

/// Whether this process is one that systemd started and hears of.
pub(super) fn is_there() -> bool {
    env::var_os("NOTIFY_SOCKET").is_some() && (has_store() || env::var_os("INVOCATION_ID").is_some())
}

/// Whether it keeps descriptors also while the unit is stopped (`FileDescriptorStorePreserve`): since version 254, which also
/// says that there is a store.
pub(super) fn has_store() -> bool {
    env::var_os("FDSTORE").is_some()
}

/// A command that runs this program in a unit of its own, which neither the end of the agent's unit ends nor the beginning of a
/// shutdown.
pub(super) fn beside(program: &Path) -> Command {
    let mut command = Command::new("systemd-run");
    command.args(["--scope", "--quiet", "--collect", "--property=DefaultDependencies=no"]).arg(program);
    command
}

/// What lay in the store when this process was started.
pub(super) fn take() -> HashMap<String, Descriptors> {
    let found = match sd_notify::listen_fds_with_names() {
        Ok(found) => found,
        Err(error) => {
            tracing::error!("what systemd keeps can't be taken over: {error}");
            return HashMap::new();
        }
    };
    let mut by_name: HashMap<String, Vec<OwnedFd>> = HashMap::new();
    for (descriptor, name) in found {
        // SAFETY: systemd handed the descriptor to this process, which takes each once.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        // A program that is started must not have it.
        let _ = fcntl_setfd(&descriptor, FdFlags::CLOEXEC);
        if let Some(name) = name.strip_prefix(PREFIX) {
            by_name.entry(name.to_owned()).or_default().push(descriptor);
        }
    }
    by_name.into_iter().filter_map(|(name, found)| Some((name, Descriptors::sort(found)?))).collect()
}

pub(super) fn put(name: &str, descriptors: &Descriptors) -> io::Result<()> {
    // Two of one name could not be told apart.
    remove(name)?;
    tell(&format!("FDSTORE=1\nFDNAME={PREFIX}{name}\nFDPOLL=0\n"), descriptors)
}

pub(super) fn remove(name: &str) -> io::Result<()> {
    passing::send(socket()?, &format!("FDSTOREREMOVE=1\nFDNAME={PREFIX}{name}\n"), &[])
}

fn tell(text: &str, descriptors: &Descriptors) -> io::Result<()> {
    passing::send(socket()?, text, &descriptors.both())
}

fn socket() -> io::Result<OwnedFd> {
    let path = env::var_os("NOTIFY_SOCKET").ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddrUnix::new_abstract_name(name)?,
        None => SocketAddrUnix::new(path.as_bytes())?,
    };
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &address)?;
    Ok(socket)
}

/// Whether the host is being shut down.
pub(super) fn is_stopping() -> bool {
    let asked = Command::new("systemctl").arg("is-system-running").stdin(Stdio::null()).output();
    asked.is_ok_and(|output| output.stdout.trim_ascii() == b"stopping")
}
