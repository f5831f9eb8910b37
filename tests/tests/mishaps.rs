//! Lost links and killed agents under load.
//!
//! The load writes blocks that say which write they are from, through NBD clients that connect anew when the primary
//! was killed. What was flushed before must be there afterwards; of what was not, either the old or a newer content.
//! In the end the copies are compared byte by byte.

use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{BLOCK_BYTES, stamp_of, stamped};
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::patience::until;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// One writer's share of the volume, and what it may hold.
struct Writer {
    socket: PathBuf,
    first_block: u64,
    random: Random,
    next_stamp: u64,
    /// For each block: what is durable, then what was written since, in order. The last may not have been answered.
    blocks: Vec<Vec<u64>>,
    flushes: u64,
}

/// Several writers on threads of their own.
struct Load {
    is_over: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Writer>>,
}

impl Writer {
    fn new(socket: &Path, number: u64, blocks: u64, seed: u64) -> Self {
        Self {
            socket: socket.to_owned(),
            first_block: number * blocks,
            random: Random::new(seed ^ (number + 1) << 32),
            next_stamp: 1,
            blocks: vec![vec![0]; blocks as usize],
            flushes: 0,
        }
    }

    fn offset(&self, index: usize) -> u64 {
        (self.first_block + index as u64) * BLOCK_BYTES
    }

