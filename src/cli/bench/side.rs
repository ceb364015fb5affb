//! One side of a run, as a process of its own, so that its CPU time and memory are nobody else's.
//!
//! A side is told what to do by one JSON object on its command line, and says what it has to say in lines of JSON on its
//! standard output. It ends when its standard input does: whoever started it is gone, or wants it gone.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pageferry::backend::{GuestRam, StaticLog};
use pageferry::cli::print;
use pageferry::layout::PAGE_SIZE;
use pageferry::vmm_shim::guest_memory::GuestMemory;
use pageferry::{
    Destination, Landing, Offer, Refused, Report, Side, Source, Tls, TlsFiles, Uri, content_digest,
};
use serde::{Deserialize, Serialize};

use super::live::{Arrived, Dirtying, Live, Writing};
use super::series::{Sampler, Series};
use crate::cli::backing;
use crate::cli::tuning::TuningArgs;
use crate::cli::words::explain;

/// What a side is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "side", rename_all = "kebab-case")]
pub(super) enum Order {
    /// Send.
    Source(SourceOrder),
    /// Listen and receive.
    Destination(DestinationOrder),
}

/// What a source is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SourceOrder {
    /// Where the destination listens.
    pub uri: String,
    /// A file with the content of memory.
    pub image: PathBuf,
    /// What memory is made of that is written while it moves.
    pub memory: String,
    /// Certificates, if there is to be TLS.
    #[serde(default)]
    pub tls_dir: Option<PathBuf>,
    /// How it is written.
    pub dirtying: Option<Dirtying>,
    /// Whether its content in the end is to be told.
    pub digest: bool,
    /// Whether it is to be told how it went over time.
    pub series: bool,
    /// How to send.
    pub transfer: Transfer,
}

/// How to send, as strings where the command line has strings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Transfer {
    pub streams: u16,
    pub codec: String,
    pub timeout_s: u64,
    pub tuning: TuningArgs,
}

/// What a destination is to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct DestinationOrder {
    /// Where to listen.
    pub uri: String,
    /// What memory is made of.
    pub memory: String,
    /// Certificates, if there is to be TLS.
    #[serde(default)]
    pub tls_dir: Option<PathBuf>,
    /// Whether a guest comes, not memory alone.
    pub live: bool,
    /// Whether the content in the end is to be told.
    pub digest: bool,
    pub timeout_s: u64,
}

/// What a side says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Word {
    /// A destination listens.
    Listening(Place),
    /// It is done.
    Done(Box<Outcome>),
    /// It failed; why.
    Failed(String),
}

/// Where a destination listens, and into what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Place {
    /// Its address.
    pub uri: String,
    /// What its memory is made of.
    pub memory: String,
}

/// What a run came to on one side.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// The engine's numbers.
    pub report: Report,
    /// Largest resident set in bytes, less the guest memory that is resident in the end.
    pub peak_beyond_bytes: u64,
    /// What the writers did.
    pub writing: Option<Writing>,
    /// How a source went over time.
    pub series: Option<Series>,
}

/// Does what `order` says, in this process.
pub(super) fn run(order: &str) {
    let word = match serde_json::from_str(order) {
        Ok(order) => {
            end_with_standard_input();
            let outcome = match order {
                Order::Source(order) => source(&order),
                Order::Destination(order) => destination(&order),
            };
            outcome.map_or_else(Word::Failed, |outcome| Word::Done(Box::new(outcome)))
        }
        Err(e) => Word::Failed(format!("the order of a side is not understood: {e}")),
    };
    tell(&word);
}

fn tell(word: &Word) {
    let text = serde_json::to_string(word).unwrap_or_default() + "\n";
    // Whoever listened is gone, and this process will be soon.
    let _ = print::pass_on(text.as_bytes(), false);
}

/// Ends this process when whoever started it closes its standard input, or dies.
fn end_with_standard_input() {
    std::thread::spawn(|| {
        let mut input = std::io::stdin();
        while input.read(&mut [0; 64]).is_ok_and(|n| n != 0) {}
        std::process::exit(crate::cli::Exit::Cancelled as i32);
    });
}

fn source(order: &SourceOrder) -> Result<Outcome, String> {
    let uri: Uri = order.uri.parse().map_err(|e| explain(&e))?;
    let image = Arc::new(GuestMemory::open_ram_file(&order.image, false).map_err(|e| explain(&e))?);
    let live = match &order.dirtying {
        Some(dirtying) => Some(Live::start(&image, &order.memory, dirtying)?),
        None => None,
    };
    let (ram, source) = match &live {
        Some(live) => (live.ram.clone(), live.source.clone()),
        None => (image.clone(), Source::builder(image.clone(), Arc::new(StaticLog))),
    };
    drop(image);
    reset_peak();
    let source = source
        .streams(order.transfer.streams)
        .codec(order.transfer.codec.parse().map_err(|e| format!("codec: {e}"))?)
        .link_timeout(Duration::from_secs(order.transfer.timeout_s))
        .tls(tls(order.tls_dir.as_deref(), Side::Client).map(|tls| tls.hostname(local_name(&uri))))
        .tuning(order.transfer.tuning.tuning())
        .build()
        .map_err(|e| explain(&e))?;
    let migration = source.start(&uri).map_err(|e| explain(&e))?;
    let progress = migration.progress();
    let sampler = order.series.then(|| {
        let written = live.as_ref().map(Live::written);
        Sampler::start(&progress, move || written.as_ref().map_or(0, |written| written()))
    });
    let mut report = migration.wait().map_err(|e| explain(&e))?;
    let writing = live.as_ref().map(Live::writing);
    report.cpu_s -= writing.map_or(0.0, |writing| writing.cpu_s);
    let series = sampler.map(|sampler| sampler.finish(&progress));
    let private = live.is_some() && order.memory.starts_with("anon");
    let outcome = finish(report, &ram, private, order.digest)?;
    Ok(Outcome { writing, series, ..outcome })
}

