//! NBD over TCP: with TLS, as programs that are not ours speak it and as strangers try to; and how much memory clients get.

use blockmirror_protocol::nbd::handshake::*;
use blockmirror_protocol::nbd::option_reply::*;
use blockmirror_protocol::nbd::transmission::*;
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::certificates::Authority;
use blockmirror_tests::machines::content::{first_difference, noise};
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{run, succeed, text};
use blockmirror_tests::require;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A client that says what a test wants, on any kind of socket.
struct Wire<S>(S);

type EncryptedWire = Wire<StreamOwned<ClientConnection, TcpStream>>;

impl<S: Read + Write> Wire<S> {
    /// Takes the greeting and answers it.
    fn greet(&mut self) {
        self.greet_as(true);
    }

    fn greet_as(&mut self, fixed_newstyle: bool) {
        assert_eq!(self.array::<GREETING_BYTES>(), greeting());
        self.send(&ClientFlags { fixed_newstyle, no_zeroes: true }.encode());
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("the server listens");
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().expect("as many as asked for")
    }

    /// Sends an option and takes its replies up to the last.
    fn ask(&mut self, option: &ClientOption) -> Vec<OptionReply> {
        self.send(&option.encode());
        self.replies(option.number())
    }

    fn replies(&mut self, option: u32) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let header = OptionReplyHeader::parse(&self.array()).expect("a reply");
            assert_eq!(header.option, option);
            let data = self.bytes(header.length as usize);
            replies.push(OptionReply::parse(header.kind, &data).expect("a reply"));
            if matches!(replies.last(), Some(OptionReply::Acknowledged | OptionReply::Error { .. })) {
                return replies;
            }
        }
    }

    fn refusal(&mut self, option: &ClientOption) -> (Refusal, String) {
        match &self.ask(option)[..] {
            [OptionReply::Error { reason, message }] => (*reason, message.clone()),
            other => panic!("{option:?} was answered with {other:?}"),
        }
    }

    fn open(&mut self) {
        assert_eq!(self.ask(&go()).last(), Some(&OptionReply::Acknowledged));
    }

    fn request(&mut self, kind: CommandKind, length: u64) {
        let length = length as u32;
        let header = RequestHeader { flags: CommandFlags::NONE, kind, cookie: 7, offset: 0, length };
        self.send(&header.encode());
    }

    /// Reads the start of the volume.
    fn read(&mut self, length: u64) -> io::Result<()> {
        let mut reply = [0; SIMPLE_REPLY_BYTES];
        self.0.read_exact(&mut reply)?;
        assert_eq!(SimpleReply::parse(&reply), Ok(SimpleReply { failure: None, cookie: 7 }));
        let taken = io::copy(&mut Read::take(&mut self.0, length), &mut io::sink())?;
        assert_eq!(taken, length);
        Ok(())
    }

    /// What the server still says before it closes the connection.
    fn last_words(&mut self) -> Vec<u8> {
        let mut words = Vec::new();
        match self.0.read_to_end(&mut words) {
            Err(error) if error.kind() != io::ErrorKind::ConnectionReset => panic!("{error}"),
            _ => words,
        }
    }
}

fn go() -> ClientOption {
    ClientOption::Go(ExportQuery { name: String::new(), kinds: Vec::new() })
}

fn connect(address: SocketAddr) -> Wire<TcpStream> {
    let socket = TcpStream::connect(address).expect("the server listens");
    socket.set_read_timeout(Some(Duration::from_secs(120))).expect("a socket");
    Wire(socket)
}

