//! The source's process around its phases: what happens to it, and what it comes to.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use pagecopy::layout::PAGE_SIZE;

use super::{Env, Fate, Happening, ME, Task};
use crate::clock;
use crate::engine::progress::Phase;
use crate::engine::report::Status;
use crate::engine::source::leave::Leave;
use crate::engine::source::{Attempt as Phases, Cause, Failure};
use crate::simulation::{STRUCK, TICK};

/// The process.
pub(in crate::simulation) struct SourceHost<'a> {
    env: &'a Env<'a>,
    task: &'a Task,
    phases: Option<Pin<Box<dyn Future<Output = Option<Failure>> + 'a>>>,
    fate: Option<Fate>,
}

impl<'a> SourceHost<'a> {
    pub(in crate::simulation) fn start(env: &'a Env<'a>, task: &'a Task) -> SourceHost<'a> {
        let phases = async {
            let leave = Leave::new(&task.progress, clock::now());
            let mut phases = Phases::new(env, &task.backend, &task.options, &task.progress, leave);
            let result = phases.carry_out().await;
            phases.end(result).await
        };
        let mut host = Self { env, task, phases: Some(Box::pin(phases)), fate: None };
        host.turn();
        host
    }

    pub(in crate::simulation) fn fate(&self) -> Option<Fate> {
        self.fate
    }

    pub(in crate::simulation) fn owns_guest(&self) -> bool {
        self.fate.map_or(self.task.progress.phase() == Phase::Precopy, |fate| fate == Fate::RunsOn)
    }

    /// Pages have begun to move.
    pub(in crate::simulation) fn has_moved_pages(&self) -> bool {
        !matches!(self.task.progress.report().status, Status::None | Status::Setup)
    }

    /// It does not know who has the guest, and asks.
    pub(in crate::simulation) fn is_asking(&self) -> bool {
        self.task.progress.report().status == Status::Unknown
    }

    /// How often it has asked in vain what became of the guest.
    pub(in crate::simulation) fn asked(&self) -> u32 {
        self.env.state.borrow().asked
    }

    pub(in crate::simulation) fn describe(&self) -> String {
        let report = self.task.progress.report();
        let state = self.env.state.borrow();
        let pages = state.pages.as_ref().map(|pages| {
            let under_way = pages.counters().logical_under_way.load(Ordering::Relaxed);
            format!("{} pages wait, {under_way} bytes are under way", pages.pending().count())
        });
        let (status, rounds, error) = (report.status, report.rounds, report.error);
        format!("{:?}, {status:?} in round {rounds}, {pages:?}, {error:?}", self.fate)
    }

    /// It panics where it waits next.
    pub(in crate::simulation) fn panic(&mut self) {
        self.env.state.borrow_mut().panics = true;
        self.turn();
    }

    /// Somebody cancels.
    pub(in crate::simulation) fn cancel(&mut self) {
        // In postcopy it does not count.
        let _ = self.task.progress.cancel();
        self.turn();
    }

    /// Something happens to it.
    pub(in crate::simulation) fn happen(&mut self, event: Happening) {
        let (env, world) = (self.env, &self.env.world);
        match event {
            Happening::Arrive(wire, _) | Happening::Notice(wire, _) | Happening::Look(wire, _) => {
                env.touched(wire);
            }
            Happening::Abort(wire) => {
                world.borrow().connection(wire).close(ME);
                env.touched(wire);
            }
            Happening::Refuse(wire) => {
                world.borrow().connection(wire).notice(ME);
                env.touched(wire);
            }
            Happening::Lane(stream) => env.lane_turn(stream),
            Happening::Postcopy(wire, _) => env.postcopy_turn(wire),
            Happening::Tick(_) => {
                env.wake_all(1000);
                env.wake_postcopy();
                world.borrow_mut().schedule(TICK, event);
            }
            // The turn below is what it is for.
            Happening::Alarm(_) => {}
            Happening::Worker(_) | Happening::Guest(_) => {}
        }
        self.turn();
    }

    /// The phases look at everything that may have happened, and go on.
    fn turn(&mut self) {
        let Some(phases) = &mut self.phases else { return };
        match phases.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Pending => self.env.look_after_lanes(),
            Poll::Ready(failure) => {
                self.phases = None;
                self.over(failure.as_ref());
            }
        }
    }

