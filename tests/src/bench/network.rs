//! Networks of the bench's own: traffic in them is nobody else's, and what they do to the machine ends with them.

use super::Bench;
use super::processes::{Server, command, run, say};
use crate::machines::programs::own;
use anyhow::{Context, Result};
use std::net::Ipv4Addr;
use std::process::Command;

/// A network namespace with a loopback device. Dropped, it is deleted.
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new(name: &str) -> Result<Self> {
        let name = format!("bm-{}-{name}", std::process::id());
        run(command("ip", ["netns", "add"]).arg(&name))?;
        let namespace = Self { name };
        run(command("ip", ["-n"]).arg(&namespace.name).args(["link", "set", "lo", "up"]))?;
        Ok(namespace)
    }

    /// Its name, under `/run/netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many bytes went over its loopback device so far, in both directions and with all headers.
    ///
    /// # Errors
    /// When the kernel doesn't tell.
    pub fn carried_bytes(&self) -> Result<u64> {
        let net = format!("--net=/run/netns/{}", self.name);
        let table = say(&mut command("nsenter", [net.as_str(), "cat", "/proc/net/dev"]))?;
        let line =
            table.lines().find_map(|line| line.trim().strip_prefix("lo:")).context("no loopback device")?;
        Ok(line.split_ascii_whitespace().next().context("no count")?.parse()?)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// What a long-distance link does to packets.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Shape {
    /// The time that a packet takes in one direction, in milliseconds.
    pub delay_milliseconds: u32,
    /// How much it carries, in megabits per second.
    pub rate_megabits: u32,
    /// How many packets are lost, in percent.
    pub loss_percent: f64,
}

/// Two networks with a long-distance link between them. In this order: the link goes before what it joins.
pub struct Wan {
    _link: Server,
    /// The two ends.
    pub ends: [Namespace; 2],
}

impl Wan {
    /// The addresses of the two ends.
    pub const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 97, 0, 1), Ipv4Addr::new(10, 97, 0, 2)];

    /// A link of this shape.
    ///
    /// # Errors
    /// When it can't be made, for instance for want of `/dev/net/tun`.
    pub fn new(bench: &Bench, shape: Shape) -> Result<Self> {
        let ends = [Namespace::new("near")?, Namespace::new("far")?];
        let mut link = Command::new(own("wanlink"));
        for (end, address) in ends.iter().zip(Self::ADDRESSES) {
            link.arg(end.name()).arg(format!("{address}/24"));
        }
        let (delay, rate) = (shape.delay_milliseconds, shape.rate_megabits);
        link.arg(format!("delay={delay}")).arg(format!("rate={rate}"));
        link.arg(format!("loss={}", shape.loss_percent));
        let log = bench.run_path("wanlink.log");
        let link = Server::start("wanlink", &mut link, &log)?;
        let link = link.ready(|| std::fs::read_to_string(&log).is_ok_and(|said| said.starts_with("up")))?;
        Ok(Self { _link: link, ends })
    }
}
