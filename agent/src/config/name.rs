//! What the operator calls volumes and hosts, and where a host's agent is reached.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// No name is longer than this, in bytes.
pub const NAME_LIMIT_BYTES: usize = 63;

/// The name of a volume or of a host. It stands in file names, paths and addresses as it is: lower-case letters,
/// digits, `.`, `_` and `-`, the first a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// A text that cannot be a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not a name; use up to 63 lower-case letters, digits, '.', '_' and '-', \
     the first a letter or digit"
)]
pub struct NotAName(pub String);

impl Name {
    /// The nearest name to any text, for the host name that the kernel reports.
    #[must_use]
    pub fn nearest(text: &str) -> Self {
        let mapped = text.chars().map(|letter| match letter.to_ascii_lowercase() {
            letter if is_name_letter(letter) => letter,
            _ => '-',
        });
        let name: String =
            mapped.skip_while(|first| !first.is_ascii_alphanumeric()).take(NAME_LIMIT_BYTES).collect();
        if name.is_empty() { Self("host".to_owned()) } else { Self(name) }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_name_letter(letter: char) -> bool {
    matches!(letter, 'a'..='z' | '0'..='9' | '.' | '_' | '-')
}

impl TryFrom<String> for Name {
    type Error = NotAName;

    fn try_from(text: String) -> Result<Self, NotAName> {
        let fits = text.len() <= NAME_LIMIT_BYTES && text.chars().all(is_name_letter);
        if fits && text.starts_with(|first: char| first.is_ascii_alphanumeric()) {
            Ok(Self(text))
        } else {
            Err(NotAName(text))
        }
    }
}

impl FromStr for Name {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        text.to_owned().try_into()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Name({})", self.0)
    }
}

/// Where an agent is reached: `host:port`, the host a name, an IPv4 address, or an IPv6 address in brackets.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Address(String);

/// A text that is not an address with a port.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an address; write ADDRESS:PORT, such as 192.0.2.1:7447 or [2001:db8::1]:7447")]
pub struct NotAnAddress(pub String);

impl Address {
    /// The address as text, fit for resolving.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it leads nowhere but to the host that dials it.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        let host = self.0.rsplit_once(':').map_or("", |(host, _)| host);
        let ip = self.0.parse::<std::net::SocketAddr>().map(|address| address.ip());
        ip.map_or(host == "localhost", |ip| ip.to_canonical().is_loopback())
    }
}

impl TryFrom<String> for Address {
    type Error = NotAnAddress;

    fn try_from(text: String) -> Result<Self, NotAnAddress> {
        if is_address(&text) { Ok(Self(text)) } else { Err(NotAnAddress(text)) }
    }
}

fn is_address(text: &str) -> bool {
    if let Ok(address) = text.parse::<std::net::SocketAddr>() {
        return address.port() != 0;
    }
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let letters = |letter: u8| letter.is_ascii_alphanumeric() || matches!(letter, b'.' | b'-' | b'_');
    let is_host = !host.is_empty() && host.len() <= 253 && host.bytes().all(letters);
    let is_port = port.bytes().all(|digit| digit.is_ascii_digit());
    is_host && is_port && port.parse::<u16>().is_ok_and(|port| port != 0)
}

impl FromStr for Address {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        text.to_owned().try_into()
    }
}

impl From<std::net::SocketAddr> for Address {
    fn from(address: std::net::SocketAddr) -> Self {
        Self(address.to_string())
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_short_lower_case_and_no_path() {
        for text in ["a", "data", "vm-01.disk_2", "0", &"x".repeat(63)] {
            assert!(text.parse::<Name>().is_ok(), "{text}");
        }
        for text in ["", ".", "..", "-a", "_a", "Data", "a/b", "a b", "é", "a\n", &"x".repeat(64)] {
            assert_eq!(text.parse::<Name>(), Err(NotAName(text.to_owned())));
        }
    }

    #[test]
    fn a_reported_host_name_becomes_a_name() {
        for (text, name) in [
            ("Storage-1.example.org", "storage-1.example.org"),
            ("büro", "b-ro"),
            ("--x", "x"),
            ("", "host"),
            ("(none)", "none-"),
        ] {
            assert_eq!(Name::nearest(text).as_str(), name);
        }
        assert!(Name::nearest(&"y".repeat(80)).as_str().parse::<Name>().is_ok());
    }

    #[test]
    fn an_address_has_a_host_and_a_port() {
        for text in ["192.0.2.1:7447", "b:7447", "b.example.org:1", "[2001:db8::1]:7447"] {
            assert!(text.parse::<Address>().is_ok(), "{text}");
        }
        for text in ["", "b", "b:", ":7447", "b:0", "b:65536", "b:+1", "2001:db8::1:7447", "a b:1", "[::1]:0"]
        {
            assert_eq!(text.parse::<Address>(), Err(NotAnAddress(text.to_owned())));
        }
    }
}
