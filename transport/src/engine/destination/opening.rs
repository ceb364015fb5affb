//! Who wants to open a session: any number of callers at a time, until one says a HELLO that is not refused.

use std::sync::Arc;
use std::time::Duration;

use pagecopy::backend::{GuestRam, Unclaimed};
use pagecopy::digest::PageHasher;
use pagecopy::layout::{Layout, PAGE_SIZE};

use super::environment::{Call, Environment, Event, Speaks, say_no};
use super::session::{Agreed, Made, Session, caught, check_room, lacks_room, say_busy};
use super::{Arrival, Incoming, IncomingError, Offer};
use crate::clock;
use crate::destination::PageSink;
use crate::engine::progress::Progress;
use crate::engine::report::{Report, Status};
use crate::engine::{Options, explain};
use crate::link::LinkEvent;
use crate::local::{destination_bytes, guarded};
use crate::session::{DestinationEvent, DestinationSession};
use crate::wire::control::{ErrorCode, Hello, Message, Welcome, capability};

/// A destination that waits for its guest.
pub(crate) struct Reception<'a, E: Environment> {
    env: &'a E,
    options: &'a Options,
    progress: &'a Progress,
    /// Those who have not said HELLO yet.
    callers: Vec<Caller<E::Link>>,
}

/// Somebody who has opened a control connection and not said HELLO.
struct Caller<L> {
    call: Call<L>,
    session: DestinationSession,
    /// By the clock.
    until: Duration,
}

/// A source that said HELLO.
struct Opening<L> {
    call: Call<L>,
    session: DestinationSession,
    hello: Hello,
}

impl<'a, E: Environment> Reception<'a, E> {
    /// One that nobody has called yet.
    pub(crate) fn new(env: &'a E, options: &'a Options, progress: &'a Progress) -> Self {
        Self { env, options, progress, callers: Vec::new() }
    }

    /// Takes a session in, until the guest is here and runs, or the session has failed.
    pub(crate) async fn receive(mut self, incoming: &mut dyn Incoming) -> Result<Arrival, IncomingError> {
        loop {
            let opening = caught(self.opening()).await?;
            if let Some(session) = self.accept(opening, incoming) {
                let running = session.take_in(incoming).await?;
                return Ok(Arrival { report: self.progress.report(), running, vm: () });
            }
        }
    }

    fn tell(&self, notice: &str) {
        let _ = guarded(|| self.env.tell(notice));
    }

    /// Waits for a HELLO. Each of those who call has the time-out for it, and none keeps another from being heard.
    async fn opening(&mut self) -> Result<Opening<E::Link>, IncomingError> {
        loop {
            if self.progress.is_cancelled() {
                return Err(IncomingError::Cancelled);
            }
            self.refuse_late();
            self.env.wait().await;
            let Some(event) = self.env.next() else { continue };
            match event {
                Event::Control(call) => {
                    let until = clock::now() + self.options.timeout;
                    self.callers.push(Caller { call, session: DestinationSession::new(), until });
                }
                Event::Link { generation, event } => {
                    if let Some(opening) = self.hear_caller(generation, event) {
                        return Ok(opening);
                    }
                }
                Event::Refused { peer, reason } => {
                    self.tell(&format!("refused a connection from {peer}: {reason}"));
                }
                Event::Notice(text) => self.tell(&text),
                // Of a session that is over.
                Event::Stream { .. }
                | Event::Query { .. }
                | Event::Populated(_)
                | Event::Postcopy(_)
                | Event::Resume { .. }
                | Event::StreamEnded { .. } => {}
            }
        }
    }

    /// The first message of a control connection must be HELLO.
    fn hear_caller(&mut self, generation: u64, event: LinkEvent) -> Option<Opening<E::Link>> {
        let at = self.callers.iter().position(|caller| caller.call.generation == generation)?;
        let (code, reason) = match event {
            LinkEvent::Message(message) => match self.callers[at].session.handle(message) {
                Ok(DestinationEvent::Hello(hello)) => {
                    let Caller { call, session, .. } = self.callers.remove(at);
                    return Some(Opening { call, session, hello });
                }
                Ok(_) => return None,
                Err(error) => (ErrorCode::Protocol, explain(&error)),
            },
            LinkEvent::Dead(error) => (ErrorCode::Protocol, format!("no HELLO came: {}", explain(&error))),
        };
        self.refuse(at, code, reason);
        None
    }

    fn refuse(&mut self, at: usize, code: ErrorCode, reason: String) {
        let Caller { call, .. } = self.callers.remove(at);
        self.tell(&format!("refused a connection from {}: {reason}", call.peer));
        say_no(&call.link, code, reason);
    }

    /// HELLO is to come soon.
    fn refuse_late(&mut self) {
        let now = clock::now();
        // Of those who had to give way nothing more is heard. Nobody else is let in while they are remembered here.
        self.callers.retain(|caller| !caller.call.link.is_closed());
        while let Some(at) = self.callers.iter().position(|caller| caller.until <= now) {
            let reason = format!("no HELLO came within {} s", self.options.timeout.as_secs());
            self.refuse(at, ErrorCode::Timeout, reason);
        }
    }

