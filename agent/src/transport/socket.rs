//! The UDP socket, and the thread's runtime that drives it.
//!
//! Two things differ from what quinn does by itself. A bundle of packets is kept within what one UDP send can carry:
//! quinn bundles ten, which above 6,550 bytes a packet is more than a datagram's 65,507, so that every send failed
//! and the path's MTU fell back to its smallest. And timers and tasks always belong to the transport's own thread,
//! whichever thread dials.

use crate::busy_poll;
use crate::quantity::Size;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;
use tokio::runtime::Handle;

/// The most that one UDP send carries, in bytes: IPv4's limit, the smaller one.
const SEND_LIMIT_BYTES: usize = 65_507;

/// The most that one UDP receive brings, in bytes, however many packets the kernel has joined in it.
const RECEIVE_LIMIT_BYTES: usize = 65_536;

/// Opens the socket. `[::]` serves IPv4 as well, and alone where the host has no IPv6.
pub(super) fn open(listen: SocketAddr, buffer_bytes: usize) -> io::Result<UdpSocket> {
    let opened = open_exactly(listen, buffer_bytes);
    let without_ipv6 = matches!(
        &opened,
        Err(error) if matches!(Errno::from_io_error(error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
    );
    if listen.ip() == Ipv6Addr::UNSPECIFIED && without_ipv6 {
        return open_exactly(SocketAddr::from((Ipv4Addr::UNSPECIFIED, listen.port())), buffer_bytes);
    }
    opened
}

fn open_exactly(listen: SocketAddr, buffer_bytes: usize) -> io::Result<UdpSocket> {
    let family = if listen.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(ipproto::UDP))?;
    if listen.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, false)?;
    }
    enlarge_buffers(&socket, buffer_bytes)?;
    match rustix::net::bind(&socket, &listen) {
        // An interface that comes late, or an address that moves between hosts, is taken up by itself.
        Err(Errno::ADDRNOTAVAIL) if !listen.ip().is_unspecified() => {
            sockopt::set_ip_freebind(&socket, true)?;
            rustix::net::bind(&socket, &listen)?;
            tracing::warn!(
                "no interface has the address {} of `listen` yet: nobody is heard before one has",
                listen.ip()
            );
        }
        bound => bound?,
    }
    Ok(UdpSocket::from(socket))
}

/// Beyond the system's limit where that is allowed, else up to it: the limit's default of 208 KiB loses packets.
fn enlarge_buffers(socket: impl AsFd, bytes: usize) -> io::Result<()> {
    let socket = socket.as_fd();
    sockopt::set_socket_recv_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, bytes))?;
    sockopt::set_socket_send_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_send_buffer_size(socket, bytes))?;
    let had = sockopt::socket_recv_buffer_size(socket)?.min(sockopt::socket_send_buffer_size(socket)?);
    if let Some(advice) = advice(had, bytes) {
        tracing::warn!("{advice}");
    }
    Ok(())
}

/// What to do about buffers that are smaller than was asked for. The kernel says twice what it has for data.
fn advice(had_bytes: usize, wanted_bytes: usize) -> Option<String> {
    let (had, wanted) = (Size(had_bytes as u64 / 2), Size(wanted_bytes as u64));
    (had < wanted).then(|| {
        format!(
            "the network's buffers are {had} where {wanted} are wanted, and bursts of packets are lost: \
             sysctl -w net.core.rmem_max={wanted_bytes} net.core.wmem_max={wanted_bytes}"
        )
    })
}

/// Puts quinn's timers, tasks and sockets onto the transport's thread.
#[derive(Debug)]
pub(super) struct ThreadRuntime {
    handle: Handle,
    packet_limit_bytes: usize,
}

impl ThreadRuntime {
    pub(super) fn new(handle: Handle, packet_limit_bytes: u16) -> Self {
        Self { handle, packet_limit_bytes: usize::from(packet_limit_bytes) }
    }
}

impl Runtime for ThreadRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _entered = self.handle.enter();
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.handle.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _entered = self.handle.enter();
        let inner = TokioRuntime.wrap_udp_socket(socket)?;
        Ok(Arc::new(BundlingSocket::new(inner, self.packet_limit_bytes)))
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

/// A socket whose bundles never pass what one send carries.
#[derive(Debug)]
struct BundlingSocket {
    inner: Arc<dyn AsyncUdpSocket>,
    packet_limit_bytes: usize,
    /// The largest packet that was ever bundled. A connection's MTU only grows while it is probed, by single packets,
    /// so this is behind for one bundle at most, which is then sent in parts.
    largest_packet_bytes: AtomicUsize,
}

impl BundlingSocket {
    fn new(inner: Arc<dyn AsyncUdpSocket>, packet_limit_bytes: usize) -> Self {
        Self { inner, packet_limit_bytes, largest_packet_bytes: AtomicUsize::new(1200) }
    }
}

