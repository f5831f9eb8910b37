//! The protocol's machines in virtual time: a primary, its replicas, their disks and links, applications and mishaps,
//! all from one seed.
//!
//! [`world::World`] is the shell of all machines at once: it carries out their actions, in any order that real disks
//! and networks could, and gives the answers back as events. [`model`] says what must be true, and [`checks`] compares.
//! A run is a function of its seed alone.

pub mod application;
pub mod checks;
pub mod disk;
pub mod files;
pub mod link;
pub mod mishaps;
pub mod model;
pub mod primary;
pub mod random;
pub mod replica;
pub mod settings;
pub mod world;
