//! A host that has a volume's content and lets recoveries read it, as a replica does, with knobs for what can go
//! wrong.

use blockmirror_agent::buffer::BufferPool;
use blockmirror_agent::recovery::{Source, serve};
use blockmirror_agent::storage;
use blockmirror_agent::storage::faults::{Calls, Faults};
use blockmirror_agent::storage::file::{Access, File};
use blockmirror_agent::token::{Secret, Token};
use blockmirror_agent::transport::{
    CloseReason, Connection, ControlReceiver, ControlSender, Endpoint, HostKey, Incoming,
};
use blockmirror_protocol::disk::recovery::CHUNK_BYTES;
use blockmirror_protocol::lineage::Ends;
use blockmirror_protocol::terms::{DataState, Fence, Role};
use blockmirror_protocol::units::{
    BlockSize, CopyId, Epoch, GenerationId, HostId, Position, Sequence, VolumeId,
};
use blockmirror_protocol::wire::message::{
    Message, Other, Others, Recover, Recovering, Refusal, Refused, Standing,
};
use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use tokio::sync::{oneshot, watch};

pub const VOLUME: VolumeId = VolumeId([1; 16]);
pub const NAME: &str = "data";

/// What the host does, to be set by a test at any time.
#[derive(Clone, Default)]
pub struct Knobs {
    /// Who is let in by key; everybody when nothing is said.
    pub member: Option<HostId>,
    /// The secret of the invitation.
    pub secret: Option<[u8; 32]>,
    /// What every recovery is refused with.
    pub refuse: Option<Refused>,
    /// What the copy holds.
    pub inconsistent: bool,
    /// The epoch that the copy is at.
    pub epoch: u64,
    /// Another host of the volume, and how many epochs more it has, if it says so.
    pub other: Option<Option<u64>>,
    /// After so many reads each connection is cut.
    pub cut_after: Option<u64>,
    /// A byte that changes before the digest is computed.
    pub change_at: Option<u64>,
    /// The read of the disk, counted from now, that fails.
    pub fail_read: Option<u64>,
}

/// What the host has seen.
#[derive(Clone, Default)]
pub struct Seen {
    /// Where the reads began whose answers have arrived.
    pub reads: Vec<u64>,
    /// Who asked for a recovery.
    pub peers: Vec<HostId>,
}

pub struct Host {
    pub address: String,
    pub id: HostId,
    knobs: Arc<Mutex<Knobs>>,
    seen: Arc<Mutex<Seen>>,
    allowed: watch::Sender<u64>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Serving {
    image: PathBuf,
    size_bytes: u64,
    storage: Rc<Faults>,
    backing: Rc<File>,
    knobs: Arc<Mutex<Knobs>>,
    seen: Arc<Mutex<Seen>>,
    allowed: watch::Receiver<u64>,
}

impl Host {
    /// Serves an image until it is dropped.
    pub fn start(image: &Path) -> Self {
        let knobs = Arc::new(Mutex::new(Knobs { epoch: 1, ..Knobs::default() }));
        let seen = Arc::<Mutex<Seen>>::default();
        let (allowed, allowed_receiver) = watch::channel(u64::MAX);
        let (stop, stopped) = oneshot::channel();
        let (ready, address) = mpsc::channel();
        let (image, shared) = (image.to_owned(), (knobs.clone(), seen.clone()));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            tokio::task::LocalSet::new().block_on(&runtime, async {
                let endpoint =
                    Endpoint::bind("127.0.0.1:0".parse().unwrap(), &HostKey::ephemeral().unwrap()).unwrap();
                ready.send((endpoint.local_address().to_string(), endpoint.id())).unwrap();
                let serving = Rc::new(Serving {
                    size_bytes: std::fs::metadata(&image).unwrap().len(),
                    storage: Faults::new(storage::open().unwrap()),
                    backing: Rc::new(File::open_backing(&image, Access::ReadOnly).unwrap()),
                    image,
                    knobs: shared.0,
                    seen: shared.1,
                    allowed: allowed_receiver,
                });
                tokio::select! {
                    () = accept(&endpoint, &serving) => {}
                    _ = stopped => {}
                }
                endpoint.close().await;
            });
        });
        let (address, id) = address.recv().unwrap();
        Self { address, id, knobs, seen, allowed, stop: Some(stop), thread: Some(thread) }
    }

    pub fn set(&self, change: impl FnOnce(&mut Knobs)) {
        change(&mut self.knobs.lock().unwrap());
    }

    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap().clone()
    }

    /// Answers only reads of so many chunks from the first on; others wait.
    pub fn allow(&self, chunks: u64) {
        self.allowed.send_replace(chunks);
    }

    /// A token with the invitation's secret.
    pub fn token(&self, secret: u8) -> String {
        let token = Token {
            addresses: vec![self.address.clone()],
            host: self.id,
            volume: VOLUME,
            name: NAME.into(),
            secret: Secret([secret; 32]),
        };
        token.encode().unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the host panicked");
    }
}

async fn accept(endpoint: &Endpoint, serving: &Rc<Serving>) {
    while let Some(connection) = endpoint.accept().await {
        connection.trust(0);
        tokio::task::spawn_local(serve_connection(connection, serving.clone()));
    }
}

/// The first control stream, by which a recovery lasts.
type First = Rc<RefCell<Option<ControlSender>>>;

