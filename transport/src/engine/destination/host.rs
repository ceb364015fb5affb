//! The destination's environment on a host: a listening socket, threads, and the system's clock.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Select, Sender};
use pagecopy::backend::{BackendError, Guest, GuestRam, StateBlob};
use pagecopy::layout::Layout;

use super::IncomingError;
use super::base::BaseFile;
use super::environment::{Call, Environment, Event, PostcopyEvent};
use super::front::{Front, FrontLink, Heard, Opened, Request};
use super::threads::{Enlarger, Populating, start_thread};
use crate::accept::Acceptor;
use crate::carrier::Breaker;
use crate::destination::{BaseCopy, PageSink, receive_stream};
use crate::engine::Options;
use crate::local::guarded;
use crate::postcopy::{MissingSink, PostcopyError};
use crate::socket::{Connection, Listener, Tls};
use crate::uri::Uri;
use crate::wire::control::{ErrorCode, Message};
use crate::wire::stream_number;

/// How often somebody who waits looks at everything that may have happened.
const TICK: Duration = Duration::from_millis(20);

/// A data stream's worker.
struct Worker {
    breaker: Arc<dyn Breaker>,
    thread: JoinHandle<()>,
}

/// What there is of postcopy.
#[derive(Default)]
struct Postcopy {
    /// One a number: another takes its place.
    connections: BTreeMap<u16, Arc<Connection>>,
    threads: Vec<JoinHandle<()>>,
}

/// What streams bring pages to, and what lets them in.
struct Streams {
    sink: Arc<PageSink>,
    acceptor: Acceptor,
}

/// See the module.
pub(super) struct Host {
    front: Front,
    heard: (Sender<Heard>, Receiver<Heard>),
    notice: Box<dyn Fn(&str) + Send + Sync>,
    /// An older copy of the guest that is to come.
    base: Option<BaseFile>,
    /// Most bytes that are registered for RDMA.
    pinned_max: u64,
    streams: RefCell<Option<Streams>>,
    /// By number.
    workers: RefCell<BTreeMap<u16, Worker>>,
    populating: RefCell<Option<Populating>>,
    /// Works while pages come.
    enlarger: RefCell<Option<Enlarger>>,
    postcopy: RefCell<Postcopy>,
}

impl Host {
    /// Listens; returns where a source connects, with the port that the system chose.
    pub(super) fn listen(
        uri: &Uri,
        options: &Options,
        notice: Box<dyn Fn(&str) + Send + Sync>,
    ) -> Result<(Self, Uri), IncomingError> {
        let tls = options.tls.as_ref().map(Tls::acceptor).transpose()?;
        let base = open_base(uri, options)?;
        let listener = Listener::bind(uri)?;
        if listener.is_reachable() && options.tls.is_none() && !options.insecure {
            return Err(IncomingError::Unprotected { uri: uri.clone() });
        }
        let heard = crossbeam_channel::unbounded();
        let (front, uri) =
            Front::start(listener, uri, options.timeout, tls, options.runtime.as_ref(), &heard.0)?;
        let host = Self {
            front,
            heard,
            notice,
            base,
            pinned_max: options.rdma.pinned_max,
            streams: RefCell::new(None),
            workers: RefCell::default(),
            populating: RefCell::new(None),
            enlarger: RefCell::new(None),
            postcopy: RefCell::default(),
        };
        Ok((host, uri))
    }

    /// Starts a thread of postcopy.
    fn start(&self, name: String, work: impl FnOnce() + Send + 'static) -> Result<(), IncomingError> {
        let threads = &mut self.postcopy.borrow_mut().threads;
        threads.retain(|thread| !thread.is_finished());
        threads.push(start_thread(name, work)?);
        Ok(())
    }
}

/// Opens the older copy of the guest, where there is to be one.
fn open_base(uri: &Uri, options: &Options) -> Result<Option<BaseFile>, IncomingError> {
    let Some(path) = &options.base else { return Ok(None) };
    if matches!(uri, Uri::Rdma { .. }) {
        let why = "pages over RDMA come without one: leave --base out, or use tcp: or unix:".into();
        return Err(IncomingError::Base { path: path.clone(), why });
    }
    BaseFile::open(path).map(Some)
}

impl Environment for Host {
    type Link = FrontLink;
    type Request = Request;
    type Postcopy = Opened;

    async fn wait(&self) {
        let mut any = Select::new();
        any.recv(&self.heard.1);
        let _ = any.ready_timeout(TICK);
    }

    fn next(&self) -> Option<Heard> {
        self.heard.1.try_recv().ok()
    }

    fn tell(&self, notice: &str) {
        (self.notice)(notice);
    }

    fn check_headroom(&self, bytes: u64) -> io::Result<()> {
        crate::reserve::fill();
        crate::local::check_headroom(bytes)
    }

    fn base(&self, layout: &Layout) -> Option<Arc<dyn BaseCopy>> {
        let fitted = self.base.as_ref()?.fit(layout);
        fitted.inspect_err(|why| self.tell(&format!("the base is of no use, and all pages come: {why}"))).ok()
    }

