//! A server that is killed at every instant of a request's life, and its successors (S1, S2), on a kernel of the test's own:
//! a socket that requests are sent to and answers come from.
//!
//! Each request must be answered, and every block must end with what the last write brought that was sent to it, also
//! where writes to it were under way together. A read may find what a write brought that was sent before its answer, and
//! nothing older than the last one that was answered before the read was sent.

use crate::buffer::BufferPool;
use crate::device::loopback::fuse::Server;
use crate::device::loopback::in_flight::{Identity, Table};
use crate::device::loopback::instants::Instant;
use crate::device::{Answer, Command, Errno, Geometry, Request, Volume};
use blockmirror_protocol::ranges::ByteRange;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Signal, getpid, kill_process};
use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::rc::Rc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

const BLOCK_BYTES: u64 = 512;
const BLOCKS: u64 = 64;
const IDENTITY: Identity = Identity { volume: [7; 16], size_bytes: BLOCKS * BLOCK_BYTES, read_only: false };
/// Where the child finds the table.
const TABLE_FD: i32 = 200;
const DISK: &str = "BLOCKMIRROR_TEST_DISK";
const DEATH: &str = "BLOCKMIRROR_TEST_DEATH";
const INSTANTS: [Instant; 4] = [Instant::Ready, Instant::Arrived, Instant::Answering, Instant::Answered];
/// So many requests are under way at most.
const DEPTH: usize = 12;

/// At which instant this process dies, and how many times it passes it before.
static OWN_DEATH: OnceLock<(Instant, AtomicU64)> = OnceLock::new();

pub(in crate::device::loopback) fn pass(instant: Instant) {
    let Some((deadly, left)) = OWN_DEATH.get() else { return };
    if *deadly == instant && left.fetch_sub(1, Ordering::Relaxed) == 1 {
        kill_process(getpid(), Signal::KILL).expect("a process may end itself");
    }
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// A volume on a file: it executes requests in their order, and answers them in any.
struct Disk(File);

impl Disk {
    fn execute(&self, command: Command) -> std::io::Result<Answer> {
        match command {
            Command::Read(range) => {
                let mut buffer = BufferPool::new(0).take(range.length as usize);
                self.0.read_exact_at(&mut buffer, range.offset)?;
                return Ok(Answer::Data(buffer));
            }
            Command::Write { offset, data, .. } => self.0.write_all_at(&data, offset)?,
            Command::Zero { range, .. } => {
                self.0.write_all_at(&vec![0; range.length as usize], range.offset)?
            }
            Command::Flush | Command::Allocation(_) => {}
        }
        Ok(Answer::Done)
    }
}

impl Volume for Disk {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: IDENTITY.size_bytes, read_only: false, preferred_bytes: 4096 }
    }

    fn submit(&self, request: Request) {
        let mut dice = Dice(request.cookie.wrapping_mul(0x9e37_79b9) ^ u64::from(std::process::id()));
        let answer = self.execute(request.command).map_err(|_| Errno(libc::EIO));
        tokio::task::spawn_local(async move {
            for _ in 0..dice.below(6) {
                tokio::task::yield_now().await;
            }
            request.reply.complete(request.cookie, answer);
        });
    }
}

/// Not a test: the server that is killed.
#[test]
fn serves_until_its_instant_has_come() {
    let Ok(disk) = std::env::var(DISK) else { return };
    if let Ok(death) = std::env::var(DEATH) {
        let (instant, count) = death.split_once(' ').expect("an instant and a count");
        let instant = INSTANTS[instant.parse::<usize>().expect("a number")];
        let count = AtomicU64::new(count.parse().expect("a number"));
        OWN_DEATH.set((instant, count)).expect("it is set once");
    }
    let disk = Disk(File::options().read(true).write(true).open(disk).expect("a disk"));
    // SAFETY: the parent left the descriptors there for this.
    let (socket, table) = unsafe { (File::from_raw_fd(0), OwnedFd::from_raw_fd(TABLE_FD)) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (table, left) = Table::take_over(table, IDENTITY).expect("a table that can be taken over");
        let pool = BufferPool::new(1 << 20);
        let server = Server::new(socket, table, left, Rc::new(disk), pool).expect("a server");
        // The end of the socket is no request.
        drop(server.serve().await);
    });
}

fn start(socket: &OwnedFd, table: &Table, disk: &Path, death: Option<(usize, u64)>) -> Child {
    let mut command = std::process::Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "device::loopback::tests::deaths::serves_until_its_instant_has_come"]);
    command
        .env(DISK, disk)
        .stdin(Stdio::from(socket.try_clone().expect("a descriptor")))
        .stdout(Stdio::null());
    if let Some((instant, count)) = death {
        command.env(DEATH, format!("{instant} {count}"));
    }
    let table = table.file().as_raw_fd();
    // SAFETY: dup2(2) is one of the calls that may be made between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::dup2(table, TABLE_FD) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
    command.spawn().expect("a child")
}

/// What was sent and not answered.
enum Sent {
    Write {
        blocks: std::ops::Range<u64>,
        number: u64,
    },
    /// For each block, the last write that had been answered.
    Read {
        first: u64,
        floors: Vec<u64>,
    },
    Other,
}

