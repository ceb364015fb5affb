//! Migration URIs, written as QEMU writes them: `tcp:HOST:PORT`, `unix:PATH`, `rdma:HOST:PORT` of a destination that answers, and
//! `file:PATH`, `exec:COMMAND`, `fd:N` where nobody does.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where a destination listens, or where a guest is saved to and loaded from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:HOST:PORT`, `tcp:[V6]:PORT`; an empty HOST or `0` means every address when listening and the loopback when connecting.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port; 0 lets the system choose when listening.
        port: u16,
    },
    /// `unix:PATH`, or `unix:@NAME` in the abstract namespace, of which [`abstract_name`] tells.
    Unix(PathBuf),
    /// `rdma:HOST:PORT`, written as for TCP: control over TCP, pages over queue pairs. The address is of an RDMA device.
    Rdma {
        /// Name or address, without brackets.
        host: String,
        /// Port, the same one for both; 0 lets the system choose when listening.
        port: u16,
    },
    /// `file:PATH`: a file that a guest is saved to, or loaded from.
    File(PathBuf),
    /// `exec:COMMAND`: a command of the shell that takes a saved guest on its standard input, or gives one on its standard output.
    Exec(String),
    /// `fd:N`: an open descriptor of this process that a guest is saved to, or loaded from.
    Fd(i32),
}

/// A text that is no URI this version understands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{uri:?} is not a migration URI: {why}; expected tcp:HOST:PORT, tcp:[IPV6]:PORT, unix:PATH, rdma:HOST:PORT, file:PATH, \
     exec:COMMAND or fd:N"
)]
pub struct UriError {
    uri: String,
    why: String,
}

/// The name of a Unix socket in Linux's abstract namespace: no file, and gone with its listener. Written with an `@` before it, as QEMU's
/// users and ss(8) do; a file of that name is `./@NAME`.
pub fn abstract_name(path: &Path) -> Option<&[u8]> {
    path.as_os_str().as_bytes().strip_prefix(b"@")
}

/// Longest path of a Unix socket (`sun_path` less the final NUL).
const UNIX_PATH_MAX: usize = 107;

