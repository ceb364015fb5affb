//! A socket that QEMU connects to, and nobody else.

use std::io::{self, ErrorKind};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use serde_json::{Value, json};

/// A listening socket without a place in the file system (unix(7), "abstract"): it is gone with this process, whatever becomes of it.
#[derive(Debug)]
pub(super) struct Door {
    name: String,
    listener: UnixListener,
}

impl Door {
    pub(super) fn open() -> io::Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("pageferry-{}-{number}", std::process::id());
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        listener.set_nonblocking(true)?;
        Ok(Self { name, listener })
    }

    /// Its address, as a channel of QEMU's command `migrate`.
    pub(super) fn channel(&self, kind: &str) -> Value {
        let address = json!({ "transport": "socket", "type": "unix", "path": self.name, "abstract": true, "tight": true });
        json!({ "channel-type": kind, "addr": address })
    }

    /// Waits until this process connects. Others who do are turned away.
    pub(super) fn accept(&self, pid: u32, patience: Duration) -> io::Result<UnixStream> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    let credentials = rustix::net::sockopt::socket_peercred(&stream)?;
                    if credentials.pid.as_raw_nonzero().get() as u32 == pid {
                        return Ok(stream);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    super::ready(&self.listener, PollFlags::IN, left)?;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Err(ErrorKind::TimedOut.into())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn who_connects_is_asked_who_it_is() {
        let (door, other) = (Door::open().unwrap(), Door::open().unwrap());
        assert_ne!(door.name, other.name);
        let address = SocketAddr::from_abstract_name(&door.name).unwrap();
        let [_expected, mut stranger] = [(); 2].map(|()| UnixStream::connect_addr(&address).unwrap());
        let own = std::process::id();
        let _accepted = door.accept(own, Duration::from_secs(5)).unwrap();
        let refused = door.accept(own + 1, Duration::from_millis(50)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TimedOut);
        assert_eq!(stranger.read(&mut [0]).unwrap(), 0, "it was turned away");
        assert_eq!(door.channel("main")["addr"]["path"], door.name);
    }
}
