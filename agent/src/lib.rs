//! The hands of Blockmirror: opens things, waits, moves bytes, reports. The rules are in `blockmirror_protocol`.

pub mod backing;
pub mod buffer;
pub mod config;
pub mod control;
pub mod device;
pub mod durable;
pub mod export;
pub mod generations;
pub mod invitations;
pub mod metadata;
pub mod pre_images;
pub mod primary;
pub mod process;
pub mod quantity;
pub mod recovery;
pub mod replica;
pub mod standing;
pub mod storage;
pub mod stored;
pub mod supervisor;
pub mod system;
pub mod token;
pub mod transport;
pub mod verdict;
pub mod volume;
pub mod words;
