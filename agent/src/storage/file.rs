//! An open backing or metadata file.

/// An open file or block device.
#[derive(Debug)]
pub struct File {}
