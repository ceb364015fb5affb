//! Which streams live, and what becomes of the others: the bookkeeping of both sides, pure. Time comes in.
//!
//! A stream is dead for good once both sides say so: the source by STREAM_LOST, the destination by STREAM_STOPPED, in either
//! order. Only then are the pages of its unreceipted frames dirty again (rules 1 and 2): before that the destination's worker
//! might still write an old version of a page over a newer one that came on another stream.

use std::collections::BTreeMap;
use std::time::Duration;

#[cfg(test)]
use crate::simulation::fault;
use crate::wire::control::{Message, StreamEnd};

/// How long a destination that dropped all streams has to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why a session cannot go on for want of streams.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamsError {
    /// Every stream died.
    #[error("all data streams are lost; the last one: {last}")]
    AllLost {
        /// Why the last one did.
        last: String,
    },
    /// The destination never said that a lost stream's worker has stopped.
    #[error(
        "the destination did not stop stream {stream} within {seconds} s after it was lost, so its pages cannot be sent again"
    )]
    NotStopped {
        /// Which.
        stream: u16,
        /// How long was waited.
        seconds: u64,
    },
}

/// A stream that died at the source, until the destination has stopped its worker, too.
#[derive(Debug)]
struct Dead<F> {
    frames: Vec<F>,
    error: String,
    since: Duration,
}

/// The streams of a session at the source. `F` is a frame without receipt.
#[derive(Debug)]
pub struct SourceStreams<F> {
    live: u32,
    ended: Vec<StreamEnd>,
    dead: BTreeMap<u16, Dead<F>>,
    /// Streams whose worker the destination has stopped, with its reason.
    stopped: BTreeMap<u16, String>,
    last_error: Option<String>,
}

impl<F> SourceStreams<F> {
    /// A session without streams.
    pub fn new() -> Self {
        Self { live: 0, ended: Vec::new(), dead: BTreeMap::new(), stopped: BTreeMap::new(), last_error: None }
    }

    /// A stream works.
    pub fn started(&mut self) {
        self.live += 1;
    }

    /// A stream ended in order.
    pub fn ended(&mut self, account: StreamEnd) {
        self.live -= 1;
        self.ended.push(account);
    }

    /// A stream died here, of `error`, with these frames under way: STREAM_LOST is due. Returns the frames whose pages are to be
    /// dirty again: none before the destination's worker has stopped.
    #[must_use = "the pages of these frames are pending again"]
    pub fn died(&mut self, stream: u16, error: String, frames: Vec<F>, now: Duration) -> Vec<F> {
        self.live -= 1;
        let theirs = self.stopped.get(&stream).filter(|reason| !reason.is_empty());
        self.last_error = Some(match theirs {
            Some(reason) => format!("{error}; the destination stopped stream {stream}: {reason}"),
            None => error.clone(),
        });
        self.dead.insert(stream, Dead { frames, error, since: now });
        self.bury(stream)
    }

    /// The destination has stopped a stream's worker; `reason` is empty where it was told to. Returns frames as
    /// [`died`](Self::died) does.
    #[must_use = "the pages of these frames are pending again"]
    pub fn stopped(&mut self, stream: u16, reason: String) -> Vec<F> {
        if !reason.is_empty() {
            // Which side was first is not known: the other one's reason is a consequence.
            let theirs = format!("the destination stopped stream {stream}: {reason}");
            let own = self.dead.get(&stream).map(|dead| format!("{}; ", dead.error));
            self.last_error = Some(own.unwrap_or_default() + &theirs);
        }
        self.stopped.insert(stream, reason);
        self.bury(stream)
    }

    /// A stream that is dead on both sides gives its frames back; any stream may take their pages.
    fn bury(&mut self, stream: u16) -> Vec<F> {
        let stopped = self.stopped.contains_key(&stream);
        #[cfg(test)]
        let stopped = stopped || fault::is(fault::Fault::NoStopBeforeResend);
        if !stopped {
            return Vec::new();
        }
        let Some(dead) = self.dead.remove(&stream) else { return Vec::new() };
        self.last_error.get_or_insert(dead.error);
        dead.frames
    }

