//! Standard output and standard error that take nothing.

use std::fs::File;
use std::io::{PipeReader, Read, Write, pipe};
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use testkit::PATIENCE;

use crate::vm::{Ended, PAGEFERRY};

/// What a stream of output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sink {
    /// A pipe whose reader is gone.
    Closed,
    /// A file on a file system without room.
    Full,
    /// A pipe that is full, and that nobody reads.
    Stalled,
}

impl Sink {
    pub(crate) const ALL: [Self; 3] = [Self::Closed, Self::Full, Self::Stalled];

    /// It, and what must be kept as long as it is to be so.
    pub(crate) fn open(self) -> (Stdio, Option<PipeReader>) {
        match self {
            Self::Full => (File::options().write(true).open("/dev/full").unwrap().into(), None),
            Self::Closed => (pipe().unwrap().1.into(), None),
            Self::Stalled => {
                let (reader, mut writer) = pipe().unwrap();
                let flags = fcntl_getfl(&writer).unwrap();
                fcntl_setfl(&writer, flags | OFlags::NONBLOCK).unwrap();
                for piece in [4096, 1] {
                    while writer.write_all(&vec![b'.'; piece]).is_ok() {}
                }
                // The child has the same open file.
                fcntl_setfl(&writer, flags).unwrap();
                (writer.into(), Some(reader))
            }
        }
    }
}

/// Which stream it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Out,
    Errors,
}

/// Runs a command to its end with one of its streams like that; what it printed on the other.
#[track_caller]
pub(crate) fn run(args: &[&str], stream: Stream, sink: Sink) -> Ended {
    let (stdio, _reader) = sink.open();
    let mut command = Command::new(PAGEFERRY);
    command.args(args).stdin(Stdio::null());
    match stream {
        Stream::Out => command.stdout(stdio).stderr(Stdio::piped()),
        Stream::Errors => command.stderr(stdio).stdout(Stdio::piped()),
    };
    let mut child = command.spawn().unwrap();
    // Of these copies of the pipe's ends one would keep it open.
    drop(command);
    let mut other: Box<dyn Read + Send> = match stream {
        Stream::Out => Box::new(child.stderr.take().unwrap()),
        Stream::Errors => Box::new(child.stdout.take().unwrap()),
    };
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        other.read_to_string(&mut text).unwrap();
        text
    });
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > PATIENCE {
            let _ = child.kill();
            panic!("{args:?} with {stream:?} {sink:?} did not end: {}", reading.join().unwrap());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    let text = reading.join().unwrap();
    assert!(!text.contains("panicked"), "{args:?} with {stream:?} {sink:?}: {text}");
    let (out, err) = if stream == Stream::Out { (String::new(), text) } else { (text, String::new()) };
    Ended { code: status.code(), out, err }
}
