//! The NBD server as its clients see it: programs that we did not write, and bytes that no program should send.

mod clients;
mod harness;
mod hostile;
mod memory;
mod raw;
mod requests;
