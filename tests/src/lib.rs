//! The evidence: a harness that runs the protocol's machines in virtual time, one that runs the real programs on real
//! devices, and torture for those.

pub mod harness;
pub mod machines;
pub mod torture;