fn tls(dir: Option<&Path>, side: Side) -> Option<Tls> {
    dir.map(|dir| Tls::new(TlsFiles::of_folder(dir, side)))
}

/// The name of a destination behind a Unix socket.
fn local_name(uri: &Uri) -> Option<String> {
    matches!(uri, Uri::Unix(_)).then(|| "localhost".into())
}

/// What a side says of a run that succeeded; `private` tells whether its guest memory is.
fn finish(report: Report, ram: &GuestMemory, private: bool, digest: bool) -> Result<Outcome, String> {
    let guests = if private { Guests::Private(resident(ram)) } else { Guests::Mapped };
    let mut outcome = Outcome { report, peak_beyond_bytes: peak_beyond(guests), ..Outcome::default() };
    if digest {
        outcome.report.digest = Some(content_digest(ram).map_err(|e| explain(&e))?);
    }
    Ok(outcome)
}

/// Makes memory of the size that comes.
fn land(memory: &str, offer: &Offer) -> Result<Arc<GuestMemory>, Refused> {
    let backing = backing::parse(memory)?;
    Ok(Arc::new(GuestMemory::create(offer.layout.clone(), &backing)?.enlarging()))
}

fn destination(order: &DestinationOrder) -> Result<Outcome, String> {
    let uri: Uri = order.uri.parse().map_err(|e| explain(&e))?;
    let destination = Destination::builder()
        .link_timeout(Duration::from_secs(order.timeout_s))
        .notice(|text| tracing::info!("{text}"))
        .tls(tls(order.tls_dir.as_deref(), Side::Server))
        // What it takes in is made up.
        .insecure(true)
        .bind(&uri)
        .map_err(|e| explain(&e))?;
    tell(&Word::Listening(Place { uri: destination.uri().to_string(), memory: order.memory.clone() }));
    let (memory, live) = (order.memory.clone(), order.live);
    let arriving = destination.receive(move |offer| {
        let ram = land(&memory, offer)?;
        let landing =
            if live { Landing::guest(ram.clone(), Arc::new(Arrived)) } else { Landing::memory(ram.clone()) };
        Ok(landing.keeping(ram))
    });
    let arrival = arriving.map_err(|e| explain(&e))?.wait().map_err(|e| explain(&e))?;
    finish(arrival.report, &arrival.vm, order.memory.starts_with("anon"), order.digest)
}

/// Which part of this process' memory is the guest's.
#[derive(Clone, Copy)]
enum Guests {
    /// So many bytes of private memory.
    Private(u64),
    /// What is mapped of shared memory; where nothing is, what is mapped of files.
    Mapped,
}

/// Bytes of guest memory that are populated.
fn resident(ram: &GuestMemory) -> u64 {
    let mut pages = vec![0; ram.layout().chunks() as usize];
    // Without an answer nothing counts as the guest's, which makes the figure too large, not too small.
    let known = ram.populated(0, &mut pages).is_ok();
    if known { pages.iter().map(|w| u64::from(w.count_ones())).sum::<u64>() * PAGE_SIZE as u64 } else { 0 }
}

/// The largest resident set of this process less its guest memory, in bytes: what the migration takes on top.
///
/// Not from `getrusage`, whose maximum a process inherits from the one that started it.
fn peak_beyond(guests: Guests) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let value = |name: &str| status_bytes(&text, name).unwrap_or(0);
    let guests = match guests {
        Guests::Private(bytes) => bytes,
        Guests::Mapped => match value("RssShmem") {
            0 => value("RssFile"),
            shared => shared,
        },
    };
    value("VmHWM").saturating_sub(guests)
}

/// Forgets the largest resident set so far (proc(5), `clear_refs`). Where the kernel does not, the figure stays too large.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// A size in a `/proc/PID/status`, in bytes.
fn status_bytes(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_a_status() {
        let text = "VmHWM:\t  123456 kB\nRssAnon:\t       8 kB\nThreads:\t4\n";
        assert_eq!(status_bytes(text, "VmHWM"), Some(123_456 << 10));
        assert_eq!(status_bytes(text, "RssAnon"), Some(8 << 10));
        assert_eq!(status_bytes(text, "Threads"), None);
        assert_eq!(status_bytes(text, "Rss"), None);
        assert!(peak_beyond(Guests::Private(0)) > 1 << 20);
    }
}
