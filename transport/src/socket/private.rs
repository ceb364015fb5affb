//! Listening for those who may command this process: a Unix socket with a mode of its own, that knows who connects.

use std::io;
use std::path::Path;

use tokio::net::UnixStream;

use super::SocketError;
use super::listener::{Kind, Listener};
use crate::uri::Uri;

/// A Unix socket's file that users of this host connect to.
#[derive(Debug)]
pub struct PrivateListener(Listener);

impl PrivateListener {
    /// Listens at a path as [`Listener::bind`] does. The file has this mode before anybody can connect, whatever the umask.
    ///
    /// # Errors
    /// As [`Listener::bind`], and for a name in the abstract namespace, which has no mode.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, SocketError> {
        Listener::bind_with_mode(&Uri::Unix(path.into()), Some(mode)).map(Self)
    }

    /// Hands it to tokio; must be called inside a runtime.
    ///
    /// # Errors
    /// When the system has no descriptor for it.
    pub fn on_tokio(self) -> io::Result<AsyncPrivateListener> {
        let Kind::Unix(listener, _) = &self.0.0 else { unreachable!("it was bound as a Unix socket") };
        listener.set_nonblocking(true)?;
        let inner = tokio::net::UnixListener::from_std(listener.try_clone()?)?;
        Ok(AsyncPrivateListener { inner, _listener: self.0 })
    }
}

/// A [`PrivateListener`] on tokio.
#[derive(Debug)]
pub struct AsyncPrivateListener {
    inner: tokio::net::UnixListener,
    /// Removes the path in the end.
    _listener: Listener,
}

/// Who connected, as the kernel knows it (`SO_PEERCRED`): the process that called `connect`, then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Its effective user. One that this process's user namespace does not have is the overflow user, 65534.
    pub user: u32,
    /// Its number, where this process can see it.
    pub process: Option<i32>,
}

impl AsyncPrivateListener {
    /// Waits for a connection; says who it is.
    ///
    /// # Errors
    /// Whatever accepting fails with; the next one may succeed.
    pub async fn accept(&self) -> io::Result<(UnixStream, Caller)> {
        let (stream, _) = self.inner.accept().await?;
        let who = stream.peer_cred()?;
        Ok((stream, Caller { user: who.uid(), process: who.pid() }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn a_caller_is_known_and_the_file_has_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        for mode in [0o600, 0o666] {
            let listener = PrivateListener::bind(&path, mode).unwrap().on_tokio().unwrap();
            assert_eq!(path.metadata().unwrap().mode() & 0o777, mode);
            let _connected = std::os::unix::net::UnixStream::connect(&path).unwrap();
            let (_, caller) = listener.accept().await.unwrap();
            let own = Caller {
                user: rustix::process::geteuid().as_raw(),
                process: Some(std::process::id().cast_signed()),
            };
            assert_eq!(caller, own);
            drop(listener);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_name_without_a_file_has_no_mode() {
        let name = format!("@pageferry-private-{}", std::process::id());
        let error = PrivateListener::bind(Path::new(&name), 0o600).unwrap_err();
        assert!(error.io().to_string().contains("use a path"), "{error}");
    }
}
