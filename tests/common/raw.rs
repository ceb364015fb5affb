//! Peers made by hand: they speak the protocol as far as a test wants, and then break it.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::pagecopy::digest::{PageHasher, receipt};
use pageferry::pagecopy::layout::Region;
use pageferry::transport::wire::control::{
    CHECKSUM_LEN, ErrorCode, HEADER_LEN, Hello, Message, Welcome, capability,
};
use pageferry::transport::wire::frame::{FrameHeader, FrameKind, encode_receipt};
use pageferry::transport::wire::{Preamble, Role};
use rustls::{ClientConfig, ServerConfig};

use super::secure::{PROOF_LEN, Wire};

pub(crate) const SESSION: [u8; 16] = *b"a test's session";
pub(crate) const SEED: u64 = 42;

/// A preamble of the test's session.
pub(crate) fn preamble(role: Role, stream: u16) -> Preamble {
    Preamble { version_min: 1, version_max: 1, role, stream, session: SESSION }
}

/// HELLO for one stream and one region of `len` bytes.
pub(crate) fn hello(len: u64) -> Hello {
    Hello {
        seed: SEED,
        capabilities: 3,
        streams: 1,
        live: false,
        timeout_ms: 2000,
        reconnect_ms: 0,
        regions: vec![Region::new("ram", 0, len)],
        presence: vec![0xff],
        dense: vec![],
        data_bytes: 0,
        machine: String::new(),
    }
}

/// Far more than any wait of the tests: a failure, not a hang.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(20);

/// How a peer connects to a destination: the port, and what it shakes hands with, if it does.
#[derive(Clone)]
pub(crate) struct Door {
    pub(crate) port: u16,
    pub(crate) tls: Option<Arc<ClientConfig>>,
}

impl Door {
    pub(crate) fn plain(port: u16) -> Self {
        Self { port, tls: None }
    }

    /// A connection, if it comes about.
    pub(crate) fn try_connect(&self) -> io::Result<Peer> {
        let socket = TcpStream::connect(("127.0.0.1", self.port))?;
        Ok(Peer::over(match &self.tls {
            Some(config) => Wire::secured(socket, config)?,
            None => Wire::plain(socket),
        }))
    }

    /// A source made by hand whose session the destination has accepted, and the key of the session.
    pub(crate) fn open_session(&self, hello: Hello) -> (Peer, Option<[u8; PROOF_LEN]>) {
        let mut peer = self.try_connect().unwrap();
        peer.write(&preamble(Role::Control, 0).encode());
        peer.send(&Message::Hello(hello));
        assert!(matches!(peer.receive(), Some(Message::Welcome(_))));
        assert_eq!(peer.receive(), Some(Message::Prepared));
        let key = self.tls.as_ref().map(|_| peer.socket.session_key(&SESSION));
        (peer, key)
    }
}

/// A connection.
pub(crate) struct Peer {
    pub(crate) socket: Wire,
}

impl Peer {
    pub(crate) fn connect(port: u16) -> Self {
        Door::plain(port).try_connect().unwrap()
    }

    pub(crate) fn over(socket: Wire) -> Self {
        Self { socket }
    }

    /// The words that a connection of a session begins with, with the proof that it is one.
    pub(crate) fn begin(&mut self, preamble: &Preamble, key: Option<&[u8; PROOF_LEN]>) {
        self.write(&preamble.encode());
        if let Some(key) = key {
            let proof = self.socket.proof(key, preamble);
            self.write(&proof);
        }
    }

    /// Writes; the peer may have closed already.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    pub(crate) fn send(&mut self, message: &Message) {
        self.write(&message.encode());
    }

    /// The next message other than PING and PONG; PINGs are answered. `None` at the end.
    pub(crate) fn receive(&mut self) -> Option<Message> {
        next_message(&mut self.socket)
    }

    /// The next message is an ERROR with this code and words.
    #[track_caller]
    pub(crate) fn expect_error(&mut self, expected: ErrorCode, words: &str) {
        assert_refused(self.receive(), expected, words);
    }
}

/// The next message of a peer other than PING and PONG; PINGs are answered. `None` at the end.
pub(crate) fn next_message(peer: &mut (impl Read + Write)) -> Option<Message> {
    let began = Instant::now();
    loop {
        assert!(began.elapsed() < SILENCE_MAX, "the peer lives, and has said nothing for {SILENCE_MAX:?}");
        let mut bytes = vec![0; HEADER_LEN];
        peer.read_exact(&mut bytes).ok()?;
        let (_, len) = Message::decode_header(bytes.first_chunk().unwrap()).unwrap();
        bytes.resize(HEADER_LEN + len + CHECKSUM_LEN, 0);
        peer.read_exact(&mut bytes[HEADER_LEN..]).ok()?;
        match Message::decode(&bytes).unwrap() {
            // It may have closed already.
            Message::Ping(nonce) => drop(peer.write_all(&Message::Pong(nonce).encode())),
            Message::Pong(_) => {}
            message => return Some(message),
        }
    }
}

