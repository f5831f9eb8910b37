//! Programs that do the same work, each set up as its manual says for the same guarantees.
//!
//! On a disk, only those that pass the page cache by are compared with: a server that answers a write from memory is
//! faster than any disk. What such a one does is told all the same.

use super::Bench;
use super::place::Place;
use super::processes::{Server, command};
use crate::machines::programs::has;
use anyhow::Result;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A server of an NBD export.
pub struct Export {
    /// Its process.
    pub server: Server,
    /// How to connect.
    pub uri: String,
    socket: Option<PathBuf>,
}

impl Drop for Export {
    fn drop(&mut self) {
        // Where it is gone already, that is fine.
        let _ = self.socket.take().map(fs::remove_file);
    }
}

/// A socket that a server listens on is there. Nothing connects: some servers end with their first client.
fn unix(bench: &Bench, name: &str, mut command: Command, export: &str) -> Result<Export> {
    let socket = bench.run_path(&format!("{name}.sock"));
    let server = Server::start(name, &mut command, &bench.run_path(&format!("{name}.log")))?;
    let server = server.ready(|| socket.exists())?;
    let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
    Ok(Export { server, uri, socket: Some(socket) })
}

/// A free TCP port on this machine.
///
/// # Errors
/// When there is none.
pub fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Whether somebody listens on a TCP port of this machine, without connecting to it.
#[must_use]
pub fn listens(address: SocketAddr) -> bool {
    // The fields are: number, local address, remote address, state; 0A is "listening".
    let wanted = format!(":{:04X}", address.port());
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    table.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&wanted)) && fields.nth(1) == Some("0A")
    })
}

/// Why a contestant is out, if one of its programs is missing.
#[must_use]
pub fn missing(programs: &[&str]) -> Option<String> {
    programs.iter().find(|program| !has(program)).map(|program| format!("{program} is not installed"))
}

/// nbdkit's file plugin. It always uses the page cache; with `cache=none` it lets go of pages as soon as it can.
///
/// # Errors
/// When it doesn't come up.
pub fn nbdkit(bench: &Bench, place: &Place, name: &str, file: &Path) -> Result<Export> {
    let socket = bench.run_path(&format!("{name}.sock"));
    let mut nbdkit = command("nbdkit", ["--foreground", "--exit-with-parent", "--unix"]);
    nbdkit.arg(socket).arg("file").arg(file);
    if place.is_disk() {
        nbdkit.args(["cache=none", "fadvise=random"]);
    }
    unix(bench, name, nbdkit, "")
}

/// What qemu's programs are told about a file at this place.
pub(super) fn qemu_cache(place: &Place) -> [&'static str; 2] {
    if place.is_direct { ["none", "io_uring"] } else { ["writeback", "threads"] }
}

fn qemu_nbd_command(place: &Place, file: &Path) -> Command {
    let [cache, aio] = qemu_cache(place);
    let mut qemu = command("qemu-nbd", ["--format=raw", "--persistent", "--shared=16", "--discard=unmap"]);
    qemu.arg(format!("--cache={cache}")).arg(format!("--aio={aio}")).arg(file);
    qemu
}

/// qemu-nbd on a Unix socket.
///
/// # Errors
/// When it doesn't come up.
pub fn qemu_nbd(bench: &Bench, place: &Place, name: &str, file: &Path) -> Result<Export> {
    let mut qemu = qemu_nbd_command(place, file);
    qemu.arg("--socket").arg(bench.run_path(&format!("{name}.sock")));
    unix(bench, name, qemu, "")
}

/// qemu-nbd on a TCP port of this machine, with TLS where there are keys: a folder in which the user `bench` has one in
/// `keys.psk`.
///
/// # Errors
/// When it doesn't come up.
pub fn qemu_nbd_tcp(
    bench: &Bench,
    place: &Place,
    name: &str,
    file: &Path,
    keys: Option<&Path>,
) -> Result<(Export, SocketAddr)> {
    let address = free_port()?;
    let mut qemu = qemu_nbd_command(place, file);
    qemu.arg("--bind=127.0.0.1").arg(format!("--port={}", address.port()));
    let mut uri = format!("nbd://{address}");
    if let Some(keys) = keys {
        qemu.arg("--object").arg(format!("tls-creds-psk,id=tls,endpoint=server,dir={}", keys.display()));
        qemu.arg("--tls-creds=tls");
        uri = format!("nbds://bench@{address}/?tls-psk-file={}", keys.join("keys.psk").display());
    }
    let server = Server::start(name, &mut qemu, &bench.run_path(&format!("{name}.log")))?;
    let server = server.ready(|| listens(address))?;
    Ok((Export { server, uri, socket: None }, address))
}

/// A folder with a key that a client and a server of TLS share.
///
/// # Errors
/// When it can't be made.
pub fn tls_keys(bench: &Bench) -> Result<PathBuf> {
    let folder = bench.run_path("tls");
    fs::create_dir_all(&folder)?;
    let key: String = fs::read("/proc/sys/kernel/random/uuid")?
        .iter()
        .filter(|byte| byte.is_ascii_hexdigit())
        .map(|byte| char::from(*byte))
        .collect();
    fs::write(folder.join("keys.psk"), format!("bench:{key}\n"))?;
    Ok(folder)
}

/// nbd-server. It always uses the page cache. It makes itself a daemon, or serves one client only; so it lives in a
/// process namespace that ends with it.
///
/// # Errors
/// When it doesn't come up.
pub fn nbd_server(bench: &Bench, name: &str, file: &Path) -> Result<Export> {
    let (socket, settings) =
        (bench.run_path(&format!("{name}.sock")), bench.run_path(&format!("{name}.conf")));
    let port = free_port()?.port();
    let text = format!(
        "[generic]\nunixsock = {}\nlistenaddr = 127.0.0.1\nport = {port}\n\
         [data]\nexportname = {}\nflush = true\nfua = true\ntrim = true\n",
        socket.display(),
        file.display()
    );
    fs::write(&settings, text)?;
    let mut unshare = command("unshare", ["--fork", "--pid", "--kill-child", "sh", "-c"]);
    unshare.arg("nbd-server -C \"$0\" && exec sleep infinity").arg(&settings);
    unix(bench, name, unshare, "data")
}
