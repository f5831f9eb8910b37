//! The socket in the file system: made with the right mode, never stolen from a living server, removed at the end.

use super::ListenError;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixSocket};

/// How many clients may wait to be accepted.
const BACKLOG: u32 = 128;

/// The file of a listening socket; removed when this is dropped, unless another server has replaced it.
pub(super) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the nbd socket");
        }
    }
}

/// Listens on `path` with mode 0600, after removing a socket there that nobody accepts on.
pub(super) fn listen(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    remove_stale(path)?;
    let listener = bind(path).map_err(failed("listen on", path))?;
    let found = fs::symlink_metadata(path).map_err(failed("look at", path))?;
    Ok((listener, SocketFile { path: path.to_owned(), device: found.dev(), inode: found.ino() }))
}

/// Linux gives the socket's own mode to the file that `bind` makes (unix_bind in net/unix/af_unix.c), so there is no
/// moment in which anybody else could connect.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let socket = UnixSocket::new_stream()?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(path)?;
    socket.listen(BACKLOG)
}

fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed("look at", path)(source)),
    };
    if !found.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    if is_live(path).map_err(failed("connect to", path))? {
        return Err(ListenError::AlreadyServed { path: path.to_owned() });
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Whether somebody accepts on the socket. Never waits: a full queue has a server behind it too.
fn is_live(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ListenError {
    let place = path.display().to_string();
    move |source| ListenError::Io { operation, place, source }
}
