//! What a command writes to its standard error: read at once, so that it never waits for that; its end is kept for an error's text.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_setfl};

use crate::local::lock;

/// Bytes that are kept for an error's text.
const TAIL_BYTES: usize = 4096;
/// Bytes of a line that are shown.
const LINE_BYTES: usize = 512;
/// Lines that are shown within [`WINDOW`]; of others only the number.
const LINES_MAX: u32 = 100;
const WINDOW: Duration = Duration::from_secs(1);
/// Bytes that are read of one who still speaks when nobody wants to know any more: about what a pipe holds.
const LEFT_BYTES: usize = 64 << 10;
const READ_BYTES: usize = 16 << 10;

/// A thread that reads a command's standard error.
pub(super) struct Said {
    tail: Arc<Mutex<VecDeque<u8>>>,
    /// Ends when nobody is left who could say more.
    over: Receiver<Infallible>,
    thread: Mutex<Option<Listening>>,
}

/// The thread, and what is closed when nobody wants to know more.
struct Listening {
    wanted: PipeWriter,
    thread: JoinHandle<()>,
}

impl Said {
    /// Begins to read; returns what the command is given as its standard error.
    pub(super) fn listen() -> io::Result<(Self, PipeWriter)> {
        let (errors, for_command) = io::pipe()?;
        // Of this end alone: the two ends of a pipe are opened apart.
        fcntl_setfl(&errors, OFlags::NONBLOCK)?;
        let (unwanted, wanted) = io::pipe()?;
        let (alive, over) = bounded(0);
        let tail = Arc::new(Mutex::new(VecDeque::with_capacity(TAIL_BYTES)));
        let listener = Listener { errors, unwanted, tail: tail.clone(), lines: Lines::new() };
        let thread = std::thread::Builder::new().name("command-errors".into()).spawn(move || {
            let _alive = alive;
            listener.run();
        })?;
        Ok((Self { tail, over, thread: Mutex::new(Some(Listening { wanted, thread })) }, for_command))
    }

    /// Waits until nobody is left who could say more; says whether that is so.
    pub(super) fn all(&self, limit: Duration) -> bool {
        matches!(self.over.recv_timeout(limit), Err(RecvTimeoutError::Disconnected))
    }

    /// The last lines, as one. Nothing that is said later is read.
    pub(super) fn last_words(&self) -> String {
        self.end();
        let bytes: Vec<u8> = lock(&self.tail).iter().copied().collect();
        // What was cut off at its beginning is not shown in part.
        let cut =
            if bytes.len() < TAIL_BYTES { 0 } else { bytes.iter().position(is_end).map_or(0, |at| at + 1) };
        let lines: Vec<_> =
            bytes[cut..].split(is_end).map(readable).filter(|line| !line.is_empty()).collect();
        lines.join(" | ")
    }

    /// Reads what was said by now, and no more.
    fn end(&self) {
        if let Some(Listening { wanted, thread }) = lock(&self.thread).take() {
            drop(wanted);
            // A panic was in what shows the lines.
            let _ = thread.join();
        }
    }
}

impl Drop for Said {
    fn drop(&mut self) {
        self.end();
    }
}

/// Progress is often written over the same line.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "as iterators of slices want it")]
fn is_end(byte: &u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

/// A line as text, without what a terminal would take for more.
fn readable(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// What the thread works with.
struct Listener {
    errors: PipeReader,
    unwanted: PipeReader,
    tail: Arc<Mutex<VecDeque<u8>>>,
    lines: Lines,
}

impl Listener {
    fn run(mut self) {
        let mut buffer = vec![0; READ_BYTES];
        // Once nobody wants more, what is already there is read all the same, up to this.
        let mut left = None;
        while left != Some(0) {
            match self.errors.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    self.hear(&buffer[..count]);
                    left = left.map(|left: usize| left.saturating_sub(count));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && left.is_none() => {}
                Err(_) => break,
            }
            if left.is_none() && self.is_unwanted() {
                left = Some(LEFT_BYTES);
            }
        }
        self.lines.end();
    }

    /// Waits for more to read; says whether nobody wants it.
    fn is_unwanted(&self) -> bool {
        let mut ends = [
            PollFd::new(&self.errors, PollFlags::IN),
            // Nothing is ever written here: what comes is the hang-up.
            PollFd::new(&self.unwanted, PollFlags::IN),
        ];
        match poll(&mut ends, None) {
            Ok(_) => !ends[1].revents().is_empty(),
            Err(error) => error != rustix::io::Errno::INTR,
        }
    }

    fn hear(&mut self, bytes: &[u8]) {
        let mut tail = lock(&self.tail);
        tail.extend(&bytes[bytes.len().saturating_sub(TAIL_BYTES)..]);
        let over = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..over);
        drop(tail);
        self.lines.hear(bytes);
    }
}

