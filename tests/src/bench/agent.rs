//! Agents of Blockmirror's own, as processes with folders of their own, and the operator's tool.

use super::Bench;
use super::place::Place;
use super::processes::{PATIENCE, Server, command, say, until};
use crate::machines::programs::own;
use anyhow::{Context, Result, ensure};
use blockmirror_agent::control::api::{Connection, PeerState, PeerStatus, StatusReply, VolumeStatus};
use blockmirror_agent::control::socket_path;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long an agent may take to answer.
const SILENCE: Duration = Duration::from_secs(60);

/// An agent. Ended in order when it is dropped, and its folders are removed.
pub struct Agent {
    server: Option<Server>,
    name: String,
    home: PathBuf,
    run: PathBuf,
    listen: SocketAddr,
    namespace: Option<String>,
    /// Where its programs are, if they are those of another release.
    programs: Option<PathBuf>,
}

impl Agent {
    /// One whose configuration and state are at a place, and which has started.
    ///
    /// # Errors
    /// When it doesn't come up.
    pub fn start(bench: &Bench, place: &Place, name: &str) -> Result<Self> {
        let mut agent = Self::prepare(bench, place, name)?;
        agent.begin()?;
        Ok(agent)
    }

    /// One that was not started.
    ///
    /// # Errors
    /// When its folders can't be made.
    pub fn prepare(bench: &Bench, place: &Place, name: &str) -> Result<Self> {
        let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
        Self::prepare_at(bench, place, name, port, None)
    }

    /// One that listens at this address, within a network namespace.
    ///
    /// # Errors
    /// When its folders can't be made.
    pub fn prepare_at(
        bench: &Bench,
        place: &Place,
        name: &str,
        listen: SocketAddr,
        namespace: Option<&str>,
    ) -> Result<Self> {
        let (home, run) = (place.path(&format!("agent-{name}")), bench.run_path(name));
        remove(&home)?;
        remove(&run)?;
        fs::create_dir_all(home.join("config"))?;
        fs::create_dir_all(&run)?;
        let settings = format!("name = \"{name}\"\nadvertise = [\"{listen}\"]\n");
        fs::write(home.join("config/agent.toml"), settings)?;
        let namespace = namespace.map(str::to_owned);
        Ok(Self { server: None, name: name.to_owned(), home, run, listen, namespace, programs: None })
    }

    /// The same, with programs of another release, which are in this folder.
    #[must_use]
    pub fn of_release(mut self, programs: &Path) -> Self {
        self.programs = Some(programs.to_owned());
        self
    }

    fn program(&self, name: &str) -> PathBuf {
        self.programs.as_ref().map_or_else(|| own(name), |folder| folder.join(name))
    }