    /// Decides on an offer; `None` when it was refused.
    fn accept(&mut self, opening: Opening<E::Link>, incoming: &mut dyn Incoming) -> Option<Session<'a, E>> {
        let Opening { call, session, hello } = opening;
        let opened = guarded(|| open(self.env, &hello, incoming)).unwrap_or_else(|what| {
            Err((
                ErrorCode::Local,
                format!("this destination panicked as it made memory for the guest: {what}"),
            ))
        });
        let Made { ram, guest, claim } = match opened {
            Ok(opened) => opened,
            Err((code, reason)) => {
                self.tell(&format!("refused the guest offered by {}: {reason}", call.peer));
                say_no(&call.link, code, reason);
                return None;
            }
        };
        let reconnect = self.options.reconnect_timeout.min(Duration::from_millis(hello.reconnect_ms.into()));
        let resume = if reconnect.is_zero() { 0 } else { capability::RESUME };
        let base = self.env.base(ram.layout()).filter(|_| hello.capabilities & capability::BASE != 0);
        let warm = if base.is_some() { capability::BASE } else { 0 };
        let capabilities = hello.capabilities & (self.capabilities(&hello, &*ram) | resume | warm);
        let resumes = capabilities & capability::RESUME != 0;
        let patience = if resumes { reconnect } else { Duration::ZERO };
        let (hasher, timeout) = (PageHasher::new(hello.seed), self.options.timeout);
        let sink = PageSink::new(ram.clone(), hasher, capabilities, timeout);
        let sink = Arc::new(sink.with_base(base));
        self.env.give_to(&call);
        self.env.prepare_streams(&sink);
        // Another has the session now.
        self.callers.drain(..).for_each(|caller| say_busy(&caller.call.link));
        let Call { link, version, generation, .. } = call;
        link.send(Message::Welcome(Welcome {
            version,
            capabilities,
            streams: hello.streams,
            timeout_ms: self.options.timeout.as_millis().try_into().unwrap_or(u32::MAX),
            reconnect_ms: reconnect.as_millis().try_into().unwrap_or(u32::MAX),
        }));
        self.progress.update(|r| {
            let protection = r.protection;
            *r = Report {
                status: Status::Setup,
                page_size: PAGE_SIZE as u32,
                protection,
                ..Report::default()
            };
            r.pages.total = ram.layout().pages();
            r.streams = hello.streams;
        });
        let agreed = Agreed { machine: session, link, generation, hello, patience };
        Some(Session::new((self.env, self.options, self.progress), agreed, Made { ram, guest, claim }, sink))
    }

    /// What this side can do for such a guest, besides taking a session up again.
    fn capabilities(&self, hello: &Hello, ram: &dyn GuestRam) -> u64 {
        if !hello.live {
            return capability::ENCODINGS;
        }
        match ram.missing_unit() {
            Ok(_) => capability::ENCODINGS | capability::POSTCOPY,
            Err(error) => {
                self.tell(&format!("no postcopy here: {}", explain(&error)));
                capability::ENCODINGS
            }
        }
    }
}

/// Memory for the guest that is offered, and who is to run it; or why not.
fn open(
    env: &impl Environment,
    hello: &Hello,
    incoming: &mut dyn Incoming,
) -> Result<Made, (ErrorCode, String)> {
    let refused = |reason| (ErrorCode::Layout, reason);
    let layout = Layout::new(hello.regions.clone()).map_err(|e| refused(e.to_string()))?;
    let layout = check_presence(hello, layout).map_err(refused)?;
    let Hello { live, data_bytes, .. } = *hello;
    let offer = Offer { layout, machine: hello.machine.clone(), live, data_bytes };
    let ram = incoming.open(&offer).map_err(refused)?;
    let guest = incoming.guest();
    if hello.live != guest.is_some() {
        return Err(refused(
            if hello.live {
                "this destination takes memory alone, not a running guest"
            } else {
                "this destination waits for a running guest, not for memory alone"
            }
            .into(),
        ));
    }
    let brought = format!("the guest brings {} bytes", hello.data_bytes);
    let no_room = |reason| (ErrorCode::NoRoom, reason);
    check_room(&brought, hello.data_bytes, ram.room()).map_err(no_room)?;
    let claim = match ram.claim(hello.data_bytes) {
        Ok(claim) => claim,
        Err(Unclaimed::NoRoom(room)) => {
            return Err(no_room(lacks_room(&brought, &room)));
        }
        Err(Unclaimed::Unknown(error)) => {
            env.tell(&format!(
                "guests that come to this host at once are not counted together: {}",
                explain(&error)
            ));
            None
        }
    };
    env.check_headroom(destination_bytes(ram.layout(), hello.streams))
        .map_err(|e| (ErrorCode::Local, e.to_string()))?;
    Ok(Made { ram, guest, claim })
}

/// Refuses maps that are not the layout's.
fn check_presence(hello: &Hello, layout: Layout) -> Result<Layout, String> {
    let (found, expected) = (hello.presence.len(), Hello::presence_len(&layout));
    if found != expected {
        return Err(format!("field presence map has {found} bytes; the layout's has {expected}"));
    }
    match hello.dense.len() {
        0 => Ok(layout),
        len if len == expected => Ok(layout),
        len => Err(format!("field dense map has {len} bytes; the layout's presence map has {expected}")),
    }
}
