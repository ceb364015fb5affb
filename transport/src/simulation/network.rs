//! Connections in memory: bytes in order on each, no order between them, and cuts at any byte.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::carrier::{Breaker, FrameReceiver, FrameSender, ReceiptReader, SourceEnd};
use crate::postcopy::channel::Channel;
use crate::sys::{ReceiveList, SendList};

/// An end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source = 0,
    Destination = 1,
}

impl Side {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// What travels: what one call wrote, or the end.
#[derive(Debug)]
pub(super) enum Segment {
    Bytes(Vec<u8>),
    End,
}

/// One direction of a connection.
#[derive(Debug, Default)]
struct Pipe {
    /// Written and not yet under way.
    written: Vec<Segment>,
    under_way: VecDeque<Segment>,
    /// Part of a segment that a cut let through: seen only along with the end.
    part: Vec<u8>,
    arrived: VecDeque<u8>,
    /// The writer has said that nothing more comes.
    ended: bool,
    /// The end has arrived.
    over: bool,
}

#[derive(Debug, Default)]
struct State {
    /// By the side that writes.
    pipes: [Pipe; 2],
    /// The side has closed the connection, or knows that it is broken.
    down: [bool; 2],
    /// Nothing that is written from now on arrives.
    cut: bool,
}

/// A connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Connection(Arc<Mutex<State>>);

impl Connection {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Writes; fails once the side knows that the connection is broken.
    pub(super) fn write(&self, side: Side, bytes: Vec<u8>) -> io::Result<()> {
        let mut state = self.state();
        let State { pipes, down, cut } = &mut *state;
        let pipe = &mut pipes[side as usize];
        if down[side as usize] || pipe.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if !*cut {
            pipe.written.push(Segment::Bytes(bytes));
        }
        Ok(())
    }

    /// Says that nothing more will be written.
    pub(super) fn end(&self, side: Side) {
        let mut state = self.state();
        let cut = state.cut;
        let pipe = &mut state.pipes[side as usize];
        if !std::mem::replace(&mut pipe.ended, true) && !cut {
            pipe.written.push(Segment::End);
        }
    }

    /// Closes the connection; what was written is still under way.
    pub(super) fn close(&self, side: Side) {
        self.end(side);
        self.state().down[side as usize] = true;
    }

    /// Whether there is something to read for this side: bytes, or the end.
    pub(super) fn readable(&self, side: Side) -> bool {
        let state = self.state();
        let pipe = &state.pipes[side.other() as usize];
        !pipe.arrived.is_empty() || pipe.over || state.down[side as usize]
    }

    pub(super) fn is_down(&self, side: Side) -> bool {
        self.state().down[side as usize]
    }

    /// Neither side uses it any more and nothing is under way.
    pub(super) fn is_done(&self) -> bool {
        let state = self.state();
        let idle = |pipe: &Pipe| pipe.written.is_empty() && pipe.under_way.is_empty();
        state.down == [true; 2] && state.pipes.iter().all(idle)
    }

