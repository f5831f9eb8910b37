//! New volumes on this host: made by the operator, or joined with a token.
//!
//! The volume's configuration file is written last: without it nothing of the volume exists for the agent, and what an
//! interrupted attempt left is removed by the next one.

use super::files::{self, ANSWER_TIME};
use super::learning::Lesson;
use super::operations::{Operator, finish};
use super::{Entry, Supervisor, failed, refused};
use crate::buffer::BufferPool;
use crate::config::{Name, Role, VOLUME_LIMIT_BYTES, VolumeConfig};
use crate::control::api::{CreateRequest, Failure, FailureKind, JoinRequest, StatusReply};
use crate::control::verbs::CarryOut;
use crate::state::Unrecovered;
use crate::state::backing;
use crate::storage::file::{Access, File, OpenError};
use crate::storage::{self, probe};
use crate::token::Token;
use crate::transport::{AskError, key};
use crate::volume::Learned;
use crate::words::with_causes;
use blockmirror_protocol::disk::superblock::{Role as SuperblockRole, Superblock};
use blockmirror_protocol::terms::{DataState, Fence};
use blockmirror_protocol::units::{BlockSize, CopyId, GenerationId, SECTOR_BYTES, VolumeId};
use blockmirror_protocol::wire::message::{Join, Joined, Member, Members, Message};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a primary may take to take a host in: others wait meanwhile that want to be made or to join here.
const JOIN_TIME: Duration = Duration::from_secs(60);

/// How long it is tried to hear an answer that was lost, and how long after an attempt the next one follows.
const AGAIN_TIME: Duration = Duration::from_secs(10);
const AGAIN_PAUSE: Duration = Duration::from_secs(1);

/// How long it may take to look at a backing, or to make it.
const LOOK_TIME: Duration = Duration::from_secs(20);
/// How long it is tried to find out whether two paths lead to one file.
const PATH_TIME: Duration = Duration::from_secs(2);
/// How long a new volume may take to open before its status is given as it is.
const OPENING_TIME: Duration = Duration::from_secs(30);

/// A backing that was looked at, and made where it was missing.
pub(super) struct Prepared {
    pub(super) size_bytes: u64,
    pub(super) made: bool,
}

/// Why a primary has not said that this host has joined.
enum NotJoined {
    /// It said no.
    Refused(Failure),
    /// It was not asked.
    Unheard(Failure),
    /// It may have been asked, and nothing came back.
    Lost(Failure),
}

impl From<NotJoined> for Failure {
    fn from(not: NotJoined) -> Self {
        let (NotJoined::Refused(failure) | NotJoined::Unheard(failure) | NotJoined::Lost(failure)) = not;
        failure
    }
}

/// Why this host is no member, or is not known to be one.
enum NotTaken {
    /// The primary has not taken it in.
    Refused(Failure),
    /// It may have.
    Unknown(Failure),
}

impl CarryOut<CreateRequest> for Operator {
    async fn carry_out(&self, (): (), request: CreateRequest) -> Result<StatusReply, Failure> {
        // A tool that goes away leaves the volume whole, not half made.
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.make(request).await })).await
    }
}

impl CarryOut<JoinRequest> for Operator {
    async fn carry_out(&self, (): (), request: JoinRequest) -> Result<StatusReply, Failure> {
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.join_with(request).await })).await
    }
}

impl Supervisor {
    async fn make(&self, request: CreateRequest) -> Result<StatusReply, Failure> {
        let _one_at_a_time = self.making.lock().await;
        self.must_be_free(&request.name, &request.backing).await?;
        let block_size = match request.block_size_bytes {
            Some(bytes) => BlockSize::new(bytes).map_err(|error| usage(error.to_string()))?,
            None => BlockSize::default(),
        };
        let (backing, wanted) = (request.backing.clone(), request.size_bytes);
        let prepared = in_time(&request.backing, move || prepare(&backing, wanted)).await?;
        let config = VolumeConfig {
            devices: request.devices,
            ..VolumeConfig::new(
                request.name.clone(),
                VolumeId(key::random()),
                Role::Primary,
                request.backing.clone(),
                request.size_bytes.unwrap_or(prepared.size_bytes),
                block_size,
            )
        };
        let copy = CopyId(key::random());
        let superblock = Superblock {
            role: SuperblockRole::Primary,
            data: DataState::Consistent,
            fence: Fence { counter: 1, holder: self.endpoint.id() },
            lineage: vec![GenerationId(key::random())],
            agreed: 1,
            heirs: Vec::new(),
            ..Superblock::empty(config.id, copy, config.size_bytes, block_size)
        };
        self.set_up(config, superblock, prepared.made).await
    }