/// Starts TLS with the certificate in a folder.
fn encrypt(
    mut wire: Wire<TcpStream>,
    folder: &Path,
    versions: &[&'static SupportedProtocolVersion],
) -> EncryptedWire {
    assert_eq!(wire.ask(&ClientOption::StartTls), [OptionReply::Acknowledged]);
    Wire(StreamOwned::new(tls_client(folder, versions), wire.0))
}

fn tls_client(folder: &Path, versions: &[&'static SupportedProtocolVersion]) -> ClientConnection {
    let certificate = |name| CertificateDer::from_pem_file(folder.join(name)).expect("a certificate");
    let mut roots = RootCertStore::empty();
    roots.add(certificate("ca-cert.pem")).expect("an authority");
    let key = PrivateKeyDer::from_pem_file(folder.join("client-key.pem")).expect("a key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .expect("the versions are there")
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate("client-cert.pem")], key)
        .expect("a certificate and its key");
    let name = ServerName::try_from("localhost").expect("a name");
    ClientConnection::new(Arc::new(config), name).expect("a client")
}

/// Serves the volume over TLS from the agent's next start on, which this is.
fn serve_over_tls(host: &mut Host, folder: &Path) {
    host.stop();
    host.configure(|volume| {
        volume.nbd_listen = Some("127.0.0.1:0".parse().expect("an address"));
        volume.nbd_tls = Some(folder.to_owned());
    });
    host.start();
    host.wait_until("the volume is served", |status| !status.facts.devices.is_empty());
}

struct Served {
    mirror: Mirror,
    authority: Authority,
}

impl Served {
    fn new(size_bytes: u64, replicas: &[&str]) -> Self {
        let mut mirror = Mirror::new(size_bytes, "nbd", replicas);
        let authority = Authority::new(&mirror.folder, "authority");
        serve_over_tls(&mut mirror.primary, &authority.server());
        Self { mirror, authority }
    }

    fn address(&self) -> SocketAddr {
        self.mirror.primary.tcp_address()
    }

    fn uri(&self, certificates: &Path) -> String {
        format!("{}?tls-certificates={}", self.mirror.primary.tcp_uri(), certificates.display())
    }

    fn connect(&self) -> Wire<TcpStream> {
        let mut wire = connect(self.address());
        wire.greet();
        wire
    }

    /// Waits until a line of the agent's log has all of these words: a client hears of its end before the log does.
    fn wait_for_words(&self, words: &[&str]) {
        until(&format!("the log has {words:?}"), || {
            let log = self.mirror.primary.log();
            let has_words = |line: &str| words.iter().all(|words| line.contains(words));
            if log.lines().any(has_words) { Ok(()) } else { Err(log) }
        });
    }

    /// Whoever may is served, whatever others did.
    fn assert_serving(&self, client: &Path) {
        let mut wire = encrypt(self.connect(), client, &[&TLS13]);
        wire.open();
        wire.request(CommandKind::Read, 4096);
        wire.read(4096).expect("the server answers");
    }
}

#[test]
fn what_programs_write_over_tls_is_on_the_replica_and_comes_out_again() {
    require!("openssl", "nbdinfo", "nbdcopy", "qemu-img", "qemu-io");
    let served = Served::new(64 * MIB, &["b"]);
    let mirror = &served.mirror;
    let client = served.authority.client("client");
    let uri = served.uri(&client);
    let source = mirror.folder.join("source");
    fs::write(&source, noise(&mut Random::new(1), 64 * MIB)).expect("a source");
    let information = succeed("nbdinfo", &[&uri]);
    assert!(information.contains("protocol: newstyle-fixed with TLS"), "{information}");
    succeed("nbdcopy", &["--flush", text(&source), &uri]);
    mirror.assert_identical();
    let out = mirror.folder.join("out");
    succeed("nbdcopy", &[&uri, text(&out)]);
    assert_eq!(first_difference(&source, &out), None);

    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", client.display());
    let address = served.address();
    let (host, port) = (address.ip(), address.port());
    let image = format!("driver=nbd,host={host},port={port},export=data,tls-creds=tls");
    let object = ["--object", credentials.as_str()];
    let information = succeed("qemu-img", &[&["info"][..], &object, &["--image-opts", &image]].concat());
    assert!(information.contains("64 MiB"), "{information}");
    let commands = [
        "-c",
        "write -P 0x11 0 32M",
        "-c",
        "write -z 1M 3M",
        "-c",
        "aio_write -P 0x22 40M 8M",
        "-c",
        "aio_flush",
        "-c",
        "read -P 0x11 0 1M",
        "-c",
        "read -P 0 1M 3M",
        "-c",
        "read -P 0x22 40M 8M",
    ];
    let said = succeed("qemu-io", &[&object[..], &commands, &["--image-opts", &image]].concat());
    assert!(!said.contains("failed"), "{said}");
    mirror.assert_identical();
    let converted = mirror.folder.join("converted");
    let opts = ["--image-opts", &image, "-O", "raw", text(&converted)];
    succeed("qemu-img", &[&["convert"][..], &object, &opts].concat());
    assert_eq!(first_difference(&mirror.primary.backing(), &converted), None);
    let file = format!("driver=raw,file.driver=file,file.filename={}", converted.display());
    succeed("qemu-img", &[&["compare"][..], &object, &["--image-opts", &image, &file]].concat());
}

#[test]
fn who_has_no_certificate_of_the_authority_is_not_served() {
    require!("openssl", "nbdinfo");
    let mut served = Served::new(16 * MIB, &[]);
    let client = served.authority.client("client");
    let stranger = Authority::new(&served.mirror.folder, "stranger").client("client");
    fs::copy(served.authority.certificate(), stranger.join("ca-cert.pem")).expect("a file");
    let nobody = served.mirror.folder.join("nobody");
    fs::create_dir(&nobody).expect("a folder");
    fs::copy(served.authority.certificate(), nobody.join("ca-cert.pem")).expect("a file");
    for folder in [&stranger, &nobody] {
        let refused = run("nbdinfo", &["--size", &served.uri(folder)]);
        assert!(!refused.status.success(), "{}: {refused:?}", folder.display());
    }
    // Programs keep certificates of others back; this one shows it all the same.
    let mut pushing = encrypt(served.connect(), &stranger, &[&TLS13]);
    let asked = pushing.0.write_all(&go().encode());
    assert!(asked.and_then(|()| pushing.0.read_exact(&mut [0])).is_err());
    for words in ["UnknownIssuer", "peer sent no certificates"] {
        served.wait_for_words(&["the client did not get through the tls handshake: ", words]);
    }
    let plain = served.mirror.primary.tcp_uri().replace("nbds:", "nbd:");
    let refused = run("nbdinfo", &["--size", &plain]);
    assert!(String::from_utf8_lossy(&refused.stderr).to_lowercase().contains("tls"), "{refused:?}");
    succeed("nbdinfo", &["--size", &served.uri(&client)]);

    let other = served.authority.client("other");
    let server = served.mirror.folder.join("authority/server");
    served.authority.revoke(&client, &server);
    serve_over_tls(&mut served.mirror.primary, &server);
    assert!(!run("nbdinfo", &["--size", &served.uri(&client)]).status.success());
    served.wait_for_words(&["Revoked"]);
    succeed("nbdinfo", &["--size", &served.uri(&other)]);
}

#[test]
fn before_tls_no_option_is_heard_but_to_start_it_or_to_leave() {
    require!("openssl");
    let served = Served::new(16 * MIB, &[]);
    let client = served.authority.client("client");
    let mut wire = served.connect();
    let contexts = ContextQuery { name: String::new(), queries: vec!["base:allocation".to_owned()] };
    for option in [
        go(),
        ClientOption::Info(ExportQuery { name: "data".to_owned(), kinds: Vec::new() }),
        ClientOption::List,
        ClientOption::StructuredReply,
        ClientOption::ListMetaContext(contexts.clone()),
        ClientOption::SetMetaContext(contexts.clone()),
        ClientOption::Unknown(99),
    ] {
        let (reason, message) = wire.refusal(&option);
        assert_eq!(reason, Refusal::TlsRequired, "{option:?}");
        assert!(message.contains("start tls first"), "{message}");
    }
    wire.send(&OptionHeader { option: option::START_TLS, length: 1 }.encode());
    wire.send(b"x");
    assert!(matches!(
        wire.replies(option::START_TLS)[..],
        [OptionReply::Error { reason: Refusal::Invalid, .. }]
    ));
    // Nothing of what was said before counts.
    let mut wire = encrypt(wire, &client, &[&TLS13]);
    assert_eq!(wire.refusal(&ClientOption::StartTls).0, Refusal::Invalid);
    assert_eq!(wire.refusal(&ClientOption::SetMetaContext(contexts)).0, Refusal::Invalid);
    assert_eq!(wire.ask(&ClientOption::List).len(), 2);
    wire.open();
    wire.request(CommandKind::Read, 8 * MIB);
    wire.read(8 * MIB).expect("the server answers");
    wire.request(CommandKind::Disconnect, 0);
    assert!(wire.last_words().is_empty(), "tls ends in order, and then the connection");

    let mut leaving = served.connect();
    assert_eq!(leaving.ask(&ClientOption::Abort), [OptionReply::Acknowledged]);
    assert!(leaving.last_words().is_empty());
    let mut by_name = served.connect();
    by_name.send(&ClientOption::ExportName("data".to_owned()).encode());
    assert!(by_name.last_words().is_empty());
    let mut old = connect(served.address());
    old.greet_as(false);
    old.send(&ClientOption::StartTls.encode());
    assert!(old.last_words().is_empty());

    let mut older = encrypt(served.connect(), &client, &[&TLS12]);
    older.open();
    older.request(CommandKind::Read, 4096);
    older.read(4096).expect("the protocol wants TLS 1.2 too");

    let mut plain = Wire(UnixStream::connect(served.mirror.primary.socket()).expect("a socket"));
    plain.greet();
    assert_eq!(plain.refusal(&ClientOption::StartTls).0, Refusal::Unsupported);
    plain.open();
}

/// Other servers kept what a client, or somebody between, had sent in plain text behind the wish for TLS, and took it for
/// the client's own words inside TLS (CVE-2021-3716).
#[test]
fn what_is_sent_in_plain_text_behind_the_wish_for_tls_is_never_heard() {
    require!("openssl");
    let served = Served::new(16 * MIB, &[]);
    let client = served.authority.client("client");
    for injected in [go().encode(), ClientOption::Abort.encode(), ClientOption::List.encode()] {
        let mut wire = served.connect();
        wire.send(&[ClientOption::StartTls.encode(), injected.clone()].concat());
        assert_eq!(wire.replies(option::START_TLS), [OptionReply::Acknowledged]);
        assert_alert(&wire.last_words());

        // The same before a handshake that is good.
        let mut wire = served.connect();
        wire.send(&[ClientOption::StartTls.encode(), injected].concat());
        assert_eq!(wire.replies(option::START_TLS), [OptionReply::Acknowledged]);
        let mut wire = StreamOwned::new(tls_client(&client, &[&TLS13]), wire.0);
        assert!(wire.write_all(&go().encode()).and_then(|()| wire.read_exact(&mut [0])).is_err());
    }
    served.assert_serving(&client);
}

/// Nothing, or a record of TLS that says what is wrong.
fn assert_alert(words: &[u8]) {
    assert!(words.is_empty() || (words[0] == 21 && words.len() == 7), "{words:?}");
}

#[test]
fn who_breaks_off_or_sends_garbage_in_the_handshake_harms_nobody() {
    require!("openssl");
    let served = Served::new(16 * MIB, &[]);
    let client = served.authority.client("client");
    let started = || {
        let mut wire = served.connect();
        assert_eq!(wire.ask(&ClientOption::StartTls), [OptionReply::Acknowledged]);
        wire
    };
    let mut hello = Vec::new();
    tls_client(&client, &[&TLS13]).write_tls(&mut hello).expect("a vector takes all");
    // More of them than there are places: the oldest give way.
    let mut halfway: Vec<_> = (0..70).map(|_| started()).collect();
    for wire in &mut halfway[6..] {
        wire.send(&hello[..hello.len() / 2]);
    }
    assert!(halfway[..5].iter_mut().all(|wire| wire.last_words().is_empty()));
    served.assert_serving(&client);
    let mut random = Random::new(3);
    for length in [1, 5, 100, 20_000] {
        // So many bytes that are no TLS, and then no more.
        let mut wire = started();
        let _ = wire.0.write_all(&noise(&mut random, length.max(512))[..length as usize]);
        let _ = wire.0.shutdown(std::net::Shutdown::Write);
        assert_alert(&wire.last_words());
    }
    // A message of 16 MiB that never comes.
    let mut endless = started();
    endless.send(&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff]);
    let _ = (0..2000).try_for_each(|_| endless.0.write_all(&[0; 16 << 10]));
    drop(endless);
    // Half a record inside TLS, and a record that was changed.
    let mut cut = encrypt(served.connect(), &client, &[&TLS13]);
    cut.open();
    cut.0.sock.write_all(&[23, 3, 3, 1, 0, 0, 0]).expect("the server listens");
    drop(cut);
    let mut changed = encrypt(served.connect(), &client, &[&TLS13]);
    changed.open();
    changed.0.sock.write_all(&[23, 3, 3, 0, 32]).expect("the server listens");
    changed.0.sock.write_all(&[9; 32]).expect("the server listens");
    assert!(changed.0.read_exact(&mut [0]).is_err());
    served.assert_serving(&client);
    assert!(served.mirror.primary.peak_memory_bytes() < 200 * MIB);
}

