//! What the machine can do: the bytes of an image over loopback TCP into memory of the same kind, without a protocol, a hash or a
//! check. The time includes what it takes to populate the destination's memory.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use clap::Args;
use pagecopy::backend::GuestRam;
use pagecopy::layout::{Layout, Region};
use pageferry::measure::process::{self, Running};
use pageferry::measure::{Job, Target, Took};
use pageferry::print;
use rustix::pipe::SpliceFlags;
use transport::socket::{Connection, Listener};
use transport::uri::Uri;
use vm_memory::VolatileSlice;
use vmm_shim::guest_memory::{Backing, GuestMemory};

/// Bytes of a system call.
const STEP: u64 = 1 << 20;

/// How long a transfer may take.
const PATIENCE: Duration = Duration::from_secs(180);

/// How the bytes are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    /// Written from the mapped image.
    Write,
    /// Spliced from the file through a pipe, without a copy.
    Splice,
}

impl fmt::Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Write { "write" } else { "splice" })
    }
}

impl FromStr for Sender {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "write" => Ok(Self::Write),
            "splice" => Ok(Self::Splice),
            _ => Err(format!("{text:?} is neither write nor splice")),
        }
    }
}

/// What a process of its own does, so that it shares no address space with whoever measures it.
#[derive(Debug, Args)]
pub(crate) struct LimitArgs {
    sender: Sender,
    streams: u8,
    image: PathBuf,
    /// Into this file, made new; else into anonymous memory
    copy: Option<PathBuf>,
}

/// Moves the image and prints what it took.
pub(crate) fn run(args: &LimitArgs) -> Result<(), String> {
    let target = args.copy.as_deref().map_or(Target::Anonymous, Target::File);
    let took = transfer(args.sender, args.streams, &args.image, target);
    let took = took.map_err(|e| format!("{}: {e}", args.image.display()))?;
    print::line(serde_json::to_string(&took).map_err(|e| e.to_string())?);
    Ok(())
}

/// Starts this program for one transfer.
pub(crate) fn measure(sender: Sender, streams: u8, job: &Job<'_>) -> Result<Took, String> {
    let own = std::env::current_exe().map_err(|e| format!("this program's own place: {e}"))?;
    let mut command = Command::new(own);
    command.args(["limit", &sender.to_string(), &streams.to_string()]).arg(job.image);
    if let Target::File(copy) = job.target {
        command.arg(copy);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = Running::start(&mut command).map_err(|e| e.to_string())?.wait(PATIENCE)?;
    serde_json::from_slice(&output.stdout)
        .map_err(|_| String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// Moves all of the image, holes too.
fn transfer(sender: Sender, streams: u8, image: &Path, target: Target<'_>) -> io::Result<Took> {
    let source = GuestMemory::open_ram_file(image, false).map_err(io::Error::other)?;
    let length = source.region(0).len() as u64;
    let sockets = sockets(streams)?;
    let share = length.div_ceil(u64::from(streams)).next_multiple_of(STEP);
    let begin = Instant::now();
    let memory = memory(length, target)?;
    let setup_ms = begin.elapsed().as_secs_f64() * 1e3;
    std::thread::scope(|scope| {
        let mut workers = Vec::new();
        for (stream, (to, from)) in sockets.into_iter().enumerate() {
            let start = (stream as u64 * share).min(length);
            let bytes = share.min(length - start);
            let (source, memory) = (&source, &memory);
            workers.push(scope.spawn(move || match sender {
                Sender::Write => write(source, &to, start, bytes),
                Sender::Splice => splice(image, &to, start, bytes),
            }));
            workers.push(scope.spawn(move || receive(memory, &from, start, bytes)));
        }
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
        })
    })?;
    let total_ms = begin.elapsed().as_secs_f64() * 1e3;
    // Both sides are this process.
    let source_cpu_s = process::cpu_s(std::process::id()).unwrap_or(0.0);
    Ok(Took {
        total_ms,
        reported_ms: total_ms,
        setup_ms,
        source_cpu_s,
        wire_bytes: length,
        ..Took::default()
    })
}

/// Connections, the sending end of each first.
fn sockets(streams: u8) -> io::Result<Vec<(Connection, Connection)>> {
    let loopback = Uri::Tcp { host: "127.0.0.1".into(), port: 0 };
    let listener = Listener::bind(&loopback).map_err(io::Error::other)?;
    let connect = |_| {
        let to = Connection::connect(&listener.uri(), PATIENCE, &|| false).map_err(io::Error::other)?;
        Ok((to, listener.accept()?))
    };
    (0..streams).map(connect).collect()
}

/// The destination's memory, populated with all cores: anonymous memory, and files where the kernel makes large pages of them.
fn memory(length: u64, target: Target<'_>) -> io::Result<GuestMemory> {
    let layout = Layout::new(vec![Region::new("ram", 0, length)]);
    let backing = match target {
        Target::File(path) => Backing::File { path: path.into(), create: true },
        Target::Anonymous => Backing::Anonymous { huge: true },
    };
    let memory = GuestMemory::create(layout.map_err(io::Error::other)?, &backing);
    let memory = memory.map_err(io::Error::other)?.enlarging();
    if memory.populates_ahead() || memory.enlarges() {
        let chunks = memory.layout().chunks();
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let share = chunks.div_ceil(threads).next_multiple_of(8);
        std::thread::scope(|scope| {
            let populate = |thread: u32| {
                let first = (thread * share).min(chunks);
                let count = share.min(chunks - first);
                if memory.enlarges() && memory.enlarge(first, count) {
                    Ok(())
                } else {
                    memory.populate(first, count)
                }
            };
            let workers: Vec<_> = (0..threads).map(|n| scope.spawn(move || populate(n))).collect();
            workers.into_iter().try_for_each(|worker| match worker.join() {
                Ok(done) => done.map_err(io::Error::other),
                Err(_) => Err(io::Error::other("a thread panicked")),
            })
        })?;
    }
    Ok(memory)
}

fn part(memory: &GuestMemory, at: u64, bytes: u64) -> io::Result<VolatileSlice<'_>> {
    memory.region(0).subslice(at as usize, bytes as usize).map_err(io::Error::other)
}