    async fn join_with(&self, request: JoinRequest) -> Result<StatusReply, Failure> {
        let _one_at_a_time = self.making.lock().await;
        let token = Token::parse(&request.token).map_err(|error| usage(error.to_string()))?;
        if let Some(config) = self.config_of(token.volume).await {
            return self.join_again(&config, &request, &token).await;
        }
        let asked = self.ask_to_join(&token, true).await?;
        let name: Name = asked.name.parse().map_err(|_| failed("the primary's volume has no usable name"))?;
        self.must_be_free(&name, &request.backing).await?;
        let (backing, wanted) = (request.backing.clone(), Some(asked.size_bytes));
        let prepared = in_time(&request.backing, move || {
            let prepared = prepare(&backing, wanted)?;
            if !prepared.made {
                must_be_blank(&backing, request.overwrite)?;
            }
            Ok(prepared)
        })
        .await?;
        let config = self.replica_config(&request, &name, &asked);
        let copy = CopyId(key::random());
        let superblock = Superblock {
            source: Fence { counter: 0, holder: token.host },
            ..Superblock::empty(asked.volume, copy, asked.size_bytes, asked.block_size)
        };
        // The volume is ready before the token is used up, because the primary dials at once.
        let reply = self.set_up(config, superblock, prepared.made).await?;
        match self.be_taken_in(&token).await {
            Ok(_) => Ok(reply),
            Err(NotTaken::Refused(failure)) => {
                self.discard(&name, &request.backing, prepared.made).await;
                Err(failure)
            }
            // Where the primary has taken this host in, it would keep a member that is not there.
            Err(NotTaken::Unknown(failure)) => Err(failed(format!(
                "{}: it is not known whether the primary has taken this host in; the volume {name} stays here. If it has, it \
                 mirrors to this host by itself; to make sure, run the same command again, with this token or a new one",
                failure.message
            ))),
        }
    }

    /// Has the primary take this host in. It may be asked again where its answer was lost: a host that it has taken in is
    /// told so once more.
    async fn be_taken_in(&self, token: &Token) -> Result<Joined, NotTaken> {
        let first = match self.ask_to_join(token, false).await {
            Ok(joined) => return Ok(joined),
            Err(NotJoined::Refused(failure)) => return Err(NotTaken::Refused(failure)),
            Err(NotJoined::Unheard(failure)) => return Err(NotTaken::Refused(failure)),
            Err(NotJoined::Lost(failure)) => failure,
        };
        let began = Instant::now();
        while began.elapsed() < AGAIN_TIME {
            tokio::time::sleep(AGAIN_PAUSE).await;
            if let Ok(joined) = self.ask_to_join(token, false).await {
                return Ok(joined);
            }
        }
        // Also where it refuses now: a primary of an earlier release says that the token was used, perhaps by this host.
        Err(NotTaken::Unknown(first))
    }

    /// Makes a replica that is here known to its primary, which lost or never learned of it: a join that a crash cut
    /// short left the volume without the primary's knowledge, and one whose answer was lost without this host's.
    async fn join_again(
        &self,
        config: &VolumeConfig,
        request: &JoinRequest,
        token: &Token,
    ) -> Result<StatusReply, Failure> {
        let (name, backing) = (&config.name, config.backing.display());
        if config.role != Role::Replica || config.backing != request.backing {
            let text = format!("there is a volume {name} on this host already, with the backing {backing}");
            return Err(refused(text));
        }
        // A connection that the primary has forgotten shows here, where nothing is used up.
        self.ask_to_join(token, true).await?;
        let joined = self.be_taken_in(token).await.map_err(|not| match not {
            NotTaken::Refused(failure) | NotTaken::Unknown(failure) => failure,
        })?;
        let told = Members { members: joined.members, removed: Vec::new() };
        self.learn_now(name, Lesson::Found(Learned::Members(told))).await?;
        self.status_of(vec![name.clone()]).await
    }

    /// Takes back a volume that did not come to be.
    async fn discard(&self, name: &Name, backing: &Path, made: bool) {
        let entry = self.volumes.lock().await.remove(name);
        if let Some(entry) = entry {
            // One that hangs is told of by what comes next.
            let _ = entry.handle.stop().await;
        }
        let (state, file) = (self.state_folder(name), self.folders.config.volume_path(name));
        let (path, backing) = (state.clone(), backing.to_owned());
        let remove = move || {
            // The next attempt removes what is left, unless it was a volume.
            if let Err(error) = backing::forget(&state) {
                tracing::warn!("{}", with_causes(&error));
            }
            remove_file(&file);
            remove_state(&state);
            remove_made(&backing, made);
        };
        if let Err(silent) = files::in_time(&path, LOOK_TIME, remove).await {
            tracing::warn!("{silent}");
        }
    }

