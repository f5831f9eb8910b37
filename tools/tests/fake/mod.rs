//! An agent without volumes of its own: real socket and server, canned answers, and a list of what it was asked.

use blockmirror_agent::config::{Compression, DeviceKind, Mode, Name, Role};
use blockmirror_agent::control::api::*;
use blockmirror_agent::control::{ControlSocket, Operations};
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

impl Operations for Fake {
    async fn status(&self, volume: Option<Name>) -> Result<StatusReply, Failure> {
        let mut volumes = match &volume {
            Some(name) => vec![self.find(name)?.clone()],
            None => self.volumes.clone(),
        };
        let mut left = self.resyncing_answers.lock().unwrap();
        if let (Some(next), Some(volume)) = (left.checked_sub(1), volumes.first_mut()) {
            *left = next;
            *volume = verdict::running(resyncing(volume.facts.clone()));
        }
        Ok(self.reply(volumes))
    }

    async fn create(&self, request: CreateRequest) -> Result<StatusReply, Failure> {
        self.note(format!("create {}", serde_json::to_string(&request).unwrap()));
        if request.backing.ends_with("mounted") {
            return Err(Failure::new(FailureKind::Refused, "the backing is mounted; unmount it first"));
        }
        let mut facts = volume(request.name.as_str(), Role::Primary);
        facts.peers.clear();
        Ok(self.reply(vec![verdict::running(facts)]))
    }

    async fn invite(&self, volume: Name, request: InviteRequest) -> Result<Invitation, Failure> {
        self.note(format!("invite {volume} {}", serde_json::to_string(&request).unwrap()));
        self.find(&volume)?;
        let (expires_seconds, addresses) = (request.expires_seconds, request.addresses);
        let (schema, token) = (INVITATION_SCHEMA.to_owned(), "bm1-token".to_owned());
        Ok(Invitation { schema, volume, token, expires_seconds, addresses })
    }

    async fn invitations(&self, volume: Name) -> Result<InvitationsReply, Failure> {
        self.find(&volume)?;
        let open = (InvitationState::Open, Some(600));
        let states = [("0badcafe", open), ("0badf00d", (InvitationState::Used, None))];
        let invitations = states.map(|(id, (state, left_seconds))| InvitationStatus {
            id: id.to_owned(),
            state,
            left_seconds,
        });
        Ok(InvitationsReply {
            schema: INVITATIONS_SCHEMA.to_owned(),
            volume,
            invitations: invitations.to_vec(),
        })
    }

    async fn revoke(&self, volume: Name, id: String) -> Result<InvitationsReply, Failure> {
        self.note(format!("revoke {volume} {id}"));
        self.invitations(volume).await
    }

    async fn remove_peer(
        &self,
        volume: Name,
        peer: Name,
        request: RemovePeerRequest,
    ) -> Result<PeerRemoval, Failure> {
        self.note(format!("remove {volume} {peer} {}", serde_json::to_string(&request).unwrap()));
        let verdict = verdict::peer_removal(&volume, &peer, &[], &["c".to_owned()], !request.dry_run);
        let (schema, done) = (PEER_REMOVAL_SCHEMA.to_owned(), !request.dry_run);
        Ok(PeerRemoval {
            schema,
            volume,
            peer,
            done,
            told: Vec::new(),
            untold: vec!["c".to_owned()],
            verdict,
        })
    }

    async fn join(&self, request: JoinRequest) -> Result<StatusReply, Failure> {
        self.note(format!("join {}", serde_json::to_string(&request).unwrap()));
        match request.token.as_str() {
            "expired" => Err(Failure::new(FailureKind::Failed, "the token is expired; ask for a new one")),
            "lost" => Err(Failure::new(FailureKind::Timeout, "the primary does not answer")),
            _ => Ok(self.reply(vec![verdict::running(volume("data", Role::Replica))])),
        }
    }

    async fn peers(&self, volume: Name) -> Result<PeersReply, Failure> {
        let peers = self.find(&volume)?.facts.peers.clone();
        Ok(PeersReply { schema: PEERS_SCHEMA.to_owned(), volume, peers })
    }

    async fn pause(&self, volume: Name, peer: Name) -> Result<PeerStatus, Failure> {
        self.note(format!("pause {volume} {peer}"));
        self.peer(&volume, &peer)
    }

    async fn resume(&self, volume: Name, peer: Name) -> Result<PeerStatus, Failure> {
        self.note(format!("resume {volume} {peer}"));
        self.peer(&volume, &peer)
    }

    async fn set_mode(&self, volume: Name, peer: Name, request: ModeRequest) -> Result<PeerStatus, Failure> {
        self.note(format!("mode {volume} {peer} {}", request.mode));
        Ok(PeerStatus { mode: request.mode, ..self.peer(&volume, &peer)? })
    }

    async fn tune(&self, volume: Name, peer: Name, request: TuneRequest) -> Result<PeerStatus, Failure> {
        let TuneRequest { compression, resync_limit_bytes } = request;
        self.note(format!("tune {volume} {peer} {compression:?} {resync_limit_bytes:?}"));
        let known = self.peer(&volume, &peer)?;
        Ok(PeerStatus { compression: compression.unwrap_or_default(), resync_limit_bytes, ..known })
    }

