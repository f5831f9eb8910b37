//! An operation under way, as the calls to the kernel that it takes, one after the other.
//!
//! A [`Job`] says what to call next ([`Job::step`]) and takes what came of it ([`Job::ended`]); it makes no call
//! itself, so the ring and the threads carry out the same operation in the same steps. It owns the memory that its
//! steps point to: the memory stays where it is, and stays alive, until the job is taken apart by [`Job::finish`],
//! which is never done while a step is with the kernel.

use super::file::{Descriptor, File, Kind};
use super::unaligned::{Overwrite, ReadAround};
use super::writes::Writing;
use super::zeroing::Zeroing;
use super::{Error, Operation, Outcome, UnderWay};
use crate::buffer::{Buffer, BufferPool};
use blockmirror_protocol::ranges::ByteRange;
use bytes::Bytes;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

/// The most that one call transfers, in bytes: below the kernel's own limit, and aligned.
const LONGEST_TRANSFER: usize = 1 << 30;

/// One call to the kernel. The memory belongs to the job that gave the step out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Read { offset: u64, start: *mut u8, length: usize },
    Write { offset: u64, start: *const u8, length: usize, durable: bool },
    Fallocate { mode: i32, range: ByteRange },
    Sync,
}

impl Step {
    /// How much it transfers or clears, in bytes.
    pub(super) fn length(self) -> u64 {
        match self {
            Self::Read { length, .. } | Self::Write { length, .. } => length as u64,
            Self::Fallocate { range, .. } => range.length,
            Self::Sync => 0,
        }
    }
}

/// How much of a piece of memory went to or came from the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transfer {
    range: ByteRange,
    done: usize,
}

impl Transfer {
    pub(super) fn new(range: ByteRange) -> Self {
        Self { range, done: 0 }
    }

    pub(super) fn is_complete(self) -> bool {
        self.done as u64 == self.range.length
    }

    fn next_length(self) -> usize {
        (self.range.length as usize - self.done).min(LONGEST_TRANSFER)
    }

    /// The read of what is missing of `memory`, which is as long as the transfer.
    pub(super) fn read_step(self, memory: &mut [u8]) -> Step {
        assert_eq!(memory.len() as u64, self.range.length, "a transfer fills its memory");
        let length = self.next_length();
        let start = memory[self.done..self.done + length].as_mut_ptr();
        Step::Read { offset: self.range.offset + self.done as u64, start, length }
    }

    /// The write of what is left of `memory`, which is as long as the transfer.
    pub(super) fn write_step(self, memory: &[u8], durable: bool) -> Step {
        assert_eq!(memory.len() as u64, self.range.length, "a transfer sends its memory");
        let length = self.next_length();
        let start = memory[self.done..self.done + length].as_ptr();
        Step::Write { offset: self.range.offset + self.done as u64, start, length, durable }
    }

    /// Takes the length that a read gave. Nothing, or a part of an alignment unit, is the file's end.
    pub(super) fn has_read(
        &mut self,
        length: usize,
        memory: &mut [u8],
        descriptor: &Descriptor,
    ) -> io::Result<()> {
        self.done += length;
        assert!(self.done <= memory.len(), "the kernel reads no more than it was asked");
        let unit_cut_short = descriptor.direct && !(self.done as u64).is_multiple_of(descriptor.alignment);
        if !self.is_complete() && (length == 0 || unit_cut_short) {
            if descriptor.kind != Kind::Metadata {
                return Err(cut_off());
            }
            memory[self.done..].fill(0);
            self.done = memory.len();
        }
        Ok(())
    }

    /// Takes the length that a write took.
    pub(super) fn has_written(&mut self, length: usize) -> io::Result<()> {
        if length == 0 {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "the kernel wrote nothing"));
        }
        self.done += length;
        assert!(self.done as u64 <= self.range.length, "the kernel writes no more than it was asked");
        Ok(())
    }
}

/// What is left of an operation, with the memory that it needs.
enum Task {
    Read { buffer: Buffer, transfer: Transfer },
    ReadAround(ReadAround),
    Write { data: Bytes, transfer: Transfer, durable: bool },
    Overwrite(Overwrite),
    Zero(Box<Zeroing>),
    Sync { done: bool },
}

/// An operation under way.
pub(super) struct Job {
    descriptor: Arc<Descriptor>,
    operation: &'static str,
    offset: u64,
    task: Task,
    /// Whether a sync has to make durable what was written.
    then_sync: bool,
    failure: Option<io::Error>,
    /// When it was begun, or its last step ended.
    moved: Instant,
    /// Of a write that somebody wants to know of; ends with the job.
    writing: Option<Writing>,
    /// Whether the step that is to be made was counted.
    is_counted: bool,
}

