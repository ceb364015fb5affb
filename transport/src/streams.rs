//! Which streams live, and what becomes of the others: the bookkeeping of both sides, pure. Time comes in.
//!
//! A stream is dead for good once both sides say so: the source by STREAM_LOST, the destination by STREAM_STOPPED, in either
//! order. Only then are the pages of its unreceipted frames dirty again (rules 1 and 2): before that the destination's worker
//! might still write an old version of a page over a newer one that came on another stream.
//!
//! A stream is named by its id: its number and which incarnation of that number it is. A number may be connected again once the
//! source has buried its last incarnation; what is said of that one late is not taken for the next.

use std::collections::BTreeMap;
use std::time::Duration;

#[cfg(test)]
use crate::simulation::fault;
use crate::wire::control::{Message, StreamEnd};
use crate::wire::{is_later_incarnation, stream_number};

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
    /// Streams can be connected, and carry nothing.
    #[error("data streams were lost for {seconds} s without anything arriving on one; the last one: {last}")]
    NothingArrives {
        /// For how long.
        seconds: u64,
        /// Why the last one was lost.
        last: String,
    },
    /// What was on its way when the handover began was lost, or arrived other than it was sent.
    #[error("the last pages did not all arrive as they were sent: {last}")]
    LateLoss {
        /// What is known of it.
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
    /// Of streams that live and send no more, what their accounts will be.
    sent: BTreeMap<u16, StreamEnd>,
    dead: BTreeMap<u16, Dead<F>>,
    /// By number, the last stream whose worker the destination has stopped, with its reason: more than that would be for a hostile one
    /// to fill.
    stopped: BTreeMap<u16, (u16, String)>,
    last_error: Option<String>,
    /// Streams that are dead on both sides, until [`take_buried`](SourceStreams::take_buried).
    buried: Vec<u16>,
}

impl<F> SourceStreams<F> {
    /// A session without streams.
    pub fn new() -> Self {
        Self {
            live: 0,
            ended: Vec::new(),
            sent: BTreeMap::new(),
            dead: BTreeMap::new(),
            stopped: BTreeMap::new(),
            last_error: None,
            buried: Vec::new(),
        }
    }

    /// A stream works.
    pub fn started(&mut self) {
        self.live += 1;
    }

    /// All of a stream is on its way, its end too; this will be its account.
    pub fn sent(&mut self, account: StreamEnd) {
        self.sent.insert(account.stream, account);
    }

    /// A stream ended in order.
    pub fn ended(&mut self, account: StreamEnd) {
        self.live -= 1;
        self.sent.remove(&account.stream);
        self.ended.push(account);
    }

    /// A stream died here, of `error`, with these frames under way: STREAM_LOST is due. Returns the frames whose pages are to be
    /// dirty again: none before the destination's worker has stopped.
    #[must_use = "the pages of these frames are pending again"]
    pub fn died(&mut self, stream: u16, error: String, frames: Vec<F>, now: Duration) -> Vec<F> {
        self.live -= 1;
        self.sent.remove(&stream);
        let theirs = self.stopped_for(stream).filter(|reason| !reason.is_empty());
        self.last_error = Some(match theirs {
            Some(reason) => {
                format!("{error}; the destination stopped stream {}: {reason}", stream_number(stream))
            }
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
            let theirs = format!("the destination stopped stream {}: {reason}", stream_number(stream));
            let own = self.dead.get(&stream).map(|dead| format!("{}; ", dead.error));
            self.last_error = Some(own.unwrap_or_default() + &theirs);
        }
        self.stopped.insert(stream_number(stream), (stream, reason));
        self.bury(stream)
    }

    /// Why the destination has stopped a stream's worker, if it has.
    fn stopped_for(&self, stream: u16) -> Option<&str> {
        let (id, reason) = self.stopped.get(&stream_number(stream))?;
        (*id == stream).then_some(reason)
    }

    /// A stream that is dead on both sides gives its frames back; any stream may take their pages.
    fn bury(&mut self, stream: u16) -> Vec<F> {
        let stopped = self.stopped_for(stream).is_some();
        #[cfg(test)]
        let stopped = stopped || fault::is(fault::Fault::NoStopBeforeResend);
        if !stopped {
            return Vec::new();
        }
        let Some(dead) = self.dead.remove(&stream) else { return Vec::new() };
        self.forget(stream);
        self.buried.push(stream);
        self.last_error.get_or_insert(dead.error);
        dead.frames
    }

    /// Streams that have come to be dead on both sides since this was asked last: their numbers may be connected again.
    pub fn take_buried(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.buried)
    }