    /// Works until the load is over; connects anew whenever the server goes away.
    fn work(mut self, is_over: &AtomicBool, requests: &AtomicU64) -> Self {
        while !is_over.load(Ordering::Relaxed) {
            let mut client = self.connect();
            let worked = self.verify(&mut client).and_then(|()| {
                while !is_over.load(Ordering::Relaxed) {
                    self.step(&mut client)?;
                    requests.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            });
            // A primary that is killed takes the connection with it; a request never fails otherwise.
            if let Err(error) = worked {
                assert_ne!(error.kind(), io::ErrorKind::Other, "a request was refused: {error}");
            }
        }
        self
    }

    fn connect(&self) -> Client {
        until("the primary serves its device", || {
            Client::connect(&self.socket).map_err(|error| error.to_string())
        })
    }

    /// Reads all blocks: what is found is what a crash left, and stays.
    fn verify(&mut self, client: &mut Client) -> io::Result<()> {
        for index in 0..self.blocks.len() {
            let block = client.read(self.offset(index), BLOCK_BYTES)?;
            let stamp = stamp_of(&block).unwrap_or_else(|| panic!("block {index} is a mixture"));
            let possible = &mut self.blocks[index];
            assert!(possible.contains(&stamp), "block {index} holds {stamp}, not one of {possible:?}");
            // It may still be in no disk's cache but ours: an older content is no longer possible for readers, and
            // durable from the next flush on.
            let found = possible.iter().position(|one| *one == stamp).expect("it was just found");
            possible.truncate(found + 1);
        }
        Ok(())
    }

    fn step(&mut self, client: &mut Client) -> io::Result<()> {
        match self.random.below(20) {
            0 => self.flush(client),
            1 => self.clear(client, true),
            2 => self.clear(client, false),
            3 => self.read(client),
            _ => self.write(client),
        }
    }

    fn flush(&mut self, client: &mut Client) -> io::Result<()> {
        client.flush()?;
        for possible in &mut self.blocks {
            let last = possible.pop().expect("a block holds something");
            possible.clear();
            possible.push(last);
        }
        self.flushes += 1;
        Ok(())
    }

    fn write(&mut self, client: &mut Client) -> io::Result<()> {
        let (first, count) = self.some_blocks(4);
        let mut data = Vec::new();
        for index in first..first + count {
            let stamp = self.first_block << 40 | self.next_stamp;
            self.next_stamp += 1;
            self.blocks[index].push(stamp);
            data.extend(stamped(stamp));
        }
        client.write(self.offset(first), &data)
    }

    fn clear(&mut self, client: &mut Client, trim: bool) -> io::Result<()> {
        let (first, count) = self.some_blocks(32);
        self.blocks[first..first + count].iter_mut().for_each(|possible| possible.push(0));
        let length = count as u64 * BLOCK_BYTES;
        match trim {
            true => client.trim(self.offset(first), length),
            false => client.zero(self.offset(first), length),
        }
    }

    fn read(&mut self, client: &mut Client) -> io::Result<()> {
        let (index, _) = self.some_blocks(1);
        let block = client.read(self.offset(index), BLOCK_BYTES)?;
        assert_eq!(
            stamp_of(&block),
            self.blocks[index].last().copied(),
            "block {index} holds what was written"
        );
        Ok(())
    }

    fn some_blocks(&mut self, most: u64) -> (usize, usize) {
        let count = 1 + self.random.below(most);
        let first = self.random.below(self.blocks.len() as u64 - count);
        (first as usize, count as usize)
    }
}

impl Load {
    fn start(mirror: &Mirror, writers: u64, blocks: u64, seed: u64) -> Self {
        let (is_over, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = (0..writers).map(|number| {
            let writer = Writer::new(&mirror.primary.socket(), number, blocks, seed);
            let (is_over, requests) = (is_over.clone(), requests.clone());
            std::thread::spawn(move || writer.work(&is_over, &requests))
        });
        let threads = threads.collect();
        Self { is_over, requests, threads }
    }

    /// Returns after this many further requests were answered.
    fn pass(&self, count: u64) {
        let goal = self.requests.load(Ordering::Relaxed) + count;
        until("the load goes on", || {
            assert!(self.threads.iter().all(|thread| !thread.is_finished()), "a writer failed");
            let done = self.requests.load(Ordering::Relaxed);
            if done >= goal { Ok(()) } else { Err(format!("{done} of {goal} requests")) }
        });
    }

    /// Ends the load; everything is read once more.
    fn end(self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let mut writer = thread.join().expect("a writer ends well");
            let mut client = writer.connect();
            writer.verify(&mut client).expect("the primary serves its device");
            println!("{} stamps and {} flushes", writer.next_stamp, writer.flushes);
        }
    }
}

#[test]
fn cuts_and_kills_at_random_moments_leave_identical_copies_and_every_flushed_write() {
    let seed = std::env::var("BLOCKMIRROR_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed}; BLOCKMIRROR_SEED={seed} tries it again");
    let mut random = Random::new(seed);
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let load = Load::start(&mirror, 3, 2000, seed);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(35) {
        load.pass(random.below(800));
        match random.below(4) {
            0 => {
                println!("the primary is killed");
                mirror.primary.kill();
                mirror.primary.start();
            }
            1 => {
                println!("the replica is killed");
                mirror.replica_mut().kill();
                load.pass(random.below(500));
                mirror.replica_mut().start();
            }
            2 => {
                println!("the link is cut for a moment");
                mirror.replica().link().cut();
                load.pass(random.below(500));
                mirror.replica().link().mend();
            }
            _ => {
                println!("both are killed while the link is cut");
                mirror.replica().link().cut();
                load.pass(random.below(300));
                mirror.primary.kill();
                mirror.replica_mut().kill();
                mirror.replica_mut().start();
                mirror.replica().link().mend();
                mirror.primary.start();
            }
        }
        if random.once_in(2) {
            mirror.wait_until_in_sync();
        }
    }
    load.end();
    mirror.assert_identical();
}

#[test]
fn a_killed_primary_copies_its_active_extents_and_no_more() {
    const VOLUME_BYTES: u64 = 1 << 30;
    let mut mirror = Mirror::new(VOLUME_BYTES, "nbd", &["b"]);
    let mut client = mirror.client();
    // The load begins with the first two extents, and expects them empty.
    for extent in 2..VOLUME_BYTES / (4 * MIB) {
        client.write(extent * 4 * MIB, &stamped(extent + 1)).expect("a write");
    }
    client.flush().expect("a flush");
    mirror.wait_until_quiet();
    drop(client);
    // Extents stay active for some seconds after their last write; stopping in order lets all of them go.
    mirror.primary.stop();
    mirror.primary.start();
    mirror.wait_until_quiet();

    let load = Load::start(&mirror, 2, 1024, 1);
    load.pass(1000);
    mirror.replica().link().cut();
    mirror.primary.kill();
    mirror.primary.start();
    let lacks = mirror.peer("b").out_of_sync_bytes.expect("the primary keeps a map");
    println!("{lacks} bytes of {VOLUME_BYTES} are copied again");
    assert_eq!(lacks, 8 * MIB, "the load keeps to two extents");
    mirror.replica().link().mend();
    load.pass(100);
    load.end();
    mirror.assert_identical();
}
