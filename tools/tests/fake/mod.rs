//! An agent without volumes of its own: real socket and server, canned answers, and a list of what it was asked.

mod answers;

use blockmirror_agent::config::{Compression, DeviceKind, Mode, Name, Role};
use blockmirror_agent::control::ControlSocket;
use blockmirror_agent::control::api::*;
use blockmirror_agent::verdict;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

/// What the agent answers: its volumes, and for how many questions the first one's replica still lacks something.
pub struct Fake {
    asked: Mutex<Vec<String>>,
    resyncing_answers: Mutex<usize>,
    volumes: Vec<VolumeStatus>,
}

/// A volume called `name`, in sync with b or following a.
pub fn volume(name: &str, role: Role) -> VolumeFacts {
    let (peer, other) = match role {
        Role::Primary => ("b", Role::Replica),
        Role::Replica => ("a", Role::Primary),
    };
    let path = (role == Role::Primary).then(|| format!("/dev/blockmirror/{name}").into());
    VolumeFacts {
        name: name.parse().unwrap(),
        id: "01".repeat(16),
        role,
        size_bytes: 100 << 30,
        block_size_bytes: 4096,
        backing: format!("/srv/{name}.img").into(),
        backing_error: None,
        storage: Some("io_uring".to_owned()),
        devices: path
            .map(|path| DeviceStatus {
                kind: DeviceKind::Loop,
                uri: None,
                path: Some(path),
                error: None,
                warning: None,
            })
            .into_iter()
            .collect(),
        data: Some(CopyState::Consistent),
        epoch: Some(12),
        blocked: None,
        rebuild: None,
        health: Health::default(),
        touched: None,
        backing_users: Vec::new(),
        succession: Succession::default(),
        peers: vec![PeerStatus {
            promised: false,
            name: peer.parse().unwrap(),
            fingerprint: "07".repeat(32),
            role: other,
            addresses: vec![format!("{peer}:7447").parse().unwrap()],
            connection: Connection::Connected,
            connection_seconds: Some(180),
            paused_there: false,
            path: None,
            error: None,
            mode: Mode::Async,
            compression: Compression::Off,
            resync_limit_bytes: None,
            state: (role == Role::Primary).then_some(PeerState::InSync),
            is_beyond: false,
            data: Some(CopyState::Consistent),
            out_of_sync_bytes: (role == Role::Primary).then_some(0),
            lag_bytes: (role == Role::Primary).then_some(0),
            lag_seconds: (role == Role::Primary).then_some(0),
            heard: None,
            durable_epoch: None,
            resync: None,
            compare: None,
        }],
    }
}

/// The same volume while its replica is being copied to.
pub fn resyncing(mut facts: VolumeFacts) -> VolumeFacts {
    let peer = &mut facts.peers[0];
    peer.state = Some(PeerState::Resyncing);
    peer.data = Some(CopyState::Inconsistent);
    peer.out_of_sync_bytes = Some(57 << 30);
    peer.resync = Some(Progress::new(43 << 30, 100 << 30, 120 << 20));
    facts
}

impl Fake {
    /// An agent with these volumes.
    pub fn with(volumes: impl IntoIterator<Item = VolumeFacts>) -> Self {
        let volumes = volumes.into_iter().map(verdict::running).collect();
        Self { asked: Mutex::default(), resyncing_answers: Mutex::default(), volumes }
    }

    /// The first volume's replica is still being copied to for so many status questions.
    pub fn resyncing_for(mut self, answers: usize) -> Self {
        self.resyncing_answers = Mutex::new(answers);
        self
    }

    fn note(&self, text: String) {
        self.asked.lock().unwrap().push(text);
    }

    fn find(&self, name: &Name) -> Result<&VolumeStatus, Failure> {
        let found = self.volumes.iter().find(|volume| volume.facts.name == *name);
        found.ok_or_else(|| Failure::no_such_volume(name))
    }

    fn peer(&self, volume: &Name, name: &Name) -> Result<PeerStatus, Failure> {
        let found = self.find(volume)?.facts.peers.iter().find(|peer| peer.name == *name);
        found.cloned().ok_or_else(|| Failure::no_such_peer(volume, name))
    }

    fn reply(&self, volumes: Vec<VolumeStatus>) -> StatusReply {
        let host = HostStatus {
            name: "a".parse().unwrap(),
            fingerprint: Some("01".repeat(32)),
            version: Some("0.1.0".to_owned()),
            listen: Some("0.0.0.0:7447".parse().unwrap()),
        };
        StatusReply { schema: STATUS_SCHEMA.to_owned(), host, volumes }
    }
}

/// A run folder, a configuration folder, and an agent that serves them until this is dropped.
pub struct Agent {
    folder: tempfile::TempDir,
    fake: Arc<Fake>,
    server: Option<(tokio::sync::oneshot::Sender<()>, std::thread::JoinHandle<()>)>,
}

impl Agent {
    /// Starts an agent that answers from `fake`.
    pub fn start(fake: Fake) -> Self {
        let mut agent = Self { folder: tempfile::tempdir().unwrap(), fake: Arc::new(fake), server: None };
        let socket = ControlSocket::claim(&agent.run(), &agent.record()).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let fake = agent.fake.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                tokio::select! {
                    ended = socket.serve(fake) => panic!("the server ended: {ended:?}"),
                    _ = stopped => {}
                }
            });
        });
        agent.server = Some((stop, thread));
        agent
    }

    /// Stops answering; the socket goes, the record stays.
    pub fn stop(&mut self) {
        if let Some((stop, thread)) = self.server.take() {
            drop(stop);
            thread.join().unwrap();
        }
    }

    /// The run folder.
    pub fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// The configuration's folder.
    pub fn config(&self) -> PathBuf {
        self.folder.path().join("etc")
    }

    fn record(&self) -> AgentRecord {
        AgentRecord {
            pid: std::process::id(),
            config: self.config(),
            state: self.folder.path().join("var"),
            listen: "0.0.0.0:7447".parse().unwrap(),
        }
    }

    /// What it was asked to do, in order.
    pub fn asked(&self) -> Vec<String> {
        self.fake.asked.lock().unwrap().clone()
    }

    /// Runs the tool against this agent.
    pub fn tool(&self, arguments: &[&str]) -> Ended {
        run(&self.run(), arguments)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop();
    }
}

/// How the tool ended.
#[derive(Debug, PartialEq)]
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// What it printed.
    pub output: String,
    /// What it complained about.
    pub errors: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().expect("the tool is not killed by a signal"),
            output: String::from_utf8(output.stdout).unwrap(),
            errors: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// The tool, with its run folder, and without a terminal.
pub fn command(run: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockmirror"));
    command.arg("--run").arg(run).args(arguments).current_dir("/").stdin(Stdio::null());
    command
}

/// Runs the tool.
pub fn run(run: &Path, arguments: &[&str]) -> Ended {
    command(run, arguments).output().unwrap().into()
}
