//! A server on a thread of its own, which a test can look into.

use crate::memory::Memory;
use blockmirror_agent::buffer::BufferPool;
use blockmirror_agent::device::Geometry;
use blockmirror_agent::device::nbd::{Offer, Server};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::rc::Rc;
use std::sync::mpsc as std_mpsc;
use std::thread::JoinHandle;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

/// The name that the volume is served under.
pub const NAME: &str = "data";

/// What runs on the server's thread.
pub struct Served {
    pub volume: Rc<Memory>,
    pub unix: Server,
    pub tcp: Server,
}

type Visit = Box<dyn FnOnce(Rc<Served>) -> std::pin::Pin<Box<dyn Future<Output = ()>>> + Send>;

pub struct Harness {
    folder: tempfile::TempDir,
    visits: Option<mpsc::UnboundedSender<Visit>>,
    thread: Option<JoinHandle<()>>,
}

impl Harness {
    pub fn start(size_bytes: u64) -> Self {
        Self::start_with(Geometry { size_bytes, read_only: false, preferred_bytes: 4096 })
    }

    pub fn start_with(geometry: Geometry) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (visits, receiver) = mpsc::unbounded_channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            LocalSet::new().block_on(&runtime, serve(path, geometry, receiver));
        });
        let harness = Self { folder, visits: Some(visits), thread: Some(thread) };
        harness.look(|_| ());
        harness
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where clients find the default export.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    /// Where clients find the export of this name.
    pub fn uri_of(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    pub fn tcp_uri(&self) -> String {
        format!("nbd://{}/{NAME}", self.look(|served| served.tcp.address().unwrap()))
    }

    /// Calls `look` on the server's thread.
    pub fn look<T: Send + 'static>(&self, look: impl FnOnce(&Served) -> T + Send + 'static) -> T {
        self.visit(|served| async move { look(&served) })
    }

    /// Returns once `holds` does, as seen from the server's thread.
    pub fn until(&self, mut holds: impl FnMut(&Served) -> bool + Send + 'static) {
        self.visit(|served| async move {
            while !holds(&served) {
                tokio::task::yield_now().await;
            }
        });
    }

    fn visit<T: Send + 'static, F: Future<Output = T> + 'static>(
        &self,
        visit: impl FnOnce(Rc<Served>) -> F + Send + 'static,
    ) -> T {
        let (sender, receiver) = std_mpsc::channel();
        let visit: Visit = Box::new(move |served| {
            let seen = visit(served);
            Box::pin(async move { sender.send(seen.await).expect("the test waits for what it sees") })
        });
        self.visits.as_ref().unwrap().send(visit).expect("the server's thread runs");
        receiver.recv().expect("the server's thread answers")
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        drop(self.visits.take());
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.expect("the server's thread ends well");
            assert!(!self.socket().exists(), "a stopped server leaves no socket behind");
        }
    }
}

async fn serve(path: PathBuf, geometry: Geometry, mut visits: mpsc::UnboundedReceiver<Visit>) {
    let pool = BufferPool::new(16 << 20);
    let volume = Memory::new(geometry, pool.clone());
    let answering = tokio::task::spawn_local(volume.clone().answer());
    let offer = Offer::new(NAME, volume.clone(), pool);
    let unix = Server::unix(&path, offer.clone()).unwrap();
    let tcp = Server::tcp("127.0.0.1:0".parse().unwrap(), offer, None).unwrap();
    let served = Rc::new(Served { volume, unix, tcp });
    while let Some(visit) = visits.recv().await {
        visit(served.clone()).await;
    }
    let Served { volume, unix, tcp } = Rc::into_inner(served).expect("every visit has ended");
    unix.stop().await;
    tcp.stop().await;
    answering.abort();
    assert!(answering.await.unwrap_err().is_cancelled(), "the volume answers until the end");
    volume.hold(true);
    assert_eq!(Rc::strong_count(&volume), 1, "a stopped server holds on to nothing");
}

/// Whether a test can run; says why where it cannot.
pub fn has(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap();
    if !found.status.success() {
        eprintln!("skipped: {program} is not installed");
    }
    found.status.success()
}

/// Runs a program to its end, or for two minutes.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new("timeout").arg("120").arg(program).args(arguments).output().unwrap()
}

/// Runs a program that must succeed, and gives what it printed.
pub fn succeed(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{out}\n{error}", output.status);
    out.into_owned()
}