    fn over(&mut self, failure: Option<&Failure>) {
        use crate::engine::source::Fate as Has;
        use crate::session::SessionError;
        let mut world = self.env.world.borrow_mut();
        let state = &mut *self.env.state.borrow_mut();
        world.note(|| format!("the source is through: {failure:?}"));
        let fate = match failure.map(|failure| (failure.fate, &failure.cause)) {
            None => Fate::Moved,
            Some((Has::RunsOn, cause)) => {
                match cause {
                    // Only what the other side says by itself may end a session; that it broke the protocol may not happen.
                    Cause::Session(error) if !matches!(error, SessionError::Peer { .. }) => {
                        world.violated(format!("at the source: {error}"));
                    }
                    Cause::Panicked { what } if what != STRUCK => {
                        world.violated(format!("at the source: {what}"));
                    }
                    Cause::Fatal(error) => world.violated(format!("at the source: {error}")),
                    _ => {}
                }
                Fate::RunsOn
            }
            Some((Has::Unknown, _)) => {
                // Somebody ended the asking: the guest stays paused, and is nobody's to run here.
                world.saw("asked no more", 1);
                if self.task.progress.phase() == Phase::Postcopy {
                    world.violated("the source serves no pages any more, and the destination may miss them");
                }
                Fate::Unknown
            }
            // The destination says so; whether it may is seen in the end.
            Some((Has::Lost, _)) => Fate::Lost,
            Some((fate, cause)) => {
                world.violated(format!("the source ended so: {fate:?}: {cause:?}"));
                Fate::RunsOn
            }
        };
        if let Some(pages) = &state.pages {
            let counters = pages.counters();
            for (what, counter) in [
                ("pages of zeros", &counters.zero),
                ("unchanged pages", &counters.unchanged),
                ("deltas", &counters.delta),
                ("compressed pages", &counters.compressed),
                ("pages referred to", &counters.referred),
                ("raw pages", &counters.raw),
                ("torn pages", &counters.torn),
            ] {
                world.saw(what, counter.load(Ordering::Relaxed));
            }
            let same = counters.same_acked.load(Ordering::Relaxed) / PAGE_SIZE as u64;
            let lacking = counters.same_lacking.load(Ordering::Relaxed);
            world.saw("pages as in the base", same - lacking);
            world.saw("pages that the base did not have", lacking);
            world.saw("taken from the base, and moved", u64::from(same != lacking && failure.is_none()));
        }
        let moved = failure.is_none();
        let resumed = u64::from(self.task.progress.report().reconnects);
        world.saw("resumed", resumed);
        world.saw("resumed, and moved", u64::from(resumed != 0 && moved));
        world.saw("moved although streams died", u64::from(state.lost && moved));
        world.saw("asked, and heard that it runs", u64::from(state.asked != 0 && moved));
        let abandoned = failure.is_some_and(|failure| matches!(failure.cause, Cause::Abandoned));
        world.saw("abandoned, and heard of it", u64::from(abandoned));
        let postcopy = self.task.progress.report().postcopy.is_some();
        world.saw("moved before its pages", u64::from(postcopy && moved));
        world.saw("resumed, and moved before its pages", u64::from(postcopy && moved && resumed != 0));
        for lane in std::mem::take(&mut state.lanes).into_values() {
            if let Some(stepped) = &lane.stepped {
                stepped.abort();
            }
            world.connection(lane.wire).close(ME);
        }
        if let Some(link) = state.link.take() {
            world.connection(link.wire).close(ME);
        }
        self.fate = Some(fate);
    }
}
