//! The one place that prints. Nothing that a closed pipe, a full disk or a reader who stalls does there ends or stops anything.
//!
//! **Standard output** takes a command's result. A result that could not be delivered is remembered, and [`end`] says so and changes
//! the exit code. Only a reader who went away is taken as `head` and others mean it: it has read enough.
//!
//! **Standard error** takes everything else, through a [`Lossy`] queue: whoever says something never waits for it to be read, and
//! what cannot be written is lost.

use std::collections::VecDeque;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::panic::PanicHookInfo;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// Most bytes that wait to be written.
const QUEUE_BYTES_MAX: usize = 1 << 20;
/// How long a process that ends waits for what it said to be written.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Exit code of a command that did what it was told, and could not print the result.
pub const NOT_PRINTED: u8 = 6;

static PRINTED: AtomicBool = AtomicBool::new(false);
static UNDELIVERED: Mutex<Option<io::Error>> = Mutex::new(None);
static ERRORS: OnceLock<Lossy> = OnceLock::new();
/// All queues, for the end.
static QUEUES: Mutex<Vec<Lossy>> = Mutex::new(Vec::new());

/// What is written where pieces were lost before.
type OnLoss = fn(u64) -> String;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Prints a line of the result.
pub fn line(text: impl Display) {
    self::text(format_args!("{text}\n"));
}

/// Prints a piece of the result.
pub fn text(text: impl Display) {
    PRINTED.store(true, Ordering::Relaxed);
    if let Err(error) = pass_on(text.to_string().as_bytes(), false) {
        not_delivered(error);
    }
}

/// The result cannot be printed, for this reason: what [`text`] finds out by itself.
pub fn not_delivered(error: io::Error) {
    lock(&UNDELIVERED).get_or_insert(error);
}

/// Whether a result was printed, delivered or not.
pub fn has_printed() -> bool {
    PRINTED.load(Ordering::Relaxed)
}

/// Says a line on standard error.
pub fn note(text: impl Display) {
    errors().push(format!("{text}\n").into_bytes());
}

/// The queue of standard error, for whoever says more than lines.
pub fn errors() -> &'static Lossy {
    let on_loss = |lost| format!("pageferry: {lost} messages before this one could not be written\n");
    ERRORS.get_or_init(|| Lossy::new("stderr", Box::new(io::stderr()), on_loss))
}

/// Writes what another program said to standard output, or to standard error, and waits until it is written.
///
/// # Errors
/// Whatever writing fails with.
pub fn pass_on(bytes: &[u8], to_errors: bool) -> io::Result<()> {
    if to_errors {
        return io::stderr().lock().write_all(bytes);
    }
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush())
}

/// Standard output as a console: of what nobody reads in time some is lost, and nobody waits.
pub fn console() -> Lossy {
    Lossy::new("console", Box::new(io::stdout()), |_| String::new())
}

/// Whether standard output is a terminal, and whether standard error is.
pub fn terminals() -> (bool, bool) {
    (io::stdout().is_terminal(), io::stderr().is_terminal())
}

/// Columns of the terminal that standard error is.
pub fn columns() -> Option<u16> {
    rustix::termios::tcgetwinsize(io::stderr()).ok().map(|size| size.ws_col).filter(|&columns| columns != 0)
}

/// The exit code of a process that would end with `code`: another one where it succeeded and its result could not be printed, which
/// is then said. Waits for what was said to be written, but not for ever.
pub fn end(name: &str, code: ExitCode) -> ExitCode {
    let failed = lock(&UNDELIVERED).take().filter(|error| error.kind() != io::ErrorKind::BrokenPipe);
    let code = match failed {
        Some(error) => {
            note(format_args!("{name}: the result cannot be written to standard output: {error}"));
            if code == ExitCode::SUCCESS { ExitCode::from(NOT_PRINTED) } else { code }
        }
        None => code,
    };
    flush(END_PATIENCE);
    code
}

/// Waits until all that was said is written, at most so long.
pub fn flush(patience: Duration) {
    let until = Instant::now() + patience;
    let queues = lock(&QUEUES).clone();
    for queue in queues {
        queue.flush(until.saturating_duration_since(Instant::now()));
    }
}

/// Has panics said by `say` instead of by Rust, which would wait for a reader of standard error.
pub fn on_panic(say: fn(&str)) {
    std::panic::set_hook(Box::new(move |info| {
        say(&panicked(info));
        let trace = std::backtrace::Backtrace::capture();
        if trace.status() == std::backtrace::BacktraceStatus::Captured {
            note(trace);
        }
    }));
}

fn panicked(info: &PanicHookInfo<'_>) -> String {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("without a name").to_owned();
    let place = info.location().map_or_else(String::new, |place| format!(" at {place}"));
    let payload = info.payload();
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no text");
    format!("thread {name} panicked{place}: {text}; this is a defect, please report it")
}

/// A writer that nobody waits for: a thread writes what is pushed. Where it does not keep up, or cannot write, what comes is lost.
#[derive(Clone, Debug)]
pub struct Lossy {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Pieces that were lost since that was last written.
    lost: u64,
    /// The thread has one.
    writing: bool,
    /// There is no thread.
    broken: bool,
}

