//! What a connection of postcopy is to its two ends.

use std::io;

use crate::socket::Connection;
use crate::sys::{ReceiveList, SendList};

/// Bytes both ways. Both ends share it with whoever may break it.
pub(crate) trait Channel: Send + Sync {
    /// Sends, as much as one call takes.
    fn send(&self, list: &mut SendList<'_>) -> io::Result<usize>;

    /// Receives what is there; with `wait`, for a moment at least. 0 when the peer sends no more.
    fn receive(&self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize>;

    /// Breaks it.
    fn shutdown(&self);
}

impl Channel for Connection {
    fn send(&self, list: &mut SendList<'_>) -> io::Result<usize> {
        Self::send(self, list)
    }

    fn receive(&self, list: &mut ReceiveList<'_>, wait: bool) -> io::Result<usize> {
        Self::receive(self, list, wait)
    }

    fn shutdown(&self) {
        Self::shutdown(self);
    }
}

/// Sends all of it.
pub(super) fn send_all(channel: &dyn Channel, mut list: SendList<'_>) -> io::Result<u64> {
    let mut all = 0;
    while !list.is_empty() {
        match channel.send(&mut list) {
            Ok(sent) => all += sent as u64,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(all)
}

/// Sends these bytes.
pub(super) fn send_bytes(channel: &dyn Channel, bytes: &[u8]) -> io::Result<()> {
    let mut list = SendList::new();
    list.push(bytes);
    send_all(channel, list).map(drop)
}