    /// An id is about to be used; the destination may have said something of a stream that had it long ago.
    pub fn forget(&mut self, stream: u16) {
        if self.stopped_for(stream).is_some() {
            self.stopped.remove(&stream_number(stream));
        }
    }

    /// The destination has stopped all streams, and the source has ended its own: nothing that was said of any counts. Returns
    /// frames as [`died`](Self::died) does.
    #[must_use = "the pages of these frames are pending again"]
    pub fn void(&mut self) -> Vec<F> {
        let dead = std::mem::take(self).dead;
        dead.into_values().flat_map(|dead| dead.frames).collect()
    }

    /// Whether a stream works.
    pub fn any_live(&self) -> bool {
        self.live != 0
    }

    /// Whether a stream has died here whose worker the destination has not stopped, as far as is known: its pages are still to be sent
    /// again.
    pub fn any_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    /// Whether the session can go on, when the destination has `timeout` to stop a worker.
    pub fn check(&self, now: Duration, timeout: Duration) -> Result<(), StreamsError> {
        if let Some(last) = self.all_lost(now) {
            return Err(StreamsError::AllLost { last: last.into() });
        }
        self.check_stopped(now, timeout)
    }

    /// Whether no stream is left; why the last one died, as soon as that is known.
    pub fn all_lost(&self, now: Duration) -> Option<&str> {
        // The destination may be about to say why it dropped the streams.
        let silent = |dead: &Dead<F>| now.saturating_sub(dead.since) > LAST_WORDS;
        let none = self.live == 0 && self.ended.is_empty();
        let known = self.dead.is_empty() || self.dead.values().any(silent);
        self.last_error.as_deref().filter(|_| none && known)
    }

    /// Whether the destination stops workers in time.
    pub fn check_stopped(&self, now: Duration, timeout: Duration) -> Result<(), StreamsError> {
        let waited = |dead: &Dead<F>| now.saturating_sub(dead.since);
        // Until its worker has stopped, what a stream had under way cannot be sent again.
        let limit = timeout.max(LAST_WORDS);
        if let Some((&stream, _)) = self.dead.iter().find(|(_, dead)| waited(dead) > limit) {
            let stream = stream_number(stream);
            return Err(StreamsError::NotStopped { stream, seconds: limit.as_secs() });
        }
        Ok(())
    }

    /// Whether every stream has ended, in order or dead on both sides.
    pub fn all_over(&self) -> bool {
        self.live == 0 && self.dead.is_empty()
    }

    /// Whether every stream has ended, in order or dead on both sides, or has sent all that it will.
    pub fn all_sent(&self) -> bool {
        self.live as usize == self.sent.len() && self.dead.is_empty()
    }

    /// A stream that has sent all that it will and that the destination has stopped before its end; why.
    pub fn stopped_in_flight(&self) -> Option<&str> {
        self.sent.keys().find_map(|&stream| self.stopped_for(stream))
    }

    /// The accounts that all streams have or will have, for FINISH; of none that the destination calls dead.
    pub fn promised(&self) -> Vec<StreamEnd> {
        let all = self.ended.iter().chain(self.sent.values());
        let mut accounts: Vec<_> =
            all.copied().filter(|end| self.stopped_for(end.stream).is_none()).collect();
        accounts.sort_by_key(|end| stream_number(end.stream));
        accounts
    }

