//! TLS on the command line, and in requests to a `vm`.

use std::path::{Path, PathBuf};

use clap::Args;
use pageferry::{Side, Tls, TlsFiles};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Certificates of a side.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub(super) struct TlsArgs {
    /// Protect every connection by TLS 1.3, with the certificates and the key in this folder: ca-cert.pem, and server-cert.pem with
    /// server-key.pem where it listens, client-cert.pem with client-key.pem where it connects; `pageferry keys` makes them
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// The certificates of the authorities that the other side's must be signed by, in a file
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// This side's certificate, in a file
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// This side's key, in a file
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
}

impl TlsArgs {
    /// The files that were named, for this side; a file that is named goes before one in the folder.
    fn files(&self, side: Side) -> Result<Option<TlsFiles>, String> {
        let named = [&self.tls_ca, &self.tls_cert, &self.tls_key];
        let Some(dir) = &self.tls_dir else {
            return match named {
                [None, None, None] => Ok(None),
                [Some(ca), Some(cert), Some(key)] => {
                    Ok(Some(TlsFiles { ca: ca.clone(), cert: cert.clone(), key: key.clone(), crl: None }))
                }
                _ => {
                    Err("--tls-ca, --tls-cert and --tls-key go together: give all three, or --tls-dir".into())
                }
            };
        };
        let mut files = TlsFiles::of_folder(dir, side);
        for (file, named) in [&mut files.ca, &mut files.cert, &mut files.key].into_iter().zip(named) {
            named.iter().for_each(|named| file.clone_from(named));
        }
        Ok(Some(files))
    }
}

/// What protects whoever connects.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub(super) struct ConnectArgs {
    #[command(flatten)]
    tls: TlsArgs,
    /// The name that the destination's certificate must be for, where that is not the address: behind a tunnel, or a Unix socket
    #[arg(long, value_name = "NAME")]
    tls_hostname: Option<String>,
    /// With TLS and rdma: - let pages travel as they are: RDMA encrypts nothing, and TLS protects the control connection alone
    #[arg(long)]
    insecure_data_path: bool,
}

/// What protects whoever listens.
#[derive(Clone, Debug, Default, PartialEq, Args)]
pub(super) struct ListenArgs {
    #[command(flatten)]
    tls: TlsArgs,
    /// Let only a source send whose certificate is for this name; may be given several times
    #[arg(long, value_name = "NAME")]
    tls_allow: Vec<String>,
    /// Listen without TLS where others can reach it: whoever does can hand over a guest, and whoever taps the wire reads one
    #[arg(long)]
    insecure: bool,
    /// With TLS and rdma: - let pages travel as they are: RDMA encrypts nothing, and TLS protects the control connection alone
    #[arg(long)]
    insecure_data_path: bool,
}

impl ListenArgs {
    /// The files that are read anew for every session.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let files = self.tls.files(Side::Server).ok().flatten();
        files.map_or_else(Vec::new, |TlsFiles { ca, cert, key, crl }| {
            [ca, cert, key].into_iter().chain(crl).collect()
        })
    }

    pub(super) fn is_insecure(&self) -> bool {
        self.insecure
    }

    pub(super) fn tls(&self) -> Result<Option<Tls>, String> {
        let Some(files) = self.tls.files(Side::Server)? else {
            return match self.tls_allow.first() {
                Some(name) => Err(format!(
                    "--tls-allow {name} says who may send, which TLS alone can tell: give --tls-dir"
                )),
                None => Ok(None),
            };
        };
        let tls = Tls::new(files).allow(self.tls_allow.iter().cloned());
        Ok(Some(tls.insecure_data_path(self.insecure_data_path)))
    }
}

/// The same in a request to a `vm`, whose process reads the files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TlsRequest {
    /// The authorities that the destination's certificate must be signed by. An absolute path, as all of these, since the VM has a
    /// folder of its own.
    pub ca: PathBuf,
    /// This side's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Certificates that are revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crl: Option<PathBuf>,
    /// The name that the destination's certificate must be for, where that is not the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Over RDMA: let pages travel as they are.
    #[serde(default)]
    pub insecure_data_path: bool,
}

impl ConnectArgs {
    pub(super) fn request(&self) -> Result<Option<TlsRequest>, String> {
        let Some(TlsFiles { ca, cert, key, crl }) = self.tls.files(Side::Client)? else {
            return match &self.tls_hostname {
                Some(name) => Err(format!(
                    "--tls-hostname {name} names a certificate, and there is no TLS: give --tls-dir"
                )),
                None => Ok(None),
            };
        };
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
        Ok(Some(TlsRequest {
            ca: absolute(&ca),
            cert: absolute(&cert),
            key: absolute(&key),
            crl: crl.as_deref().map(absolute),
            hostname: self.tls_hostname.clone(),
            insecure_data_path: self.insecure_data_path,
        }))
    }

    pub(super) fn tls(&self) -> Result<Option<Tls>, String> {
        Ok(self.request()?.map(|request| request.tls()))
    }
}

impl TlsRequest {
    pub(super) fn tls(&self) -> Tls {
        let Self { ca, cert, key, crl, hostname, insecure_data_path } = self.clone();
        Tls::new(TlsFiles { ca, cert, key, crl }).hostname(hostname).insecure_data_path(insecure_data_path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(dir: Option<&str>, named: [Option<&str>; 3]) -> TlsArgs {
        let [tls_ca, tls_cert, tls_key] = named.map(|path| path.map(PathBuf::from));
        TlsArgs { tls_dir: dir.map(PathBuf::from), tls_ca, tls_cert, tls_key }
    }

    #[test]
    fn files_are_a_folders_unless_they_are_named() {
        let files = |args: &TlsArgs, side| args.files(side).unwrap().unwrap();
        let named = |ca: &str, cert: &str, key: &str| TlsFiles {
            ca: ca.into(),
            cert: cert.into(),
            key: key.into(),
            crl: None,
        };
        // A list of revoked certificates may come later.
        let of = |ca: &str, cert: &str, key: &str| TlsFiles {
            crl: Some("/d/ca-crl.pem".into()),
            ..named(ca, cert, key)
        };
        let dir = args(Some("/d"), [None, None, None]);
        let client = of("/d/ca-cert.pem", "/d/client-cert.pem", "/d/client-key.pem");
        assert_eq!(files(&dir, Side::Client), client);
        let server = of("/d/ca-cert.pem", "/d/server-cert.pem", "/d/server-key.pem");
        assert_eq!(files(&dir, Side::Server), server);
        let some = args(Some("/d"), [None, Some("c"), None]);
        assert_eq!(files(&some, Side::Server), of("/d/ca-cert.pem", "c", "/d/server-key.pem"));
        let all = args(None, [Some("a"), Some("c"), Some("k")]);
        assert_eq!(files(&all, Side::Server), named("a", "c", "k"));
        assert_eq!(args(None, [None, None, None]).files(Side::Client), Ok(None));
        for named in [[Some("a"), None, None], [Some("a"), Some("c"), None], [None, None, Some("k")]] {
            assert!(args(None, named).files(Side::Client).unwrap_err().contains("go together"));
        }
    }

    #[test]
    fn what_is_of_no_use_without_tls_is_refused() {
        let connect = ConnectArgs { tls_hostname: Some("node7".into()), ..ConnectArgs::default() };
        assert!(connect.tls().unwrap_err().contains("--tls-dir"));
        let listen = ListenArgs { tls_allow: vec!["node7".into()], ..ListenArgs::default() };
        assert!(listen.tls().unwrap_err().contains("--tls-dir"));
    }
}