async fn serve_connection(connection: Connection, serving: Rc<Serving>) {
    let (first, mut source, mut reads) = (First::default(), None, 0);
    while let Ok(incoming) = connection.accept().await {
        let Incoming::Control(mut sender, mut receiver) = incoming else { panic!("a control stream") };
        let Ok(message) = receiver.receive().await else { continue };
        match message {
            Message::Recover(recover) => match serving.let_in(&recover, connection.peer()) {
                Ok(info) => {
                    serving.seen.lock().unwrap().peers.push(connection.peer());
                    sender.send(&info.clone().into()).await.unwrap();
                    let pool = BufferPool::new(64 << 20);
                    let storage = serving.storage.clone();
                    source = Some(Rc::new(Source::new(storage, serving.backing.clone(), pool, info)));
                    *first.borrow_mut() = Some(sender);
                }
                Err(refused) => {
                    sender.send(&refused.into()).await.unwrap();
                    sender.finish().await.unwrap_or_default();
                }
            },
            Message::AskOthers(ask) => {
                let request = Recover { name: ask.name, secret: ask.secret, accept_inconsistent: true };
                let answer = match serving.let_in(&request, connection.peer()) {
                    Ok(info) => serving.others(&info).into(),
                    Err(refused) => Message::from(refused),
                };
                sender.send(&answer).await.unwrap();
                sender.finish().await.unwrap_or_default();
            }
            message => {
                let source: Rc<Source> = source.clone().expect("a recovery begins with Recover");
                reads += u64::from(matches!(message, Message::ReadContent(_)));
                if serving.knobs.lock().unwrap().cut_after.is_some_and(|limit| reads > limit) {
                    return connection.close(CloseReason::ShuttingDown, "cut");
                }
                let answer = answer(serving.clone(), source, first.clone(), message, sender, receiver);
                tokio::task::spawn_local(answer);
            }
        }
    }
}

async fn answer(
    serving: Rc<Serving>,
    source: Rc<Source>,
    first: First,
    message: Message,
    sender: ControlSender,
    receiver: ControlReceiver,
) {
    serving.prepare(&message).await;
    let served = serve(&source, message.clone(), sender, receiver).await;
    if let (Ok(()), Message::ReadContent(read)) = (&served, message) {
        serving.seen.lock().unwrap().reads.push(read.range.offset);
    }
    if let Some(refused) = served.err().and_then(|error| error.refusal()) {
        let first = first.borrow_mut().take();
        if let Some(mut first) = first {
            first.send(&refused.into()).await.unwrap_or_default();
            first.finish().await.unwrap_or_default();
        }
    }
}

impl Serving {
    fn let_in(&self, recover: &Recover, peer: HostId) -> Result<Recovering, Refused> {
        let refuse = |refusal, text: &str| Err(Refused { refusal, text: text.into() });
        let knobs = self.knobs.lock().unwrap().clone();
        if let Some(refused) = knobs.refuse {
            return Err(refused);
        }
        if recover.name != NAME {
            return refuse(Refusal::UnknownVolume, "no such volume here");
        }
        match recover.secret {
            Some(secret) if knobs.secret != Some(secret) => {
                return refuse(Refusal::Token, "the token is wrong");
            }
            None if knobs.member.is_some_and(|member| member != peer) => {
                return refuse(Refusal::UnknownKey, "the key is no member's");
            }
            _ => {}
        }
        if knobs.inconsistent && !recover.accept_inconsistent {
            return refuse(Refusal::Backing, "the copy is inconsistent; add --accept-inconsistent");
        }
        let position =
            Position { generation: GenerationId([3; 16]), epoch: Epoch(knobs.epoch), sequence: Sequence(9) };
        Ok(Recovering {
            volume: VOLUME,
            copy: CopyId([2; 16]),
            size_bytes: self.size_bytes,
            block_size: BlockSize::default(),
            data: if knobs.inconsistent { DataState::Inconsistent } else { DataState::Consistent },
            position,
            lineage: vec![GenerationId([3; 16])],
        })
    }

    fn others(&self, info: &Recovering) -> Others {
        let own = Standing {
            role: Role::Replica,
            data: info.data,
            can_roll_back: false,
            fence: Fence::default(),
            lineage: info.lineage.clone(),
            marker: info.position,
            silent_milliseconds: 0,
            serves: false,
            dirty_bytes: 0,
            began: Vec::new(),
            ends: Ends::default(),
            replaced: false,
            given: Box::default(),
        };
        let newer = |epochs| {
            let mut standing = own.clone();
            standing.marker.epoch.0 += epochs;
            standing
        };
        let other = self.knobs.lock().unwrap().other.map(|epochs| Other {
            name: "c".into(),
            host: HostId([9; 32]),
            addresses: vec!["c:7447".into()],
            standing: epochs.map(newer),
        });
        Others { others: other.into_iter().collect(), own: Box::new(own) }
    }

    /// Waits for its turn, and turns the knobs that concern this message.
    async fn prepare(&self, message: &Message) {
        if let Message::ReadContent(read) = message {
            let mut allowed = self.allowed.clone();
            // An error means that the host is being dropped.
            let _ = allowed.wait_for(|chunks| read.range.offset / CHUNK_BYTES < *chunks).await;
        }
        let mut knobs = self.knobs.lock().unwrap();
        if let Some(nth) = knobs.fail_read.take() {
            self.storage.fail(Calls::Reads, nth, 5);
        }
        if matches!(message, Message::AskDigest(_))
            && let Some(at) = knobs.change_at.take()
        {
            let image = std::fs::OpenOptions::new().read(true).write(true).open(&self.image).unwrap();
            let mut byte = [0];
            image.read_exact_at(&mut byte, at).unwrap();
            image.write_all_at(&[!byte[0]], at).unwrap();
            image.sync_all().unwrap();
        }
    }
}
