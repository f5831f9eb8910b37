//! The evidence: a harness that runs the protocol's machines in virtual time.

pub mod harness;
