//! The keeper: a process of ours that does nothing but hold descriptors, where there is no systemd to do it.
//!
//! One for a run folder. The agent starts it when there is first something to keep: its own program with `--keep`, in a
//! session of its own and without a working folder, so that neither a terminal nor an unmounting ends it. Under a systemd whose
//! own store does not outlive a stopped unit, it has a scope of its own. It listens on
//! `keeper.sock` in that folder, which the agent has claimed, and ends by itself when it holds nothing and nobody is connected.
//! While no agent is, it lets go of sessions that have ended, because somebody unmounted them by force.
//!
//! **What is said.** One packet is one message, text and descriptors. The agent says `1 put NAME` with both descriptors,
//! `1 drop NAME`, or `1 list`. The keeper answers `1 kept NAME` with both descriptors for each that is listed, and then, to
//! everything, `1 done`, or `1 no` and why. The number is the version: an upgraded agent finds the keeper of the one before.

use super::{Descriptors, passing, systemd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, fchmod};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    shutdown, socket_with,
};
use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The option that makes the agent's program a keeper.
pub const OPTION: &str = "--keep";

const VERSION: &str = "1 ";
/// How long the keeper may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(5);
const BACKLOG: i32 = 8;
/// It holds no more than this, and no more are connected.
const LIMIT: usize = 4096;
const CONNECTIONS: usize = 16;

/// The keeper, as an agent sees it.
pub(super) struct Keeper {
    path: PathBuf,
    socket: Option<OwnedFd>,
    /// The number of the connection, and of the one whose end somebody waits for.
    connection: u64,
    watched: u64,
    /// The process, if it is this agent's child.
    child: Option<Child>,
    /// Whether it is to outlive the unit of systemd that the agent runs in.
    leaves_unit: bool,
}

impl Keeper {
    /// The keeper of a run folder, and what it holds; none is started where none is there.
    pub(super) fn find(run: &Path, leaves_unit: bool) -> io::Result<(Self, HashMap<String, Descriptors>)> {
        let path = run.join("keeper.sock");
        let mut keeper = Self { path, socket: None, connection: 0, watched: 0, child: None, leaves_unit };
        let address = SocketAddrUnix::new(&keeper.path)?;
        let socket = new_socket()?;
        match connect(&socket, &address) {
            Ok(()) => keeper.connected(with_timeout(socket)?),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => {
                return Ok((keeper, HashMap::new()));
            }
            Err(error) => return Err(error.into()),
        }
        match keeper.ask("list", &[]) {
            Ok(held) => Ok((keeper, held)),
            // It was just ending, because it held nothing.
            Err(error) if is_end(&error) => {
                keeper.let_go();
                Ok((keeper, HashMap::new()))
            }
            Err(error) => Err(error),
        }
    }

    /// Keeps one more. `held` is what was kept before, for a keeper that has to be started.
    pub(super) fn put(
        &mut self,
        name: &str,
        descriptors: &Descriptors,
        held: &HashMap<String, Descriptors>,
    ) -> io::Result<()> {
        let put = format!("put {name}");
        if self.socket.is_some() {
            match self.ask(&put, &descriptors.both()) {
                Err(error) if is_end(&error) => {}
                asked => return asked.map(drop),
            }
        }
        self.start_anew(held)?;
        let asked = self.ask(&put, &descriptors.both()).map(drop);
        if asked.is_err() {
            // It may have ended at once, or be as slow as its systemd; what it says later must be no answer to another order.
            self.abandon();
        }
        asked
    }

    /// Ends a keeper that this agent has just started.
    fn abandon(&mut self) {
        if let Some(child) = &mut self.child {
            // An error means that it has ended by itself.
            let _ = child.kill();
        }
        self.let_go();
    }

    pub(super) fn remove(&mut self, name: &str) -> io::Result<()> {
        match self.ask(&format!("drop {name}"), &[]) {
            Err(error) if is_end(&error) => Ok(()),
            asked => asked.map(drop),
        }
    }

    /// Starts a keeper that holds what is held; or leaves none, rather than one that holds a part of it.
    pub(super) fn start_anew(&mut self, held: &HashMap<String, Descriptors>) -> io::Result<()> {
        self.let_go();
        let started = self.start(held);
        if started.is_err() {
            self.abandon();
        }
        started
    }

