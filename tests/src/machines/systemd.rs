//! The part of systemd that an agent's descriptors lie in: a notification socket that takes them (sd_notify(3)), and a
//! start that hands them over (sd_listen_fds(3)).

use rustix::io::dup;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags,
    SocketType, bind, recvmsg, socket_with,
};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

/// What lies in the store, with its names.
type Stored = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// What stands for systemd beside one agent.
pub struct Systemd {
    socket: PathBuf,
    stored: Stored,
}

impl Systemd {
    /// One that listens at a path.
    ///
    /// # Panics
    /// When it can't.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        let listener = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
        let listener = listener.expect("a socket");
        bind(&listener, &SocketAddrUnix::new(socket).expect("an address")).expect("a free name");
        let stored = Stored::default();
        let for_thread = stored.clone();
        // It ends with the process.
        std::thread::spawn(move || {
            while let Some((text, descriptors)) = receive(&listener) {
                take(&text, descriptors, &for_thread);
            }
        });
        Self { socket: socket.to_owned(), stored }
    }

    /// The names of what lies in the store.
    ///
    /// # Panics
    /// Never: no holder of the lock panics.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.stored.lock().expect("no holder panics").iter().map(|(name, _)| name.clone()).collect()
    }

    /// The command as systemd starts it, with what lies in the store.
    ///
    /// # Panics
    /// When there are no more descriptors.
    #[must_use]
    pub fn start(&self, command: &Command) -> Command {
        let stored = self.stored.lock().expect("no holder panics");
        let mut started = Command::new("sh");
        // Only the process itself knows its number.
        started.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]).arg(command.get_program());
        started.args(command.get_args());
        started.env("NOTIFY_SOCKET", &self.socket).env("FDSTORE", "1024");
        if !stored.is_empty() {
            started.env("LISTEN_FDS", stored.len().to_string());
            let names: Vec<&str> = stored.iter().map(|(name, _)| name.as_str()).collect();
            started.env("LISTEN_FDNAMES", names.join(":"));
        }
        // Above all that they are to become.
        let copies: Vec<OwnedFd> =
            stored.iter().map(|(_, descriptor)| dup(descriptor).expect("a descriptor")).collect();
        let hand_over = move || {
            for (index, descriptor) in copies.iter().enumerate() {
                let high = move_up(descriptor.as_raw_fd())?;
                let low = 3 + RawFd::try_from(index).expect("there are few");
                // SAFETY: both are numbers; what is replaced belongs to a process that is about to become another.
                if unsafe { libc::dup2(high, low) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: it makes calls to the kernel alone.
        unsafe { started.pre_exec(hand_over) };
        started
    }
}

/// A copy that is out of the way of those that are handed over, and closed when the program begins.
fn move_up(descriptor: RawFd) -> std::io::Result<RawFd> {
    // SAFETY: the call takes plain numbers.
    match unsafe { libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 500) } {
        -1 => Err(std::io::Error::last_os_error()),
        copy => Ok(copy),
    }
}

fn receive(socket: &OwnedFd) -> Option<(String, Vec<OwnedFd>)> {
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).ok()?;
    let rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptors = rights.flatten().collect();
    Some((String::from_utf8_lossy(&text[..received.bytes]).into_owned(), descriptors))
}

fn take(text: &str, descriptors: Vec<OwnedFd>, stored: &Stored) {
    let is_there = |line: &str| text.lines().any(|said| said == line);
    let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
    let mut stored = stored.lock().expect("no holder panics");
    if is_there("FDSTOREREMOVE=1") {
        stored.retain(|(known, _)| known != name);
    } else if is_there("FDSTORE=1") {
        stored.extend(descriptors.into_iter().map(|descriptor| (name.to_owned(), descriptor)));
    }
}
