//! A volume in memory that knows which of its parts were ever written.

use blockmirror_agent::buffer::BufferPool;
use blockmirror_agent::device::{Answer, Command, Errno, Geometry, Part, Reply, Request, Volume};
use blockmirror_protocol::ranges::ByteRange;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use tokio::sync::Notify;

/// What space is given and taken back in.
const CELL_BYTES: u64 = 4096;

type Waiting = (Rc<dyn Reply>, u64, Result<Answer, Errno>);

/// Acts on a request at once and answers it later, the newest first.
pub struct Memory {
    geometry: Geometry,
    pool: BufferPool,
    cells: RefCell<BTreeMap<u64, Box<[u8]>>>,
    waiting: RefCell<Vec<Waiting>>,
    arrived: Notify,
    held: Cell<bool>,
    failure: Cell<Option<Errno>>,
    zeroed: RefCell<Vec<(ByteRange, bool, bool)>>,
    flushes: Cell<usize>,
    durable_writes: Cell<usize>,
}

impl Memory {
    pub fn new(geometry: Geometry, pool: BufferPool) -> Rc<Self> {
        Rc::new(Self {
            geometry,
            pool,
            cells: RefCell::default(),
            waiting: RefCell::default(),
            arrived: Notify::new(),
            held: Cell::new(false),
            failure: Cell::new(None),
            zeroed: RefCell::default(),
            flushes: Cell::new(0),
            durable_writes: Cell::new(0),
        })
    }

    /// Answers requests for as long as it is polled.
    pub async fn answer(self: Rc<Self>) {
        loop {
            self.arrived.notified().await;
            if !self.held.get() {
                let waiting = self.waiting.take();
                for (reply, cookie, answer) in waiting.into_iter().rev() {
                    reply.complete(cookie, answer);
                }
            }
        }
    }

    /// From now on requests wait for their answers, or no more.
    pub fn hold(&self, held: bool) {
        self.held.set(held);
        self.arrived.notify_one();
    }

    /// From now on every request fails like this.
    pub fn fail(&self, failure: Option<Errno>) {
        self.failure.set(failure);
    }

    /// How many requests wait for their answers.
    pub fn waiting(&self) -> usize {
        self.waiting.borrow().len()
    }

    /// The ranges that were zeroed, with `may_unmap` and `fua`.
    pub fn zeroed(&self) -> Vec<(ByteRange, bool, bool)> {
        self.zeroed.borrow().clone()
    }

    pub fn flushes(&self) -> usize {
        self.flushes.get()
    }

    pub fn durable_writes(&self) -> usize {
        self.durable_writes.get()
    }

    pub fn content(&self, range: ByteRange) -> Vec<u8> {
        let mut content = vec![0; range.length as usize];
        self.read(range, &mut content);
        content
    }

    fn act(&self, command: Command) -> Answer {
        match command {
            Command::Read(range) => {
                let mut buffer = self.pool.take(range.length as usize);
                self.read(range, &mut buffer);
                return Answer::Data(buffer);
            }
            Command::Write { offset, data, fua } => {
                assert!(data.as_ptr().addr().is_multiple_of(512), "a payload is aligned");
                self.durable_writes.set(self.durable_writes.get() + usize::from(fua));
                self.write(offset, &data);
            }
            Command::Zero { range, may_unmap, fua } => {
                self.zeroed.borrow_mut().push((range, may_unmap, fua));
                self.zero(range, may_unmap);
            }
            Command::Flush => self.flushes.set(self.flushes.get() + 1),
            Command::Allocation(range) => return Answer::Allocation(self.allocation(range)),
        }
        Answer::Done
    }

    fn read(&self, range: ByteRange, target: &mut [u8]) {
        for part in range.split_at_multiples(CELL_BYTES) {
            let start = (part.offset - range.offset) as usize;
            let target = &mut target[start..start + part.length as usize];
            match self.cells.borrow().get(&(part.offset / CELL_BYTES)) {
                Some(cell) => target.copy_from_slice(&cell[within(part)]),
                None => target.fill(0),
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for part in ByteRange::new(offset, data.len() as u64).split_at_multiples(CELL_BYTES) {
            let mut cells = self.cells.borrow_mut();
            let cell = cells
                .entry(part.offset / CELL_BYTES)
                .or_insert_with(|| vec![0; CELL_BYTES as usize].into_boxed_slice());
            let start = (part.offset - offset) as usize;
            cell[within(part)].copy_from_slice(&data[start..start + part.length as usize]);
        }
    }

    fn zero(&self, range: ByteRange, may_unmap: bool) {
        if may_unmap {
            let whole = range.offset.div_ceil(CELL_BYTES)..range.end() / CELL_BYTES;
            self.cells.borrow_mut().retain(|cell, _| !whole.contains(cell));
            for part in [range.offset, range.end()].map(|edge| ByteRange::new(edge, 0).widened(CELL_BYTES)) {
                if let (Some(edge), Some(cell)) =
                    (part.intersection(range), self.cells.borrow_mut().get_mut(&(part.offset / CELL_BYTES)))
                {
                    cell[within(edge)].fill(0);
                }
            }
        } else {
            self.write(range.offset, &vec![0; range.length as usize]);
        }
    }

    fn allocation(&self, range: ByteRange) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        for part in range.split_at_multiples(CELL_BYTES) {
            let hole = !self.cells.borrow().contains_key(&(part.offset / CELL_BYTES));
            match parts.last_mut() {
                Some(last) if last.hole == hole => last.length += part.length,
                _ => parts.push(Part { length: part.length, hole }),
            }
        }
        parts
    }
}

fn within(part: ByteRange) -> std::ops::Range<usize> {
    let start = (part.offset % CELL_BYTES) as usize;
    start..start + part.length as usize
}

impl Volume for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&self, request: Request) {
        let answer = match self.failure.get() {
            Some(failure) => Err(failure),
            None => Ok(self.act(request.command)),
        };
        self.waiting.borrow_mut().push((request.reply, request.cookie, answer));
        self.arrived.notify_one();
    }
}
