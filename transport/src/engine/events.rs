//! What a migration tells of itself while it runs.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::awaited::Awaited;
use super::report::{Report, Round, Stalled, Status};

/// Events that are kept for those who have not read them.
const KEPT_MAX: usize = 4096;

/// Something that happened to a migration. As JSON it is an object with its name in the field `event`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// It has come to another phase.
    Phase {
        /// Which.
        status: Status,
    },
    /// A pass over a dirty set has ended; at a source.
    Round(Round),
    /// The guest writes its memory as fast as it is delivered: the migration does not end by itself.
    Stalled(Stalled),
    /// It does get on again.
    GetsOn,
    /// A data stream was lost. Its pages go over the others, and it is opened again.
    StreamLost {
        /// Streams that were lost so far.
        lost: u32,
    },
    /// A data stream was opened again.
    StreamReconnected {
        /// Streams that were opened again so far.
        reconnected: u32,
    },
    /// The guest runs at the destination; at a source.
    Downtime {
        /// How long it ran nowhere, in milliseconds.
        ms: f64,
        /// What was predicted at the switchover, in milliseconds.
        expected_ms: f64,
    },
    /// Whoever reads is slow: so many events were not kept for him.
    Missed {
        /// How many.
        events: u64,
    },
    /// It has ended; no other event follows.
    Done {
        /// Its numbers. How it ended is [`Report::status`], and why it failed [`Report::error`].
        report: Box<Report>,
    },
}

/// The events of one migration.
pub(super) type Journal = Arc<Awaited<Kept>>;

#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Events that are not kept any more.
    dropped: u64,
    events: VecDeque<Event>,
    ended: bool,
}

impl Kept {
    /// Keeps an event, unless the migration has ended.
    pub(super) fn add(&mut self, event: Event) {
        if self.ended {
            return;
        }
        self.ended = matches!(event, Event::Done { .. });
        if self.events.len() == KEPT_MAX {
            self.events.pop_front();
            self.dropped += 1;
        }
        self.events.push_back(event);
    }

    /// Whether [`Event::Done`] was told.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// What follows the first `seen` events, counting it as seen; `Some(None)` where nothing ever will.
    fn after(&self, seen: &mut u64) -> Option<Option<Event>> {
        if let Some(missed) = self.dropped.checked_sub(*seen).filter(|&missed| missed != 0) {
            *seen = self.dropped;
            return Some(Some(Event::Missed { events: missed }));
        }
        match self.events.get((*seen - self.dropped) as usize) {
            Some(event) => {
                *seen += 1;
                Some(Some(event.clone()))
            }
            None => self.ended.then_some(None),
        }
    }
}

/// The events of a migration from its beginning, whenever this was asked for; each reader has all of them. As an iterator it blocks
/// until something happens, and ends after [`Event::Done`].
///
/// In async code, [`Self::recv`] is the same without blocking.
#[derive(Debug)]
pub struct Events {
    journal: Journal,
    seen: u64,
}

impl Events {
    pub(super) fn new(journal: &Journal) -> Self {
        Self { journal: journal.clone(), seen: 0 }
    }

    /// The next event, without blocking a thread: on any runtime. `None` after [`Event::Done`]. Nothing is lost where the future is
    /// dropped.
    pub async fn recv(&mut self) -> Option<Event> {
        poll_fn(|context| self.journal.poll(context, |kept| kept.after(&mut self.seen))).await
    }

    /// The next event, if it happens within `limit`; also `None` after [`Event::Done`].
    pub fn next_within(&mut self, limit: Duration) -> Option<Event> {
        self.journal.wait_for(limit, |kept| kept.after(&mut self.seen)).flatten()
    }
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.journal.wait(|kept| kept.after(&mut self.seen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(lost: u32) -> Event {
        Event::StreamLost { lost }
    }

    fn done() -> Event {
        Event::Done { report: Box::default() }
    }

    #[test]
    fn each_reader_has_all_events_and_an_end() {
        let journal = Journal::default();
        let early = Events::new(&journal);
        for event in [lost(1), lost(2), done(), lost(3)] {
            journal.change(|kept| kept.add(event));
        }
        let all = [lost(1), lost(2), done()];
        assert_eq!(early.collect::<Vec<_>>(), all);
        let mut late = Events::new(&journal);
        assert_eq!(late.by_ref().collect::<Vec<_>>(), all);
        assert_eq!(late.next_within(Duration::from_secs(60)), None);
    }

    #[test]
    fn who_is_slow_is_told_what_he_missed() {
        let journal = Journal::default();
        let mut reader = Events::new(&journal);
        let tell = |numbers: std::ops::Range<u32>| {
            numbers.for_each(|number| journal.change(|kept| kept.add(lost(number))));
        };
        tell(0..2);
        assert_eq!(reader.next(), Some(lost(0)));
        tell(2..2 + KEPT_MAX as u32);
        assert_eq!(reader.next(), Some(Event::Missed { events: 1 }));
        assert_eq!(reader.next(), Some(lost(2)));
    }

    #[test]
    fn threads_and_tasks_wait_until_something_happens() {
        let journal = Journal::default();
        let (mut blocking, mut task) = (Events::new(&journal), Events::new(&journal));
        assert_eq!(blocking.next_within(Duration::from_millis(1)), None);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        std::thread::scope(|scope| {
            let blocked = scope.spawn(move || blocking.next());
            let awaited = scope.spawn(move || runtime.block_on(task.recv()));
            std::thread::sleep(Duration::from_millis(20));
            journal.change(|kept| kept.add(lost(7)));
            assert_eq!(blocked.join().unwrap(), Some(lost(7)));
            assert_eq!(awaited.join().unwrap(), Some(lost(7)));
        });
    }

    #[test]
    fn as_json_an_event_has_its_name() {
        let round = Round { dirtied_pages: 5, ..Round::default() };
        for (event, name) in [(lost(1), "stream-lost"), (Event::Round(round), "round"), (done(), "done")] {
            let json = serde_json::to_value(&event).unwrap();
            assert_eq!(json["event"], name, "{json}");
            assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);
        }
    }
}