    /// Whether the session can go on, when the destination has `timeout` to stop a worker.
    pub fn check(&mut self, now: Duration, timeout: Duration) -> Result<(), StreamsError> {
        let waited = |dead: &Dead<F>| now.saturating_sub(dead.since);
        // The destination may be about to say why it dropped the streams.
        let silent = |dead: &Dead<F>| waited(dead) > LAST_WORDS;
        if self.live == 0
            && self.ended.is_empty()
            && (self.dead.is_empty() || self.dead.values().any(silent))
            && let Some(last) = self.last_error.take()
        {
            return Err(StreamsError::AllLost { last });
        }
        // Until its worker has stopped, what a stream had under way cannot be sent again.
        let limit = timeout.max(LAST_WORDS);
        if let Some((&stream, _)) = self.dead.iter().find(|(_, dead)| waited(dead) > limit) {
            return Err(StreamsError::NotStopped { stream, seconds: limit.as_secs() });
        }
        Ok(())
    }

    /// Whether every stream has ended, in order or dead on both sides.
    pub fn all_over(&self) -> bool {
        self.live == 0 && self.dead.is_empty()
    }

    /// The accounts of those that ended in order, for FINISH.
    pub fn take_accounts(&mut self) -> Vec<StreamEnd> {
        self.ended.sort_by_key(|end| end.stream);
        std::mem::take(&mut self.ended)
    }
}

impl<F> Default for SourceStreams<F> {
    fn default() -> Self {
        Self::new()
    }
}

/// What became of a stream's worker at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Worker {
    Runs,
    EndedInOrder(StreamEnd),
    Failed,
}

/// A stream at the destination.
#[derive(Clone, Copy, Debug)]
struct Entry {
    worker: Worker,
    /// The source calls it dead, or was told that it is: its account does not count.
    lost: bool,
}

/// What STREAM_LOST asks of the destination.
#[derive(Clone, Debug, PartialEq)]
pub enum Stop {
    /// Send this: nothing of the stream can reach memory any more.
    Say(Message),
    /// Break the stream's connection; when its worker has ended, [`DestinationStreams::ended`] says what to send.
    Worker,
    /// The source knows already.
    Nothing,
}

/// The streams of a session at the destination.
#[derive(Debug, Default)]
pub struct DestinationStreams {
    streams: BTreeMap<u16, Entry>,
}