/// A peer said ERROR, with this code and words.
#[track_caller]
pub(crate) fn assert_refused(said: Option<Message>, expected: ErrorCode, words: &str) {
    match said {
        Some(Message::Error { code, text }) => {
            assert_eq!(code, expected, "{text}");
            assert!(text.contains(words), "{words:?} in {text:?}");
        }
        other => panic!("an ERROR with {words:?} was expected, not {other:?}"),
    }
}

/// A source made by hand whose session the destination has accepted.
pub(crate) fn open_session(port: u16, hello: Hello) -> Peer {
    Door::plain(port).open_session(hello).0
}

/// A stream of that session.
pub(crate) fn open_stream(port: u16, stream: u16) -> Peer {
    let mut peer = Peer::connect(port);
    peer.write(&preamble(Role::Stream, stream).encode());
    assert_eq!(peer.receive(), Some(Message::Attached { stream }));
    peer
}

/// A destination made by hand.
pub(crate) struct Server {
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
}

impl Server {
    pub(crate) fn new() -> (Self, String) {
        Self::with(None)
    }

    /// One that shakes hands with this, if it does.
    pub(crate) fn with(tls: Option<Arc<ServerConfig>>) -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        (Self { listener, tls }, uri)
    }

    /// The next connection, before anything is said on it.
    pub(crate) fn accept_socket(&self) -> TcpStream {
        self.listener.accept().unwrap().0
    }

    /// The next connection and its preamble. Whether it proves to be of the session is not looked at.
    pub(crate) fn accept(&self) -> (Peer, Preamble) {
        let socket = self.accept_socket();
        let mut peer = Peer::over(match &self.tls {
            Some(config) => Wire::accepted(socket, config).unwrap(),
            None => Wire::plain(socket),
        });
        let mut bytes = [0; Preamble::LEN];
        peer.socket.read_exact(&mut bytes).unwrap();
        let preamble = Preamble::decode(&bytes).unwrap();
        if self.tls.is_some() && preamble.role != Role::Control {
            peer.socket.read_exact(&mut [0; PROOF_LEN]).unwrap();
        }
        (peer, preamble)
    }

    /// The control connection and its HELLO.
    pub(crate) fn hello(&self) -> (Peer, Hello) {
        let (mut peer, preamble) = self.accept();
        assert_eq!(preamble.role, Role::Control);
        match peer.receive() {
            Some(Message::Hello(hello)) => (peer, hello),
            other => panic!("{other:?} instead of HELLO"),
        }
    }

    /// The control connection up to PREPARED; its PINGs are answered from here on, what else it says is dropped.
    pub(crate) fn prepared(&self) -> (Peer, PageHasher) {
        let (mut peer, hello) = self.hello();
        peer.send(&welcome(&hello));
        peer.send(&Message::Prepared);
        let mut reader = Peer::over(peer.socket.try_clone().unwrap());
        std::thread::spawn(move || while reader.receive().is_some() {});
        (peer, PageHasher::new(hello.seed))
    }

    /// The next stream, attached.
    pub(crate) fn stream(&self) -> Peer {
        let (mut peer, preamble) = self.accept();
        assert_eq!(preamble.role, Role::Stream);
        peer.send(&Message::Attached { stream: preamble.stream });
        peer
    }
}

/// WELCOME as a good destination says it.
pub(crate) fn welcome(hello: &Hello) -> Message {
    Message::Welcome(Welcome {
        version: 1,
        // Not capability::RESUME: what such a destination does is to be seen at once.
        capabilities: hello.capabilities & capability::CODECS,
        streams: hello.streams,
        timeout_ms: 2000,
        reconnect_ms: 0,
    })
}

/// Reads a frame of raw pages; `None` at the end. Returns its header and the digests of its pages.
pub(crate) fn read_raw_frame(peer: &mut Peer, hasher: &PageHasher) -> Option<(FrameHeader, Vec<u64>)> {
    let mut bytes = [0; FrameHeader::LEN];
    peer.socket.read_exact(&mut bytes).ok()?;
    let header = FrameHeader::decode(&bytes, hasher).unwrap();
    if header.kind == FrameKind::End {
        return None;
    }
    assert_eq!(header.pages(), header.raw, "the test's memory is all raw");
    let mut raw = vec![0; header.raw_len()];
    peer.socket.read_exact(&mut raw).ok()?;
    Some((header, raw.as_chunks().0.iter().map(|page| receipt(hasher.page(page))).collect()))
}

/// A receipt's bytes.
pub(crate) fn receipt_bytes(seq: u64, digests: &[u64], hasher: &PageHasher) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_receipt(&mut bytes, seq, digests, hasher);
    bytes
}
