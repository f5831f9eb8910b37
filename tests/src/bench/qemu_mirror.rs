//! qemu's own mirror: a storage daemon that writes each block to its file and to a remote qemu-nbd, and answers when both
//! have it.

use super::Bench;
use super::peers::{Export, qemu_cache, qemu_nbd_tcp};
use super::place::Place;
use super::processes::{PATIENCE, Server, command, until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long the daemon may take to answer a command.
const SILENCE: Duration = Duration::from_secs(20);

/// QEMU's mirror job, from one image to another. In this order: the daemon goes before what it writes to.
pub struct QemuMirror {
    /// How to connect.
    pub uri: String,
    _daemon: Server,
    _far: Export,
}

impl QemuMirror {
    /// A mirror from one file to another, of which it is assumed that they are the same.
    ///
    /// # Errors
    /// When it doesn't come up.
    pub fn start(bench: &Bench, place: &Place, near: &Path, far: &Path) -> Result<Self> {
        let (far, address) = qemu_nbd_tcp(bench, place, "qemu-far", far, None)?;
        let (socket, control) = (bench.run_path("qemu-mirror.sock"), bench.run_path("qemu-mirror.qmp"));
        for stale in [&socket, &control] {
            // Where there is none, that is fine.
            let _ = std::fs::remove_file(stale);
        }
        let [_, aio] = qemu_cache(place);
        let direct = if place.is_direct { "on" } else { "off" };
        let port = address.port();
        let mut daemon = command(
            "qemu-storage-daemon",
            [
                "--blockdev".to_owned(),
                format!(
                    "driver=file,node-name=near,filename={},aio={aio},cache.direct={direct}",
                    near.display()
                ),
                "--blockdev".to_owned(),
                format!("driver=nbd,node-name=far,server.type=inet,server.host=127.0.0.1,server.port={port}"),
                "--chardev".to_owned(),
                format!("socket,id=control,path={},server=on,wait=off", control.display()),
                "--monitor".to_owned(),
                "chardev=control".to_owned(),
                "--nbd-server".to_owned(),
                format!("addr.type=unix,addr.path={}", socket.display()),
                "--export".to_owned(),
                "type=nbd,id=export,node-name=near,name=data,writable=on".to_owned(),
            ],
        );
        let daemon = Server::start("qemu-mirror", &mut daemon, &bench.run_path("qemu-mirror.log"))?;
        let daemon = daemon.ready(|| socket.exists() && control.exists())?;
        begin(&control).context("the mirror can't be started")?;
        let uri = format!("nbd+unix:///data?socket={}", socket.display());
        Ok(Self { uri, _daemon: daemon, _far: far })
    }
}

/// Starts the job, and waits until all that is written goes to both.
fn begin(control: &Path) -> Result<()> {
    let mut socket = UnixStream::connect(control)?;
    socket.set_read_timeout(Some(SILENCE))?;
    let mut lines = BufReader::new(socket.try_clone()?).lines();
    let mut ask = |command: Value| -> Result<Value> {
        writeln!(socket, "{command}")?;
        // Events come in between.
        loop {
            let line: Value = serde_json::from_str(&lines.next().context("it hung up")??)?;
            ensure!(line.get("error").is_none(), "{command}: {line}");
            if let Some(reply) = line.get("return") {
                return Ok(reply.clone());
            }
        }
    };
    ask(json!({ "execute": "qmp_capabilities" }))?;
    ask(json!({ "execute": "blockdev-mirror", "arguments": {
        "job-id": "mirror", "device": "near", "target": "far", "sync": "none", "copy-mode": "write-blocking",
    } }))?;
    until("the mirror is ready", PATIENCE, || {
        let jobs = ask(json!({ "execute": "query-jobs" }))?;
        Ok((jobs[0]["status"] == "ready").then_some(()))
    })
}
