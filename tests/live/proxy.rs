//! A TCP proxy between source and destination that understands the protocol, and harms it where a test wants.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};

use pageferry::transport::wire::control::{CHECKSUM_LEN, HEADER_LEN, Message};
use pageferry::transport::wire::{Preamble, Role, stream_number};
use testkit::proxy::Port;

/// Largest piece of page data that is passed on at a time.
const PIECE_BYTES: usize = 32 << 10;

/// Who sent something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    Source,
    Destination,
}

/// What comes by.
#[derive(Debug)]
pub(crate) enum Seen<'a> {
    /// A new connection, before its preamble goes on; a stream by its id.
    Open { role: Role, stream: u16 },
    /// A message on a control connection, or on a query.
    Message { role: Role, by: By, message: &'a Message },
    /// Page data from the source, or receipts: `total` bytes of this connection with this piece, which has `len`.
    Data { role: Role, stream: u16, by: By, total: u64, len: usize },
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It goes on.
    Pass,
    /// It does not; what follows does.
    Lose,
    /// It does not, and both ends of this connection are closed.
    Cut,
    /// It goes on, with a bit in the middle of it flipped.
    Flip,
}

type Rule = dyn Fn(&Seen<'_>) -> Verdict + Send + Sync;

struct Shared {
    to: String,
    rule: Box<Rule>,
    /// By role and the stream's number.
    open: Mutex<Vec<(Role, u16, TcpStream)>>,
}

/// A running proxy; dropping it closes everything.
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    port: Port,
}

impl Proxy {
    /// A proxy to the destination at `uri` (`tcp:HOST:PORT`), by a rule.
    pub(crate) fn new(uri: &str, rule: impl Fn(&Seen<'_>) -> Verdict + Send + Sync + 'static) -> Self {
        let to = uri.strip_prefix("tcp:").expect("a TCP URI").to_owned();
        let shared = Arc::new(Shared { to, rule: Box::new(rule), open: Mutex::new(Vec::new()) });
        let serving = shared.clone();
        // Whatever breaks a connection shows at its ends.
        let port = Port::open(move |_, client| drop(serve(&serving, client)));
        Self { shared, port }
    }

    /// Where the source connects.
    pub(crate) fn uri(&self) -> String {
        self.port.uri()
    }

    /// Closes all connections that are open now.
    pub(crate) fn cut_all(&self) {
        self.cut(|_, _| true);
    }

    /// Closes those of the connections that are open now.
    pub(crate) fn cut(&self, which: impl Fn(Role, u16) -> bool) {
        self.shared.open.lock().unwrap().retain(|(role, stream, socket)| {
            let cut = which(*role, *stream);
            if cut {
                let _ = socket.shutdown(Shutdown::Both);
            }
            !cut
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.port.close();
        self.cut_all();
    }
}

fn serve(shared: &Arc<Shared>, mut client: TcpStream) -> io::Result<()> {
    let mut preamble = [0; Preamble::LEN];
    client.read_exact(&mut preamble)?;
    let decoded = Preamble::decode(&preamble).map_err(io::Error::other)?;
    let (role, stream) = (decoded.role, decoded.stream);
    if (shared.rule)(&Seen::Open { role, stream }) != Verdict::Pass {
        return Ok(());
    }
    let mut server = TcpStream::connect(&shared.to)?;
    for side in [&client, &server] {
        side.set_nodelay(true)?;
        shared.open.lock().unwrap().push((role, stream_number(stream), side.try_clone()?));
    }
    server.write_all(&preamble)?;
    let back = (shared.clone(), server.try_clone()?, client.try_clone()?);
    let returning = std::thread::spawn(move || {
        let (shared, server, client) = back;
        pump(&shared, role, stream, By::Destination, server, client);
    });
    pump(shared, role, stream, By::Source, client, server);
    returning.join().expect("the rule of a proxy does not panic");
    Ok(())
}

/// Passes on what one side says until it ends, or a verdict ends it.
fn pump(shared: &Shared, role: Role, stream: u16, by: By, mut from: TcpStream, mut to: TcpStream) {
    let result = match role {
        Role::Stream | Role::Postcopy => pass_data(shared, role, stream, by, &mut from, &mut to),
        _ => pass_messages(shared, role, by, &mut from, &mut to),
    };
    match result {
        // An end in order is passed on, and the other direction stays.
        Ok(true) => drop(to.shutdown(Shutdown::Write)),
        Ok(false) => {
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        }
        // Whoever closed may have said why before: what is under way the other way still gets there.
        Err(_) => {
            let _ = from.shutdown(Shutdown::Read);
            let _ = to.shutdown(Shutdown::Write);
        }
    }
}

/// Returns whether the end was in order.
fn pass_messages(
    shared: &Shared,
    role: Role,
    by: By,
    from: &mut TcpStream,
    to: &mut TcpStream,
) -> io::Result<bool> {
    loop {
        let mut bytes = vec![0; HEADER_LEN];
        match from.read(&mut bytes[..1])? {
            0 => return Ok(true),
            _ => from.read_exact(&mut bytes[1..])?,
        }
        let (_, len) = Message::decode_header(bytes.first_chunk().unwrap()).map_err(io::Error::other)?;
        bytes.resize(HEADER_LEN + len + CHECKSUM_LEN, 0);
        from.read_exact(&mut bytes[HEADER_LEN..])?;
        let message = Message::decode(&bytes).map_err(io::Error::other)?;
        match (shared.rule)(&Seen::Message { role, by, message: &message }) {
            Verdict::Pass => to.write_all(&bytes)?,
            Verdict::Flip => {
                let at = bytes.len() / 2;
                bytes[at] ^= 1;
                to.write_all(&bytes)?;
            }
            Verdict::Lose => {}
            Verdict::Cut => return Ok(false),
        }
    }
}

fn pass_data(
    shared: &Shared,
    role: Role,
    stream: u16,
    by: By,
    from: &mut TcpStream,
    to: &mut TcpStream,
) -> io::Result<bool> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut total = 0;
    loop {
        let len = from.read(&mut piece)?;
        if len == 0 {
            return Ok(true);
        }
        total += len as u64;
        match (shared.rule)(&Seen::Data { role, stream, by, total, len }) {
            Verdict::Pass => to.write_all(&piece[..len])?,
            Verdict::Flip => {
                piece[len / 2] ^= 1;
                to.write_all(&piece[..len])?;
            }
            Verdict::Lose => {}
            Verdict::Cut => return Ok(false),
        }
    }
}