    fn start(&mut self, held: &HashMap<String, Descriptors>) -> io::Result<()> {
        remove(&self.path)?;
        let address = SocketAddrUnix::new(&self.path)?;
        let listener = new_socket()?;
        // Before it is bound, so that nobody else can connect in between.
        fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
        bind(&listener, &address)?;
        listen(&listener, BACKLOG)?;
        let mut command = match self.leaves_unit {
            true => systemd::beside(&own_program()?),
            false => Command::new("/proc/self/exe"),
        };
        command.arg(OPTION).current_dir("/").env_clear();
        command.stdin(Stdio::from(listener)).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: setsid(2) is one of the calls that may be made between fork and exec.
        unsafe { command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from)) };
        self.child = Some(command.spawn()?);
        // Its end of the socket is the only one from here on, so that its end is noticed.
        drop(command);
        let socket = new_socket()?;
        connect(&socket, &address)?;
        self.connected(with_timeout(socket)?);
        for (name, descriptors) in held {
            self.ask(&format!("put {name}"), &descriptors.both())?;
        }
        Ok(())
    }

    fn connected(&mut self, socket: OwnedFd) {
        self.socket = Some(socket);
        self.connection += 1;
    }

    /// Leaves a keeper that has ended, or ends now because it holds nothing.
    pub(super) fn let_go(&mut self) {
        if let Some(socket) = self.socket.take() {
            // Whoever watches has a copy of it. An error means that the other side is gone.
            let _ = shutdown(&socket, Shutdown::Both);
            if let Err(error) = remove(&self.path) {
                tracing::debug!("{} can't be removed: {error}", self.path.display());
            }
        }
        if let Some(mut child) = self.child.take() {
            // One that holds something without an agent must not be waited for.
            if !matches!(child.try_wait(), Ok(Some(_))) {
                std::thread::spawn(move || child.wait());
            }
        }
    }

    /// The connection that tells that the keeper has ended, where nobody watches it yet, and its number.
    pub(super) fn connection_to_watch(&mut self) -> Option<(OwnedFd, u64)> {
        let copy = self.socket.as_ref().filter(|_| self.watched != self.connection)?.try_clone().ok()?;
        self.watched = self.connection;
        Some((copy, self.connection))
    }

    /// Whether another keeper took the place of the one at the other end of this connection.
    pub(super) fn is_replaced(&self, connection: u64) -> bool {
        self.socket.is_some() && self.connection != connection
    }

    /// Whether it is systemd that the agent was started by.
    pub(super) fn leaves_unit(&self) -> bool {
        self.leaves_unit
    }

    /// Whether there is none.
    pub(super) fn is_missing(&self) -> bool {
        self.socket.is_none()
    }

    /// The number of the newest connection.
    pub(super) fn connection(&self) -> u64 {
        self.connection
    }

    fn ask(&self, what: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<HashMap<String, Descriptors>> {
        let socket = self.socket.as_ref().ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        passing::send(socket, &format!("{VERSION}{what}"), descriptors)?;
        let mut kept = HashMap::new();
        loop {
            let Some((text, descriptors)) = passing::receive(socket)? else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            let strange = || io::Error::other(format!("the keeper says {text:?}, which is not understood"));
            let words = text.strip_prefix(VERSION).ok_or_else(strange)?;
            match words.split_once(' ').unwrap_or((words, "")) {
                ("done", "") => return Ok(kept),
                ("no", why) => return Err(io::Error::other(why.to_owned())),
                ("kept", name) => {
                    let descriptors = Descriptors::sort(descriptors).ok_or_else(strange)?;
                    kept.insert(name.to_owned(), descriptors);
                }
                _ => return Err(strange()),
            }
        }
    }
}

/// Where this program lies, also where another version was installed over it since.
fn own_program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?.into_os_string().into_vec();
    let path = path.strip_suffix(b" (deleted)").map(<[u8]>::to_vec).unwrap_or(path);
    Ok(PathBuf::from(OsString::from_vec(path)))
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn with_timeout(socket: OwnedFd) -> io::Result<OwnedFd> {
    for direction in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, direction, Some(ANSWER_TIME))?;
    }
    Ok(socket)
}

