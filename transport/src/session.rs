//! The control session as two pure state machines: which message may come when, and who owns the guest.
//!
//! ```text
//! source                                   destination
//! ExpectWelcome   -- HELLO -------------->  ExpectHello
//!                 <------------- WELCOME --  Preparing
//!                 <---- BASE (any, or none)
//! ExpectPrepared  <------------ PREPARED --  Moving
//! Moving          == frames / receipts ==>  Moving
//!                 -- STREAM_LOST -------->
//!                 <------ STREAM_STOPPED --
//!                 -- STATE, FINISH ------>  Moving -> applies, compares
//! ExpectReady     <--------------- READY --  Ready
//! Ready -> Gone   -- GO ----------------->  Running
//! Gone            <------------- RUNNING --
//! Done            -- RUNNING ------------>  (knows that the source knows)
//! ```
//! A source that lost its connections before GO opens another control connection and takes the session back to where pages
//! move. What either side had of the handover is void:
//!
//! ```text
//! Moving to Ready -- RESUME n ----------->  Moving to Ready: stops all streams, drops the state
//! ExpectResumed   <----------- RESUMED n --  Moving
//! Moving          == frames / receipts ==>
//! ```
//! Only a source that has not said GO resumes, and only an attempt with a number above all others is taken. So there is never
//! a GO of a handover that was taken back, and a RESUME that was long on its way takes back nothing.
//!
//! With postcopy POSTCOPY and POSTCOPY_READY come while pages are moving, and MISSING before FINISH. The guest is then handed over in
//! the same way, and what is missing follows; SENT and ARRIVED end that. Until GO it is taken back like any other handover.
//!
//! The machines hold rule 5: until [`SourceSession::go`] was called the source owns the guest, whatever happens; from that
//! call on it never resumes it unless the destination says it abandoned the session. The destination owns it from the
//! moment it accepts GO, which it does only in `Ready`.

#[cfg(test)]
use crate::simulation::fault;
use crate::wire::control::{
    Arrived, Base, ChunkRun, ErrorCode, Hello, Message, SessionStatus, Totals, Welcome,
};
use crate::wire::{VERSION_MAX, VERSION_MIN};

/// What ended a session, or made a message impossible.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The peer said so.
    #[error("the {peer} reports: {text}")]
    Peer {
        /// `source` or `destination`.
        peer: &'static str,
        /// For programs.
        code: ErrorCode,
        /// Its words.
        text: String,
    },
    /// A message that may not come now.
    #[error("the {peer} sent {message} while this side was in state {state}")]
    OutOfOrder {
        /// `source` or `destination`.
        peer: &'static str,
        /// The message's name.
        message: &'static str,
        /// The state's name.
        state: &'static str,
    },
    /// The destination's account of the transfer is not the source's.
    #[error(
        "the destination's account of the transfer differs from the source's ({what}): nothing was handed over"
    )]
    TotalsDiffer {
        /// What differs.
        what: &'static str,
    },
    /// A RESUME that comes late, or to a side that cannot go back.
    #[error("the source wants to resume the session (attempt {epoch}) in state {state} after attempt {last}")]
    NoResume {
        /// Number of the attempt.
        epoch: u32,
        /// The last that was taken.
        last: u32,
        /// The state's name.
        state: &'static str,
    },
    /// What the destination says of its older copy cannot be.
    #[error("the destination says of its base what cannot be: {what}")]
    Base {
        /// What.
        what: &'static str,
    },
    /// A WELCOME that takes what was not offered.
    #[error("the destination answered HELLO with {what}, which was not offered")]
    NotOffered {
        /// What it took.
        what: String,
    },
}

/// Checks that a destination's answer lies within the source's offer.
pub fn check_welcome(welcome: &Welcome, streams: u16, capabilities: u64) -> Result<(), SessionError> {
    let what = if !(VERSION_MIN..=VERSION_MAX).contains(&welcome.version) {
        format!("version {}", welcome.version)
    } else if !(1..=streams).contains(&welcome.streams) {
        format!("{} streams", welcome.streams)
    } else if welcome.capabilities & !capabilities != 0 {
        format!("capabilities {:#x}", welcome.capabilities)
    } else {
        return Ok(());
    };
    Err(SessionError::NotOffered { what })
}