impl Uri {
    /// Whether nobody answers there: a guest is saved to it or loaded from it, and nothing is ever connected.
    pub fn is_one_way(&self) -> bool {
        match self {
            Self::Tcp { .. } | Self::Unix(_) | Self::Rdma { .. } => false,
            Self::File(_) | Self::Exec(_) | Self::Fd(_) => true,
        }
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(uri: &str) -> Result<Self, UriError> {
        let fail = |why: &str| Err(UriError { uri: uri.into(), why: why.into() });
        let Some((scheme, rest)) = uri.split_once(':') else { return fail("no scheme") };
        match scheme {
            "unix" if rest.is_empty() => fail("the path is empty"),
            "unix" if rest.len() > UNIX_PATH_MAX => fail("the path is longer than 107 bytes"),
            "unix" if rest == "@" => fail("the abstract name is empty"),
            "unix" if rest.contains('\0') => fail("the path holds a NUL"),
            "unix" => Ok(Self::Unix(rest.into())),
            "rdma" if !cfg!(feature = "rdma") => fail(
                "the rdma transport is not built in; build with `--features rdma`, which needs libibverbs-dev, librdmacm-dev, \
                 libclang-dev and pkg-config (Debian's names)",
            ),
            "tcp" | "rdma" => {
                let Some((host, port)) = rest.rsplit_once(':') else { return fail("no port") };
                let Ok(port) = port.parse() else { return fail("the port is not a number from 0 to 65535") };
                let host = match host.strip_prefix('[').map(|h| h.strip_suffix(']')) {
                    Some(Some(v6)) => v6,
                    Some(None) => return fail("the bracket is not closed"),
                    None if host.contains(':') => return fail("an IPv6 address needs brackets"),
                    None => host,
                };
                if host.contains(['[', ']', '\0']) {
                    return fail("the host holds a bracket or a NUL");
                }
                let host = host.into();
                Ok(if scheme == "tcp" { Self::Tcp { host, port } } else { Self::Rdma { host, port } })
            }
            "file" | "exec" | "fd" => one_way(scheme, rest).or_else(|why| fail(&why)),
            "vsock" => fail("the vsock transport is not built into this version"),
            _ => fail("unknown scheme"),
        }
    }
}

/// A place where nobody answers, from what follows its scheme and the colon.
fn one_way(scheme: &str, rest: &str) -> Result<Uri, String> {
    // Space between the colon and a command, as QEMU's users write it, is none of the command.
    let (what, rest) = match scheme {
        "file" => ("path", rest),
        "exec" => ("command", rest.trim_start()),
        _ => ("descriptor", rest),
    };
    if rest.is_empty() {
        return Err(format!("the {what} is empty"));
    }
    if rest.contains('\0') {
        return Err(format!("the {what} holds a NUL"));
    }
    match scheme {
        "file" => Ok(Uri::File(rest.into())),
        "exec" => Ok(Uri::Exec(rest.into())),
        _ if rest.starts_with('-') => Err("the descriptor is negative".into()),
        _ if !rest.bytes().all(|b| b.is_ascii_digit()) => {
            Err("the descriptor is not a number; it is one of this process, by its number and not by a name"
                .into())
        }
        _ => rest
            .parse()
            .map(Uri::Fd)
            .map_err(|_| format!("the descriptor is not a number from 0 to {}", i32::MAX)),
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, host, port) = match self {
            Self::Tcp { host, port } => ("tcp", host, port),
            Self::Rdma { host, port } => ("rdma", host, port),
            Self::Unix(path) => return write!(f, "unix:{}", path.display()),
            Self::File(path) => return write!(f, "file:{}", path.display()),
            Self::Exec(command) => return write!(f, "exec:{command}"),
            Self::Fd(number) => return write!(f, "fd:{number}"),
        };
        if host.contains(':') {
            write!(f, "{scheme}:[{host}]:{port}")
        } else {
            write!(f, "{scheme}:{host}:{port}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_qemu_writes() {
        for (text, host, port) in [
            ("tcp:127.0.0.1:4444", "127.0.0.1", 4444),
            ("tcp:[::1]:1", "::1", 1),
            ("tcp::4444", "", 4444),
            ("tcp:0:4444", "0", 4444),
            ("tcp:node7.cluster:65535", "node7.cluster", 65535),
        ] {
            let uri: Uri = text.parse().unwrap();
            assert_eq!(uri, Uri::Tcp { host: host.into(), port });
            assert_eq!(uri.to_string(), text);
        }
        assert_eq!("unix:/run/a:b".parse(), Ok(Uri::Unix("/run/a:b".into())));
    }

    #[test]
    fn places_where_nobody_answers_are_read_and_written_alike() {
        let exec = |command: &str| Uri::Exec(command.into());
        for (text, uri, written) in [
            ("file:/var/lib/guest 1:a", Uri::File("/var/lib/guest 1:a".into()), None),
            ("file: x", Uri::File(" x".into()), None),
            ("exec:gzip -c > x", exec("gzip -c > x"), None),
            ("exec: gzip -c -d X ", exec("gzip -c -d X "), Some("exec:gzip -c -d X ")),
            ("exec:\t\n  a: b", exec("a: b"), Some("exec:a: b")),
            ("fd:0", Uri::Fd(0), None),
            ("fd:007", Uri::Fd(7), Some("fd:7")),
            ("fd:2147483647", Uri::Fd(i32::MAX), None),
        ] {
            assert_eq!(text.parse(), Ok(uri.clone()));
            assert_eq!(uri.to_string(), written.unwrap_or(text));
            assert_eq!(uri.to_string().parse(), Ok(uri.clone()));
            assert!(uri.is_one_way(), "{text}");
        }
        for text in ["tcp:h:1", "unix:/s"] {
            assert!(!text.parse::<Uri>().unwrap().is_one_way(), "{text}");
        }
        assert!(!Uri::Rdma { host: "h".into(), port: 1 }.is_one_way());
    }

    #[test]
    fn rdma_is_there_or_says_what_it_takes() {
        let uri = "rdma:[fe80::1]:4444".parse::<Uri>();
        if cfg!(feature = "rdma") {
            let uri = uri.unwrap();
            assert_eq!(uri, Uri::Rdma { host: "fe80::1".into(), port: 4444 });
            assert_eq!(uri.to_string(), "rdma:[fe80::1]:4444");
            assert!("rdma:h".parse::<Uri>().unwrap_err().to_string().contains("no port"));
        } else {
            let error = uri.unwrap_err().to_string();
            for word in ["--features rdma", "libibverbs-dev", "librdmacm-dev", "libclang-dev", "pkg-config"] {
                assert!(error.contains(word), "{error}");
            }
        }
    }

    #[test]
    fn refuses_with_a_reason() {
        for (text, why) in [
            ("", "no scheme"),
            ("tcp:host", "no port"),
            ("tcp:h:99999", "not a number"),
            ("tcp:::1:80", "brackets"),
            ("tcp:[::1:80", "not closed"),
            ("tcp:[[::1]]:80", "holds a bracket"),
            ("tcp:a]:80", "holds a bracket"),
            ("tcp:a\0b:80", "or a NUL"),
            ("unix:", "empty"),
            ("unix:@", "empty"),
            ("file:", "the path is empty"),
            ("file:a\0b", "the path holds a NUL"),
            ("exec:", "the command is empty"),
            ("exec: \t ", "the command is empty"),
            ("exec:a\0b", "the command holds a NUL"),
            ("fd:", "the descriptor is empty"),
            ("fd:-1", "negative"),
            ("fd:+1", "not a number"),
            ("fd:1 ", "not a number"),
            ("fd:\u{0663}", "not a number"),
            ("fd:migrate", "not by a name"),
            ("fd:2147483648", "not a number from 0 to 2147483647"),
            ("fd:1\0", "holds a NUL"),
            ("vsock:2:1", "not built"),
            ("x", "file:PATH, exec:COMMAND or fd:N"),
            ("ftp:x", "unknown scheme"),
        ] {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(format!("unix:{}", "x".repeat(108)).parse::<Uri>().is_err());
    }
}
