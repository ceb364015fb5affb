//! What the phases of a destination stand on: listening, waiting, connections and threads. [`Host`](super::host::Host) is the real one;
//! the simulation has another, in which all of it is decided by a seed.
//!
//! Nothing here decides anything. As at the source, phases are asynchronous functions only so that they can be left where they wait:
//! see [`the source's environment`](crate::engine::source::environment).

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::backend::{BackendError, Guest, GuestRam, StateBlob};
use pagecopy::layout::Layout;

use super::IncomingError;
use crate::destination::{BaseCopy, PageSink, ReceiveError};
use crate::link::LinkEvent;
use crate::postcopy::{MissingSink, PostcopyError};
use crate::wire::SessionId;
use crate::wire::control::{ErrorCode, Message, StreamEnd};

/// A connection for messages. Dropped, it is closed once what was said is on its way, and nothing that comes on it counts.
pub(crate) trait Speaks {
    /// Says something, in order; on a connection that is lost it goes nowhere.
    fn send(&self, message: Message);

    /// Waits until what was said has left this host, at most so long.
    fn flush(&self, limit: Duration);

    /// Whether something that was said has not left this host.
    fn is_sending(&self) -> bool;

    /// Whether it had to give way to others.
    fn is_closed(&self) -> bool;
}

/// A control connection that wants to open a session.
pub(crate) struct Call<L> {
    pub(crate) link: L,
    pub(crate) peer: String,
    /// That both sides speak.
    pub(crate) version: u16,
    pub(crate) generation: u64,
    pub(crate) session: SessionId,
}

/// What a destination hears. Every connection for messages has a generation of its own: what comes on it is told with that.
pub(crate) enum Event<L, R, P> {
    /// A control connection that nobody has spoken on.
    Control(Call<L>),
    /// Something came over a link.
    Link { generation: u64, event: LinkEvent },
    /// A data stream of the session, unanswered yet.
    Stream { request: R, stream: u16 },
    /// A stream's worker has ended.
    StreamEnded { stream: u16, result: Result<StreamEnd, ReceiveError> },
    /// One of the threads that populate memory has ended.
    Populated(Result<(), BackendError>),
    /// Something about the pages that follow the guest.
    Postcopy(PostcopyEvent<P>),
    /// A source asks what became of the session.
    Query { link: L, generation: u64 },
    /// A source takes its session up again.
    Resume { link: L, generation: u64 },
    /// A connection was refused.
    Refused { peer: String, reason: String },
    /// The listening socket has something to say.
    Notice(String),
}

/// What is heard of postcopy.
pub(crate) enum PostcopyEvent<P> {
    /// A connection of the session, unanswered yet.
    Opened { connection: P, stream: u16 },
    /// A connection has ended.
    Ended(PostcopyError),
    /// Faults cannot be served any more.
    Faults(BackendError),
}

/// What is heard in an environment.
pub(crate) type EventOf<E> =
    Event<<E as Environment>::Link, <E as Environment>::Request, <E as Environment>::Postcopy>;

/// See the module.
pub(crate) trait Environment {
    /// A connection for messages.
    type Link: Speaks;
    /// A data stream that is not answered yet. Dropped, it is closed.
    type Request;
    /// A connection of postcopy that is not answered yet. Dropped, it is closed.
    type Postcopy;

    /// Waits until something may have happened, at most a moment.
    async fn wait(&self);

    /// What has happened, oldest first.
    fn next(&self) -> Option<EventOf<Self>>;

    /// Tells whoever started this destination; what it does with that is its own affair.
    fn tell(&self, notice: &str);

    /// Sees to it that there are so many bytes of memory to work with.
    fn check_headroom(&self, bytes: u64) -> io::Result<()>;

    /// An older copy of a guest whose memory is laid out like this, where there is one.
    fn base(&self, layout: &Layout) -> Option<Arc<dyn BaseCopy>>;

    /// The session is this caller's: connections of others are refused from here on.
    fn give_to(&self, call: &Call<Self::Link>);

    /// Loads device state.
    async fn load_state(&self, guest: &dyn Guest, state: &[StateBlob]) -> Result<(), BackendError>;

    /// Brings memory in, by so many threads as this returns; [`Event::Populated`] tells of the end of each.
    fn populate(
        &self,
        ram: &Arc<dyn GuestRam>,
        sink: &Arc<PageSink>,
        runs: Vec<Range<u32>>,
    ) -> Result<usize, IncomingError>;

    /// Ends those threads, also before they are through.
    fn end_populating(&self);

    /// Brings memory in as large pages while pages come; places what is left of it, page by page.
    fn enlarge(&self, sink: &Arc<PageSink>, runs: Vec<Range<u32>>);

    /// Ends that, also before it is through.
    fn end_enlarging(&self);

    /// Streams bring pages to this sink from here on.
    fn prepare_streams(&self, sink: &Arc<PageSink>);

    /// Says no to a data stream, and why.
    fn refuse(&self, request: Self::Request, code: ErrorCode, text: String);

    /// Lets a data stream in: says ATTACHED, and starts its worker, of whose end [`Event::StreamEnded`] tells. Says whether it did: the
    /// source may be gone already.
    fn start_worker(&self, request: Self::Request, stream: u16) -> Result<bool, IncomingError>;

    /// Breaks a stream's connection: its worker ends as soon as it sees that.
    fn break_worker(&self, stream: u16);

    /// Waits for a worker whose end was told.
    fn join_worker(&self, stream: u16);

    /// Breaks all streams, and waits for their workers.
    fn end_workers(&self);

    /// Says no to a connection of postcopy, and why.
    fn refuse_postcopy(&self, connection: Self::Postcopy, code: ErrorCode, text: String);

    /// Lets a connection of postcopy in: says ATTACHED. It takes the place of the one with its number. Says whether it did: the source may
    /// be gone already.
    fn admit_postcopy(&self, connection: Self::Postcopy, stream: u16) -> bool;

    /// Starts the worker of a connection that was let in; [`PostcopyEvent::Ended`] tells if it fails.
    fn start_postcopy(&self, sink: &Arc<MissingSink>, stream: u16) -> Result<(), IncomingError>;

    /// Asks for pages that somebody touches; [`PostcopyEvent::Faults`] tells if that fails.
    fn serve_faults(&self, sink: &Arc<MissingSink>) -> Result<(), IncomingError>;

    /// Breaks all connections of postcopy, and waits for its threads, which were told to stop.
    fn end_postcopy(&self);
}

/// Says something on a connection that is about to be dropped.
pub(super) fn say_no(link: &impl Speaks, code: ErrorCode, text: String) {
    link.send(Message::Error { code, text });
}