    /// The accounts of those that ended in order, for FINISH; of none that the destination calls dead.
    pub fn take_accounts(&mut self) -> Vec<StreamEnd> {
        let mut ended = std::mem::take(&mut self.ended);
        ended.retain(|end| self.stopped_for(end.stream).is_none());
        self.ended = ended;
        self.ended.sort_by_key(|end| stream_number(end.stream));
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
    /// Which incarnation of the number it is.
    stream: u16,
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
    /// By number.
    streams: BTreeMap<u16, Entry>,
}

impl DestinationStreams {
    /// A session without streams.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a stream, whose number is one of `agreed`, may connect now; if not, why.
    pub fn admit(&self, stream: u16, agreed: u16, moving: bool) -> Result<(), &'static str> {
        if stream_number(stream) >= agreed {
            Err("it was not agreed on")
        } else if self.running(stream).is_some_and(|earlier| !is_later_incarnation(stream, earlier)) {
            Err("it is already connected")
        } else if !moving {
            Err("pages are not moving")
        } else {
            Ok(())
        }
    }

    /// The incarnation of a stream's number whose worker may still write to memory. Where a later one asks to connect, the source knows
    /// of its end before this side does: it is to be stopped first, as if STREAM_LOST had come.
    pub fn running(&self, stream: u16) -> Option<u16> {
        let entry = self.streams.get(&stream_number(stream))?;
        (entry.worker == Worker::Runs).then_some(entry.stream)
    }

    fn entry(&mut self, stream: u16) -> Option<&mut Entry> {
        self.streams.get_mut(&stream_number(stream)).filter(|entry| entry.stream == stream)
    }

    /// A stream's worker has started.
    pub fn started(&mut self, stream: u16) {
        self.streams.insert(stream_number(stream), Entry { stream, worker: Worker::Runs, lost: false });
    }

    /// Whether a stream's worker may still write to memory.
    pub fn runs(&self, stream: u16) -> bool {
        self.running(stream) == Some(stream)
    }

    /// A stream's worker has ended, in order or for a reason; returns what the source is to hear.
    #[must_use = "the source waits for STREAM_STOPPED"]
    pub fn ended(&mut self, stream: u16, result: Result<StreamEnd, String>) -> Option<Message> {
        let entry = self.entry(stream).filter(|entry| entry.worker == Worker::Runs)?;
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
        let Some(entry) = self.entry(stream) else { return Stop::Say(stopped) };
        let told = std::mem::replace(&mut entry.lost, true);
        match entry.worker {
            Worker::Runs => Stop::Worker,
            Worker::EndedInOrder(_) if !told => Stop::Say(stopped),
            Worker::EndedInOrder(_) | Worker::Failed => Stop::Nothing,
        }
    }

    /// How many streams have a worker that may still write to memory.
    pub fn running_count(&self) -> usize {
        self.streams.values().filter(|entry| entry.worker == Worker::Runs).count()
    }

    /// Whether there ever was a stream.
    pub fn any(&self) -> bool {
        !self.streams.is_empty()
    }

    /// A stream whose worker has not ended yet.
    pub fn unfinished(&self) -> Option<u16> {
        self.streams.values().find(|entry| entry.worker == Worker::Runs).map(|entry| entry.stream)
    }

    /// The source has lost its connections: no account of any stream counts. Returns those whose connections are to be broken.
    pub fn void(&mut self) -> Vec<u16> {
        let mut running = Vec::new();
        for entry in self.streams.values_mut() {
            entry.lost = true;
            if entry.worker == Worker::Runs {
                running.push(entry.stream);
            }
        }
        running
    }