fn write(source: &GuestMemory, to: &Connection, start: u64, bytes: u64) -> io::Result<()> {
    for at in (start..start + bytes).step_by(STEP as usize) {
        let mut piece = part(source, at, STEP.min(start + bytes - at))?;
        while !piece.is_empty() {
            piece = piece.offset(to.send_memory(&piece)?).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

fn splice(image: &Path, to: &Connection, start: u64, bytes: u64) -> io::Result<()> {
    let file = File::open(image)?;
    let (reader, writer) = rustix::pipe::pipe()?;
    // A smaller pipe takes more system calls and is no error.
    let _ = rustix::pipe::fcntl_setpipe_size(&writer, STEP as usize);
    let flags = SpliceFlags::MOVE | SpliceFlags::MORE;
    let (mut at, end) = (start, start + bytes);
    while at < end {
        let wanted = STEP.min(end - at) as usize;
        let mut within = rustix::pipe::splice(&file, Some(&mut at), &writer, None, wanted, flags)?;
        if within == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while within > 0 {
            within -= to.send_piped(reader.as_fd(), within)?;
        }
    }
    Ok(())
}

fn receive(memory: &GuestMemory, from: &Connection, start: u64, bytes: u64) -> io::Result<()> {
    let mut at = start;
    while at < start + bytes {
        let piece = part(memory, at, STEP.min(start + bytes - at))?;
        match from.receive_memory(&piece)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => at += length as u64,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pageferry::measure::same_content;
    use pageferry_benches::images::{self, Kind};

    use super::*;

    #[test]
    fn every_byte_arrives() {
        let folder = tempfile::tempdir().unwrap();
        let (image, copy) = (folder.path().join("image"), folder.path().join("copy"));
        images::make(&image, Kind::Mixed, 11 << 20, 3).unwrap();
        for (sender, streams) in [(Sender::Write, 2), (Sender::Splice, 3)] {
            let took = transfer(sender, streams, &image, Target::File(&copy)).unwrap();
            assert_eq!(took.wire_bytes, 11 << 20);
            assert!(same_content(&image, &copy).unwrap(), "{sender}");
            std::fs::remove_file(&copy).unwrap();
            assert!(transfer(sender, streams, &image, Target::Anonymous).unwrap().total_ms > 0.0);
        }
    }
}
