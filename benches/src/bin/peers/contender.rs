//! What takes part in a comparison: pageferry, QEMU, or the bare machine.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use pageferry::measure::ferry::Ferry;
use pageferry::measure::qemu::{self, Mode};
use pageferry::measure::{Job, Took};

use crate::limit::{self, Sender};

/// Who moves an image, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// `pageferry send` and `recv`: streams and codec.
    Pageferry(u16, String),
    /// `pageferry qemu send` and `recv`, beside two QEMUs: streams and codec.
    Attached(u16, String),
    /// QEMU's own migration.
    Qemu(Mode),
    /// Bytes alone, without a protocol: what the machine can do. The number is that of its streams.
    Limit(Sender, u8),
    /// One of the others, under TLS.
    Tls(Box<Contender>),
}

impl Contender {
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self, Self::Pageferry(..))
    }

    /// Ours beside two QEMUs.
    pub(crate) fn is_attached(&self) -> bool {
        matches!(self, Self::Attached(..))
    }

    /// QEMU with the pages as they are.
    pub(crate) fn is_plain_qemu(&self) -> bool {
        matches!(self, Self::Qemu(Mode::Multifd(_) | Mode::Tcp | Mode::Xbzrle))
    }

    /// QEMU with zstd.
    pub(crate) fn is_zstd_qemu(&self) -> bool {
        matches!(self, Self::Qemu(Mode::MultifdZstd(..)))
    }

    /// Ours under TLS.
    pub(crate) fn is_ours_under_tls(&self) -> bool {
        matches!(self, Self::Tls(inner) if inner.is_ours())
    }

    /// QEMU under TLS.
    pub(crate) fn is_qemu_under_tls(&self) -> bool {
        matches!(self, Self::Tls(inner) if inner.is_plain_qemu())
    }

    /// Moves the image once.
    pub(crate) fn run(&self, pageferry: &Path, job: &Job<'_>) -> Result<Took, String> {
        match self {
            Self::Pageferry(streams, codec) => {
                Ferry { program: pageferry, scheme: "tcp", streams: *streams, codec }.transfer(job)
            }
            Self::Attached(streams, codec) => {
                Ferry { program: pageferry, scheme: "tcp", streams: *streams, codec }.attached(job)
            }
            Self::Qemu(mode) => qemu::migrate(*mode, job),
            Self::Limit(sender, streams) => limit::measure(*sender, *streams, job),
            Self::Tls(inner) => {
                let keys = keys(pageferry, job.folder, job.host)?;
                inner.run(pageferry, &Job { tls: Some(&keys), ..*job })
            }
        }
    }
}

/// A folder with certificates for this host, made once.
fn keys(pageferry: &Path, folder: &Path, host: &str) -> Result<PathBuf, String> {
    let keys = folder.join(format!("keys-{host}"));
    if !keys.is_dir() {
        let made = Command::new(pageferry).args(["keys", "init", "--host", host]).arg(&keys).output();
        let made = made.map_err(|e| format!("{}: {e}", pageferry.display()))?;
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).into_owned());
        }
    }
    Ok(keys)
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pageferry(streams, codec) => write!(f, "pageferry:{streams}:{codec}"),
            Self::Attached(streams, codec) => write!(f, "attached:{streams}:{codec}"),
            Self::Qemu(mode) => write!(f, "qemu:{mode}"),
            Self::Limit(sender, streams) => write!(f, "limit:{sender}:{streams}"),
            Self::Tls(inner) => write!(f, "tls:{inner}"),
        }
    }
}

impl FromStr for Contender {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (who, how) = text.split_once(':').unwrap_or((text, ""));
        match who {
            "pageferry" | "attached" => {
                let (streams, codec) = how.split_once(':').unwrap_or((how, "auto"));
                let streams = streams.parse().map_err(|_| format!("{streams:?} is no number of streams"))?;
                let codec = codec.to_owned();
                Ok(if who == "attached" {
                    Self::Attached(streams, codec)
                } else {
                    Self::Pageferry(streams, codec)
                })
            }
            "qemu" => how.parse().map(Self::Qemu),
            "limit" => {
                let (sender, streams) = how.split_once(':').unwrap_or((how, "2"));
                let streams = streams.parse().ok().filter(|n| (1..=64).contains(n));
                Ok(Self::Limit(sender.parse()?, streams.ok_or("streams of a limit are 1 to 64")?))
            }
            "tls" => match how.parse()? {
                inner @ (Self::Pageferry(..) | Self::Qemu(_)) => Ok(Self::Tls(Box::new(inner))),
                other => Err(format!("{other} has no TLS")),
            },
            _ => Err(format!(
                "{text:?} is none of [tls:]pageferry:STREAMS[:CODEC], attached:STREAMS[:CODEC], [tls:]qemu:MODE, limit:write|splice[:STREAMS]"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contenders_are_named_and_read_alike() {
        for text in [
            "pageferry:4:auto",
            "pageferry:2:zstd:3",
            "qemu:multifd:8",
            "qemu:tcp",
            "limit:splice:2",
            "tls:qemu:multifd:4",
            "tls:pageferry:1:raw",
            "attached:4:auto",
        ] {
            assert_eq!(text.parse::<Contender>().unwrap().to_string(), text);
        }
        assert_eq!("pageferry:8".parse::<Contender>().unwrap().to_string(), "pageferry:8:auto");
        for bad in [
            "",
            "pageferry",
            "pageferry:x",
            "qemu",
            "qemu:udp",
            "limit:telepathy",
            "xen:4",
            "tls",
            "tls:limit:write",
            "tls:tls:qemu:tcp",
        ] {
            assert!(bad.parse::<Contender>().is_err(), "{bad}");
        }
    }
}