/// Says in which part the accounts of both sides differ.
pub fn compare_totals(mine: &Totals, theirs: &Totals) -> Result<(), SessionError> {
    let what = if mine.streams != theirs.streams {
        "frames and receipts of the streams"
    } else if mine.pages != theirs.pages {
        "number of pages carried"
    } else if mine.state != theirs.state {
        "device state"
    } else {
        return Ok(());
    };
    Err(SessionError::TotalsDiffer { what })
}

/// Where the source stands; named for what it waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum SourceState {
    ExpectWelcome,
    ExpectPrepared,
    Moving,
    ExpectReady(Totals),
    Ready,
    Gone,
    Done,
    ExpectResumed,
}

/// What a message means to the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// Nothing to do.
    Nothing,
    /// Send this back.
    Reply(Message),
    /// The destination accepted the session.
    Welcome(Welcome),
    /// The destination has an older copy of the guest, and says what that holds.
    Base(Base),
    /// Streams may connect.
    Prepared,
    /// The destination has stopped this stream's worker, by itself or because it was told to.
    StreamStopped {
        /// Which stream.
        stream: u16,
        /// Why, if it was by itself; else empty.
        reason: String,
    },
    /// The destination holds everything: the source may say GO.
    Ready,
    /// The destination owns the guest.
    Running,
    /// The destination has stopped all streams and taken READY back: pages may move again.
    Resumed,
    /// The destination takes the guest before its pages; these many chunks of them at a time, or single ones (0).
    PostcopyReady {
        /// See [`Message::PostcopyReady`].
        unit_chunks: u32,
    },
    /// No page is missing at the destination any more.
    Arrived(Arrived),
    /// The destination gave the session up and never runs the guest, which is the source's again.
    Abandoned,
}

/// The source's side of a session.
#[derive(Clone, Debug)]
pub struct SourceSession {
    state: SourceState,
    /// POSTCOPY was said.
    postcopy: bool,
    /// Number of the last attempt to resume.
    epoch: u32,
}

impl SourceSession {
    /// A session whose HELLO is about to be sent.
    pub fn new() -> Self {
        Self { state: SourceState::ExpectWelcome, postcopy: false, epoch: 0 }
    }

    /// Takes a message from the destination.
    pub fn handle(&mut self, message: Message) -> Result<SourceEvent, SessionError> {
        use SourceState as S;
        if let (S::ExpectReady(mine), Message::StreamStopped { stream, .. }) = (&mut self.state, &message) {
            // It had ended in order here: its END was lost, and this crossed FINISH. The destination leaves it out, too.
            mine.streams.retain(|end| end.stream != *stream);
        }
        let event = match (&self.state, message) {
            (_, Message::Ping(nonce)) => SourceEvent::Reply(Message::Pong(nonce)),
            (_, Message::Pong(_)) => SourceEvent::Nothing,
            (_, Message::Error { code, text }) => {
                return Err(SessionError::Peer { peer: "destination", code, text });
            }
            (S::ExpectWelcome, Message::Welcome(welcome)) => {
                self.state = S::ExpectPrepared;
                SourceEvent::Welcome(welcome)
            }
            (S::ExpectPrepared, Message::Base(base)) => SourceEvent::Base(base),
            (S::ExpectPrepared, Message::Prepared) => {
                self.state = S::Moving;
                SourceEvent::Prepared
            }
            (S::Moving | S::ExpectReady(_), Message::StreamStopped { stream, reason }) => {
                SourceEvent::StreamStopped { stream, reason }
            }
            (S::Moving, Message::PostcopyReady { unit_chunks }) if self.postcopy => {
                SourceEvent::PostcopyReady { unit_chunks }
            }
            (S::Done, Message::Arrived(arrived)) if self.postcopy => SourceEvent::Arrived(arrived),
            (S::ExpectReady(mine), Message::Ready(theirs)) => {
                compare_totals(mine, &theirs)?;
                self.state = S::Ready;
                SourceEvent::Ready
            }
            // It says why next. Where that crosses GO, this settles who has the guest.
            (S::Ready, Message::Status(SessionStatus::Abandoned)) => SourceEvent::Nothing,
            (S::Gone, Message::Status(SessionStatus::Abandoned)) => SourceEvent::Abandoned,
            (S::Gone, Message::Running) => {
                self.state = S::Done;
                SourceEvent::Running
            }
            (S::ExpectResumed, Message::Resumed { epoch }) if epoch == self.epoch => {
                self.state = S::Moving;
                SourceEvent::Resumed
            }
            #[cfg(test)]
            (S::Gone, Message::Ready(_)) if fault::is(fault::Fault::GoBeforeReady) => SourceEvent::Nothing,
            (_, message) => {
                return Err(SessionError::OutOfOrder {
                    peer: "destination",
                    message: message.name(),
                    state: self.state_name(),
                });
            }
        };
        Ok(event)
    }

