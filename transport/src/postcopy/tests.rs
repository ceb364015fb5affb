//! Connections of postcopy as they are, with their threads and sockets, over memory of a simulation.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use pagecopy::bitmap::PageBitmap;
use pagecopy::choose::CodecMode;
use pagecopy::digest::PageHasher;
use pagecopy::layout::{Layout, PAGE_SIZE};
use testkit::wait_until;

use super::lane::ANSWERS_MAX;
use super::partial::Partial;
use super::{Lane, LaneEnd, MissingRuns, MissingSink, PageServer, PostcopyError, ServerOptions};
use crate::socket::Connection;
use crate::source::HostShare;
use crate::wire::WireError;
use crate::wire::control::capability;
use crate::wire::postcopy::PageRequest;

/// Longest wait for what must happen: this machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// All pages of a memory, on their way from one side to the other.
struct Pair {
    source: Arc<Partial>,
    destination: Arc<Partial>,
    server: Arc<PageServer>,
    sink: Arc<MissingSink>,
    lanes: Vec<Lane>,
    _ends: Receiver<LaneEnd>,
    receivers: Vec<JoinHandle<()>>,
}

/// A page that is not zeros, and shrinks.
fn content(chunk: u32, bit: u32) -> [u8; PAGE_SIZE] {
    let mut page = [7; PAGE_SIZE];
    page[100..104].copy_from_slice(&chunk.to_le_bytes());
    page[104..108].copy_from_slice(&bit.to_le_bytes());
    page
}

impl Pair {
    /// Connected by one connection for requests and so many others, whose threads begin to send at once.
    fn new(chunks: u32, codec: CodecMode, pushing: u16, bytes_per_s: Option<u64>) -> Self {
        Self::sharing(chunks, codec, pushing, bytes_per_s, None)
    }

    /// The same, on a host whose sessions share this.
    fn sharing(
        chunks: u32,
        codec: CodecMode,
        pushing: u16,
        bytes_per_s: Option<u64>,
        host: Option<Arc<HostShare>>,
    ) -> Self {
        let layout = Layout::flat(u64::from(chunks) * 64 * PAGE_SIZE as u64).unwrap();
        let (source, destination) = (Partial::new(layout.clone()), Partial::new(layout.clone()));
        let missing = PageBitmap::new(chunks);
        for chunk in 0..chunks {
            missing.insert(chunk, u64::MAX);
            (0..64).for_each(|bit| source.memory.write(chunk, bit, &content(chunk, bit)));
        }
        let (hasher, timeout) = (PageHasher::new(5), Duration::from_secs(20));
        let options = ServerOptions { timeout, codec };
        let holes = PageBitmap::new(chunks);
        let server = PageServer::new(source.clone(), hasher.clone(), missing, holes, 0, options);
        let server = server.sharing(host);
        server.limit_bandwidth(bytes_per_s);
        let mut announced = MissingRuns::new(&layout);
        announced.add(server.runs(), &layout).unwrap();
        let pages = announced.into_pages();
        let sink = MissingSink::new(destination.clone(), hasher, pages, capability::ALL, timeout).unwrap();
        let (server, sink, (ended, ends)) = (Arc::new(server), Arc::new(sink), unbounded());
        let (mut lanes, mut receivers) = (Vec::new(), Vec::new());
        for stream in 0..=pushing {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let theirs = Arc::new(Connection::unix(theirs));
            let receiving = sink.clone();
            receivers.push(std::thread::spawn(move || drop(receiving.receive(&theirs, stream))));
            lanes.push(Lane::spawn(&server, opened(ours), stream, ended.clone()).unwrap());
        }
        Self { source, destination, server, sink, lanes, _ends: ends, receivers }
    }