    /// Writes state and configuration, and starts the volume.
    async fn set_up(
        &self,
        config: VolumeConfig,
        superblock: Superblock,
        made: bool,
    ) -> Result<StatusReply, Failure> {
        let (name, state) = (config.name.clone(), self.state_folder(&config.name));
        let (folder, written, path) = (self.folders.config.clone(), config.clone(), state.clone());
        let is_given_up = Arc::new(AtomicBool::new(false));
        let is_unwanted = is_given_up.clone();
        let write = move || {
            let saved = write_state(&state, &superblock)
                .and_then(|()| folder.save_volume(&written).map_err(|error| failed(with_causes(&error))));
            let is_unwanted = is_unwanted.load(Ordering::Relaxed);
            if is_unwanted {
                remove_file(&folder.volume_path(&written.name));
            }
            if is_unwanted || saved.is_err() {
                remove_made(&written.backing, made);
                remove_state(&state);
            }
            saved
        };
        match files::in_time(&path, LOOK_TIME, write).await {
            Ok(written) => written?,
            Err(silent) => {
                // What was begun is taken back when the disk answers.
                is_given_up.store(true, Ordering::Relaxed);
                return Err(failed(silent.to_string()));
            }
        }
        let opened = self.start(config).await?;
        // An error means that the thread died, or takes long; the status will tell.
        let _ = tokio::time::timeout(OPENING_TIME, opened).await;
        self.status_of(vec![name]).await
    }

    async fn must_be_free(&self, name: &Name, backing: &Path) -> Result<(), Failure> {
        let path = self.folders.config.volume_path(name);
        let (is_taken, others) = {
            let volumes = self.volumes.lock().await;
            let backing_of = |entry: &Entry| (entry.config.name.clone(), entry.config.backing.clone());
            (volumes.contains_key(name), volumes.values().map(backing_of).collect::<Vec<_>>())
        };
        let is_on_disk = {
            let (folder, path) = (self.folders.config.path(), path.clone());
            let looked = files::in_time(folder, ANSWER_TIME, move || path.exists()).await;
            looked.map_err(|silent| failed(silent.to_string()))?
        };
        if is_taken || is_on_disk {
            let text = format!("there is a volume {name} on this host already ({})", path.display());
            return Err(refused(text));
        }
        for (other, its_backing) in others {
            if is_same(backing, its_backing).await {
                return Err(refused(format!("{} is the backing of the volume {other}", backing.display())));
            }
        }
        let (folder, name) = (self.state_folder(name), name.clone());
        let state = folder.clone();
        let clear = move || {
            if backing::is_on_record(&folder) {
                return Err(refused(format!(
                    "{} holds the state of a volume {name} that is not configured any more: put {} back, or move that \
                     folder away",
                    folder.display(),
                    path.display()
                )));
            }
            // An attempt that was interrupted before its configuration was written never became a volume.
            match std::fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    let folder = folder.display();
                    Err(failed(format!("cannot remove what an earlier attempt left in {folder}: {error}")))
                }
                _ => Ok(()),
            }
        };
        files::in_time(&state, ANSWER_TIME, clear).await.map_err(|silent| failed(silent.to_string()))?
    }

    async fn ask_to_join(&self, token: &Token, ask_only: bool) -> Result<Joined, NotJoined> {
        let join = Join {
            volume: token.volume,
            secret: token.secret.0,
            name: self.name.to_string(),
            listen: self.told_addresses(),
            ask_only,
        };
        let join = join.into();
        let answered = async {
            match ask_only {
                true => self.peers.ask(token.host, &token.addresses, &join).await,
                // The token is used up by it.
                false => self.peers.ask_once(token.host, &token.addresses, &join).await,
            }
        };
        let asked = tokio::time::timeout(JOIN_TIME, answered);
        let answered = asked.await.map_err(|_| {
            NotJoined::Lost(failed("the primary does not answer; look at `blockmirror status` there"))
        })?;
        match answered {
            Ok((_, Message::Joined(joined))) if !Member::are_sound(&joined.members) => {
                let text = "the primary tells of more hosts, names or addresses than a volume has";
                Err(NotJoined::Refused(failed(text)))
            }
            Ok((_, Message::Joined(joined))) if joined.volume == token.volume => Ok(joined),
            Ok((_, Message::Refused(no))) => Err(NotJoined::Refused(refused(no.text))),
            Ok(_) => {
                let text = "the primary answered with something else; is it of another version?";
                Err(NotJoined::Refused(failed(text)))
            }
            Err(error @ AskError::Unreachable(_)) => Err(NotJoined::Unheard(failed(with_causes(&error)))),
            Err(error) => Err(NotJoined::Lost(failed(with_causes(&error)))),
        }
    }

    fn replica_config(&self, request: &JoinRequest, name: &Name, joined: &Joined) -> VolumeConfig {
        let mut config = VolumeConfig::new(
            name.clone(),
            joined.volume,
            Role::Replica,
            request.backing.clone(),
            joined.size_bytes,
            joined.block_size,
        );
        for (index, member) in joined.members.iter().enumerate() {
            if member.host != self.endpoint.id() {
                let role = if index == 0 { Role::Primary } else { Role::Replica };
                let peer = config.peer_of(member, role);
                config.peers.push(peer);
            } else {
                config.version = member.version;
            }
        }
        config
    }
}