    /// The guest is to run before all its pages are there: the message that says so.
    ///
    /// # Panics
    /// When pages are not moving: the caller's order of steps is wrong.
    pub fn postcopy(&mut self) -> Message {
        assert_eq!(self.state, SourceState::Moving, "POSTCOPY follows PREPARED");
        self.postcopy = true;
        Message::Postcopy
    }

    /// Everything is sent and receipted, other than what is said to be missing: the message that says so.
    ///
    /// # Panics
    /// When pages are not moving: the caller's order of steps is wrong.
    pub fn finish(&mut self, totals: Totals) -> Message {
        assert_eq!(self.state, SourceState::Moving, "FINISH follows PREPARED");
        self.state = SourceState::ExpectReady(totals.clone());
        Message::Finish(totals)
    }

    /// Gives up the right to run the guest. The point of no return: from here on the source never resumes it by itself.
    ///
    /// # Panics
    /// When READY has not come: without it nobody else could run the guest.
    pub fn go(&mut self) -> Message {
        let ready = self.state == SourceState::Ready;
        #[cfg(test)]
        let ready = ready || fault::is(fault::Fault::GoBeforeReady);
        assert!(ready, "GO follows READY");
        self.state = SourceState::Gone;
        Message::Go
    }

    /// Whether [`resume`](Self::resume) may be called: pages have moved, and GO was not said.
    pub fn may_resume(&self) -> bool {
        use SourceState as S;
        matches!(self.state, S::Moving | S::ExpectReady(_) | S::Ready | S::ExpectResumed)
    }

    /// Takes the session back to where pages move, over another control connection: the message that is the first on it. POSTCOPY is
    /// taken back, too: the destination may have given up the pages that were said to be missing, and gets all of them anew.
    ///
    /// # Panics
    /// When GO was said, or pages never moved: the caller's order of steps is wrong.
    pub fn resume(&mut self) -> Message {
        assert!(self.may_resume(), "RESUME in state {}", self.state_name());
        self.state = SourceState::ExpectResumed;
        self.postcopy = false;
        self.epoch += 1;
        Message::Resume { epoch: self.epoch }
    }

    /// Takes the answer to a query that followed GO; says whether the session has come to its end.
    pub fn learn(&mut self, status: SessionStatus) -> Learnt {
        match (&self.state, status) {
            (SourceState::Gone | SourceState::Done, SessionStatus::Running) => {
                self.state = SourceState::Done;
                Learnt::Running
            }
            (SourceState::Gone, SessionStatus::Ready) => Learnt::SayGoAgain,
            // The destination promises never to run it: the guest is the source's again.
            (SourceState::Gone, SessionStatus::Abandoned) => Learnt::Abandoned,
            // A destination that said READY cannot be moving: it is another one, so nothing is known.
            _ => Learnt::Unknown,
        }
    }

