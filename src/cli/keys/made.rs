//! Making keys and certificates.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde::Serialize;

use super::InitArgs;
use crate::cli::words::explain;
use crate::cli::{CliError, Exit};

const CA_CERT: &str = "ca-cert.pem";
const CA_KEY: &str = "ca-key.pem";
const DAY: Duration = Duration::from_secs(86_400);

/// What was made.
#[derive(Debug, Serialize)]
pub(super) struct Made {
    dir: PathBuf,
    /// Whom both sides' certificates are for.
    names: Vec<String>,
    days: u16,
    files: Vec<File>,
}

/// A file, and who needs it.
#[derive(Debug, Serialize)]
struct File {
    name: &'static str,
    #[serde(rename = "for")]
    whom: &'static str,
    #[serde(skip)]
    content: String,
}

impl Made {
    /// Makes and writes them.
    pub(super) fn make(args: &InitArgs) -> Result<Self, CliError> {
        let names = names(&args.host)?;
        let cannot = |e: rcgen::Error| failed(format!("cannot make a certificate: {e}"));
        let mut files = Vec::new();
        let issuer = match &args.ca {
            Some(dir) => authority_of(dir)?,
            None => {
                let key = KeyPair::generate().map_err(cannot)?;
                let params = authority(args.days);
                let certificate = params.self_signed(&key).map_err(cannot)?;
                files.push(File::new(CA_CERT, "every host", certificate.pem()));
                files.push(File::new(
                    CA_KEY,
                    "nobody but whoever signs more certificates",
                    key.serialize_pem(),
                ));
                Issuer::new(params, key)
            }
        };
        if let Some(dir) = &args.ca {
            let authority = read(&dir.join(CA_CERT))?;
            files.push(File::new(CA_CERT, "every host", authority));
        }
        for (side, cert, key) in [
            (ExtendedKeyUsagePurpose::ServerAuth, "server-cert.pem", "server-key.pem"),
            (ExtendedKeyUsagePurpose::ClientAuth, "client-cert.pem", "client-key.pem"),
        ] {
            let whom = match side {
                ExtendedKeyUsagePurpose::ServerAuth => "hosts that take guests in",
                _ => "hosts that send guests",
            };
            let own = KeyPair::generate().map_err(cannot)?;
            let params = side_of(&names, args.days, side).map_err(cannot)?;
            let certificate = params.signed_by(&own, &issuer).map_err(cannot)?;
            files.push(File::new(cert, whom, certificate.pem()));
            files.push(File::new(key, whom, own.serialize_pem()));
        }
        write(&args.dir, &files)?;
        Ok(Self { dir: args.dir.clone(), names, days: args.days, files })
    }

    pub(super) fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "made in {}, good for {} days, for {}:",
            self.dir.display(),
            self.days,
            self.names.join(", ")
        )?;
        for File { name, whom, .. } in &self.files {
            writeln!(f, "  {name:<16} for {whom}")?;
        }
        writeln!(
            f,
            "copy them to a folder of each host, readable by its user alone, and name that by --tls-dir"
        )
    }
}

impl File {
    fn new(name: &'static str, whom: &'static str, content: String) -> Self {
        Self { name, whom, content }
    }
}

fn failed(text: String) -> CliError {
    CliError { exit: Exit::CannotStart, text }
}

fn read(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path).map_err(|e| failed(format!("cannot read {}: {e}", path.display())))
}

/// The given ones, and those by which every host reaches itself.
fn names(given: &[String]) -> Result<Vec<String>, CliError> {
    let own = rustix::system::uname();
    let own = own.nodename().to_string_lossy();
    let own = Some(&*own).filter(|name| pageferry::Tls::is_name(name));
    let mut names: Vec<String> = Vec::new();
    for name in given.iter().map(String::as_str).chain(["localhost"]).chain(own).chain(["127.0.0.1", "::1"]) {
        if !pageferry::Tls::is_name(name) {
            return Err(CliError::usage(format!("--host: {name:?} is neither a host's name nor an address")));
        }
        if !names.iter().any(|known| known == name) {
            names.push(name.into());
        }
    }
    Ok(names)
}

/// A certificate that is good from a day ago, for clocks that are behind.
fn dated(mut params: CertificateParams, name: &str, days: u16) -> CertificateParams {
    let now = SystemTime::now();
    params.not_before = (now - DAY).into();
    params.not_after = (now + DAY * u32::from(days)).into();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn authority(days: u16) -> CertificateParams {
    let mut params = dated(CertificateParams::default(), "pageferry lab authority", days);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn authority_of(dir: &Path) -> Result<Issuer<'static, KeyPair>, CliError> {
    let (cert, key) = (dir.join(CA_CERT), dir.join(CA_KEY));
    let cannot = |path: &Path, e: rcgen::Error| failed(format!("cannot sign with {}: {e}", path.display()));
    let own = KeyPair::from_pem(&read(&key)?).map_err(|e| cannot(&key, e))?;
    Issuer::from_ca_cert_pem(&read(&cert)?, own).map_err(|e| cannot(&cert, e))
}

/// Usages as QEMU asks for them.
fn side_of(
    names: &[String],
    days: u16,
    side: ExtendedKeyUsagePurpose,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = dated(CertificateParams::new(names)?, &names[0], days);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![side];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Writes all of them, or none; none that is there is touched.
fn write(dir: &Path, files: &[File]) -> Result<(), CliError> {
    let folder = || match std::fs::DirBuilder::new().mode(0o700).recursive(false).create(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        result => result,
    };
    folder().map_err(|e| failed(format!("cannot make the folder {}: {e}", dir.display())))?;
    let there = files.iter().find(|file| dir.join(file.name).symlink_metadata().is_ok());
    if let Some(there) = there {
        let path = dir.join(there.name);
        return Err(failed(format!(
            "{} is there already, and is left alone: choose another folder",
            path.display()
        )));
    }
    for (at, file) in files.iter().enumerate() {
        let path = dir.join(file.name);
        let written =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).and_then(|mut new| {
                new.write_all(file.content.as_bytes())?;
                new.sync_all()
            });
        if let Err(error) = written {
            for made in &files[..=at] {
                // Those that were made a moment ago.
                let _ = std::fs::remove_file(dir.join(made.name));
            }
            return Err(failed(format!("cannot write {}: {}", path.display(), explain(&error))));
        }
    }
    Ok(())
}
