//! The link to a host: a relay of UDP datagrams that can be cut or made longer, and that counts what it forwards.
//!
//! A host advertises its relay's address instead of its own, so all who dial it come through here. Each of them gets a
//! socket of its own towards the host, as behind an address translator. A cut relay drops everything in both
//! directions, as an unplugged cable does: nobody is told.

use rustix::net::sockopt;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the threads look whether they are to end.
const LOOK: Duration = Duration::from_millis(50);
/// Large enough that nothing is lost before the relay has read it.
const BUFFER_BYTES: usize = 8 << 20;

/// A link between two agents that a test can cut.
pub struct Relay {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    target: Mutex<Option<SocketAddr>>,
    is_cut: AtomicBool,
    is_over: AtomicBool,
    bytes_to_host: AtomicU64,
    bytes_from_host: AtomicU64,
    delay_milliseconds: AtomicU64,
}

/// A datagram on its way to the host.
struct Delayed {
    due: Instant,
    datagram: Vec<u8>,
    from: Arc<UdpSocket>,
    target: SocketAddr,
}

impl Relay {
    /// A relay that drops everything until it has a target.
    ///
    /// # Panics
    /// When there is no socket to be had.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "starting a thread is no default")]
    pub fn new() -> Self {
        let front = Arc::new(socket());
        let address = front.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared::default());
        let for_thread = shared.clone();
        let thread = std::thread::spawn(move || forward(&front, &for_thread));
        Self { shared, address, thread: Some(thread) }
    }

    /// The address to dial.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the host listens now.
    ///
    /// # Panics
    /// When a thread of the relay did.
    pub fn lead_to(&self, target: SocketAddr) {
        *self.shared.target.lock().expect("no holder panics") = Some(target);
    }

    /// Drops everything from now on.
    pub fn cut(&self) {
        self.shared.is_cut.store(true, Ordering::Relaxed);
    }

    /// Ends a cut.
    pub fn mend(&self) {
        self.shared.is_cut.store(false, Ordering::Relaxed);
    }

    /// Makes the way to the host so much longer from now on.
    pub fn delay(&self, milliseconds: u64) {
        self.shared.delay_milliseconds.store(milliseconds, Ordering::Relaxed);
    }

    /// How many bytes of UDP payload went to the host so far.
    #[must_use]
    pub fn bytes_to_host(&self) -> u64 {
        self.shared.bytes_to_host.load(Ordering::Relaxed)
    }

    /// How many bytes of UDP payload came back from the host so far.
    #[must_use]
    pub fn bytes_from_host(&self) -> u64 {
        self.shared.bytes_from_host.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        let ended = self.thread.take().expect("the thread is joined once").join();
        if !std::thread::panicking() {
            ended.expect("the relay's thread ends well");
        }
    }
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port of the kernel's choice");
    socket.set_read_timeout(Some(LOOK)).expect("the time is not zero");
    // Without root only the system's limit is had, which is enough for slower tests.
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER_BYTES);
    socket
}

/// Carries datagrams from all clients to the host, and starts a thread per client for the way back.
fn forward(front: &Arc<UdpSocket>, shared: &Arc<Shared>) {
    let mut clients: HashMap<(SocketAddr, SocketAddr), Arc<UdpSocket>> = HashMap::new();
    let mut threads = Vec::new();
    let mut datagram = vec![0; 1 << 16];
    let (way, delayed) = channel();
    let for_thread = shared.clone();
    threads.push(std::thread::spawn(move || deliver(&delayed, &for_thread)));
    while let Some(received) = receive(front, shared, &mut datagram) {
        let target = *shared.target.lock().expect("no holder panics");
        let (Some((length, client)), Some(target)) = (received, target) else { continue };
        let back = clients.entry((client, target)).or_insert_with(|| {
            let back = Arc::new(socket());
            let (shared, front, own) = (shared.clone(), front.clone(), back.clone());
            threads.push(std::thread::spawn(move || return_to(client, &front, &own, &shared)));
            back
        });
        let delay = Duration::from_millis(shared.delay_milliseconds.load(Ordering::Relaxed));
        if delay.is_zero() {
            hand_over(back, &datagram[..length], target, shared);
        } else {
            let (due, datagram, from) = (Instant::now() + delay, datagram[..length].to_vec(), back.clone());
            way.send(Delayed { due, datagram, from, target }).expect("the thread lasts as long as the way");
        }
    }
    drop(way);
    threads.into_iter().for_each(|thread| thread.join().expect("a way back ends well"));
}

/// Hands datagrams over when their time has come, until no more can come. What is still on its way then is lost.
fn deliver(delayed: &Receiver<Delayed>, shared: &Shared) {
    while let Ok(Delayed { due, datagram, from, target }) = delayed.recv() {
        if !shared.is_over.load(Ordering::Relaxed) {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            hand_over(&from, &datagram, target, shared);
        }
    }
}

/// What the host does not take is lost, as on any link.
fn hand_over(from: &UdpSocket, datagram: &[u8], target: SocketAddr, shared: &Shared) {
    if from.send_to(datagram, target).is_ok() {
        shared.bytes_to_host.fetch_add(datagram.len() as u64, Ordering::Relaxed);
    }
}

fn return_to(client: SocketAddr, front: &UdpSocket, back: &UdpSocket, shared: &Shared) {
    let mut datagram = vec![0; 1 << 16];
    while let Some(received) = receive(back, shared, &mut datagram) {
        if let Some((length, _)) = received {
            // What the client does not take is lost, as on any link.
            if front.send_to(&datagram[..length], client).is_ok() {
                shared.bytes_from_host.fetch_add(length as u64, Ordering::Relaxed);
            }
        }
    }
}

/// The next datagram, if one came that a link would carry; nothing at all once the relay is over.
fn receive(socket: &UdpSocket, shared: &Shared, datagram: &mut [u8]) -> Option<Option<(usize, SocketAddr)>> {
    let received = match socket.recv_from(datagram) {
        Ok(received) => Some(received),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
            ) =>
        {
            None
        }
        // Somebody who was sent to before does not listen any more.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => None,
        Err(error) => panic!("a relay's socket failed: {error}"),
    };
    if shared.is_over.load(Ordering::Relaxed) {
        return None;
    }
    Some(received.filter(|_| !shared.is_cut.load(Ordering::Relaxed)))
}