/// The kernel, and who uses the file: every write has a number, larger than that of those before it, and brings it.
struct Kernel {
    socket: File,
    dice: Dice,
    next_unique: u64,
    sent: HashMap<u64, Sent>,
    /// For each block, the writes in the order in which they were sent, and the last one that was answered.
    writes: Vec<Vec<u64>>,
    floors: Vec<u64>,
    answered: usize,
}

impl Kernel {
    fn send_one(&mut self) {
        let unique = self.next_unique;
        self.next_unique += 2;
        let first = self.dice.below(BLOCKS);
        let count = (self.dice.below(16) + 1).min(BLOCKS - first);
        let blocks = first..first + count;
        let range = ByteRange::new(first * BLOCK_BYTES, count * BLOCK_BYTES);
        let (opcode, body, payload, sent) = match self.dice.below(8) {
            0 => {
                let floors = self.floors[first as usize..][..count as usize].to_vec();
                (15, transfer(range), Vec::new(), Sent::Read { first, floors })
            }
            1 => (20, vec![0; 16], Vec::new(), Sent::Other),
            _ => {
                let payload = unique.to_ne_bytes().repeat(range.length as usize / 8);
                blocks.clone().for_each(|block| self.writes[block as usize].push(unique));
                (16, transfer(range), payload, Sent::Write { blocks, number: unique })
            }
        };
        let mut bytes = Vec::new();
        bytes.extend((40 + body.len() as u32 + payload.len() as u32).to_ne_bytes());
        bytes.extend(u32::to_ne_bytes(opcode));
        bytes.extend(unique.to_ne_bytes());
        bytes.extend([0; 24]);
        bytes.extend(body);
        bytes.extend(payload);
        self.sent.insert(unique, sent);
        assert_eq!(self.socket.write(&bytes).expect("the socket takes it"), bytes.len());
    }

    /// Takes an answer, if one is there. One that was given before is refused by a real kernel.
    fn take_answer(&mut self) -> bool {
        let mut bytes = vec![0; 64 << 10];
        let length = match self.socket.read(&mut bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            read => read.expect("the socket is there"),
        };
        let number = |at: usize| u64::from_ne_bytes(*bytes[at..].first_chunk().expect("a header"));
        assert_eq!(bytes[4..8], [0; 4], "nothing fails");
        let Some(sent) = self.sent.remove(&number(8)) else { return true };
        self.answered += 1;
        match sent {
            Sent::Write { blocks, number } => {
                for block in blocks {
                    let floor = &mut self.floors[block as usize];
                    *floor = number.max(*floor);
                }
            }
            Sent::Read { first, floors } => {
                assert_eq!(length as u64, 16 + floors.len() as u64 * BLOCK_BYTES);
                for (index, floor) in floors.into_iter().enumerate() {
                    let found = number(16 + index * BLOCK_BYTES as usize);
                    let is_known = found == 0 || self.writes[first as usize + index].contains(&found);
                    assert!(is_known && found >= floor, "a read finds {found}, and {floor} was answered");
                }
            }
            Sent::Other => {}
        }
        true
    }

    fn wait(&self) {
        let mut watched = [PollFd::new(&self.socket, PollFlags::IN)];
        poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 2_000_000 })).expect("a poll");
    }
}

/// The start of `fuse_read_in` and `fuse_write_in`.
fn transfer(range: ByteRange) -> Vec<u8> {
    let mut body = vec![0; 8];
    body.extend(range.offset.to_ne_bytes());
    body.extend((range.length as u32).to_ne_bytes());
    body.resize(40, 0);
    body
}

#[test]
fn whatever_instant_a_server_dies_at_its_successor_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    let disk = File::create_new(&path).expect("a disk");
    disk.set_len(IDENTITY.size_bytes).expect("a disk");
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (own, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
    let table = Table::new(IDENTITY).expect("memory");
    let mut kernel = Kernel {
        socket: own.into(),
        dice: Dice(11),
        next_unique: 2,
        sent: HashMap::new(),
        writes: vec![Vec::new(); BLOCKS as usize],
        floors: vec![0; BLOCKS as usize],
        answered: 0,
    };
    let counts = [1, 2, 3, 5, 8, 13, 40, 150];
    let deaths =
        counts.into_iter().flat_map(|count| (0..INSTANTS.len()).map(move |instant| (instant, count)));
    for death in deaths.map(Some).chain([None]) {
        let mut child = start(&theirs, &table, &path, death);
        let goal = kernel.answered + 200;
        while child.try_wait().expect("it is our process").is_none() {
            let is_over = death.is_none() && kernel.answered >= goal;
            if is_over && kernel.sent.is_empty() {
                child.kill().expect("it is our process");
            }
            while !is_over && kernel.sent.len() < DEPTH {
                kernel.send_one();
            }
            while kernel.take_answer() {}
            kernel.wait();
        }
    }
    for (block, writes) in kernel.writes.iter().enumerate() {
        let mut found = [0; 8];
        let disk = File::open(&path).expect("the disk");
        disk.read_exact_at(&mut found, block as u64 * BLOCK_BYTES).expect("a block");
        let last = writes.last().copied().unwrap_or(0);
        assert_eq!(u64::from_ne_bytes(found), last, "block {block} holds what the last write brought");
    }
}