    fn give_to(&self, call: &Call<FrontLink>) {
        self.front.give_to(call);
    }

    async fn load_state(&self, guest: &dyn Guest, state: &[StateBlob]) -> Result<(), BackendError> {
        guest.load_state(state)
    }

    fn populate(
        &self,
        ram: &Arc<dyn GuestRam>,
        sink: &Arc<PageSink>,
        runs: Vec<Range<u32>>,
    ) -> Result<usize, IncomingError> {
        let heard = self.heard.0.clone();
        let populating = Populating::start(ram, sink, runs, move |result| {
            let _ = heard.send(Event::Populated(result));
        })?;
        let count = populating.count();
        *self.populating.borrow_mut() = Some(populating);
        Ok(count)
    }

    fn end_populating(&self) {
        self.populating.take();
    }

    fn enlarge(&self, sink: &Arc<PageSink>, runs: Vec<Range<u32>>) {
        *self.enlarger.borrow_mut() = Some(Enlarger::start(sink, runs));
    }

    fn end_enlarging(&self) {
        self.enlarger.take();
    }

    fn prepare_streams(&self, sink: &Arc<PageSink>) {
        let acceptor = Acceptor::new(sink.clone(), self.pinned_max);
        *self.streams.borrow_mut() = Some(Streams { sink: sink.clone(), acceptor });
    }

    fn refuse(&self, request: Request, code: ErrorCode, text: String) {
        request.stream.refuse(code, text);
    }

    fn start_worker(&self, request: Request, stream: u16) -> Result<bool, IncomingError> {
        let streams = self.streams.borrow();
        let Streams { sink, acceptor } = streams.as_ref().expect("streams were prepared");
        let Some(carrier) = acceptor.accept(request.stream, stream)? else { return Ok(false) };
        let breaker = carrier.breaker();
        let (sink, heard, broken) = (sink.clone(), self.heard.0.clone(), breaker.clone());
        let thread = start_thread(format!("recv-{stream}"), move || {
            let result = receive_stream(&sink, carrier, stream);
            if result.is_err() {
                broken.shutdown();
            }
            let _ = heard.send(Event::StreamEnded { stream, result });
        })?;
        self.workers.borrow_mut().insert(stream_number(stream), Worker { breaker, thread });
        Ok(true)
    }

    fn break_worker(&self, stream: u16) {
        if let Some(worker) = self.workers.borrow().get(&stream_number(stream)) {
            worker.breaker.shutdown();
        }
    }

    fn join_worker(&self, stream: u16) {
        let worker = self.workers.borrow_mut().remove(&stream_number(stream));
        if let Some(worker) = worker {
            // A panic of the thread has been printed.
            let _ = worker.thread.join();
        }
    }

    fn end_workers(&self) {
        for worker in self.workers.take().into_values() {
            worker.breaker.shutdown();
            let _ = worker.thread.join();
        }
    }

    fn refuse_postcopy(&self, opened: Opened, code: ErrorCode, text: String) {
        // Whoever asked hears of the end in any case.
        let _ = (&opened.connection).write_all(&Message::Error { code, text }.encode());
    }

    fn admit_postcopy(&self, opened: Opened, stream: u16) -> bool {
        if (&opened.connection).write_all(&Message::Attached { stream }.encode()).is_err() {
            return false;
        }
        let connection = Arc::new(opened.connection);
        if let Some(old) = self.postcopy.borrow_mut().connections.insert(stream, connection) {
            old.shutdown();
        }
        true
    }

    fn start_postcopy(&self, sink: &Arc<MissingSink>, stream: u16) -> Result<(), IncomingError> {
        let connection = self.postcopy.borrow().connections.get(&stream).cloned();
        let Some(connection) = connection else { return Ok(()) };
        let (sink, heard) = (sink.clone(), self.heard.0.clone());
        self.start(format!("postcopy-{stream}"), move || {
            let received = guarded(|| sink.receive(&connection, stream)).unwrap_or_else(|what| {
                // The source opens another, which may fare better.
                connection.shutdown();
                Err(PostcopyError::Panicked { stream, what })
            });
            if let Err(error) = received {
                let _ = heard.send(Event::Postcopy(PostcopyEvent::Ended(error)));
            }
        })
    }

    fn serve_faults(&self, sink: &Arc<MissingSink>) -> Result<(), IncomingError> {
        let (sink, heard) = (sink.clone(), self.heard.0.clone());
        self.start("faults".into(), move || {
            let served = guarded(|| sink.serve_faults()).unwrap_or_else(|what| {
                // Who waits for a page that was told of and not asked for waits for ever.
                let source = io::Error::other(format!("it panicked: {what}"));
                Err(BackendError::new("ask for pages that somebody touches", source))
            });
            if let Err(error) = served {
                let _ = heard.send(Event::Postcopy(PostcopyEvent::Faults(error)));
            }
        })
    }

    fn end_postcopy(&self) {
        let Postcopy { connections, threads } = self.postcopy.take();
        connections.into_values().for_each(|connection| connection.shutdown());
        for thread in threads {
            // A panic of the thread has been printed.
            let _ = thread.join();
        }
    }
}
