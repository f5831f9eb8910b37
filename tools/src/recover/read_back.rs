//! Reads back from the target's disk what is durable there, for its digest, while more is copied. What is not read
//! back when the copying ends is read then.

use super::peer::Trouble;
use super::target::Target;
use blockmirror_agent::recovery::{ReadAhead, Reading, Subtrees};
use blockmirror_agent::storage;
use std::collections::VecDeque;
use std::rc::Rc;
use tokio::task::JoinSet;

/// How many chunks are read back at a time.
const CHUNKS: usize = 2;
/// How many pieces of each are read ahead of the hash.
const DEPTH: usize = 4;

/// The chunks that are to be read back.
pub struct ReadBack {
    target: Rc<Target>,
    subtrees: Rc<Subtrees>,
    waiting: VecDeque<u64>,
    under_way: JoinSet<Result<(), storage::Error>>,
}

impl ReadBack {
    /// Nothing is to be read yet. The values go to `subtrees`.
    pub fn new(target: Rc<Target>, subtrees: Rc<Subtrees>) -> Self {
        Self { target, subtrees, waiting: VecDeque::new(), under_way: JoinSet::new() }
    }

    /// What was read back of a chunk doesn't count: it is written again. It must not be durable yet.
    pub fn forget(&self, chunk: u64) {
        self.subtrees.forget(chunk);
    }

    /// Begins to read back chunks that are durable and won't be written any more.
    pub fn begin(&mut self, chunks: Vec<u64>) {
        self.waiting.extend(chunks);
        self.fill();
    }

    /// Waits until one more chunk was read back, for ever when none is to be. Cancel-safe.
    pub async fn next(&mut self) -> Result<(), Trouble> {
        let Some(done) = self.under_way.join_next().await else { return std::future::pending().await };
        done.expect("reading back neither panics nor is cancelled")
            .map_err(|error| Trouble::failed(&error))?;
        self.fill();
        Ok(())
    }

    /// Gives up what was not read back. None of it is being read when this returns.
    pub async fn stop(&mut self) {
        self.waiting.clear();
        self.under_way.shutdown().await;
    }

    fn fill(&mut self) {
        while self.under_way.len() < CHUNKS
            && let Some(chunk) = self.waiting.pop_front()
        {
            let (target, subtrees) = (self.target.clone(), self.subtrees.clone());
            self.under_way.spawn_local(async move {
                let (storage, file) = (target.storage().clone(), target.file().clone());
                let range = subtrees.range(chunk);
                let pieces = ReadAhead::new(storage, file, target.pool().clone(), range, DEPTH);
                let mut reading = Reading::new(pieces, subtrees);
                while reading.step().await? {}
                Ok(())
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::target::Found;
    use super::*;
    use blockmirror_protocol::disk::recovery::CHUNK_BYTES;
    use bytes::Bytes;
    use std::fs;
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    const SIZE: u64 = 3 * CHUNK_BYTES + 512;

    /// What is written: the second chunk is a hole.
    fn content() -> Vec<u8> {
        let in_hole = |at: u64| at / CHUNK_BYTES == 1;
        (0..SIZE)
            .map(|at| if in_hole(at) { 0 } else { ((at * 31) >> 3) as u8 ^ (at >> 11) as u8 | 1 })
            .collect()
    }

    /// Runs a test with a target that all was written to.
    fn with_target(test: impl AsyncFnOnce(Rc<Target>, Rc<Subtrees>)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("target");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let found = Found::look(&path).await.unwrap_or_else(|failure| panic!("{failure}"));
            let target = found.prepare(SIZE, false, storage::open().unwrap());
            let target = target.unwrap_or_else(|failure| panic!("{failure}"));
            let content = content();
            for chunk in [0, 2, 3] {
                let start = chunk * CHUNK_BYTES;
                let end = SIZE.min(start + CHUNK_BYTES);
                let bytes = Bytes::copy_from_slice(&content[start as usize..end as usize]);
                target.write(start, bytes).await.unwrap();
            }
            target.sync().await.unwrap();
            test(Rc::new(target), Subtrees::new(SIZE)).await;
        });
    }

    async fn read_all(target: &Rc<Target>, subtrees: &Rc<Subtrees>) {
        let mut read_back = ReadBack::new(target.clone(), subtrees.clone());
        read_back.begin(vec![2, 0]);
        read_back.begin(vec![3, 1]);
        for _ in 0..4 {
            assert_eq!(subtrees.digest(), None);
            assert!(read_back.next().await.is_ok());
        }
        assert!(tokio::time::timeout(Duration::from_millis(10), read_back.next()).await.is_err());
    }

    #[test]
    fn what_is_read_back_adds_up_to_the_digest() {
        with_target(async |target, subtrees| {
            read_all(&target, &subtrees).await;
            assert_eq!(subtrees.digest(), Some(blake3::hash(&content())));
            ReadBack::new(target, subtrees.clone()).forget(2);
            assert_eq!(subtrees.digest(), None);
        });
    }

    #[test]
    fn bytes_that_changed_after_they_were_written_change_the_digest() {
        // It is the disk that is asked, not what was sent to it.
        with_target(async |target, subtrees| {
            let mut content = content();
            let at = 2 * CHUNK_BYTES + 5 * 512;
            content[at as usize] ^= 0x10;
            let file = fs::OpenOptions::new().write(true).open(target.file().path()).unwrap();
            file.write_all_at(&content[at as usize..][..1], at).unwrap();
            file.sync_all().unwrap();
            read_all(&target, &subtrees).await;
            assert_eq!(subtrees.digest(), Some(blake3::hash(&content)));
        });
    }

    #[test]
    fn nothing_is_read_back_any_more_once_it_was_stopped() {
        with_target(async |target, subtrees| {
            let mut read_back = ReadBack::new(target.clone(), subtrees.clone());
            read_back.begin(vec![0, 2, 3]);
            assert!(read_back.next().await.is_ok());
            read_back.stop().await;
            let known_bytes = subtrees.known_bytes();
            target.drain().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert_eq!(subtrees.known_bytes(), known_bytes);
        });
    }
}
