//! The evidence: a harness that runs the protocol's machines in virtual time, one that runs the real programs on real
//! devices, torture for those, and the bench that measures them beside their peers.

pub mod bench;
pub mod harness;
pub mod machines;
pub mod torture;
