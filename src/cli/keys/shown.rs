//! What there is to know of certificates.

use std::fmt;
use std::path::{Path, PathBuf};

use pageferry::certificates;
use serde::Serialize;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::cli::words::explain;
use crate::cli::{CliError, Exit};

/// Those that a folder may have.
const NAMES: [&str; 3] = ["ca-cert.pem", "server-cert.pem", "client-cert.pem"];

/// The certificates of a folder or a file.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    certificates: Vec<Certificate>,
}

/// One of them.
#[derive(Debug, Serialize)]
struct Certificate {
    file: PathBuf,
    subject: String,
    issuer: String,
    /// Whom it is for.
    names: Vec<String>,
    not_before: String,
    not_after: String,
    /// Whole days that it is still good; below 0: since when it is not.
    days_left: i64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    Good,
    Expired,
    NotValidYet,
}

impl Shown {
    pub(super) fn of(path: &Path) -> Result<Self, CliError> {
        let failed = |text: String| CliError { exit: Exit::CannotStart, text };
        let files: Vec<PathBuf> = if path.is_dir() {
            NAMES.iter().map(|name| path.join(name)).filter(|file| file.exists()).collect()
        } else {
            vec![path.into()]
        };
        if files.is_empty() {
            let names = NAMES.join(", ");
            return Err(failed(format!("{} has none of {names}", path.display())));
        }
        let mut found = Vec::new();
        for file in files {
            for der in certificates(&file).map_err(|e| failed(explain(&e)))? {
                let (_, parsed) = X509Certificate::from_der(&der).map_err(|e| {
                    failed(format!("{} holds a certificate that is none: {e}", file.display()))
                })?;
                found.push(Certificate::of(&file, &parsed));
            }
        }
        Ok(Self { certificates: found })
    }

    pub(super) fn are_good(&self) -> bool {
        self.certificates.iter().all(|certificate| certificate.state == State::Good)
    }

    pub(super) fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl Certificate {
    fn of(file: &Path, parsed: &X509Certificate<'_>) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.map_or(0, |since| since.as_secs() as i64);
        let (from, until) = (parsed.validity().not_before, parsed.validity().not_after);
        let state = match () {
            () if now < from.timestamp() => State::NotValidYet,
            () if now > until.timestamp() => State::Expired,
            () => State::Good,
        };
        let alternatives = parsed.subject_alternative_name().ok().flatten();
        let names = alternatives.iter().flat_map(|names| &names.value.general_names).map(name_of).collect();
        Self {
            file: file.into(),
            subject: parsed.subject().to_string(),
            issuer: parsed.issuer().to_string(),
            names,
            not_before: from.to_string(),
            not_after: until.to_string(),
            days_left: (until.timestamp() - now).div_euclid(86_400),
            state,
        }
    }
}

fn name_of(name: &GeneralName<'_>) -> String {
    match name {
        GeneralName::DNSName(name) => (*name).into(),
        GeneralName::IPAddress(bytes) => match (<[u8; 4]>::try_from(*bytes), <[u8; 16]>::try_from(*bytes)) {
            (Ok(v4), _) => std::net::Ipv4Addr::from(v4).to_string(),
            (_, Ok(v6)) => std::net::Ipv6Addr::from(v6).to_string(),
            _ => "an address of a strange length".into(),
        },
        other => other.to_string(),
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for shown in &self.certificates {
            let state = match shown.state {
                State::Good => format!("{} days left", shown.days_left),
                State::Expired => format!("EXPIRED on {}", shown.not_after),
                State::NotValidYet => format!("NOT VALID before {}", shown.not_before),
            };
            writeln!(f, "{}: {}, signed by {}: {state}", shown.file.display(), shown.subject, shown.issuer)?;
            if !shown.names.is_empty() {
                writeln!(f, "  for {}", shown.names.join(", "))?;
            }
        }
        Ok(())
    }
}