/// Shows what comes in as lines, not more of them than anybody reads.
struct Lines {
    line: Vec<u8>,
    since: Instant,
    shown: u32,
    left_out: u64,
}

impl Lines {
    fn new() -> Self {
        Self { line: Vec::with_capacity(LINE_BYTES), since: Instant::now(), shown: 0, left_out: 0 }
    }

    fn hear(&mut self, mut bytes: &[u8]) {
        while let Some(end) = bytes.iter().position(is_end) {
            self.add(&bytes[..end]);
            self.show();
            bytes = &bytes[end + 1..];
        }
        self.add(bytes);
    }

    fn add(&mut self, part: &[u8]) {
        let room = LINE_BYTES - self.line.len();
        self.line.extend_from_slice(&part[..part.len().min(room)]);
    }

    fn show(&mut self) {
        if self.line.is_empty() {
            return;
        }
        if self.since.elapsed() >= WINDOW {
            self.tell_left_out();
            (self.since, self.shown) = (Instant::now(), 0);
        }
        if self.shown < LINES_MAX {
            self.shown += 1;
            let line = readable(&self.line);
            tracing::warn!(target: "transport::engine::archive", "exec: {line}");
        } else {
            self.left_out += 1;
        }
        self.line.clear();
    }

    fn tell_left_out(&mut self) {
        if self.left_out != 0 {
            let lines = self.left_out;
            tracing::warn!(target: "transport::engine::archive", "exec: {lines} more lines came too fast to be shown");
        }
        self.left_out = 0;
    }

    fn end(&mut self) {
        self.show();
        self.tell_left_out();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_last_lines_are_kept_and_are_one() {
        let (said, mut errors) = Said::listen().unwrap();
        errors.write_all(b"\xff first\n\n  10%\r20%\r\x1b[1mlast").unwrap();
        drop(errors);
        assert!(said.all(LONG));
        assert_eq!(said.last_words(), "\u{fffd} first | 10% | 20% |  [1mlast");
    }

    #[test]
    fn no_more_is_kept_than_fits_a_text() {
        let (said, mut errors) = Said::listen().unwrap();
        for line in 0..100_000 {
            writeln!(errors, "line {line}").unwrap();
        }
        drop(errors);
        assert!(said.all(LONG));
        let words = said.last_words();
        assert_eq!(said.last_words(), words);
        assert!(words.starts_with("line ") && words.ends_with(" | line 99999"), "{words}");
        assert!(lock(&said.tail).len() == TAIL_BYTES && lock(&said.tail).capacity() < 16 * READ_BYTES);
    }

    #[test]
    fn a_line_without_an_end_takes_no_memory() {
        let mut lines = Lines::new();
        (0..100).for_each(|_| lines.hear(&[b'x'; 1000]));
        assert_eq!(lines.line.len(), LINE_BYTES);
        lines.hear(b"\ny");
        assert_eq!((lines.line.as_slice(), lines.shown), (&b"y"[..], 1));
    }

    #[test]
    fn a_flood_is_shown_in_part() {
        let mut lines = Lines::new();
        // As if the machine were so slow that a second never ends.
        lines.since = Instant::now() + LONG;
        (0..LINES_MAX + 5).for_each(|_| lines.hear(b"x\n"));
        assert_eq!((lines.shown, lines.left_out), (LINES_MAX, 5));
        lines.end();
        assert_eq!(lines.left_out, 0);
    }

    #[test]
    fn nobody_who_speaks_on_is_waited_for() {
        let (said, mut errors) = Said::listen().unwrap();
        errors.write_all(b"so far\n").unwrap();
        assert!(!said.all(Duration::ZERO));
        assert_eq!(said.last_words(), "so far");
        assert!(said.all(LONG), "its thread has ended");
        assert_eq!(errors.write_all(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        let (said, mut errors) = Said::listen().unwrap();
        let tail = Arc::downgrade(&said.tail);
        drop(said);
        assert!(tail.upgrade().is_none(), "its thread has ended");
        assert_eq!(errors.write_all(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