    /// Reads what is there into `take`; `Ok(0)` at the end.
    fn take(&self, side: Side, take: impl FnOnce(&[u8]) -> usize) -> io::Result<usize> {
        let mut state = self.state();
        let down = state.down[side as usize];
        let pipe = &mut state.pipes[side.other() as usize];
        if down && pipe.under_way.is_empty() {
            // The part that a cut let through comes last.
            pipe.arrived.extend(std::mem::take(&mut pipe.part));
        }
        if !pipe.arrived.is_empty() {
            let taken = take(pipe.arrived.make_contiguous());
            pipe.arrived.drain(..taken);
            return Ok(taken);
        }
        if pipe.over {
            Ok(0)
        } else if down {
            Err(io::ErrorKind::ConnectionReset.into())
        } else {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }

    /// What comes next for a side, as far as it is there and no longer than `len`.
    pub(super) fn peek(&self, side: Side, len: usize) -> Vec<u8> {
        self.state().pipes[side.other() as usize].arrived.iter().copied().take(len).collect()
    }

    /// Whether nothing more arrives for a side than what is there.
    pub(super) fn is_over(&self, side: Side) -> bool {
        let state = self.state();
        state.pipes[side.other() as usize].over || state.down[side as usize]
    }

    /// Damages what comes next for a side: a bit of the byte `at`.
    pub(super) fn damage(&self, side: Side, at: usize, bit: u32) {
        self.state().pipes[side.other() as usize].arrived[at] ^= 1 << bit;
    }

    /// What a side has read too much of comes next for it.
    pub(super) fn unread(&self, side: Side, bytes: &[u8]) {
        let arrived = &mut self.state().pipes[side.other() as usize].arrived;
        bytes.iter().rev().for_each(|&byte| arrived.push_front(byte));
    }

    /// An end of it, for postcopy.
    pub(super) fn channel(&self, side: Side) -> Arc<dyn Channel> {
        Arc::new(End { connection: self.clone(), side })
    }

    /// Reads everything that is there; false at the end.
    pub(super) fn read_all(&self, side: Side, into: &mut Vec<u8>) -> bool {
        loop {
            let result = self.take(side, |bytes| {
                into.extend_from_slice(bytes);
                bytes.len()
            });
            match result {
                Ok(0) => return false,
                Ok(_) => {}
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    /// Puts on its way what a side wrote; says how many segments that were.
    pub(super) fn depart(&self, side: Side) -> usize {
        let pipe = &mut self.state().pipes[side as usize];
        let count = pipe.written.len();
        pipe.under_way.extend(pipe.written.drain(..));
        count
    }

    /// The oldest segment that `side` wrote arrives, unless a cut has eaten it.
    pub(super) fn arrive(&self, side: Side) {
        let pipe = &mut self.state().pipes[side as usize];
        match pipe.under_way.pop_front() {
            Some(Segment::Bytes(bytes)) => pipe.arrived.extend(bytes),
            Some(Segment::End) => pipe.over = true,
            None => {}
        }
    }

    /// Cuts the connection: of what `side` has under way only as many segments as `keep` says arrive, and a part of the next.
    /// Neither side knows.
    pub(super) fn cut(&self, mut keep: impl FnMut(Side, usize) -> (usize, usize)) {
        let mut state = self.state();
        state.cut = true;
        for side in [Side::Source, Side::Destination] {
            let pipe = &mut state.pipes[side as usize];
            pipe.under_way.extend(pipe.written.drain(..));
            let (whole, part) = keep(side, pipe.under_way.len());
            if let Some(Segment::Bytes(bytes)) = pipe.under_way.get(whole) {
                pipe.part = bytes[..part.min(bytes.len())].to_vec();
            }
            pipe.under_way.truncate(whole);
        }
    }

    /// A side learns that the connection is broken.
    pub(super) fn notice(&self, side: Side) {
        self.state().down[side as usize] = true;
    }

    /// A data stream's end at the source.
    pub(super) fn source_end(&self) -> SourceEnd {
        SourceEnd {
            frames: Box::new(self.clone()),
            receipts: Box::new(self.clone()),
            breaker: Arc::new(AtSource(self.clone())),
        }
    }
}

#[derive(Debug)]
struct AtSource(Connection);

impl Breaker for AtSource {
    fn shutdown(&self) {
        self.0.close(Side::Source);
    }
}

/// An end of a connection of postcopy.
struct End {
    connection: Connection,
    side: Side,
}

impl Channel for End {
    fn send(&self, list: &mut SendList<'_>) -> io::Result<usize> {
        let bytes = list.drain();
        let len = bytes.len();
        self.connection.write(self.side, bytes)?;
        Ok(len)
    }

    fn receive(&self, list: &mut ReceiveList<'_>, _wait: bool) -> io::Result<usize> {
        self.connection.take(self.side, |bytes| list.fill(bytes))
    }

    fn shutdown(&self) {
        self.connection.close(self.side);
    }
}

impl FrameSender for Connection {
    fn send(&mut self, mut list: SendList<'_>) -> io::Result<u64> {
        let bytes = list.drain();
        let len = bytes.len() as u64;
        self.write(Side::Source, bytes)?;
        Ok(len)
    }
}

impl ReceiptReader for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.take(Side::Source, |bytes| {
            let len = bytes.len().min(buffer.len());
            buffer[..len].copy_from_slice(&bytes[..len]);
            len
        })
    }
}

impl FrameReceiver for Connection {
    fn receive(&mut self, list: &mut ReceiveList<'_>, _wait: bool) -> io::Result<usize> {
        self.take(Side::Destination, |bytes| list.fill(bytes))
    }

    fn send(&mut self, receipts: &[u8]) -> io::Result<()> {
        self.write(Side::Destination, receipts.to_vec())
    }

    fn finish(&mut self) -> io::Result<()> {
        self.end(Side::Destination);
        Ok(())
    }
}