    async fn set_address(
        &self,
        volume: Name,
        peer: Name,
        request: AddressRequest,
    ) -> Result<PeerStatus, Failure> {
        self.note(format!("set-address {volume} {peer} {:?}", request.addresses));
        Ok(PeerStatus { addresses: request.addresses, ..self.peer(&volume, &peer)? })
    }

    /// "data" has a primary that can be reached.
    async fn promote(&self, volume: Name, request: PromoteRequest) -> Result<Promotion, Failure> {
        self.note(format!("promote {volume} {}", request.force));
        self.find(&volume)?;
        if volume.as_str() == "data" && !request.force {
            return Err(Failure::new(FailureKind::Refused, "a is the primary and reachable"));
        }
        Ok(Promotion {
            schema: PROMOTION_SCHEMA.to_owned(),
            volume: self.find(&volume)?.clone(),
            milliseconds: 1234,
            rolled_back_to: request.force.then_some(1_000_000_000),
            unanswered: vec!["a".to_owned()],
        })
    }

    async fn demote(&self, volume: Name) -> Result<Demotion, Failure> {
        self.note(format!("demote {volume}"));
        Ok(Demotion {
            schema: DEMOTION_SCHEMA.to_owned(),
            volume: self.find(&volume)?.clone(),
            released: vec!["b".to_owned()],
            unreleased: vec!["c".to_owned()],
        })
    }

    async fn switch(&self, volume: Name, request: SwitchRequest) -> Result<Switch, Failure> {
        self.note(format!("switch {volume} {}", request.to));
        let to = self.peer(&volume, &request.to)?.name;
        Ok(Switch {
            schema: SWITCH_SCHEMA.to_owned(),
            volume: self.find(&volume)?.clone(),
            to,
            milliseconds_without_writes: 850,
        })
    }

    /// Nothing is split in "other".
    async fn resolve(&self, volume: Name, request: ResolveRequest) -> Result<Resolution, Failure> {
        self.note(format!("resolve {volume} {}", serde_json::to_string(&request).unwrap()));
        let keep = self.peer(&volume, &request.keep)?.name;
        if volume.as_str() == "other" {
            return Err(Failure::new(FailureKind::Refused, "nothing to resolve"));
        }
        Ok(Resolution {
            schema: RESOLUTION_SCHEMA.to_owned(),
            volume: self.find(&volume)?.clone(),
            keep,
            done: !request.dry_run,
            loses: Stake { blocks: Some(10), bytes: Some(40960), since_unix_seconds: Some(1_000_000_000) },
            spares: Stake { blocks: None, bytes: None, since_unix_seconds: None },
            copies_everything: false,
            undo: Some("blockmirror undo data".to_owned()),
            verdict: "keeping b's content gives up 40K".to_owned(),
            alternative: "keeping this host's content would give up nothing".to_owned(),
            action: "none".to_owned(),
        })
    }

    /// Nothing is kept of "other".
    async fn undo(&self, volume: Name) -> Result<Undoing, Failure> {
        self.note(format!("undo {volume}"));
        let status = self.find(&volume)?.clone();
        if volume.as_str() == "other" {
            return Err(Failure::new(FailureKind::Refused, "nothing is kept here"));
        }
        let schema = UNDOING_SCHEMA.to_owned();
        Ok(Undoing { schema, volume: status, restored_bytes: 12 << 20, back_to: 1_000_000_000 })
    }

    async fn release(&self, volume: Name, request: ReleaseRequest) -> Result<Release, Failure> {
        self.note(format!("release {volume} {}", request.force));
        self.find(&volume)?;
        let users = vec!["mounted at /srv/data (ext4)".to_owned()];
        if !request.force {
            return Err(Failure::new(FailureKind::Refused, format!("the device is in use: {}", users[0])));
        }
        Ok(Release { schema: RELEASE_SCHEMA.to_owned(), volume, users })
    }

    async fn forget(&self, volume: Name) -> Result<Forgetting, Failure> {
        self.note(format!("forget {volume}"));
        let status = self.find(&volume)?.clone();
        Ok(Forgetting { schema: FORGETTING_SCHEMA.to_owned(), volume: status, forgotten_bytes: 12 << 20 })
    }

    /// The copy of "other" differs; a part of "unreadable" can't be read.
    async fn compare(&self, volume: Name, peer: Name) -> Result<Comparison, Failure> {
        self.note(format!("compare {volume} {peer}"));
        self.peer(&volume, &peer)?;
        let ranges = match volume.as_str() {
            "other" => vec![Difference { offset: 8192, length: 4096 }],
            _ => Vec::new(),
        };
        let unreadable = match volume.as_str() {
            "unreadable" => vec![Difference { offset: 4 << 20, length: 4 << 20 }],
            _ => Vec::new(),
        };
        let bytes_of = |ranges: &[Difference]| ranges.iter().map(|range| range.length).sum::<u64>();
        let (different_bytes, unreadable_bytes) = (bytes_of(&ranges), bytes_of(&unreadable));
        let (verdict, action) =
            verdict::comparison(&volume, &peer, 100 << 30, different_bytes, unreadable_bytes, true);
        let schema = COMPARISON_SCHEMA.to_owned();
        let (compared_bytes, seconds) = (100 << 30, 90);
        Ok(Comparison {
            schema,
            volume,
            peer,
            compared_bytes,
            different_bytes,
            ranges,
            unreadable_bytes,
            unreadable,
            seconds,
            verdict,
            action,
        })
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
