//! The real programs on real devices: agents as processes with folders of their own, the operator's tool beside them,
//! a link between them that can be cut, and clients that open what they serve.
//!
//! A [`host::Host`] is what a machine with Blockmirror on it would be; a [`mirror::Mirror`] is a primary and its
//! replicas. Tests wait for conditions, never for time: [`patience`] bounds how long a failure takes to be seen.
//! Whatever a test leaves, mounts and loop devices and processes, is taken away when its owners are dropped, also
//! when it fails.
//!
//! A test that needs root, a device or a program skips itself with the reason where that is missing; with
//! `BLOCKMIRROR_NO_SKIPS` in the environment it fails instead, so that nothing is skipped silently where all of it is
//! meant to run.

pub mod certificates;
pub mod content;
pub mod folder;
pub mod hanging;
pub mod host;
pub mod mirror;
pub mod nbd;
pub mod network;
pub mod patience;
pub mod programs;
pub mod relay;
pub mod systemd;

/// Ends a test that can't run here, with the reason. Takes the names of the programs that it needs; `root` stands for
/// the right to mount and to attach loop devices.
#[macro_export]
macro_rules! require {
    ($($need:literal),* $(,)?) => {
        if let Some(obstacle) = $crate::machines::programs::obstacle(&[$($need),*]) {
            eprintln!("skipped: {obstacle}");
            return;
        }
    };
}
