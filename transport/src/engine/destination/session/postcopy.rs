//! Postcopy at the destination: the guest is taken over before all its pages are there, and runs while they follow.
//!
//! Pages are missed, and faults are served, from before the guest's state is loaded: whatever touches its memory from then on gets
//! the newest pages or waits for them. Once the guest runs here, nothing but its source can complete it: a source that is lost for
//! longer than the patience for it costs the guest, which is stopped.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use pagecopy::backend::BackendError;
use pagecopy::digest::PageHasher;
use pagecopy::layout::PAGE_SIZE;

use super::{IncomingError, Session, check_room};
use crate::clock;
use crate::engine::destination::environment::{Environment, PostcopyEvent};
use crate::engine::explain;
use crate::engine::report::{self, Status};
use crate::link::LinkEvent;
use crate::postcopy::{MissingRuns, MissingSink, PostcopyError};
use crate::session::DestinationEvent;
#[cfg(test)]
use crate::simulation::fault;
use crate::wire::WireError;
use crate::wire::control::{ChunkRun, ErrorCode, Message, STREAMS_PUSHING_MAX};

/// What there is of postcopy once the source has announced it.
pub(super) struct Postcopy {
    /// What is still to come, until the memory misses it.
    missing: MissingRuns,
    /// Connections that are open before there is anything to do for them.
    early: BTreeSet<u16>,
    sink: Option<Arc<MissingSink>>,
    /// When the guest began to run here, by the clock.
    began: Option<Duration>,
    /// How long it took until nothing was missing.
    drained: Option<Duration>,
    /// The source has said that everything was receipted, and was told what arrived: its next word is its last.
    answered: bool,
}

