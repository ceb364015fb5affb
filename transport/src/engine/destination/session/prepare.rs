//! Preparing memory at the destination: whether it is brought in ahead of its content, beside it as large pages, or as content comes.

use std::ops::Range;

use pagecopy::backend::GuestRam;
use pagecopy::layout::CHUNK_SIZE;

use super::{IncomingError, Session};
use crate::engine::destination::environment::Environment;
use crate::link::LinkEvent;
use crate::wire::control::PRESENCE_CHUNKS;

/// Most pieces of 2 MiB that are brought in by one call: 32 MiB.
const POPULATE_PIECES: usize = 16;

impl<E: Environment> Session<'_, E> {
    /// Brings in the memory that data will come for, with all cores: before it comes where the memory says so, else while it comes, as
    /// large pages where those are worth it. Never more than this host has to spare, for nothing was sent yet and anything may be
    /// announced. Whoever cancels meanwhile, here or at the source, is heard at once.
    pub(super) async fn populate(&mut self) -> Result<(), IncomingError> {
        if !self.ram.populates_ahead() {
            if self.ram.enlarges() {
                let dense = ramped_up(runs_of_pieces(&*self.ram, |chunk| self.hello.is_dense(chunk)));
                dense.iter().for_each(|run| self.sink.announce(run.clone()));
                self.dense = Some(dense);
            } else {
                self.sink.begin_placing();
            }
            return Ok(());
        }
        let runs = runs_of_pieces(&*self.ram, |chunk| self.hello.present(chunk));
        self.populating = self.env.populate(&self.ram, &self.sink, runs)?;
        while self.populating != 0 {
            self.hear().await?;
        }
        self.env.end_populating();
        Ok(())
    }

    /// Hears what is said meanwhile, and waits a moment for it.
    pub(super) async fn hear(&mut self) -> Result<(), IncomingError> {
        match self.next().await? {
            Some(LinkEvent::Message(message)) => {
                self.machine.handle(message)?;
            }
            Some(LinkEvent::Dead(error)) => return Err(IncomingError::Link(error)),
            None => {}
        }
        Ok(())
    }
}

/// The pieces of 2 MiB that are wanted, as runs of chunks for as many calls: a call for many pieces costs less, and enough calls keep
/// all cores busy. Never more than this host has to spare.
fn runs_of_pieces(ram: &dyn GuestRam, wanted: impl Fn(u32) -> bool) -> Vec<Range<u32>> {
    let chunks = ram.layout().chunks();
    let piece_bytes = u64::from(PRESENCE_CHUNKS) * CHUNK_SIZE as u64;
    let spare = ram.spare_bytes() / 10 * 9;
    let most = usize::try_from(spare / piece_bytes).unwrap_or(usize::MAX);
    let pieces: Vec<u32> =
        (0..chunks).step_by(PRESENCE_CHUNKS as usize).filter(|&chunk| wanted(chunk)).take(most).collect();
    pieces
        .chunk_by(|left, right| right - left == PRESENCE_CHUNKS)
        .flat_map(|run| run.chunks(POPULATE_PIECES))
        .map(|run| run[0]..(run[0] + run.len() as u32 * PRESENCE_CHUNKS).min(chunks))
        .collect()
}

/// The same runs, of which the first are cut into pieces that double in size: what waits for the first waits a fraction of a
/// millisecond, and the others are large by the time that calls are slow.
fn ramped_up(runs: Vec<Range<u32>>) -> Vec<Range<u32>> {
    let mut most = PRESENCE_CHUNKS;
    let mut pieces = Vec::with_capacity(runs.len() + 8);
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            let end = at.saturating_add(most).min(run.end);
            pieces.push(at..end);
            (at, most) = (end, most.saturating_mul(2));
        }
    }
    pieces
}