impl Lossy {
    /// A queue, and the thread that writes it to `sink`. Once writing works again after pieces were lost, it writes what `on_loss` says
    /// of their number.
    pub fn new(name: &str, sink: Box<dyn Write + Send>, on_loss: OnLoss) -> Self {
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new() });
        let writer = shared.clone();
        let thread = std::thread::Builder::new().name(format!("print-{name}"));
        // It may be older than what its command knows of its needs, and has none itself.
        let leaving = super::sandbox::Leaving::begin();
        let write = move || {
            leaving.leave_nothing();
            writer.write(sink, on_loss);
        };
        if thread.spawn(write).is_err() {
            // A host without threads: nothing else works either, and the last word is written by whoever has it.
            lock(&shared.queue).broken = true;
        }
        let lossy = Self { shared };
        lock(&QUEUES).push(lossy.clone());
        lossy
    }

    /// Has this written, or lost.
    pub fn push(&self, bytes: Vec<u8>) {
        let mut queue = lock(&self.shared.queue);
        if queue.broken {
            drop(queue);
            let _ = io::stderr().write_all(&bytes);
            return;
        }
        if queue.bytes + bytes.len() > QUEUE_BYTES_MAX {
            queue.lost += 1;
            return;
        }
        queue.bytes += bytes.len();
        queue.waiting.push_back(bytes);
        self.shared.changed.notify_all();
    }

    /// Waits until everything is written, at most so long; says whether it is.
    pub fn flush(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut queue = lock(&self.shared.queue);
        while (queue.writing || !queue.waiting.is_empty()) && !queue.broken {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queue = self.shared.changed.wait_timeout(queue, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        true
    }
}

impl Shared {
    fn write(&self, mut sink: Box<dyn Write + Send>, on_loss: OnLoss) {
        let mut queue = lock(&self.queue);
        loop {
            let Some(bytes) = queue.waiting.pop_front() else {
                queue.writing = false;
                self.changed.notify_all();
                queue = self.changed.wait(queue).unwrap_or_else(|e| e.into_inner());
                continue;
            };
            queue.bytes -= bytes.len();
            queue.writing = true;
            // Never while others wait for the queue.
            drop(queue);
            let written = sink.write_all(&bytes).and_then(|()| sink.flush());
            queue = lock(&self.queue);
            match written {
                Err(_) => queue.lost += 1,
                Ok(()) if queue.lost != 0 && queue.waiting.is_empty() => {
                    let text = on_loss(std::mem::take(&mut queue.lost)).into_bytes();
                    if !text.is_empty() {
                        queue.bytes += text.len();
                        queue.waiting.push_back(text);
                    }
                }
                Ok(()) => {}
            }
        }
    }
}

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Writes when it is told to, and what it is told.
    struct Sink {
        told: Receiver<bool>,
        written: Sender<Vec<u8>>,
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.told.recv() {
                Ok(true) => {
                    let _ = self.written.send(bytes.to_vec());
                    Ok(bytes.len())
                }
                _ => Err(io::ErrorKind::StorageFull.into()),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn told(lost: u64) -> String {
        format!("{lost} were lost")
    }

    #[test]
    fn nobody_waits_for_a_writer_that_stalls_and_what_was_lost_is_told() {
        let ((tell, tells), (written, seen)) = (channel(), channel());
        let lossy = Lossy::new("test", Box::new(Sink { told: tells, written }), told);
        lossy.push(b"first".to_vec());
        // The writer has it, and stalls; so these fill the queue, and the last ones do not fit.
        while !lock(&lossy.shared.queue).writing {
            std::thread::yield_now();
        }
        (0..4).for_each(|_| lossy.push(vec![b'.'; QUEUE_BYTES_MAX / 2]));
        assert!(!lossy.flush(Duration::ZERO));
        assert_eq!(lock(&lossy.shared.queue).lost, 2);
        (0..4).for_each(|_| tell.send(true).unwrap());
        assert_eq!(seen.recv().unwrap(), b"first");
        assert_eq!(seen.recv().unwrap().len(), QUEUE_BYTES_MAX / 2);
        assert_eq!(seen.recv().unwrap().len(), QUEUE_BYTES_MAX / 2);
        assert_eq!(seen.recv().unwrap(), b"2 were lost");
        assert!(lossy.flush(Duration::from_secs(40)));
    }

    #[test]
    fn what_cannot_be_written_is_lost_and_the_rest_is_not() {
        let ((tell, tells), (written, seen)) = (channel(), channel());
        let lossy = Lossy::new("test", Box::new(Sink { told: tells, written }), told);
        for _ in 0..3 {
            lossy.push(b"lost".to_vec());
            tell.send(false).unwrap();
        }
        assert!(lossy.flush(Duration::from_secs(40)));
        lossy.push(b"kept".to_vec());
        (0..2).for_each(|_| tell.send(true).unwrap());
        assert_eq!(seen.recv().unwrap(), b"kept");
        assert_eq!(seen.recv().unwrap(), b"3 were lost");
    }
}
