//! Opening the connections of a session that are not its first.

use std::io;
use std::time::Duration;

use crate::limit::{Limit, is_cancelled};
use crate::link::{Exchange, LinkError};
use crate::socket::{Connection, SocketError};
use crate::uri::Uri;
use crate::wire::control::Message;
use crate::wire::{Preamble, WireError};

/// Pause before a connection is opened again that was closed before an answer; doubled from one to the next, up to [`AGAIN_PAUSE_MAX`].
const AGAIN_PAUSE_MIN: Duration = Duration::from_millis(5);
/// The longest such pause.
const AGAIN_PAUSE_MAX: Duration = Duration::from_millis(50);

/// Opens a connection that belongs to a session, blocking: preamble out, ATTACHED back. One that is closed before any answer, as by a
/// destination that has more strangers than it bears, is opened again within the time-out.
pub(crate) fn open_attached<E: From<SocketError> + From<LinkError>>(
    uri: &Uri,
    preamble: &Preamble,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<Connection, E> {
    let limit = Limit::new(timeout, cancelled);
    let mut pause = AGAIN_PAUSE_MIN;
    loop {
        let connection = Connection::connect(uri, timeout, cancelled)?;
        let attached = connection
            .tune(timeout)
            .map_err(LinkError::Io)
            .and_then(|()| attach(&connection, preamble, timeout, cancelled));
        let error = match attached {
            Ok(()) => return Ok(connection),
            Err(error) => error,
        };
        let step = match limit.step() {
            Ok(step) if is_unanswered(&error) => step,
            Err(over) if is_cancelled(&over) => return Err(LinkError::Cancelled.into()),
            _ => return Err(error.into()),
        };
        std::thread::sleep(pause.min(step));
        pause = (pause * 2).min(AGAIN_PAUSE_MAX);
    }
}

/// Whether a connection was closed without a word.
fn is_unanswered(error: &LinkError) -> bool {
    match error {
        LinkError::Closed => true,
        LinkError::Io(error) => {
            matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
        }
        _ => false,
    }
}

fn attach(
    connection: &Connection,
    preamble: &Preamble,
    timeout: Duration,
    cancelled: &dyn Fn() -> bool,
) -> Result<(), LinkError> {
    match Exchange::open(connection, preamble, timeout, cancelled)?.receive()? {
        Message::Attached { stream } if stream == preamble.stream => Ok(()),
        other => {
            let field = "answer to a stream's preamble";
            Err(WireError::BadValue { field, value: other.kind().into() }.into())
        }
    }
}
