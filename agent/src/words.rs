//! Errors in words.

use crate::config::Name;
use blockmirror_protocol::units::HostId;
use std::error::Error;

/// The error and all its causes in one clause, the outermost first.
#[must_use]
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// As [`with_causes`], with the name that the operator knows in place of a host's fingerprint.
#[must_use]
pub fn with_name(error: &dyn Error, host: HostId, name: &Name) -> String {
    with_causes(error).replace(&format!("host {host}"), name.as_str())
}
