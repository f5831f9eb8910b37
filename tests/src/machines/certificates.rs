//! Certificates for NBD over TLS, made by openssl: an authority, its server and its clients, in folders as qemu, nbdkit and
//! libnbd want them.

use super::folder::Folder;
use super::programs::{succeed, text};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const NEW_KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

/// Someone who signs certificates.
pub struct Authority {
    folder: PathBuf,
}

impl Authority {
    /// A new authority, which keeps its things under this name.
    ///
    /// # Panics
    /// When openssl fails.
    #[must_use]
    pub fn new(folder: &Folder, name: &str) -> Self {
        let folder = folder.join(name);
        fs::create_dir(&folder).expect("a folder");
        let authority = Self { folder };
        let (key, certificate) = (authority.path("ca-key.pem"), authority.certificate());
        let subject = format!("/CN={name}");
        let arguments = ["req", "-x509", "-days", "2", "-subj", &subject];
        let files = ["-keyout", text(&key), "-out", text(&certificate)];
        succeed("openssl", &[&arguments[..], &NEW_KEY, &files].concat());
        authority
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Its own certificate.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.path("ca-cert.pem")
    }

    /// A folder with what a server on this host needs.
    ///
    /// # Panics
    /// When openssl fails.
    #[must_use]
    pub fn server(&self) -> PathBuf {
        self.issue("server", "server", "serverAuth\nsubjectAltName=DNS:localhost,IP:127.0.0.1")
    }

    /// A folder with what a client of this name needs.
    ///
    /// # Panics
    /// When openssl fails.
    #[must_use]
    pub fn client(&self, name: &str) -> PathBuf {
        self.issue(name, "client", "clientAuth")
    }

    fn issue(&self, name: &str, role: &str, uses: &str) -> PathBuf {
        let folder = self.path(name);
        fs::create_dir(&folder).expect("a folder");
        let (request, extensions) = (self.path("request"), self.path("extensions"));
        let key = folder.join(format!("{role}-key.pem"));
        let certificate = folder.join(format!("{role}-cert.pem"));
        let subject = format!("/CN={name}");
        let arguments = ["req", "-new", "-subj", &subject, "-keyout", text(&key), "-out", text(&request)];
        succeed("openssl", &[&arguments[..], &NEW_KEY].concat());
        fs::write(&extensions, format!("extendedKeyUsage={uses}\n")).expect("a file");
        let (own, own_key) = (self.certificate(), self.path("ca-key.pem"));
        let authority = ["-CA", text(&own), "-CAkey", text(&own_key), "-CAcreateserial", "-days", "2"];
        let files = ["-in", text(&request), "-extfile", text(&extensions), "-out", text(&certificate)];
        succeed("openssl", &[&["x509", "-req"][..], &authority, &files].concat());
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("it is ours");
        fs::copy(self.certificate(), folder.join("ca-cert.pem")).expect("a file");
        folder
    }

    /// Revokes a client's certificate, and tells the server by the list in its folder.
    ///
    /// # Panics
    /// When openssl fails.
    pub fn revoke(&self, client: &Path, server: &Path) {
        let place = self.folder.display();
        let settings = format!(
            "[ca]\ndefault_ca=own\n[own]\ndatabase={place}/index\ncrlnumber={place}/number\ndefault_md=sha256\n\
             default_crl_days=2\n"
        );
        let path = self.path("settings");
        fs::write(&path, settings).expect("a file");
        fs::write(self.path("index"), "").expect("a file");
        fs::write(self.path("number"), "01\n").expect("a file");
        let (own, key) = (self.certificate(), self.path("ca-key.pem"));
        let common = ["ca", "-config", text(&path), "-cert", text(&own), "-keyfile", text(&key)];
        let certificate = client.join("client-cert.pem");
        succeed("openssl", &[&common[..], &["-revoke", text(&certificate)]].concat());
        let list = server.join("ca-crl.pem");
        succeed("openssl", &[&common[..], &["-gencrl", "-out", text(&list)]].concat());
    }
}