impl DestinationStreams {
    /// A session without streams.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether stream `stream` of `agreed` may connect now; if not, why.
    pub fn admit(&self, stream: u16, agreed: u16, moving: bool) -> Result<(), &'static str> {
        if stream >= agreed {
            Err("it was not agreed on")
        } else if self.runs(stream) {
            Err("it is already connected")
        } else if !moving {
            Err("pages are not moving")
        } else {
            Ok(())
        }
    }

    /// A stream's worker has started.
    pub fn started(&mut self, stream: u16) {
        self.streams.insert(stream, Entry { worker: Worker::Runs, lost: false });
    }

    /// Whether a stream's worker may still write to memory.
    pub fn runs(&self, stream: u16) -> bool {
        self.streams.get(&stream).is_some_and(|entry| entry.worker == Worker::Runs)
    }

    /// A stream's worker has ended, in order or for a reason; returns what the source is to hear.
    #[must_use = "the source waits for STREAM_STOPPED"]
    pub fn ended(&mut self, stream: u16, result: Result<StreamEnd, String>) -> Option<Message> {
        let entry = self.streams.get_mut(&stream).filter(|entry| entry.worker == Worker::Runs)?;
        match result {
            Ok(account) => {
                entry.worker = Worker::EndedInOrder(account);
                entry.lost.then(|| Message::StreamStopped { stream, reason: String::new() })
            }
            Err(reason) => {
                (entry.worker, entry.lost) = (Worker::Failed, true);
                Some(Message::StreamStopped { stream, reason })
            }
        }
    }

    /// The source calls a stream dead. It hears STREAM_STOPPED exactly once, when nothing more of it can reach memory.
    #[must_use = "the source waits for STREAM_STOPPED"]
    pub fn lost(&mut self, stream: u16) -> Stop {
        let stopped = Message::StreamStopped { stream, reason: String::new() };
        let Some(entry) = self.streams.get_mut(&stream) else { return Stop::Say(stopped) };
        let told = std::mem::replace(&mut entry.lost, true);
        match entry.worker {
            Worker::Runs => Stop::Worker,
            Worker::EndedInOrder(_) if !told => Stop::Say(stopped),
            Worker::EndedInOrder(_) | Worker::Failed => Stop::Nothing,
        }
    }

    /// A stream whose worker has not ended yet.
    pub fn unfinished(&self) -> Option<u16> {
        self.streams.iter().find(|(_, entry)| entry.worker == Worker::Runs).map(|(&stream, _)| stream)
    }

    /// The accounts of the streams that ended in order and that neither side calls dead, for READY.
    pub fn accounts(&self) -> Vec<StreamEnd> {
        let accounts = self.streams.values().filter_map(|entry| match entry.worker {
            Worker::EndedInOrder(account) if !entry.lost => Some(account),
            _ => None,
        });
        accounts.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);
    const NONE: Vec<u32> = Vec::new();

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn account(stream: u16) -> StreamEnd {
        StreamEnd { stream, frames: 1, fold: 2 }
    }

    fn stopped(stream: u16, reason: &str) -> Message {
        Message::StreamStopped { stream, reason: reason.into() }
    }

    #[test]
    fn frames_come_back_only_when_both_sides_have_stopped() {
        for source_first in [true, false] {
            let mut streams = SourceStreams::new();
            streams.started();
            streams.started();
            let frames = if source_first {
                assert_eq!(streams.died(1, "cut".into(), vec![7, 8], at(0)), NONE);
                assert!(!streams.all_over());
                streams.stopped(1, String::new())
            } else {
                assert_eq!(streams.stopped(1, "cut".into()), NONE);
                streams.died(1, "cut".into(), vec![7, 8], at(0))
            };
            assert_eq!(frames, [7, 8]);
            assert_eq!(streams.check(at(100), TIMEOUT), Ok(()), "the other stream lives");
            streams.ended(account(0));
            assert!(streams.all_over());
            assert_eq!(streams.take_accounts(), [account(0)]);
        }
    }

    #[test]
    fn a_worker_that_does_not_stop_ends_the_session() {
        let mut streams = SourceStreams::new();
        streams.started();
        streams.started();
        assert_eq!(streams.died(1, "cut".into(), vec![7], at(1)), NONE);
        assert_eq!(streams.check(at(6), TIMEOUT), Ok(()));
        let error = StreamsError::NotStopped { stream: 1, seconds: 5 };
        assert_eq!(streams.check(at(7), TIMEOUT), Err(error));
    }

    #[test]
    fn the_last_stream_is_mourned_after_last_words() {
        let mut streams = SourceStreams::new();
        streams.started();
        assert_eq!(streams.died(0, "cut".into(), vec![7], at(0)), NONE);
        assert_eq!(streams.check(at(1), TIMEOUT), Ok(()));
        assert_eq!(streams.stopped(0, "no memory".into()), [7]);
        let last = "cut; the destination stopped stream 0: no memory".to_owned();
        assert_eq!(streams.check(at(1), TIMEOUT), Err(StreamsError::AllLost { last }));
    }

    #[test]
    fn the_source_hears_of_every_stop_exactly_once() {
        let mut streams = DestinationStreams::new();
        assert_eq!(streams.lost(9), Stop::Say(stopped(9, "")), "it never came");
        for stream in 0..4 {
            assert_eq!(streams.admit(stream, 4, true), Ok(()));
            streams.started(stream);
            assert!(streams.admit(stream, 4, true).is_err());
        }
        assert!(streams.admit(4, 4, true).is_err());
        // Told to stop; fails by itself and is told later; ends in order and is told later; ends in order.
        assert_eq!(streams.lost(0), Stop::Worker);
        assert_eq!(streams.ended(0, Err("shut".into())), Some(stopped(0, "shut")));
        assert_eq!(streams.ended(1, Err("cut".into())), Some(stopped(1, "cut")));
        assert_eq!(streams.lost(1), Stop::Nothing);
        assert_eq!(streams.ended(2, Ok(account(2))), None);
        assert_eq!(streams.lost(2), Stop::Say(stopped(2, "")));
        assert_eq!(streams.lost(2), Stop::Nothing);
        assert_eq!(streams.unfinished(), Some(3));
        assert_eq!(streams.lost(3), Stop::Worker);
        assert_eq!(streams.ended(3, Ok(account(3))), Some(stopped(3, "")), "END came before the break");
        assert_eq!(streams.ended(3, Ok(account(3))), None);
        assert_eq!(streams.unfinished(), None);
        assert_eq!(streams.accounts(), []);
    }

    #[test]
    fn accounts_are_of_streams_that_neither_side_calls_dead() {
        let mut streams = DestinationStreams::new();
        for stream in 0..3 {
            streams.started(stream);
        }
        assert_eq!(streams.ended(2, Ok(account(2))), None);
        assert_eq!(streams.ended(0, Ok(account(0))), None);
        assert_eq!(streams.ended(1, Ok(account(1))), None);
        let _ = streams.lost(1);
        assert_eq!(streams.accounts(), [account(0), account(2)]);
    }
}