    /// Waits until all is there, and looks at it.
    fn arrives(&self) {
        wait_until("everything arrives", PATIENCE, || self.server.left() == 0 && self.sink.left() == 0);
        for chunk in 0..self.source.memory.layout().chunks() {
            for bit in 0..64 {
                let found = self.destination.memory.read(chunk, bit);
                assert!(found == content(chunk, bit), "page {bit} of chunk {chunk}");
            }
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.server.stop();
        self.sink.stop();
        self.lanes.clear();
        self.receivers.drain(..).for_each(|receiver| receiver.join().unwrap());
    }
}

/// The source's end, as a lane wants it.
fn opened(stream: UnixStream) -> Connection {
    let connection = Connection::unix(stream);
    connection.set_timeouts(Some(Duration::from_millis(100)), Some(Duration::from_secs(20))).unwrap();
    connection
}

/// Asks for pages while everything else is held back for hours, once a first frame was sent ahead of its time.
fn ask_while_the_rest_waits(pair: &Pair) {
    wait_until("the first frame", PATIENCE, || pair.sink.left() < pair.server.total());
    // What is asked before there is a connection to ask on is asked on it then, of those who wait; nobody does here.
    wait_until("a connection for requests", PATIENCE, || pair.sink.writer().is_some());
    let left = pair.sink.left();
    let asked = 128;
    for page in 0..asked {
        let (chunk, bit) = (2 + page / 64, page % 64);
        pair.sink.request(chunk, bit);
        wait_until("a page that was asked for", PATIENCE, || !pair.destination.is_missing((chunk, bit)));
        // The next frame of the others would bring at least one page.
        wait_until("it counts", PATIENCE, || pair.sink.left() < left - u64::from(page));
        assert_eq!(pair.sink.left(), left - u64::from(page) - 1);
    }
    // It was charged for what went ahead.
    assert!(!pair.server.bandwidth.is_open());
}

#[test]
fn what_the_guest_asks_for_does_not_wait_for_the_limit_and_the_rest_does() {
    let pair = Pair::new(4, CodecMode::Raw, 1, Some(1));
    ask_while_the_rest_waits(&pair);
    pair.server.limit_bandwidth(None);
    pair.arrives();
}

#[test]
fn nor_does_it_wait_for_the_limit_of_the_host() {
    let host = Arc::new(HostShare::new());
    host.limit_bandwidth(Some(1));
    let pair = Pair::sharing(4, CodecMode::Raw, 1, None, Some(host.clone()));
    ask_while_the_rest_waits(&pair);
    host.limit_bandwidth(None);
    pair.arrives();
}

#[test]
fn what_shrinks_is_sent_as_little() {
    let pair = Pair::new(16, CodecMode::Zstd { level: Some(1) }, 2, None);
    pair.arrives();
    let (total, statistics) = (pair.server.total(), pair.sink.statistics());
    assert_eq!((statistics.zero, statistics.compressed, statistics.raw), (0, total, 0));
    let logical = total * PAGE_SIZE as u64;
    assert!(statistics.wire_bytes < logical / 20, "{statistics:?}");
    let sent = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(sent(&pair.server.counters().wire), statistics.wire_bytes);
    assert_eq!(sent(&pair.server.counters().compressed), total);
}

/// Somebody who asks for page after page, and takes what comes without ever saying so, costs no more than so many frames.
#[test]
fn whoever_asks_and_receipts_nothing_is_shown_out() {
    let most = ANSWERS_MAX as u32;
    let layout = Layout::flat((u64::from(most) + 64) * PAGE_SIZE as u64).unwrap();
    let (chunks, hasher) = (layout.chunks(), PageHasher::new(5));
    let missing = PageBitmap::new(chunks);
    for chunk in 0..chunks {
        missing.insert(chunk, u64::MAX);
    }
    let timeout = Duration::from_secs(60);
    let options = ServerOptions { timeout, codec: CodecMode::Raw };
    let holes = PageBitmap::new(chunks);
    let server = PageServer::new(Partial::new(layout), hasher.clone(), missing, holes, 0, options);
    let (server, (ended, ends)) = (Arc::new(server), unbounded());
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let _lane = Lane::spawn(&server, opened(ours), 0, ended).unwrap();
    let mut taking = theirs.try_clone().unwrap();
    let taker = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while matches!(taking.read(&mut buffer), Ok(1..)) {}
    });
    for page in 0..=most {
        let request = PageRequest { chunk: page / 64, pages: 1 << (page % 64) };
        // It hangs up on the last one.
        let _ = theirs.write_all(&request.encode(&hasher));
    }
    let LaneEnd { error, .. } = ends.recv_timeout(PATIENCE).unwrap();
    let PostcopyError::Wire { stream: 0, source: WireError::BadValue { field, .. } } = error else {
        panic!("{error}");
    };
    assert_eq!(field, "requested pages (none is receipted)");
    drop(theirs);
    taker.join().unwrap();
    // All of them wait again for whoever comes next.
    assert_eq!((server.left(), server.waiting()), (server.total(), server.total()));
}