    /// Sets one of the agent's own settings, a text, before it is started.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set(&self, key: &str, value: &str) -> Result<()> {
        let mut file = fs::File::options().append(true).open(self.home.join("config/agent.toml"))?;
        Ok(writeln!(file, "{key} = \"{value}\"")?)
    }

    /// Starts it, and waits until it answers, which it does when all of its volumes are open.
    ///
    /// # Errors
    /// When it doesn't come up.
    pub fn begin(&mut self) -> Result<()> {
        let mut agent = self.within(self.program("blockmirror-agent"));
        for folder in ["config", "state"] {
            agent.arg(format!("--{folder}")).arg(self.home.join(folder));
        }
        agent.arg("--run").arg(&self.run).arg("--devices").arg(self.run.join("devices"));
        agent.arg("--listen").arg(self.listen.to_string());
        let server = Server::start(&format!("the agent {}", self.name), &mut agent, &self.run.join("log"))?;
        self.server = Some(server.ready(|| self.status().is_ok())?);
        Ok(())
    }

    /// A program of ours in the agent's network namespace.
    fn within(&self, program: PathBuf) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some(namespace) => {
                let mut command = command("nsenter", [format!("--net=/run/netns/{namespace}")]);
                command.arg(program);
                command
            }
        }
    }

    /// Ends it in order; its folders stay.
    pub fn end(&mut self) {
        self.server = None;
    }

    /// What its peers call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process.
    ///
    /// # Errors
    /// When it does not run.
    pub fn server(&self) -> Result<&Server> {
        self.server.as_ref().context("the agent does not run")
    }

    /// Runs the tool, which must succeed, and gives what it printed.
    ///
    /// # Errors
    /// When it fails; with what the agent said.
    pub fn tool(&self, arguments: &[&str]) -> Result<String> {
        let mut tool = self.within(self.program("blockmirror"));
        say(tool.arg("--run").arg(&self.run).args(arguments)).with_context(|| {
            let said = self.server.as_ref().map(Server::said).unwrap_or_default();
            format!("the agent {} said: {said}", self.name)
        })
    }

    /// Makes a volume of a backing that exists, served by these devices (`nbd`, `loop`, `none`).
    ///
    /// # Errors
    /// When that fails.
    pub fn create(&self, volume: &str, backing: &Path, devices: &str) -> Result<()> {
        self.tool(&["create", volume, "--backing", path(backing)?, "--device", devices])?;
        Ok(())
    }

    /// Makes this host a replica of another one's volume.
    ///
    /// # Errors
    /// When that fails.
    pub fn join(&self, primary: &Self, volume: &str, backing: &Path) -> Result<()> {
        let token = primary.tool(&["invite", volume])?;
        self.tool(&["join", token.trim(), "--backing", path(backing)?])?;
        Ok(())
    }

    /// The socket of a volume's NBD export.
    #[must_use]
    pub fn socket(&self, volume: &str) -> PathBuf {
        self.run.join(format!("{volume}.nbd"))
    }

    /// A volume's NBD export.
    #[must_use]
    pub fn uri(&self, volume: &str) -> String {
        format!("nbd+unix:///{volume}?socket={}", self.socket(volume).display())
    }

    /// A volume's loop device.
    #[must_use]
    pub fn device(&self, volume: &str) -> PathBuf {
        self.run.join("devices").join(volume)
    }

    /// Where it listens for its peers.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listen
    }

    /// Its run folder, which the tool is told.
    #[must_use]
    pub fn run_folder(&self) -> &Path {
        &self.run
    }

    /// How everything stands; asked directly, since a process for each look would be a load by itself.
    ///
    /// # Errors
    /// When the agent doesn't answer.
    pub fn status(&self) -> Result<StatusReply> {
        let mut socket = UnixStream::connect(socket_path(&self.run))?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.write_all(b"GET /v1/status HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n")?;
        let mut reply = Vec::new();
        socket.read_to_end(&mut reply)?;
        let end_of_head = reply.windows(4).position(|bytes| bytes == b"\r\n\r\n").context("no answer")?;
        ensure!(reply.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&reply));
        Ok(serde_json::from_slice(&reply[end_of_head + 4..])?)
    }

    /// How the volume `data` stands.
    ///
    /// # Errors
    /// When the agent doesn't answer or doesn't have it.
    pub fn volume(&self) -> Result<VolumeStatus> {
        let is_it = |volume: &VolumeStatus| volume.facts.name.as_str() == "data";
        self.status()?.volumes.into_iter().find(is_it).context("there is no volume data")
    }

    /// The first peer of the volume `data`.
    ///
    /// # Errors
    /// When there is none, or the agent doesn't answer.
    pub fn peer(&self) -> Result<PeerStatus> {
        self.volume()?.facts.peers.into_iter().next().context("the volume has no peer")
    }

    /// Waits until the volume's first peer is so.
    ///
    /// # Errors
    /// When it takes too long.
    pub fn wait_for_peer(&self, what: &str, is_so: impl Fn(&PeerStatus) -> bool) -> Result<PeerStatus> {
        let mut last = None;
        let look = || {
            let peer = self.peer().ok();
            last.clone_from(&peer);
            Ok(peer.filter(|peer| is_so(peer)))
        };
        until(what, PATIENCE, look).with_context(|| format!("last: {last:?}"))
    }

    /// Waits until the replica has everything, and nothing is on its way.
    ///
    /// # Errors
    /// When it takes too long.
    pub fn wait_until_in_sync(&self) -> Result<()> {
        self.wait_for_peer("the replica has everything", is_quiet).map(drop)
    }
}

/// Whether a replica has everything, and nothing is on its way.
#[must_use]
pub fn is_quiet(peer: &PeerStatus) -> bool {
    is_in_sync(peer) && peer.lag_bytes == Some(0)
}

/// Whether a replica has everything but what is on its way.
#[must_use]
pub fn is_in_sync(peer: &PeerStatus) -> bool {
    peer.connection == Connection::Connected
        && peer.state == Some(PeerState::InSync)
        && peer.out_of_sync_bytes == Some(0)
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("paths are text")
}

fn remove(folder: &Path) -> Result<()> {
    if folder.exists() { Ok(fs::remove_dir_all(folder)?) } else { Ok(()) }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.end();
        // What is left of them is removed with the bench's own folders.
        let _ = remove(&self.home);
        let _ = remove(&self.run);
    }
}
