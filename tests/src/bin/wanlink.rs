//! A long-distance link between two network namespaces, for kernels without netem: `wanlink NAMESPACE ADDRESS NAMESPACE
//! ADDRESS [delay=MILLISECONDS] [jitter=MILLISECONDS] [loss=PERCENT] [rate=MEGABITS] [queue=KIBIBYTES] [seed=NUMBER]`.
//!
//! Each end is a TUN device with that address. What one end sends leaves the other after the delay, at the limited rate,
//! and now and then not at all; what doesn't fit into the queue is dropped, as a router does. Packets never overtake each
//! other. Both sides have the kernel's own TCP and UDP. Delay, loss and rate are those of one direction.
//!
//! Says `up` and runs until it is ended. SIGUSR1 cuts the link, SIGUSR2 mends it. Needs root.

use anyhow::{Context, Result, bail, ensure};
use blockmirror_tests::harness::random::Random;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Error, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

static IS_CUT: AtomicBool = AtomicBool::new(false);

/// From linux/if_tun.h.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// The size of the kernel's `struct ifreq` in bytes, and where its flags are.
const REQUEST_BYTES: usize = 40;
const FLAGS_AT: usize = 16;
/// More than a packet ever has.
const PACKET_BYTES: usize = 70_000;
/// How late a sleeping thread may be woken up, in nanoseconds.
const TIMER_SLACK: libc::c_ulong = 1000;

/// What the link does, in one direction.
#[derive(Clone, Copy)]
struct Shape {
    delay: Duration,
    jitter: Duration,
    /// One packet in so many is lost on average; 0 means none.
    loss: f64,
    /// In bits per second; 0 means no limit.
    rate: f64,
    queue_bytes: f64,
    seed: u64,
}

/// A packet and when it is to arrive.
type Packet = (Instant, Box<[u8]>);

/// Packets that are on their way.
#[derive(Default)]
struct Line {
    packets: Mutex<VecDeque<Packet>>,
    more: Condvar,
}

extern "C" fn on_signal(signal: libc::c_int) {
    IS_CUT.store(signal == libc::SIGUSR1, Ordering::Relaxed);
}

/// A TUN device in a namespace, with an address. The calling thread goes there and comes back.
fn device(namespace: &str, address: &str) -> Result<File> {
    let own = File::open("/proc/thread-self/ns/net")?;
    let path = format!("/run/netns/{namespace}");
    let there = File::open(&path).with_context(|| format!("no namespace {path}"))?;
    enter(&there)?;
    let device = File::options().read(true).write(true).open("/dev/net/tun").context("no /dev/net/tun")?;
    let mut request = [0u8; REQUEST_BYTES];
    request[..3].copy_from_slice(b"wan");
    let flags = u16::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
    request[FLAGS_AT..FLAGS_AT + 2].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the request is as large as the kernel reads and writes, and lives as long as the call.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) };
    ensure!(made == 0, "cannot make a TUN device: {}", Error::last_os_error());
    ip(&["address", "add", address, "dev", "wan"])?;
    ip(&["link", "set", "wan", "up", "txqueuelen", "10000"])?;
    enter(&own)?;
    Ok(device)
}

fn enter(namespace: impl AsFd) -> Result<()> {
    let kind = Some(rustix::thread::LinkNameSpaceType::Network);
    Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)?)
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status()?;
    ensure!(status.success(), "ip {arguments:?}: {status}");
    Ok(())
}

/// Takes packets in, and decides for each whether and when it arrives.
fn take(mut from: File, line: &Line, shape: Shape) {
    let mut random = Random::new(shape.seed);
    let mut fraction = move || random.below(1 << 32) as f64 / f64::from(u32::MAX);
    let (mut free, mut last) = (Instant::now(), Instant::now());
    let mut packet = vec![0; PACKET_BYTES];
    while let Ok(length) = from.read(&mut packet) {
        if IS_CUT.load(Ordering::Relaxed) || fraction() < shape.loss {
            continue;
        }
        let now = Instant::now();
        free = free.max(now);
        if shape.rate > 0.0 {
            let waiting = (free - now).as_secs_f64() * shape.rate / 8.0;
            if waiting + length as f64 > shape.queue_bytes {
                continue;
            }
            free += Duration::from_secs_f64(length as f64 * 8.0 / shape.rate);
        }
        last = last.max(free + shape.delay + shape.jitter.mul_f64(fraction().min(1.0)));
        line.packets.lock().expect("no holder panics").push_back((last, packet[..length].into()));
        line.more.notify_one();
    }
}

/// Hands packets out when they are due.
fn deliver(line: &Line, mut to: File) {
    loop {
        let packets = line.packets.lock().expect("no holder panics");
        let mut packets =
            line.more.wait_while(packets, |packets| packets.is_empty()).expect("no holder panics");
        let (due, packet) = packets.pop_front().expect("one is there");
        drop(packets);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // What the other side does not take is lost, as on any link.
        let _ = to.write(&packet);
    }
}

fn one_way(from: File, to: File, shape: Shape) {
    let line = Arc::new(Line::default());
    let same = line.clone();
    std::thread::spawn(move || take(from, &line, shape));
    std::thread::spawn(move || deliver(&same, to));
}

fn parse(options: &[String]) -> Result<Shape> {
    let mut shape = Shape {
        delay: Duration::ZERO,
        jitter: Duration::ZERO,
        loss: 0.0,
        rate: 0.0,
        queue_bytes: f64::from(1 << 20),
        seed: 1,
    };
    for option in options {
        let (name, value) = option.split_once('=').with_context(|| format!("{option} is no option"))?;
        let number: f64 = value.parse().with_context(|| format!("{value} is no number"))?;
        match name {
            "delay" => shape.delay = Duration::try_from_secs_f64(number / 1e3)?,
            "jitter" => shape.jitter = Duration::try_from_secs_f64(number / 1e3)?,
            "loss" => shape.loss = number / 100.0,
            "rate" => shape.rate = number * 1e6,
            "queue" => shape.queue_bytes = number * 1024.0,
            "seed" => shape.seed = number as u64,
            _ => bail!("unknown option {name}; use delay, jitter, loss, rate, queue, seed"),
        }
    }
    Ok(shape)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [near, near_address, far, far_address, options @ ..] = arguments.as_slice() else {
        bail!(
            "wanlink NAMESPACE ADDRESS NAMESPACE ADDRESS [delay=MS] [jitter=MS] [loss=%] [rate=Mbit] [queue=KiB]"
        );
    };
    let shape = parse(options)?;
    // SAFETY: the call takes plain numbers, and the handler only stores to an atomic.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, TIMER_SLACK);
        libc::signal(libc::SIGUSR1, on_signal as *const () as libc::sighandler_t);
        libc::signal(libc::SIGUSR2, on_signal as *const () as libc::sighandler_t);
    }
    let (near, far) = (device(near, near_address)?, device(far, far_address)?);
    one_way(near.try_clone()?, far.try_clone()?, shape);
    one_way(far, near, Shape { seed: shape.seed + 1, ..shape });
    println!("up");
    loop {
        std::thread::park();
    }
}
