//! The protocol's machines in virtual time: hosts, their disks and links, applications and mishaps, all from one seed.
//!
//! [`world::World`] is the shell of all machines at once: it carries out their actions, in any order that real disks
//! and networks could, and gives the answers back as events. Any host may be primary, and any may dial any other;
//! [`host`] says what a host has, [`primary`], [`dialling`] and [`replica`] drive its machine. [`promises`],
//! [`history`] and [`mirror`] say what must be true; [`checks`], [`differences`] and [`rest`] compare. A run is a
//! function of its seed alone; [`seeds`] runs many, and [`script`] has what tests say that tell a story.

pub mod application;
pub mod checks;
mod clocks;
mod consent;
pub mod demotion;
pub mod dialling;
pub mod differences;
pub mod disk;
pub mod files;
mod freezing;
pub mod gap;
pub mod generations;
pub mod hanging;
pub mod history;
pub mod host;
pub mod lies;
pub mod links;
pub mod membership;
pub mod mirror;
pub mod mishaps;
pub mod primary;
pub mod promises;
pub mod promotion;
pub mod random;
pub mod rebuilding;
pub mod recovery;
pub mod replica;
mod resolution;
pub mod rest;
pub mod rewriting;
pub mod roles;
mod rotting;
pub mod script;
pub mod seeds;
pub mod set_back;
pub mod settings;
mod state_folder;
mod succession;
pub mod touched;
mod undo;
pub mod world;