#[test]
fn certificates_that_cannot_be_used_are_told_and_nothing_is_served_instead() {
    require!("openssl");
    let mut served = Served::new(16 * MIB, &[]);
    let server = served.mirror.folder.join("authority/server");
    let other = Authority::new(&served.mirror.folder, "other").server();
    let key = server.join("server-key.pem");
    let tell = |served: &mut Served, folder: &Path, words: &str| {
        serve_over_tls(&mut served.mirror.primary, folder);
        let status = served.mirror.primary.status();
        assert!(status.verdict.contains(words), "{}", status.verdict);
        let tcp = status.facts.devices.iter().filter_map(|device| device.uri.as_deref());
        assert!(tcp.filter(|uri| uri.starts_with("nbd://")).count() == 0, "{status:?}");
        drop(served.mirror.client());
    };
    let path = served.mirror.folder.join("nowhere");
    tell(&mut served, &path, "cannot read");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).expect("it is ours");
    tell(&mut served, &server, "can be read by others (mode 640)");
    fs::copy(other.join("server-key.pem"), &key).expect("a file");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("it is ours");
    tell(&mut served, &server, "cannot use the certificate and key");
    fs::write(server.join("ca-cert.pem"), "nothing").expect("a file");
    tell(&mut served, &server, "holds no certificate");
}

