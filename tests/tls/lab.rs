//! Authorities and certificates of every kind, in folders.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use tempfile::TempDir;

use crate::common::{Job, Recv, folder, send};

const DAY: Duration = Duration::from_secs(86_400);

/// Who signs.
pub(crate) struct Authority {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What is to be signed.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) names: Vec<&'static str>,
    pub(crate) common_name: &'static str,
    /// Days from now.
    pub(crate) from: i64,
    pub(crate) until: i64,
    pub(crate) purpose: Option<ExtendedKeyUsagePurpose>,
}

impl Wanted {
    /// A good one for `127.0.0.1`.
    pub(crate) fn good() -> Self {
        Self { names: vec!["127.0.0.1"], common_name: "a host", from: -1, until: 1, purpose: None }
    }
}

fn day(offset: i64) -> SystemTime {
    let days = DAY * offset.unsigned_abs() as u32;
    if offset < 0 { SystemTime::now() - days } else { SystemTime::now() + days }
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let (params, key) = (Self::params(name), KeyPair::generate().unwrap());
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        params
    }

    /// One that this one has signed.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        let (params, key) = (Self::params(name), KeyPair::generate().unwrap());
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn sign(&self, wanted: &Wanted) -> (Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = wanted.names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, wanted.common_name);
        (params.not_before, params.not_after) = (day(wanted.from).into(), day(wanted.until).into());
        params.extended_key_usages.extend(wanted.purpose.clone());
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }
}

/// A folder for `--tls-dir`, of one side or both.
pub(crate) struct Keys(TempDir);

impl Keys {
    /// One that trusts `authority`.
    pub(crate) fn trusting(authority: &Authority) -> Self {
        let folder = folder();
        std::fs::write(folder.path().join("ca-cert.pem"), &authority.pem).unwrap();
        Self(folder)
    }

    /// With a certificate for this side, and what stands between it and an authority.
    pub(crate) fn with(self, side: &str, signer: &Authority, wanted: &Wanted, between: &str) -> Self {
        let (certificate, key) = signer.sign(wanted);
        let file = |what: &str| self.0.path().join(format!("{side}-{what}.pem"));
        std::fs::write(file("cert"), certificate.pem() + between).unwrap();
        std::fs::write(file("key"), key.serialize_pem()).unwrap();
        self
    }

    /// Good for both sides.
    pub(crate) fn good() -> Self {
        let authority = Authority::new("the authority");
        let both = Self::trusting(&authority).with("server", &authority, &Wanted::good(), "");
        both.with("client", &authority, &Wanted::good(), "")
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn text(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// A destination for the job's file, with these certificates.
pub(crate) fn recv(job: &Job, keys: &Keys, args: &[&str]) -> Recv {
    let file = job.to.to_str().unwrap();
    let all = [
        "--json",
        "--link-timeout",
        "5",
        "--reconnect-timeout",
        "0",
        "--tls-dir",
        keys.text(),
        "--ram-file",
        file,
    ];
    Recv::start("tcp:127.0.0.1:0", all.iter().chain(args))
}

/// A good source is served, whatever happened before.
pub(crate) fn assert_serves(job: &Job, recv: Recv, keys: &Keys) -> crate::common::Ended {
    send(&recv.uri, &job.from, &["--tls-dir", keys.text()]).wait().code(0);
    let received = recv.ferry.wait();
    received.code(0);
    job.assert_arrived();
    received
}