impl<E: Environment> Session<'_, E> {
    /// The guest will come before its pages.
    pub(super) fn announce_postcopy(&mut self) -> Result<(), IncomingError> {
        let unit_chunks = self.ram.missing_unit()?;
        self.postcopy = Some(Postcopy {
            missing: MissingRuns::new(self.ram.layout()),
            early: BTreeSet::new(),
            sink: None,
            began: None,
            drained: None,
            answered: false,
        });
        self.send(Message::PostcopyReady { unit_chunks });
        Ok(())
    }

    /// These pages are still to come.
    pub(super) fn add_missing(&mut self, runs: &[ChunkRun]) -> Result<(), WireError> {
        // The session machine takes runs only after the announcement.
        self.postcopy.as_mut().map_or(Ok(()), |post| post.missing.add(runs, self.ram.layout()))
    }

    /// Distinct pages that frames carried, for the account: a page that is missing counts for neither side, whether its frames arrived or
    /// were lost with their stream.
    pub(super) fn carried_pages(&self) -> u64 {
        #[cfg(test)]
        if fault::is(fault::Fault::MissingCarried) {
            return self.sink.carried_pages();
        }
        match &self.postcopy {
            Some(post) => self.sink.carried_pages_without(post.missing.pages()),
            None => self.sink.carried_pages(),
        }
    }

    /// The source takes the handover back: nothing is missing any more, for it sends anew what was taken away. The guest has not run.
    pub(super) fn take_postcopy_back(&mut self) -> Result<(), IncomingError> {
        self.end_postcopy();
        match self.postcopy.take().and_then(|post| post.sink) {
            Some(sink) => Ok(sink.end()?),
            None => Ok(()),
        }
    }

    /// Something happened on the connections of postcopy.
    pub(super) fn on_postcopy(&mut self, event: PostcopyEvent<E::Postcopy>) -> Result<(), IncomingError> {
        match event {
            // Of a handover that was taken back.
            PostcopyEvent::Ended(_) | PostcopyEvent::Faults(_) if self.postcopy.is_none() => Ok(()),
            // All is here: whoever waits goes on as soon as the registration ends.
            PostcopyEvent::Ended(_) | PostcopyEvent::Faults(_)
                if self.has_begun_postcopy() && !self.misses_pages() =>
            {
                Ok(())
            }
            PostcopyEvent::Opened { connection, stream } => self.open_postcopy(connection, stream),
            PostcopyEvent::Ended(error @ PostcopyError::Memory { .. }) => {
                Err(IncomingError::PostcopyFailed { why: explain(&error) })
            }
            // The source opens another.
            PostcopyEvent::Ended(_) => Ok(()),
            PostcopyEvent::Faults(error) => Err(IncomingError::PostcopyFailed { why: explain(&error) }),
        }
    }

    fn open_postcopy(&mut self, connection: E::Postcopy, stream: u16) -> Result<(), IncomingError> {
        let Some(post) = self.postcopy.as_mut().filter(|_| stream <= STREAMS_PUSHING_MAX) else {
            let text = format!("postcopy connection {stream} is refused: it was not announced");
            self.env.refuse_postcopy(connection, ErrorCode::Protocol, text);
            return Ok(());
        };
        // The source opens a number again because it has lost the one before: nobody else gets to hold more than one of each.
        if !self.env.admit_postcopy(connection, stream) {
            return Ok(());
        }
        match &post.sink {
            None => {
                post.early.insert(stream);
                Ok(())
            }
            Some(sink) => self.env.start_postcopy(sink, stream),
        }
    }

    /// Everything that comes before the guest is here: from now on whoever touches a page that does not waits for it.
    pub(super) fn miss_pages(&mut self) -> Result<(), IncomingError> {
        let Some(post) = &mut self.postcopy else { return Ok(()) };
        let nothing = MissingRuns::new(self.ram.layout());
        let missing = std::mem::replace(&mut post.missing, nothing).into_pages();
        let (hasher, timeout) = (PageHasher::new(self.hello.seed), self.sink.timeout());
        let capabilities = self.sink.capabilities();
        let needed = missing.count() * PAGE_SIZE as u64;
        let sink = Arc::new(MissingSink::new(self.ram.clone(), hasher, missing, capabilities, timeout)?);
        post.sink = Some(sink.clone());
        // What was stale is gone. The last moment in which the guest can stay where it is.
        check_room(&format!("{needed} bytes are still to come"), needed, self.ram.room())
            .map_err(|reason| BackendError::new(reason, std::io::Error::from(rustix::io::Errno::NOSPC)))?;
        self.env.serve_faults(&sink)?;
        let early = std::mem::take(&mut post.early);
        early.into_iter().try_for_each(|stream| self.env.start_postcopy(&sink, stream))
    }

    /// The guest runs: takes its pages until none is missing.
    pub(super) async fn take_rest(&mut self) -> Result<(), IncomingError> {
        let Some(post) = &mut self.postcopy else { return Ok(()) };
        post.began = Some(clock::now());
        let patience = self.options.postcopy_timeout;
        let mut lost = None::<Duration>;
        while self.missing_left() != 0 {
            let status = if lost.is_some() { Status::PostcopyPaused } else { Status::PostcopyActive };
            self.progress.update(|r| r.status = status);
            match self.next().await? {
                Some(LinkEvent::Message(Message::Query)) => {
                    self.send(Message::Status(self.machine.status()));
                }
                // The source knows that the guest runs here.
                Some(LinkEvent::Message(Message::Running)) | None => {}
                Some(LinkEvent::Message(message)) => match self.machine.handle(message)? {
                    DestinationEvent::Sent(pages) => self.on_sent(pages)?,
                    DestinationEvent::Reply(reply) => self.send(reply),
                    _ => {}
                },
                Some(LinkEvent::Dead(_)) => self.link = None,
            }
            lost = if self.link.is_some() { None } else { lost.or_else(|| Some(clock::now())) };
            if lost.is_some_and(|at| clock::now() - at > patience) && self.missing_left() != 0 {
                let left = self.missing_left();
                return Err(IncomingError::PostcopyLost { left, seconds: patience.as_secs() });
            }
        }
        self.end_missing()?;
        self.show_postcopy();
        self.progress.update(|r| (r.status, r.verified) = (Status::Completed, true));
        Ok(())
    }

    /// Nothing is missing any more: nobody is stopped who touches memory. Connections stay, for receipts that were lost.
    pub(super) fn end_missing(&mut self) -> Result<(), IncomingError> {
        let Some(post) = &mut self.postcopy else { return Ok(()) };
        post.drained = post.began.map(|at| clock::now() - at);
        post.sink.as_ref().map_or(Ok(()), |sink| sink.end())?;
        Ok(())
    }

    /// The source says that everything was receipted.
    pub(super) fn on_sent(&mut self, pages: u64) -> Result<(), IncomingError> {
        let Some(post) = &mut self.postcopy else { return Ok(()) };
        let Some(sink) = &post.sink else { return Ok(()) };
        let (arrived, left) = (sink.arrived(), sink.left());
        if left != 0 || arrived.pages != pages {
            let total = arrived.pages;
            let why =
                format!("the source says that all {pages} pages were sent; {left} of {total} are missing");
            return Err(IncomingError::PostcopyFailed { why });
        }
        post.answered = true;
        self.send(Message::Arrived(arrived));
        Ok(())
    }

    /// Whether the source has nothing more to say than that it knows who has the guest.
    pub(super) fn is_answered(&self) -> bool {
        self.postcopy.as_ref().is_none_or(|post| post.answered)
    }

    /// Pages that are missing.
    pub(super) fn missing_left(&self) -> u64 {
        self.postcopy.as_ref().and_then(|post| post.sink.as_ref()).map_or(0, |sink| sink.left())
    }

    /// Stops all threads.
    pub(super) fn end_postcopy(&mut self) {
        let Some(post) = &self.postcopy else { return };
        if let Some(sink) = &post.sink {
            sink.stop();
        }
        self.env.end_postcopy();
    }

    /// A guest that misses pages which never come must not run on zeros instead: it is told to stop before whoever waits for a page
    /// goes on with one.
    pub(super) fn stop_guest_for_good(&self) {
        let sink = self.postcopy.as_ref().and_then(|post| post.sink.as_ref());
        let release = || sink.map_or(Ok(()), |sink| sink.end());
        if let Some(guest) = &self.guest {
            // Each vCPU was told to stop, which it does as soon as it can.
            let _ = guest.stop_for_good(&release);
        }
        self.progress.update(|r| r.status = Status::PostcopyLost);
    }

    /// Whether the guest runs here, and missed pages when it began to.
    pub(super) fn has_begun_postcopy(&self) -> bool {
        self.postcopy.as_ref().is_some_and(|post| post.began.is_some())
    }

    /// Whether the guest runs here and misses pages.
    pub(super) fn misses_pages(&self) -> bool {
        self.has_begun_postcopy() && self.missing_left() != 0
    }

    /// Shows others how it goes.
    pub(super) fn show_postcopy(&self) {
        let Some(post) = &self.postcopy else { return };
        let (Some(sink), Some(began)) = (&post.sink, post.began) else { return };
        let s = sink.statistics();
        let drain = post.drained.unwrap_or_else(|| clock::now() - began).as_secs_f64();
        let page = PAGE_SIZE as u64;
        let blocked_us: u64 = s.blocked_us.iter().sum();
        self.progress.update(|r| {
            r.remaining_bytes = s.left * page;
            r.postcopy = Some(report::Postcopy {
                pages: s.total,
                pages_left: s.left,
                faults: s.faults,
                fault_p50_us: Some(s.p50_us),
                fault_p99_us: Some(s.p99_us),
                fault_max_us: Some(s.max_us),
                blocked_ms: Some(blocked_us as f64 / 1e3),
                vcpu_blocked_ms: s.blocked_us.iter().map(|&us| us as f64 / 1e3).collect(),
                zero: s.zero,
                compressed: s.compressed,
                raw: s.raw,
                wire_bytes: s.wire_bytes,
                logical_bytes: (s.total - s.left) * page,
                drain_ms: drain * 1e3,
                drain_mib_s: ((s.total - s.left) * page) as f64 / drain.max(1e-9) / f64::from(1 << 20),
                damaged: s.damaged,
                ..report::Postcopy::default()
            });
        });
    }
}