#[test]
fn an_export_that_is_open_to_a_network_is_warned_of() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &[]);
    let mut listen = |address: &str| {
        mirror.primary.stop();
        mirror.primary.configure(|volume| volume.nbd_listen = Some(address.parse().expect("an address")));
        mirror.primary.start();
        mirror.primary.wait_until("the volume is served", |status| !status.facts.devices.is_empty());
        (mirror.primary.status().verdict, mirror.primary.log())
    };
    let words = "is not encrypted and serves whoever reaches it";
    let (verdict, log) = listen("127.0.0.1:0");
    assert!(!verdict.contains(words) && !log.contains(words), "{verdict}");
    let (verdict, log) = listen("0.0.0.0:0");
    assert!(verdict.contains("; warning: nbd on 0.0.0.0:") && verdict.contains(words), "{verdict}");
    assert!(log.contains(words), "{log}");
}

/// 64 clients that asked and did not read had 8 GiB of the agent's memory.
#[test]
fn clients_that_take_no_answers_have_256_mib_of_memory_together() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &[]);
    mirror.primary.stop();
    mirror.primary.configure(|volume| volume.nbd_listen = Some("127.0.0.1:0".parse().expect("an address")));
    mirror.primary.start();
    mirror.primary.wait_until("the volume is served", |status| !status.facts.devices.is_empty());
    let address = mirror.primary.tcp_address();
    let mut clients: Vec<Wire<TcpStream>> = (0..64)
        .map(|_| {
            let mut wire = connect(address);
            wire.greet();
            wire.open();
            wire.request(CommandKind::Read, 64 * MIB);
            wire
        })
        .collect();
    // Small requests go on, over the Unix socket and over TCP.
    let mut other = mirror.client();
    other.write_durably(0, &[7; 4096]).expect("another client is served");
    assert_eq!(other.read(0, MIB).expect("another client is served").len() as u64, MIB);
    // Half of them vanish; the others read after all, and each is served.
    drop(clients.split_off(32));
    let readers = clients.into_iter().map(|mut wire| std::thread::spawn(move || wire.read(64 * MIB)));
    for reader in readers.collect::<Vec<_>>() {
        reader.join().expect("a reader").expect("who waits is served in the end");
    }
    let mut wire = connect(address);
    wire.greet();
    wire.open();
    wire.request(CommandKind::Read, 64 * MIB);
    wire.read(64 * MIB).expect("another client is served");
    let peak = mirror.primary.peak_memory_bytes();
    assert!(peak < 320 * MIB, "the agent had {} MiB", peak / MIB);
}