    /// Whether the source was told, or says, that a stream is dead. One whose end was lost on the way may have ended in order for the
    /// source, which then hears too late that it did not.
    pub fn is_lost(&self, stream: u16) -> bool {
        let entry = self.streams.get(&stream_number(stream)).filter(|entry| entry.stream == stream);
        entry.is_some_and(|entry| entry.lost)
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

    /// What a destination says of streams that never were is kept for one of each number.
    #[test]
    fn words_of_streams_that_never_were_do_not_add_up() {
        let mut streams = SourceStreams::<u8>::new();
        for id in 0..=u16::MAX {
            assert!(streams.stopped(id, "x".repeat(4096)).is_empty());
        }
        assert_eq!(streams.stopped.len(), 256);
        // A stream that lives is still stopped by its own word.
        streams.started();
        assert!(streams.died(3, "cut".into(), vec![9], Duration::ZERO).is_empty());
        assert_eq!(streams.stopped(3, String::new()), [9]);
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
    fn a_stream_whose_end_was_lost_is_in_no_account() {
        let mut source = SourceStreams::<u32>::new();
        let mut destination = DestinationStreams::new();
        for stream in 0..2 {
            source.started();
            destination.started(stream);
        }
        // All of stream 1 was receipted, and then its connection closed: that is END's answer, or END never came.
        source.ended(account(0));
        source.ended(account(1));
        assert_eq!(destination.ended(0, Ok(account(0))), None);
        assert_eq!(destination.ended(1, Err("closed".into())), Some(stopped(1, "closed")));
        assert!(destination.is_lost(1) && !destination.is_lost(0));
        assert_eq!(destination.accounts(), [account(0)]);
        assert_eq!(source.stopped(1, "closed".into()), NONE);
        assert_eq!(source.take_accounts(), [account(0)]);
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

    /// Another incarnation of a stream's number.
    fn again(stream: u16) -> u16 {
        crate::wire::next_incarnation(stream)
    }

    #[test]
    fn a_buried_stream_may_come_again_and_is_another() {
        let mut streams = SourceStreams::new();
        streams.started();
        assert_eq!(streams.died(1, "cut".into(), vec![7], at(0)), NONE);
        assert!(streams.take_buried().is_empty(), "its worker may still write");
        assert_eq!(streams.stopped(1, String::new()), [7]);
        assert_eq!(streams.take_buried(), [1]);
        assert!(streams.take_buried().is_empty());
        assert!(streams.all_lost(at(0)).is_some());
        streams.started();
        assert_eq!(streams.all_lost(at(9)), None);
        assert_eq!(streams.stopped(1, "late".into()), NONE, "of the first one");
        assert_eq!(streams.died(again(1), "cut".into(), vec![8], at(2)), NONE);
        assert_eq!(streams.stopped(again(1), String::new()), [8]);
    }

    #[test]
    fn a_resumed_source_has_all_frames_back_and_no_accounts() {
        let mut streams = SourceStreams::<u32>::new();
        (0..3).for_each(|_| streams.started());
        streams.ended(account(0));
        assert_eq!(streams.died(1, "cut".into(), vec![7], at(0)), NONE);
        assert_eq!(streams.died(2, "cut".into(), vec![8, 9], at(0)), NONE);
        assert_eq!(streams.void(), [7, 8, 9]);
        assert!(streams.all_over() && !streams.any_live());
        assert_eq!(streams.take_accounts(), []);
        assert_eq!(streams.check(at(99), TIMEOUT), Ok(()));
    }

    #[test]
    fn a_later_incarnation_takes_the_place_of_an_earlier_one() {
        let mut streams = DestinationStreams::new();
        streams.started(1);
        let second = again(1);
        assert_eq!(streams.admit(second, 4, true), Ok(()));
        assert_eq!(streams.running(second), Some(1), "which is to be stopped first");
        assert_eq!(streams.lost(1), Stop::Worker);
        assert_eq!(streams.ended(1, Err("shut".into())), Some(stopped(1, "shut")));
        assert_eq!(streams.running(second), None);
        streams.started(second);
        assert!(streams.admit(1, 4, true).is_err(), "one that was long on its way");
        // The first one's end, told late.
        assert_eq!(streams.lost(1), Stop::Say(stopped(1, "")));
        assert_eq!(streams.ended(1, Ok(account(1))), None);
        assert!(streams.runs(second));
        assert_eq!(streams.ended(second, Ok(account(second))), None);
        assert_eq!(streams.accounts(), [account(second)]);
    }

    #[test]
    fn a_resumed_destination_counts_no_stream_of_before() {
        let mut streams = DestinationStreams::new();
        streams.started(0);
        streams.started(1);
        assert_eq!(streams.ended(0, Ok(account(0))), None);
        assert_eq!(streams.void(), [1]);
        assert_eq!(streams.ended(1, Ok(account(1))), Some(stopped(1, "")));
        assert_eq!(streams.accounts(), []);
    }
}
