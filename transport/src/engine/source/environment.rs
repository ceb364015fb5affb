//! What the phases of a source stand on: chance, waiting, connections and threads. [`Host`](super::host::Host) is the real one; the
//! simulation has another, in which all of it is decided by a seed.
//!
//! Nothing here decides anything. Phases are asynchronous functions only so that they can be left where they wait and gone on with: on a
//! host every wait blocks the thread that migrates, and a phase is through when it returns; the simulation lets one side go on at a time.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;

use super::Cause;
use crate::carrier::SourceEnd;
use crate::dial::OpenError;
use crate::link::LinkEvent;
use crate::postcopy::{self, PageServer, PostcopyError};
use crate::source::{Batch, LaneEnd, PageSource, Waits};
use crate::uri::Uri;
use crate::wire::control::{Message, StreamEnd};
use crate::wire::{Role, SessionId};

/// What a source hears.
pub(crate) enum Event {
    /// Something came over the control link.
    Link(LinkEvent),
    /// All of a lane is on its way, its end too; this will be its account.
    LaneSent(StreamEnd),
    /// A lane has ended.
    LaneEnd(LaneEnd),
    /// An attempt to open a stream has ended.
    Opened {
        /// The stream's id.
        id: u16,
        /// Its end of it.
        end: Result<SourceEnd, OpenError>,
        /// How long it was answered after: a round trip of what carries data.
        took: Duration,
    },
    /// A connection of postcopy has ended.
    PostcopyEnd(postcopy::LaneEnd),
}

/// With what streams of a session are opened.
pub(crate) struct Opening {
    pub(crate) source: Arc<PageSource>,
    pub(crate) session: SessionId,
    /// That both sides speak.
    pub(crate) version: u16,
}

/// How long a destination is waited for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// In silence, or without an answer.
    pub(crate) timeout: Duration,
    /// Until what was lost is connected again.
    pub(crate) reconnect: Duration,
}

/// See the module.
pub(crate) trait Environment: Waits {
    /// An open connection of postcopy.
    type Postcopy;

    /// A random id that nobody else has.
    fn session_id(&self) -> io::Result<SessionId>;

    /// A random number.
    fn seed(&self) -> io::Result<u64>;

    /// Another address of the destination, from here on.
    fn set_address(&self, uri: Uri);

    /// Waits until something may have happened, at most a moment.
    async fn wait(&self);

    /// Waits for so long.
    async fn sleep(&self, time: Duration);

    /// What has happened, oldest first.
    fn next(&self) -> Option<Event>;

    /// Opens a connection for messages, which takes the place of the one that there was: nothing is heard of that any more. Ends soon once
    /// `given_up` says yes.
    async fn connect(
        &self,
        role: Role,
        session: SessionId,
        timeout: Duration,
        given_up: &dyn Fn() -> bool,
    ) -> Result<(), Cause>;

    /// Says something, in order; on a connection that is lost it goes nowhere.
    fn send(&self, message: Message);

    /// Whether something that was said is still on this host.
    fn is_sending(&self) -> bool;

    /// Waits until what was said has left this host, at most so long.
    fn flush(&self, limit: Duration);

    /// Takes the session up as soon as it can be and ends it, in the background: the destination waits for a source that will not come
    /// back.
    fn say_farewell(&self, session: SessionId, resume: Message, error: Message, patience: Patience);

    /// Streams are opened so from here on, each step of which takes at most the time-out.
    fn prepare_streams(&self, opening: &Opening, timeout: Duration);

    /// Begins to open a stream; [`Event::Opened`] tells how that ends, unless it is given up.
    fn open(&self, id: u16) -> io::Result<()>;

    /// Gives all attempts up that have not been told of: what they still open is closed.
    fn give_up_opening(&self);

    /// Starts a lane, which takes from `work`; [`Event::LaneSent`] and [`Event::LaneEnd`] tell of its end.
    fn start_lane(
        &self,
        source: &Arc<PageSource>,
        end: SourceEnd,
        id: u16,
        work: Receiver<Batch>,
    ) -> io::Result<()>;

    /// Breaks all lanes.
    fn abort_lanes(&self);

    /// Waits until all lanes have ended, and been told of.
    async fn join_lanes(&self);

    /// Opens connection `stream` of postcopy.
    async fn dial_postcopy(
        &self,
        session: SessionId,
        version: u16,
        stream: u16,
        timeout: Duration,
        given_up: &dyn Fn() -> bool,
    ) -> Result<Self::Postcopy, PostcopyError>;

    /// Serves pages over it; [`Event::PostcopyEnd`] tells of its end.
    fn start_postcopy(
        &self,
        server: &Arc<PageServer>,
        connection: Self::Postcopy,
        stream: u16,
    ) -> io::Result<()>;

    /// Breaks all connections of postcopy, of whose ends nothing is told.
    fn end_postcopy(&self);
}