impl Job {
    /// Plans an operation; memory that it needs beyond its own comes from `pool`.
    pub(super) fn new(file: &File, operation: Operation, pool: &BufferPool) -> Self {
        let descriptor = file.descriptor();
        let (name, range) = (operation.name(), operation.range());
        let fits = descriptor.kind == Kind::Metadata || range.end() <= descriptor.size_bytes;
        let changes = matches!(operation, Operation::Write { .. } | Operation::Zero { .. });
        let failure = match fits {
            true if changes => descriptor.check_size().err(),
            true => None,
            false => Some(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the range ends beyond the end of the backing",
            )),
        };
        let then_sync =
            !descriptor.writes_durably && matches!(operation, Operation::Write { durable: true, .. });
        let writing = descriptor.writes.get().and_then(|writes| writes.begin(&operation));
        let task = if fits { Task::new(descriptor, operation, pool) } else { Task::Sync { done: true } };
        let descriptor = Arc::clone(descriptor);
        Self {
            descriptor,
            operation: name,
            offset: range.offset,
            task,
            then_sync,
            failure,
            moved: Instant::now(),
            writing,
            is_counted: false,
        }
    }

    /// Since when nothing of it has ended.
    pub(super) fn moved(&self) -> Instant {
        self.moved
    }

    /// The step that is to be made, or is being made.
    pub(super) fn under_way(&self) -> UnderWay {
        UnderWay { since: self.moved, path: self.descriptor.path.clone() }
    }

    /// The descriptor that the steps go to.
    pub(super) fn fd(&self) -> RawFd {
        self.descriptor.fd.as_raw_fd()
    }

    /// Whether a step only copies memory, which takes less time than to wake another thread.
    pub(super) fn is_in_memory(&self) -> bool {
        self.descriptor.in_memory
    }

    /// Whether a call may wait for a server, also one that is told not to wait.
    pub(super) fn is_served(&self) -> bool {
        self.descriptor.served
    }

    /// The next call to make; nothing when the operation has ended. The same again until [`Self::ended`] is told.
    pub(super) fn step(&mut self) -> Option<Step> {
        if self.failure.is_some() {
            return None;
        }
        let step = self.task.step(&self.descriptor).or(self.then_sync.then_some(Step::Sync))?;
        if !std::mem::replace(&mut self.is_counted, true)
            && let Some(writing) = &self.writing
        {
            writing.count(&step);
        }
        Some(step)
    }

    /// Takes the result of the step: how many bytes, or the kernel's error. A call that was merely interrupted is
    /// made again.
    pub(super) fn ended(&mut self, result: io::Result<usize>) {
        let is_written = self.task.step(&self.descriptor).is_none();
        let outcome = match result {
            Ok(_) if is_written => {
                self.then_sync = false;
                Ok(())
            }
            Ok(length) => self.task.succeeded(length, &self.descriptor),
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => self.task.failed(error, &self.descriptor),
        };
        self.failure = outcome.err();
        self.moved = Instant::now();
        self.is_counted = false;
    }

    /// The operation's outcome, once there is no further step.
    pub(super) fn finish(mut self) -> Outcome {
        assert!(self.step().is_none(), "a job is finished after its last step");
        match self.failure {
            None => Ok(self.task.into_buffer()),
            Some(source) => Err(Error {
                operation: self.operation,
                path: self.descriptor.path.display().to_string(),
                offset: self.offset,
                source: self.descriptor.explained(source),
            }),
        }
    }
}

/// The error of whoever asks for what a backing has lost to a truncation.
pub(super) fn cut_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the backing ends before its size")
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

impl Task {
    fn new(descriptor: &Descriptor, operation: Operation, pool: &BufferPool) -> Self {
        let range = operation.range();
        match operation {
            Operation::Read { buffer, .. } if descriptor.takes(range, &buffer) => {
                Self::Read { buffer, transfer: Transfer::new(range) }
            }
            Operation::Read { buffer, .. } => {
                Self::ReadAround(ReadAround::new(range, buffer, descriptor.alignment, pool))
            }
            Operation::Write { data, durable, .. } if descriptor.takes(range, &data) => {
                Self::Write { data, transfer: Transfer::new(range), durable }
            }
            Operation::Write { data, durable, .. } => {
                Self::Overwrite(Overwrite::new(range, data, durable, descriptor.alignment, pool))
            }
            Operation::Zero { range, may_unmap } => {
                Self::Zero(Box::new(Zeroing::new(range, may_unmap, descriptor, pool)))
            }
            Operation::Sync => Self::Sync { done: false },
        }
    }

    fn step(&mut self, descriptor: &Descriptor) -> Option<Step> {
        match self {
            Self::Read { buffer, transfer } => (!transfer.is_complete()).then(|| transfer.read_step(buffer)),
            Self::ReadAround(around) => around.step(),
            Self::Write { data, transfer, durable } => {
                (!transfer.is_complete()).then(|| transfer.write_step(data, *durable))
            }
            Self::Overwrite(overwrite) => overwrite.step(),
            Self::Zero(zeroing) => zeroing.step(descriptor),
            Self::Sync { done } => (!*done).then_some(Step::Sync),
        }
    }

    fn succeeded(&mut self, length: usize, descriptor: &Descriptor) -> io::Result<()> {
        match self {
            Self::Read { buffer, transfer } => transfer.has_read(length, buffer, descriptor),
            Self::ReadAround(around) => around.succeeded(length, descriptor),
            Self::Write { transfer, .. } => transfer.has_written(length),
            Self::Overwrite(overwrite) => overwrite.succeeded(length, descriptor),
            Self::Zero(zeroing) => zeroing.succeeded(length, descriptor),
            Self::Sync { done } => {
                *done = true;
                Ok(())
            }
        }
    }

    /// What an error means: only a zeroing knows another way.
    fn failed(&mut self, error: io::Error, descriptor: &Descriptor) -> io::Result<()> {
        match self {
            Self::Zero(zeroing) => zeroing.failed(error, descriptor),
            _ => Err(error),
        }
    }

    fn into_buffer(self) -> Option<Buffer> {
        match self {
            Self::Read { buffer, .. } => Some(buffer),
            Self::ReadAround(around) => Some(around.into_buffer()),
            _ => None,
        }
    }
}
