//! The evidence: a harness that runs the protocol's machines in virtual time, and one that runs the real programs on
//! real devices.

pub mod harness;
pub mod machines;
