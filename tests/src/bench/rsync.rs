//! rsync to this same machine: from a daemon of its own, and through an ssh server of its own.

use super::Bench;
use super::peers::{free_port, listens};
use super::processes::{Server, command, run, say};
use anyhow::Result;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What makes it copy without looking for what is the same, and end when the copy is durable.
const OPTIONS: [&str; 3] = ["--whole-file", "--inplace", "--fsync"];
/// The name of the copy, in the folder that is copied into.
pub const COPY: &str = "rsync.img";

/// An rsync daemon.
pub struct Daemon {
    _server: Server,
    address: SocketAddr,
}

impl Daemon {
    /// One that takes files into a folder.
    ///
    /// # Errors
    /// When it doesn't come up.
    pub fn start(bench: &Bench, folder: &Path) -> Result<Self> {
        let address = free_port()?;
        let settings = bench.run_path("rsyncd.conf");
        let text = format!(
            "use chroot = no\nuid = root\ngid = root\npid file =\n[copy]\npath = {}\nread only = no\n",
            folder.display()
        );
        fs::write(&settings, text)?;
        let mut rsync = command("rsync", ["--daemon", "--no-detach", "--address=127.0.0.1"]);
        rsync.arg(format!("--port={}", address.port())).arg("--config").arg(settings);
        let server = Server::start("rsync", &mut rsync, &bench.run_path("rsync.log"))?;
        Ok(Self { _server: server.ready(|| listens(address))?, address })
    }

    /// Copies a file into the folder, as [`COPY`].
    #[must_use]
    pub fn command(&self, source: &Path) -> Command {
        let mut rsync = command("rsync", OPTIONS);
        rsync.arg(source).arg(format!("rsync://{}/copy/{COPY}", self.address));
        rsync
    }
}

/// An ssh server that lets this user in.
pub struct Secure {
    _server: Server,
    address: SocketAddr,
    key: PathBuf,
}

impl Secure {
    /// One with keys of its own.
    ///
    /// # Errors
    /// When it doesn't come up, or doesn't let us in.
    pub fn start(bench: &Bench) -> Result<Self> {
        let address = free_port()?;
        let folder = bench.run_path("ssh");
        fs::create_dir_all(&folder)?;
        // The server wants this one to exist.
        fs::create_dir_all("/run/sshd")?;
        for key in ["host", "user"] {
            let path = folder.join(key);
            if !path.exists() {
                run(command("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path))?;
            }
        }
        let settings = folder.join("sshd_config");
        let text = format!(
            "ListenAddress {address}\nHostKey {0}/host\nAuthorizedKeysFile {0}/user.pub\nPidFile none\n\
             StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n",
            folder.display()
        );
        fs::write(&settings, text)?;
        let program = say(command("sh", ["-c", "command -v sshd"]).env_clear().env("PATH", path()))?;
        let mut sshd = command(program.trim(), ["-D", "-e", "-f"]);
        let server = Server::start("sshd", sshd.arg(settings), &bench.run_path("sshd.log"))?;
        let server = server.ready(|| listens(address))?;
        let secure = Self { _server: server, address, key: folder.join("user") };
        run(Command::new("sh").arg("-c").arg(format!("{} 127.0.0.1 true", secure.ssh())))?;
        Ok(secure)
    }

    fn ssh(&self) -> String {
        let (port, key) = (self.address.port(), self.key.display());
        format!(
            "ssh -p {port} -i {key} -o BatchMode=yes -o StrictHostKeyChecking=no \
             -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        )
    }

    /// Copies a file into a folder, as [`COPY`].
    #[must_use]
    pub fn command(&self, source: &Path, folder: &Path) -> Command {
        let mut rsync = command("rsync", OPTIONS);
        rsync.arg("-e").arg(self.ssh()).arg(source);
        rsync.arg(format!("127.0.0.1:{}", folder.join(COPY).display()));
        rsync
    }
}

/// sshd insists on being called by its whole path, which is where administrators' programs are.
fn path() -> String {
    format!("{}:/usr/local/sbin:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