impl AsyncUdpSocket for BundlingSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        // Another thread has something to send, or a packet is answered.
        busy_poll::note_event();
        let Some(packet_bytes) = transmit.segment_size else { return self.inner.try_send(transmit) };
        self.largest_packet_bytes.fetch_max(packet_bytes, Ordering::Relaxed);
        for (index, contents) in parts(transmit.contents, packet_bytes).enumerate() {
            let part = Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents,
                segment_size: (contents.len() > packet_bytes).then_some(packet_bytes),
                src_ip: transmit.src_ip,
            };
            match self.inner.try_send(&part) {
                Ok(()) => {}
                // What was sent must not be sent again; the rest counts as lost on the way and is.
                Err(error) if index > 0 && error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        received: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let arrived = self.inner.poll_recv(context, buffers, received);
        if arrived.is_ready() {
            busy_poll::note_event();
        }
        arrived
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        let fitting = SEND_LIMIT_BYTES / self.largest_packet_bytes.load(Ordering::Relaxed);
        self.inner.max_transmit_segments().min(fitting).max(1)
    }

    /// Quinn reserves so many packets of the largest size for each receive, of which the kernel never fills more than
    /// one datagram's limit. Where receives are not joined, one packet is all that comes.
    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments().min(RECEIVE_LIMIT_BYTES.div_ceil(self.packet_limit_bytes))
    }
}

/// A bundle in parts of whole packets, each within what one send carries.
fn parts(bundle: &[u8], packet_bytes: usize) -> impl Iterator<Item = &[u8]> {
    let packets = (SEND_LIMIT_BYTES / packet_bytes).max(1);
    bundle.chunks(packets * packet_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn buffers_that_are_too_small_come_with_the_command_that_helps() {
        assert_eq!(advice(8 << 20, 4 << 20), None);
        let advice = advice(416 << 10, 4 << 20).expect("the kernel's default is too small");
        assert!(advice.contains("208K where 4M"), "{advice}");
        assert!(
            advice.ends_with("sysctl -w net.core.rmem_max=4194304 net.core.wmem_max=4194304"),
            "{advice}"
        );
    }

    #[test]
    fn a_bundle_is_sent_in_parts_of_whole_packets_that_fit() {
        let bundle = vec![0; 160_000];
        let rows = [(1452, 14_520, vec![14_520]), (16_000, 64_000, vec![64_000])];
        for (packet_bytes, length, expected) in rows {
            let lengths: Vec<_> = parts(&bundle[..length], packet_bytes).map(<[u8]>::len).collect();
            assert_eq!(lengths, expected);
        }
        let lengths: Vec<_> = parts(&bundle, 16_000).map(<[u8]>::len).collect();
        assert_eq!(lengths, [64_000, 64_000, 32_000]);
        let lengths: Vec<_> = parts(&bundle[..89_100], 8_950).map(<[u8]>::len).collect();
        assert_eq!(lengths, [62_650, 26_450], "the last packet may be shorter");
    }

    /// The agent ended where its interface came up after it, and systemd soon gave it up.
    #[test]
    fn an_address_that_comes_late_is_served_when_it_is_there() {
        let ip = |arguments: &str| {
            let status = std::process::Command::new("ip").args(arguments.split(' ')).status();
            assert!(status.is_ok_and(|status| status.success()), "ip {arguments}");
        };
        let (can_run, is_root) = (
            std::process::Command::new("ip").arg("-V").output().is_ok(),
            rustix::process::geteuid().is_root(),
        );
        if !can_run || !is_root {
            return eprintln!("skipped: it takes root and ip");
        }
        let serve = move |listen: &str| {
            let socket = open(listen.parse().unwrap(), 1 << 20).unwrap();
            let there = socket.local_addr().unwrap();
            socket.set_nonblocking(false).unwrap();
            let client = UdpSocket::bind(if there.is_ipv6() { "[::1]:0" } else { "127.0.0.1:0" }).unwrap();
            assert!(client.send_to(b"early", there).is_err() || there.is_ipv6(), "nobody has it");
            let of = if there.is_ipv6() { "/128 dev lo nodad" } else { "/32 dev lo" };
            ip(&format!("addr add {}{of}", there.ip()));
            // The kernel may lose any datagram.
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            let arrives = |_| {
                client.send_to(b"hello", there).unwrap();
                let mut bytes = [0; 8];
                socket.recv(&mut bytes).is_ok_and(|length| &bytes[..length] == b"hello")
            };
            assert!((0..100).any(arrives), "nothing arrives at {there}");
        };
        // A network of its own, which goes with the thread.
        let alone = std::thread::spawn(move || {
            // SAFETY: it concerns this thread alone, which has no descriptor of the network before.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            ip("link set lo up");
            serve("192.0.2.77:0");
            if std::path::Path::new("/proc/self/net/if_inet6").exists() {
                serve("[2001:db8::77]:0");
            }
        });
        alone.join().unwrap();
    }

    #[test]
    fn the_unspecified_address_serves_both_families() {
        let socket = open("[::]:0".parse().unwrap(), 1 << 20).unwrap();
        let address = socket.local_addr().unwrap();
        socket.set_nonblocking(false).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"hello", ("127.0.0.1", address.port())).unwrap();
        let mut bytes = [0; 8];
        assert_eq!(socket.recv(&mut bytes).unwrap(), 5);
    }
}
