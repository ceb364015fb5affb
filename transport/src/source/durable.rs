//! The thread of a stream that settles frames as their bytes become durable, where nobody answers.

use std::io;

use super::doubt::Verdict;
use super::flight::{LaneError, StreamState};
use crate::carrier::Durable;

/// The thread that settles frames. They become durable in the order in which they were sent.
pub(super) struct Durables<'a> {
    stream: &'a StreamState,
    durable: Box<dyn Durable>,
    /// Bytes from the stream's start up to the end of the last frame that is settled.
    settled: u64,
}

impl<'a> Durables<'a> {
    pub(super) fn new(stream: &'a StreamState, durable: Box<dyn Durable>) -> Self {
        Self { stream, durable, settled: 0 }
    }

    /// Settles frames until the stream ends, in order or not.
    pub(super) fn run(mut self) -> Result<(), LaneError> {
        while !self.turn()? {}
        Ok(())
    }

    /// Waits a moment and settles what is durable; says whether the stream is over: all of it is.
    fn turn(&mut self) -> Result<bool, LaneError> {
        if self.stream.check()? {
            return Ok(true);
        }
        if self.stream.source().stopped() {
            return Err(self.stream.stopped());
        }
        match self.durable.durable() {
            Ok(bytes) => {
                self.settle(bytes);
                Ok(self.stream.is_settled())
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            Err(e) => Err(self.stream.io_error(e)),
        }
    }

    /// So many bytes are durable.
    fn settle(&mut self, bytes: u64) {
        let source = self.stream.source();
        let before = self.settled;
        while let Some(sent) =
            self.stream.take_oldest(source.now(), &[], |oldest| self.settled + oldest.wire_bytes() <= bytes)
        {
            self.settled += sent.wire_bytes();
            source.deliver(&sent, Verdict::unread(&sent));
        }
        if self.settled != before {
            self.stream.made_room();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use crossbeam_channel::unbounded;
    use pagecopy::backend::StaticLog;
    use pagecopy::layout::CHUNK_SIZE;

    use super::super::doubles::{Sink, Written, source, stream};
    use super::super::lane::{Lane, LaneSender};
    use super::super::settle::{Carrier, Settles};
    use super::super::{Batch, LaneNews, PageSource, Span};
    use super::*;
    use crate::carrier::{Breaker, FrameSender};
    use crate::sys::SendList;
    use crate::wire::frame::FrameHeader;

    /// A raw chunk's frame, and what ends a stream.
    const FRAME: u64 = (FrameHeader::LEN + CHUNK_SIZE) as u64;
    const END: u64 = FrameHeader::LEN as u64;

    /// Says what it is told to; fails once that is more than can be.
    #[derive(Clone, Default)]
    struct Told(Arc<AtomicU64>);

    impl Told {
        const FAILS: u64 = u64::MAX;

        fn tell(&self, durable: u64) {
            self.0.store(durable, Ordering::Relaxed);
        }
    }

    impl Durable for Told {
        fn durable(&mut self) -> io::Result<u64> {
            match self.0.load(Ordering::Relaxed) {
                Self::FAILS => Err(io::Error::from_raw_os_error(libc::EIO)),
                durable => Ok(durable),
            }
        }
    }

    fn batch(source: &Arc<PageSource>, first: u32, count: u32) -> Batch {
        Batch::new(source, Span { first, count })
    }

    fn counted(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    #[test]
    fn frames_are_settled_in_order_as_their_bytes_become_durable() {
        let source = Arc::new(source(4, Arc::new(StaticLog)));
        let (sink, told) = (Sink::default(), Told::default());
        let stream = stream(&source, &sink);
        let mut sender = LaneSender::new(&stream, Box::new(sink.clone()));
        let mut durables = Durables::new(&stream, Box::new(told.clone()));
        sender.work_off(batch(&source, 0, 4)).unwrap();
        sender.flush().unwrap();
        assert_eq!(sink.bytes().len() as u64, 4 * FRAME);
        let counters = source.counters();
        for (durable, settled) in [(0, 0), (FRAME - 1, 0), (FRAME, 1), (FRAME + 1, 1), (3 * FRAME + 5, 3)] {
            told.tell(durable);
            assert!(!durables.turn().unwrap());
            assert_eq!(stream.oldest(), Some(settled), "{durable} bytes");
            assert_eq!(counted(&counters.wire_acked), settled * FRAME, "{durable} bytes");
            let under_way = (4 - settled) * CHUNK_SIZE as u64;
            assert_eq!(counted(&counters.logical_under_way), under_way, "{durable} bytes");
        }
        // Others may have what is settled, and nothing else.
        assert_eq!([0, 1, 2, 3].map(|chunk| source.owners.claim(chunk, 1)), [true, true, true, false]);
        told.tell(Told::FAILS);
        let error = durables.turn().unwrap_err();
        assert!(matches!(error, LaneError::Io { .. }), "{error}");
        stream.fail(error);
        let end = stream.end();
        assert!(end.result.is_err());
        assert_eq!(end.unreceipted.iter().map(|frame| frame.chunk).collect::<Vec<_>>(), [3]);
        // It goes back as any frame does whose stream has died.
        source.take_back(end.unreceipted);
        assert_eq!(source.pending.iter().collect::<Vec<_>>(), [(3, u64::MAX)]);
        assert_eq!(counted(&counters.logical_under_way), 0);
        assert!(source.owners.claim(3, 1));
    }

    #[test]
    fn a_stream_is_over_once_all_of_it_is_durable() {
        let source = Arc::new(source(3, Arc::new(StaticLog)));
        let (sink, told) = (Sink::default(), Told::default());
        let stream = stream(&source, &sink);
        let mut sender = LaneSender::new(&stream, Box::new(sink));
        let mut durables = Durables::new(&stream, Box::new(told.clone()));
        sender.work_off(batch(&source, 0, 2)).unwrap();
        told.tell(2 * FRAME);
        assert!(!durables.turn().unwrap(), "more may come");
        sender.work_off(batch(&source, 2, 1)).unwrap();
        sender.end().unwrap();
        assert!(!durables.turn().unwrap(), "the last frame is not durable");
        told.tell(3 * FRAME);
        assert!(durables.turn().unwrap());
        assert_eq!(stream.end().result.unwrap().frames, 3);
    }

    /// A page may be written while it goes from where it lies, and no receipt tells: it is sent again when it is dirty, even if it is then
    /// what it was when it was hashed.
    #[test]
    fn what_nobody_has_read_back_is_no_base() {
        let source = Arc::new(source(1, Arc::new(Written)));
        let (sink, told) = (Sink::default(), Told::default());
        let stream = stream(&source, &sink);
        let mut sender = LaneSender::new(&stream, Box::new(sink));
        let mut durables = Durables::new(&stream, Box::new(told.clone()));
        // From where it lies, then from a copy, which nobody writes.
        for (sent, unchanged) in [(1, 0), (2, 0), (2, 64)] {
            source.pending.insert(0, u64::MAX);
            sender.work_off(batch(&source, 0, 1)).unwrap();
            told.tell(sent * FRAME);
            durables.turn().unwrap();
            let counters = source.counters();
            assert_eq!((counted(&counters.raw), counted(&counters.unchanged)), (sent * 64, unchanged));
            assert!(source.is_settled());
        }
    }

    /// A file, whose bytes are durable once it is synced.
    #[derive(Debug)]
    struct Kept(File);

    impl FrameSender for Kept {
        fn send(&mut self, list: SendList<'_>) -> io::Result<u64> {
            let mut sink = Sink::default();
            let sent = sink.send(list)?;
            self.0.write_all(&sink.bytes())?;
            Ok(sent)
        }
    }

    impl Durable for Kept {
        fn durable(&mut self) -> io::Result<u64> {
            let written = self.0.metadata()?.len();
            self.0.sync_data()?;
            Ok(written)
        }
    }

    impl Breaker for Kept {
        fn shutdown(&self) {}
    }

    #[test]
    fn a_file_takes_a_stream() {
        let source = Arc::new(source(40, Arc::new(StaticLog)));
        let file = tempfile::tempfile().unwrap();
        let kept = || Kept(file.try_clone().unwrap());
        let settles = Settles::WhenDurable(Box::new(kept()));
        let carrier = Carrier { frames: Box::new(kept()), settles, breaker: Arc::new(kept()) };
        let ((work, batches), (ended, ends)) = (unbounded(), unbounded());
        let lane = Lane::start(source.clone(), carrier, 0, batches, ended).unwrap();
        for first in (0..40).step_by(10) {
            work.send(batch(&source, first, 10)).unwrap();
        }
        drop(work);
        lane.join();
        let ended = |news| if let LaneNews::Ended(end) = news { Some(end) } else { None };
        let end = ends.try_iter().find_map(ended).unwrap();
        assert_eq!(end.result.unwrap().frames, 40);
        assert!(end.unreceipted.is_empty() && source.is_settled());
        assert_eq!(file.metadata().unwrap().len(), 40 * FRAME + END);
    }
}