/// Looks at a path for the operator, who is told when it takes too long: a disk or a server that hangs must not hold up
/// what else the agent is asked for. The thread that waits for it is left behind.
pub(super) async fn in_time<T: Send + 'static>(
    path: &Path,
    look: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::time::timeout(LOOK_TIME, tokio::task::spawn_blocking(look)).await {
        Ok(looked) => looked.unwrap_or_else(|_| Err(failed("the agent failed inside; see its log"))),
        Err(_) => Err(failed(format!(
            "{} does not answer: its disk or its file server hangs; use another, or try again when it answers",
            path.display()
        ))),
    }
}

/// Whether two paths lead to one file. Of another volume's backing that hangs the name alone is compared; the claim on
/// an open backing is what keeps two volumes apart.
pub(super) async fn is_same(one: &Path, other: PathBuf) -> bool {
    let (one, named_so) = (one.to_owned(), one == other);
    let look = move || match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => named_so,
    };
    let looked = tokio::time::timeout(PATH_TIME, tokio::task::spawn_blocking(look)).await;
    looked.map_or(named_so, |looked| looked.unwrap_or(named_so))
}

/// Looks at a backing, and makes an image file where there is none and the size is known.
pub(super) fn prepare(path: &Path, wanted: Option<u64>) -> Result<Prepared, Failure> {
    if let Some(bytes) = wanted
        && (bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) || bytes > VOLUME_LIMIT_BYTES)
    {
        return Err(usage(format!(
            "{bytes} bytes is no size for a volume: use a multiple of 512, at most 16P"
        )));
    }
    match File::open_backing(path, Access::ReadWrite) {
        Ok(file) => {
            let size_bytes = file.size_bytes();
            if let Some(wanted) = wanted.filter(|wanted| *wanted > size_bytes) {
                let text = format!("{} has {size_bytes} bytes, the volume needs {wanted}", path.display());
                return Err(refused(text));
            }
            Ok(Prepared { size_bytes, made: false })
        }
        Err(OpenError::NotFound { .. }) => {
            let Some(size_bytes) = wanted else {
                return Err(usage(format!("{} does not exist; give --size to make it", path.display())));
            };
            File::create_image(path, size_bytes).map_err(|error| failed(with_causes(&error)))?;
            Ok(Prepared { size_bytes, made: true })
        }
        Err(error @ OpenError::Io { .. }) => Err(failed(with_causes(&error))),
        Err(error) => Err(refused(with_causes(&error))),
    }
}

/// A replica's backing is overwritten whole, so it must hold nothing, or the operator must say so.
pub(super) fn must_be_blank(path: &Path, overwrite: bool) -> Result<(), Failure> {
    let file = File::open_backing(path, Access::ReadWrite).map_err(|error| refused(with_causes(&error)))?;
    let found = probe::what_is_on(&file)
        .map_err(|error| failed(format!("cannot look at {}: {error}", path.display())))?;
    match found {
        Some(content) if !overwrite => {
            let path = path.display();
            Err(refused(format!(
                "{path} carries {content}; use another backing, or --overwrite to destroy that"
            )))
        }
        _ => Ok(()),
    }
}

/// Writes a new volume's state folder. A storage belongs to the thread that made it, so this is for a thread that nobody
/// else needs.
fn write_state(folder: &Path, superblock: &Superblock) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| failed(format!("no runtime can be had: {error}")))?;
    let local = tokio::task::LocalSet::new();
    runtime.block_on(local.run_until(async {
        let storage = storage::open().map_err(|error| failed(format!("no storage can be had: {error}")))?;
        let created = Unrecovered::create(folder, storage, BufferPool::new(1 << 20), superblock).await;
        created.map(|_| ()).map_err(|error| failed(with_causes(&error)))
    }))
}

/// What can't be removed is removed by the next attempt.
fn remove_state(folder: &Path) {
    if let Err(error) = std::fs::remove_dir_all(folder) {
        tracing::warn!("{} can't be removed: {error}", folder.display());
    }
}

fn remove_file(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!("{} can't be removed: {error}", path.display());
    }
}

fn remove_made(path: &Path, made: bool) {
    if made && let Err(error) = std::fs::remove_file(path) {
        tracing::warn!(path = %path.display(), "the image that was just made can't be removed: {error}");
    }
}

fn usage(text: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Usage, text)
}