    /// Whether the source may resume the guest by itself.
    pub fn owns_guest(&self) -> bool {
        !matches!(self.state, SourceState::Gone | SourceState::Done)
    }

    fn state_name(&self) -> &'static str {
        match self.state {
            SourceState::ExpectWelcome => "ExpectWelcome",
            SourceState::ExpectPrepared => "ExpectPrepared",
            SourceState::Moving => "Moving",
            SourceState::ExpectReady(_) => "ExpectReady",
            SourceState::Ready => "Ready",
            SourceState::Gone => "Gone",
            SourceState::Done => "Done",
            SourceState::ExpectResumed => "ExpectResumed",
        }
    }
}

impl Default for SourceSession {
    fn default() -> Self {
        Self::new()
    }
}

/// What a query after GO brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learnt {
    /// The guest is the destination's.
    Running,
    /// GO never arrived: say it again.
    SayGoAgain,
    /// The destination gave up without running the guest: the source may resume it.
    Abandoned,
    /// Ask again later.
    Unknown,
}

/// Where the destination stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DestinationState {
    ExpectHello,
    Preparing,
    Moving,
    Finishing,
    Ready,
    Running,
    Abandoned,
}

/// What a message means to the destination.
#[derive(Clone, Debug, PartialEq)]
pub enum DestinationEvent {
    /// Nothing to do.
    Nothing,
    /// Send this back.
    Reply(Message),
    /// A source opens the session: prepare memory.
    Hello(Hello),
    /// Stop this stream's worker, then say so.
    StreamLost(u16),
    /// Device state: keep it for the finish.
    State(Vec<pagecopy::backend::StateBlob>),
    /// Apply the rest, compare, then [`DestinationSession::ready`].
    Finish(Totals),
    /// Run the guest.
    Go,
    /// The source sends so many bytes again: for the report.
    Resent(u64),
    /// The guest will run before its pages are there: get ready, then [`Message::PostcopyReady`].
    Postcopy,
    /// These pages are still to come.
    Missing(Vec<ChunkRun>),
    /// All pages that were missing have come, says the source: so many.
    Sent(u64),
}

/// The destination's side of a session.
#[derive(Clone, Debug)]
pub struct DestinationSession {
    state: DestinationState,
    have_state: bool,
    /// The source said POSTCOPY.
    postcopy: bool,
    /// READY was said and not taken back: the source may have said GO.
    ready: bool,
    /// Number of the last attempt to resume that was taken.
    epoch: u32,
}

impl DestinationSession {
    /// A destination that waits for HELLO.
    pub fn new() -> Self {
        let state = DestinationState::ExpectHello;
        Self { state, have_state: false, postcopy: false, ready: false, epoch: 0 }
    }

    /// Takes a message from the source.
    pub fn handle(&mut self, message: Message) -> Result<DestinationEvent, SessionError> {
        use DestinationState as S;
        let event = match (self.state, message) {
            (_, Message::Ping(nonce)) => DestinationEvent::Reply(Message::Pong(nonce)),
            (_, Message::Pong(_)) => DestinationEvent::Nothing,
            (_, Message::Error { code, text }) => {
                return Err(SessionError::Peer { peer: "source", code, text });
            }
            (S::ExpectHello, Message::Hello(hello)) => {
                self.state = S::Preparing;
                DestinationEvent::Hello(hello)
            }
            (S::Moving, Message::StreamLost { stream }) => DestinationEvent::StreamLost(stream),
            (S::Moving, Message::Resent { bytes }) => DestinationEvent::Resent(bytes),
            (S::Moving, Message::State(blobs)) if !self.have_state => {
                self.have_state = true;
                DestinationEvent::State(blobs)
            }
            (S::Moving, Message::Postcopy) if !self.postcopy => {
                self.postcopy = true;
                DestinationEvent::Postcopy
            }
            (S::Moving, Message::Missing(runs)) if self.postcopy => DestinationEvent::Missing(runs),
            (S::Running, Message::Sent { pages }) if self.postcopy => DestinationEvent::Sent(pages),
            (S::Moving, Message::Finish(totals)) => {
                self.state = S::Finishing;
                DestinationEvent::Finish(totals)
            }
            (S::Ready, Message::Go) => {
                self.state = S::Running;
                DestinationEvent::Go
            }
            // GO said again after an answer was lost.
            (S::Running, Message::Go) => DestinationEvent::Reply(Message::Running),
            #[cfg(test)]
            (S::Finishing, Message::Go) if fault::is(fault::Fault::GoBeforeReady) => {
                self.state = S::Running;
                DestinationEvent::Go
            }
            (_, message) => {
                return Err(SessionError::OutOfOrder {
                    peer: "source",
                    message: message.name(),
                    state: self.state_name(),
                });
            }
        };
        Ok(event)
    }

