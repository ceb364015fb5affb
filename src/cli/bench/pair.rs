//! A run: a source and a destination, each a process of its own.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use super::side::{DestinationOrder, Order, Outcome, Place, SourceOrder, Word};

/// Longest line that a side may say, in bytes.
pub(super) const LINE_MAX: u64 = 64 << 20;

/// The sides that run, to be ended when somebody asks for it.
#[derive(Clone, Default)]
pub(super) struct Running {
    inputs: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Their standard inputs; a side ends when it is closed.
    inputs: Vec<(u32, ChildStdin)>,
    cancelled: bool,
}

impl Running {
    /// Ends all sides, and those that are started from now on.
    pub(super) fn cancel(&self) {
        let mut state = self.state();
        state.cancelled = true;
        state.inputs.clear();
    }

    /// Ends the sides that run, and no others.
    pub(super) fn end_all(&self) {
        self.state().inputs.clear();
    }

    /// Whether somebody asked for the end.
    pub(super) fn is_cancelled(&self) -> bool {
        self.state().cancelled
    }

    fn add(&self, id: u32, input: ChildStdin) {
        let mut state = self.state();
        if !state.cancelled {
            state.inputs.push((id, input));
        }
    }

    fn remove(&self, id: u32) {
        self.state().inputs.retain(|(other, _)| *other != id);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A side's process; ended when dropped.
struct Side {
    name: &'static str,
    child: Child,
    output: BufReader<ChildStdout>,
    running: Running,
}

impl Side {
    fn start(order: &Order, running: &Running) -> Result<Self, String> {
        let name = match order {
            Order::Source(_) => "source",
            Order::Destination(_) => "destination",
        };
        let failed = |e: std::io::Error| format!("cannot start the {name}'s process: {e}");
        let text = serde_json::to_string(order).map_err(|e| failed(e.into()))?;
        let mut child = Command::new(std::env::current_exe().map_err(failed)?)
            .args(["bench", "--side", &text])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed(std::io::ErrorKind::BrokenPipe.into()));
        };
        running.add(child.id(), input);
        Ok(Self { name, child, output: BufReader::new(output), running: running.clone() })
    }

    /// Its next word.
    fn word(&mut self) -> Result<Word, String> {
        let mut line = String::new();
        let name = self.name;
        let read = self.output.by_ref().take(LINE_MAX).read_line(&mut line);
        if !read.is_ok_and(|n| n != 0) {
            return Err(format!("the {name}'s process ended without a word"));
        }
        match serde_json::from_str(&line) {
            Ok(Word::Failed(text)) => Err(format!("{name}: {text}")),
            Ok(word) => Ok(word),
            Err(e) => Err(format!("the {name}'s word is not understood: {e}")),
        }
    }

    /// What its run came to.
    fn outcome(&mut self) -> Result<Outcome, String> {
        match self.word()? {
            Word::Done(outcome) => Ok(*outcome),
            word => Err(format!("the {} said {word:?} out of turn", self.name)),
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.running.remove(self.child.id());
        // It may be writing a core or unmapping much memory: neither is worth waiting for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A destination on this host.
pub(super) struct Here {
    side: Side,
    /// Where it listens.
    pub place: Place,
}

impl Here {
    /// Starts a destination and waits until it listens.
    pub(super) fn start(order: DestinationOrder, running: &Running) -> Result<Self, String> {
        let mut side = Side::start(&Order::Destination(order), running)?;
        match side.word()? {
            Word::Listening(place) => Ok(Self { side, place }),
            word => Err(format!("the destination said {word:?} instead of where it listens")),
        }
    }

    /// What its run came to.
    pub(super) fn outcome(&mut self) -> Result<Outcome, String> {
        self.side.outcome()
    }
}

/// Runs a source to its end.
pub(super) fn send(order: SourceOrder, running: &Running) -> Result<Outcome, String> {
    Side::start(&Order::Source(order), running)?.outcome()
}