/// Whether the other side is gone.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected | UnexpectedEof)
}

/// Waits until the other side of a connection is gone.
pub(super) fn wait_for_end(socket: &OwnedFd) {
    loop {
        let mut watched = [PollFd::new(socket, PollFlags::RDHUP)];
        match poll(&mut watched, None) {
            Ok(_) if !watched[0].revents().is_empty() => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// The life of a keeper: holds what it is given until it is told to drop it, on the socket that is standard input.
///
/// # Errors
/// When the socket is none.
pub fn keep() -> io::Result<()> {
    crate::process::prepare();
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    Holding::default().serve(&listener)
}

/// What a keeper has.
#[derive(Default)]
pub(super) struct Holding {
    held: Vec<(String, Descriptors)>,
    connections: Vec<OwnedFd>,
    had_connection: bool,
}

impl Holding {
    pub(super) fn serve(mut self, listener: &OwnedFd) -> io::Result<()> {
        while !(self.had_connection && self.held.is_empty() && self.connections.is_empty()) {
            let (is_called, asking, ended) = self.wait(listener)?;
            for index in asking.into_iter().rev() {
                if !matches!(self.answer(index), Ok(true)) {
                    self.connections.swap_remove(index);
                }
            }
            self.held.retain(|(name, _)| !ended.contains(name));
            if is_called {
                let connection = with_timeout(accept_with(listener, SocketFlags::CLOEXEC)?)?;
                // One too many is closed: left where it is, it would be reported again and again.
                if self.connections.len() < CONNECTIONS {
                    self.connections.push(connection);
                    self.had_connection = true;
                }
            }
        }
        Ok(())
    }

    /// Waits until somebody connects or says something; while nobody is connected, also until a session ends.
    fn wait(&self, listener: &OwnedFd) -> io::Result<(bool, Vec<usize>, Vec<String>)> {
        let mut watched = vec![PollFd::new(listener, PollFlags::IN)];
        watched.extend(self.connections.iter().map(|connection| PollFd::new(connection, PollFlags::IN)));
        if self.connections.is_empty() {
            let sessions = self.held.iter().map(|(_, descriptors)| &descriptors.session);
            watched.extend(sessions.map(|session| PollFd::new(session, PollFlags::empty())));
        }
        loop {
            match poll(&mut watched, None) {
                Err(rustix::io::Errno::INTR) => {}
                polled => {
                    polled?;
                    break;
                }
            }
        }
        let has_news: Vec<bool> = watched.iter().map(|watched| !watched.revents().is_empty()).collect();
        let (connections, sessions) = has_news[1..].split_at(self.connections.len());
        let asking =
            connections.iter().enumerate().filter(|(_, asks)| **asks).map(|(index, _)| index).collect();
        let ended = self.held.iter().zip(sessions).filter(|(_, ended)| **ended);
        Ok((has_news[0], asking, ended.map(|((name, _), _)| name.clone()).collect()))
    }

    /// Answers one message of a connection. Says whether there may be more.
    fn answer(&mut self, connection: usize) -> io::Result<bool> {
        let socket = self.connections[connection].try_clone()?;
        let Some((text, descriptors)) = passing::receive(&socket)? else { return Ok(false) };
        let say = |text: &str, descriptors: &[BorrowedFd<'_>]| {
            passing::send(&socket, &format!("{VERSION}{text}"), descriptors)
        };
        let words = text.strip_prefix(VERSION).unwrap_or_default();
        match words.split_once(' ').unwrap_or((words, "")) {
            ("list", "") => {
                for (name, descriptors) in &self.held {
                    say(&format!("kept {name}"), &descriptors.both())?;
                }
            }
            ("drop", name) => self.held.retain(|(held, _)| held != name),
            ("put", name) if self.held.len() < LIMIT => {
                let Some(descriptors) = Descriptors::sort(descriptors) else {
                    return say("no descriptors of the right kind came", &[]).map(|()| true);
                };
                self.held.retain(|(held, _)| held != name);
                self.held.push((name.to_owned(), descriptors));
            }
            ("put", _) => return say("no more can be held", &[]).map(|()| true),
            _ => return say("no such order is known to this version of the keeper", &[]).map(|()| true),
        }
        say("done", &[]).map(|()| true)
    }
}
