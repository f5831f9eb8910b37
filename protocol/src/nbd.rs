//! The bytes of the NBD protocol.
