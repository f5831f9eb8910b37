//! Raw quinn between two processes, with the settings of Blockmirror's transport: the limit of what the transport can
//! carry on this machine, and its round trip. Each process does everything on one thread.

use super::Bench;
use super::processes::{Server, command, go_on};
use crate::harness::random::Random;
use crate::machines::content::noise;
use crate::machines::programs::own;
use anyhow::{Context, Result, ensure};
use blockmirror_agent::transport::bare::Bare;
use blockmirror_agent::transport::{HostKey, Options};
use blockmirror_protocol::units::HostId;
use bytes::Bytes;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;
use tokio::runtime::Runtime;

/// How much is written at once, in bytes.
const CHUNK_BYTES: u64 = 128 << 10;
/// How much is sent before anything is measured, so that the path's packet size is known and the window open.
const WARM_UP_BYTES: u64 = 64 << 20;
/// The size of a ping, in bytes: about a message's.
const PING_BYTES: usize = 64;
/// The other side says how much it took in so many bytes.
const RECEIPT_BYTES: usize = 8;
const LISTEN: &str = "127.0.0.1:0";

/// A process of its own that takes everything and answers pings. Each turn connects anew, since between turns nobody
/// here says that the connection lives.
pub struct RawQuic {
    _server: Server,
    runtime: Runtime,
    bare: Bare,
    address: SocketAddr,
    id: HostId,
    chunk: Bytes,
}

impl RawQuic {
    /// Starts the other process.
    ///
    /// # Errors
    /// When that fails.
    pub fn start(bench: &Bench) -> Result<Self> {
        let folder = bench.run_path("quic");
        let (here, there) = (folder.join("here"), folder.join("there"));
        std::fs::create_dir_all(&here)?;
        std::fs::create_dir_all(&there)?;
        let log = there.join("log");
        let mut command = command(own("bench"), ["quic", LISTEN]);
        let server = Server::start("raw quinn", command.arg(&there), &log)?;
        let server = server.ready(|| std::fs::read_to_string(&log).is_ok_and(|said| said.ends_with('\n')))?;
        let said = server.said();
        let (address, id) = said.trim().split_once(' ').context("the server says where it is")?;
        let (address, id) = (address.parse()?, HostId::from_hex(id).context("a fingerprint")?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let bare = runtime.block_on(async {
            let key = HostKey::load_or_create(&here)?;
            anyhow::Ok(Bare::open(LISTEN.parse()?, &key, &Options::default())?)
        })?;
        let chunk = noise(&mut Random::new(1), CHUNK_BYTES).into();
        Ok(Self { _server: server, runtime, bare, address, id, chunk })
    }

    /// A connection that has found its pace.
    async fn connect(&self) -> Result<quinn::Connection> {
        let connection = self.bare.connect(self.address, self.id).await?;
        self.send_over(&connection, WARM_UP_BYTES).await?;
        Ok(connection)
    }

    /// Sends so many bytes, and gives the seconds until the other side has all of them.
    ///
    /// # Errors
    /// When the connection is lost, or the bench is interrupted.
    pub fn send(&self, bytes: u64) -> Result<f64> {
        self.runtime.block_on(async {
            let connection = self.connect().await?;
            let began = Instant::now();
            self.send_over(&connection, bytes).await?;
            Ok(began.elapsed().as_secs_f64())
        })
    }

    async fn send_over(&self, connection: &quinn::Connection, bytes: u64) -> Result<()> {
        let mut stream = connection.open_uni().await?;
        let mut left = bytes;
        while left > 0 {
            go_on()?;
            let length = CHUNK_BYTES.min(left);
            stream.write_chunk(self.chunk.slice(..usize::try_from(length)?)).await?;
            left -= length;
        }
        stream.finish()?;
        let receipt = connection.accept_uni().await?.read_to_end(RECEIPT_BYTES).await?;
        ensure!(receipt == bytes.to_le_bytes(), "not all of it has arrived");
        Ok(())
    }

    /// The seconds that each of so many round trips takes, one after the other.
    ///
    /// # Errors
    /// When the connection is lost, or the bench is interrupted.
    pub fn ping(&self, count: usize) -> Result<Vec<f64>> {
        self.runtime.block_on(async {
            let connection = self.connect().await?;
            let (mut send, mut receive) = connection.open_bi().await?;
            let mut bytes = [0; PING_BYTES];
            let mut times = Vec::with_capacity(count);
            for _ in 0..count {
                go_on()?;
                let began = Instant::now();
                send.write_all(&bytes).await?;
                receive.read_exact(&mut bytes).await?;
                times.push(began.elapsed().as_secs_f64());
            }
            Ok(times)
        })
    }
}

/// The other process: says where it listens and whose key it has, and serves until it is ended.
///
/// # Errors
/// When it can't listen.
pub fn be_server(arguments: &[String]) -> Result<()> {
    let [listen, folder] = arguments else { anyhow::bail!("an address and a folder for the key") };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let key = HostKey::load_or_create(Path::new(folder))?;
    runtime.block_on(async {
        let bare = Bare::open(listen.parse()?, &key, &Options::default())?;
        println!("{} {}", bare.local_address()?, key.id());
        loop {
            if let Some(connection) = bare.accept().await {
                tokio::spawn(serve(connection));
            }
        }
    })
}

/// Takes what comes until the connection is lost, which is no mistake.
async fn serve(connection: quinn::Connection) {
    loop {
        tokio::select! {
            stream = connection.accept_uni() => match stream {
                Ok(stream) => drop(tokio::spawn(take(connection.clone(), stream))),
                Err(_) => return,
            },
            streams = connection.accept_bi() => match streams {
                Ok((send, receive)) => drop(tokio::spawn(echo(send, receive))),
                Err(_) => return,
            },
        }
    }
}

/// Takes a stream to its end, and says how much that was. A connection that is lost meanwhile is no mistake.
async fn take(connection: quinn::Connection, mut stream: quinn::RecvStream) {
    let mut chunks: [Bytes; 64] = std::array::from_fn(|_| Bytes::new());
    let mut taken = 0;
    while let Ok(Some(count)) = stream.read_chunks(&mut chunks).await {
        taken += chunks[..count].iter().map(|chunk| chunk.len() as u64).sum::<u64>();
    }
    if let Ok(mut receipt) = connection.open_uni().await {
        let _ = receipt.write_all(&taken.to_le_bytes()).await;
        let _ = receipt.finish();
    }
}

async fn echo(mut send: quinn::SendStream, mut receive: quinn::RecvStream) {
    let mut bytes = [0; PING_BYTES];
    while receive.read_exact(&mut bytes).await.is_ok() {
        if send.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