    /// Memory is prepared: pages may come.
    pub fn prepared(&mut self) -> Message {
        assert_eq!(self.state, DestinationState::Preparing, "PREPARED follows HELLO");
        self.state = DestinationState::Moving;
        Message::Prepared
    }

    /// Everything is applied and equal.
    pub fn ready(&mut self, totals: Totals) -> Message {
        assert_eq!(self.state, DestinationState::Finishing, "READY follows FINISH");
        (self.state, self.ready) = (DestinationState::Ready, true);
        Message::Ready(totals)
    }

    /// Goes back to where pages move, on the word of a source that lost its connections. Streams must have been stopped before the
    /// message that this returns is sent, and the device state is to be dropped; nothing is missing any more.
    ///
    /// # Errors
    /// When nothing has moved yet, when the guest is this side's or the session given up, and when an attempt with this number or
    /// a higher one was taken: that source has given this attempt up.
    pub fn resume(&mut self, epoch: u32) -> Result<Message, SessionError> {
        use DestinationState as S;
        let may = matches!(self.state, S::Moving | S::Finishing | S::Ready);
        if epoch <= self.epoch || !may {
            return Err(SessionError::NoResume { epoch, last: self.epoch, state: self.state_name() });
        }
        (self.state, self.have_state, self.postcopy, self.ready, self.epoch) =
            (S::Moving, false, false, false, epoch);
        Ok(Message::Resumed { epoch })
    }

    /// Whether pages move: streams may connect.
    pub fn is_moving(&self) -> bool {
        self.state == DestinationState::Moving
    }

    /// Gives the session up, unless the guest is already this side's; returns whether it is given up. Final: GO is refused
    /// from here on.
    pub fn abandon(&mut self) -> bool {
        if self.state != DestinationState::Running {
            self.state = DestinationState::Abandoned;
        }
        self.state == DestinationState::Abandoned
    }

    /// GO was taken, and the guest could not be made to run: not an instruction of it has run here, nor ever will. As
    /// [`abandon`](Self::abandon), which does not give up a guest that may have run.
    pub fn never_ran(&mut self) {
        self.state = DestinationState::Abandoned;
    }

    /// Whether the session is given up and its source may not know: it may have said GO, and asks.
    pub fn may_be_asked(&self) -> bool {
        self.ready && self.state == DestinationState::Abandoned
    }

    /// What a query is answered with.
    pub fn status(&self) -> SessionStatus {
        match self.state {
            DestinationState::Ready => SessionStatus::Ready,
            DestinationState::Running => SessionStatus::Running,
            DestinationState::Abandoned => SessionStatus::Abandoned,
            _ => SessionStatus::Moving,
        }
    }

    fn state_name(&self) -> &'static str {
        match self.state {
            DestinationState::ExpectHello => "ExpectHello",
            DestinationState::Preparing => "Preparing",
            DestinationState::Moving => "Moving",
            DestinationState::Finishing => "Finishing",
            DestinationState::Ready => "Ready",
            DestinationState::Running => "Running",
            DestinationState::Abandoned => "Abandoned",
        }
    }
}

impl Default for DestinationSession {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
