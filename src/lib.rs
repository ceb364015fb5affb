//! pageferry moves the RAM of a running virtual machine between hosts: over parallel streams, with every page checked where it lands,
//! and so that never both hosts run the guest, nor none.
//!
//! # What a VMM brings
//!
//! The traits of [`backend`]:
//!
//! | trait | is | ready to use |
//! |---|---|---|
//! | [`GuestRam`](backend::GuestRam) | memory as regions | [`vmm_shim::guest_memory`] |
//! | [`DirtyLog`](backend::DirtyLog) | which pages were written | [`vmm_shim::uffd_log`], [`StaticLog`](backend::StaticLog) |
//! | [`Guest`](backend::Guest) | pause, resume, save and load | |
//!
//! A [`Source`] is made of them on one host. A [`Destination`] listens on the other, and makes a VM for the guest that comes. Here memory
//! alone moves, within one process:
//!
//! ```
//! use std::sync::Arc;
//!
//! use pageferry::backend::{GuestRam, StaticLog};
//! use pageferry::layout::Layout;
//! use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
//! use pageferry::{Destination, Landing, Source, content_digest};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let destination = Destination::builder().bind(&"tcp:127.0.0.1:0".parse()?)?;
//! let uri = destination.uri().clone();
//! let arriving = destination.receive(|offer| {
//!     let ram = Arc::new(GuestMemory::create(offer.layout.clone(), &Backing::Memfd)?);
//!     Ok(Landing::memory(ram.clone()).keeping(ram))
//! })?;
//!
//! let ram = Arc::new(GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Memfd)?);
//! ram.chunk(3).copy_from(&[7u8; 4096]);
//! let source = Source::builder(ram.clone(), Arc::new(StaticLog)).streams(2).build()?;
//! let report = source.start(&uri)?.wait()?;
//! let arrival = arriving.wait()?;
//! assert!(report.verified);
//! assert_eq!(content_digest(&*ram)?, content_digest(&*arrival.vm)?);
//! # Ok(())
//! # }
//! ```
//!
//! `README.md` has a guest that runs, `examples/progress.rs` one that writes its memory meanwhile.
//!
//! # The phases
//!
//! ```text
//!      Status       source                                       destination
//!
//!  |   Setup        HELLO: layout, machine  ------------------>  the closure makes memory and a VM
//!  |   Active       round 1: all pages      == N streams =====>  each page is written, hashed,
//!  |                round 2: those that     == N streams =====>  and its hash sent back
//!  |                were written meanwhile ...
//! runs              until what is left fits into the downtime limit
//!  |
//!  #   Device       Guest::pause, last pages, state  --------->  Guest::load_state
//!  #                both sides compare what they counted  <----  READY
//!  #                GO: from here on the guest is the destination's
//!  |                                                             Guest::resume: it runs here
//!  |   Completed    it is told, or asks until it knows  <------  RUNNING
//! ```
//!
//! Whatever fails before GO leaves the guest at the source, where it runs on. After GO only the destination runs it. Where the two
//! cannot tell each other, the source has [`Fate::Unknown`], and its guest stays paused.
//!
//! In postcopy GO comes before the pages, which follow while the guest runs: [`Progress::postcopy`],
//! [`SourceBuilder::postcopy_after_rounds`], [`OnTimeout::Postcopy`].
//!
//! # Watching and commanding
//!
//! [`Source::start`] and [`Destination::receive`] return at once; what they begin has threads of its own. Both give a handle that
//! dereferences to [`Progress`]: [`events`](Progress::events), [`report`](Progress::report), [`tune`](Progress::tune),
//! [`cancel`](Progress::cancel) and others. A clone of it serves other threads.
//!
//! # Threads and async code
//!
//! Nothing here needs a runtime, and nothing minds one. [`Migration::wait`] and the iterator [`Events`] block the thread that calls them.
//! In async code, `migration.await` and [`Events::recv`] do the same without; they are plain futures, for any runtime. No handle
//! blocks or panics when it is dropped, in a task or elsewhere, and what was begun goes on.
//!
//! The library keeps threads of tokio's for its control links: one for all sources, and one a destination.
//! [`SourceBuilder::runtime`] and [`DestinationBuilder::runtime`] take yours instead.
//!
//! The methods of a VMM's traits are called on the library's threads, and may block.
//!
//! # Protection
//!
//! A destination listens on loopback and Unix sockets as it is. Where other hosts can reach it, it takes certificates
//! ([`DestinationBuilder::tls`]), or the word that it is to be [`insecure`](DestinationBuilder::insecure). A source gives its own by
//! [`SourceBuilder::tls`]:
//!
//! ```
//! use std::path::Path;
//!
//! use pageferry::{Side, Tls, TlsFiles};
//!
//! let of = |side| TlsFiles::of_folder(Path::new("/etc/pki/pageferry"), side);
//! let source = Tls::new(of(Side::Client)).hostname("node7.cluster".to_owned());
//! let destination = Tls::new(of(Side::Server)).allow(["node1.cluster".to_owned()]);
//! # let _ = (source, destination);
//! ```
//!
//! # Errors
//!
//! [`Failure`] says who has the guest, and why; [`IncomingError`] is the destination's. Their texts are one sentence, their sources the
//! causes; [`explain`] puts all of them in a line.
//!
//! # Features
//!
//! | feature | |
//! |---|---|
//! | `cli` (default) | the command `pageferry`; a VMM does without: `default-features = false` |
//! | `rdma` | addresses `rdma:HOST:PORT`; needs libibverbs and librdmacm |
//!
//! `docs/design.md` has the rules that hold throughout, `docs/protocol.md` the wire format, `docs/operations.md` what to expect of hosts.

// The command line lives here rather than in the binary, so that its parsers can be fuzzed and benches measure with its tools.
#[cfg(feature = "cli")]
extern crate self as pageferry;

// Help texts are for terminals: brackets in them are no links.
#[allow(rustdoc::broken_intra_doc_links)]
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;

#[cfg(feature = "cli")]
#[doc(hidden)]
pub use cli::{measure, print};

#[doc(inline)]
pub use pagecopy::choose::CodecMode;
#[doc(inline)]
pub use pagecopy::policy::{Limits, OnTimeout};
#[doc(inline)]
pub use pagecopy::{backend, bitmap, layout};
/// What an archive has is had without loading it: [`Archive`](archive::Archive) has its frames, [`Image`](archive::Image) the memory
/// that they stand for, those of its bases among them.
///
/// ```
/// use std::sync::Arc;
///
/// use pageferry::Source;
/// use pageferry::archive::{Image, Walk, verify};
/// use pageferry::backend::{GuestRam, StaticLog};
/// use pageferry::layout::Layout;
/// use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("ram.pferry");
/// let ram = Arc::new(GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Memfd)?);
/// ram.chunk(3).copy_from(&[7u8; 4096]);
/// let source = Source::builder(ram, Arc::new(StaticLog)).build()?;
/// source.start(&format!("file:{}", path.display()).parse()?)?.wait()?;
///
/// let image = Image::open(&path, None)?;
/// assert_eq!(image.held().count(), 1);
/// let checked = verify(image.archive(), image.base(), &Walk::default())?;
/// assert!(checked.faults.is_empty());
/// assert_eq!(image.read(3, 1, &mut image.reader()?)?.pages[0], [7; 4096]);
/// # Ok(())
/// # }
/// ```
#[doc(inline)]
pub use transport::archive;
/// ```
/// use pageferry::layout::Layout;
/// use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
/// use pageferry::{content_digest, populated};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let ram = GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Memfd)?;
/// assert_eq!(content_digest(&ram)?.len(), 32);
/// // Nothing was read: all of it is a hole still.
/// assert!(populated(&ram)?.is_empty());
/// # Ok(())
/// # }
/// ```
#[doc(inline)]
pub use transport::engine::content_digest;
/// Listens for one guest. Bound first, so that its address can be told to the source; then it receives.
///
/// ```
/// use std::time::Duration;
///
/// use pageferry::Destination;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let destination = Destination::builder()
///     .link_timeout(Duration::from_secs(5))
///     .notice(|line| eprintln!("{line}"))
///     .bind(&"tcp:127.0.0.1:0".parse()?)?;
/// assert!(destination.uri().to_string().starts_with("tcp:127.0.0.1:"));
///
/// // Nothing comes in here: the reason is told to the source, and it listens on.
/// let arriving = destination.receive::<()>(|offer| Err(format!("no room for \"{}\"", offer.machine).into()))?;
/// arriving.cancel()?;
/// assert!(arriving.wait().is_err());
/// # Ok(())
/// # }
/// ```
#[doc(inline)]
pub use transport::engine::destination::Destination;
#[doc(inline)]
pub use transport::engine::destination::{
    Arrival, Arriving, DestinationBuilder, IncomingError, Landing, Offer, Refused,
};
/// For logs, and for who controls the VMM, events are JSON:
///
/// ```
/// let lost = pageferry::Event::StreamLost { lost: 1 };
/// assert_eq!(serde_json::to_string(&lost).unwrap(), r#"{"event":"stream-lost","lost":1}"#);
/// ```
#[doc(inline)]
pub use transport::engine::events::Event;
/// ```
/// # use std::sync::Arc;
/// # use pageferry::backend::StaticLog;
/// # use pageferry::layout::Layout;
/// # use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
/// # use pageferry::Source;
/// use pageferry::Event;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
/// # let ram = Arc::new(GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Memfd)?);
/// # let source = Source::builder(ram, Arc::new(StaticLog)).build()?;
/// # runtime.block_on(async {
/// let migration = source.start(&"unix:@pageferry/nobody".parse()?)?;
/// let mut events = migration.events();
/// let mut last = None;
/// while let Some(event) = events.recv().await {
///     last = Some(event);
/// }
/// assert!(matches!(last, Some(Event::Done { .. })));
/// assert!(migration.await.is_err());
/// # Ok(())
/// # })
/// # }
/// ```
#[doc(inline)]
pub use transport::engine::events::Events;
/// ```
/// let error: pageferry::Uri = match "udp:host:1".parse() {
///     Ok(uri) => uri,
///     Err(error) => {
///         assert!(pageferry::explain(&error).contains("udp"));
///         return;
///     }
/// };
/// # unreachable!("{error}");
/// ```
#[doc(inline)]
pub use transport::engine::explain;
/// ```
/// # use std::sync::Arc;
/// # use pageferry::backend::StaticLog;
/// # use pageferry::layout::Layout;
/// # use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
/// # use pageferry::Source;
/// use pageferry::{Event, Fate, Status};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let ram = Arc::new(GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Memfd)?);
/// # let source = Source::builder(ram, Arc::new(StaticLog)).build()?;
/// // Nobody listens there.
/// let migration = source.start(&"unix:@pageferry/nobody".parse()?)?;
/// for event in migration.events() {
///     if let Event::Done { report } = event {
///         assert_eq!(report.status, Status::Failed);
///     }
/// }
/// assert_eq!(migration.wait().unwrap_err().fate, Fate::Unmoved);
/// # Ok(())
/// # }
/// ```
#[doc(inline)]
pub use transport::engine::migration::Migration;
/// ```
/// use std::sync::Arc;
/// use std::time::Duration;
///
/// use pageferry::backend::StaticLog;
/// use pageferry::layout::Layout;
/// use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
/// use pageferry::{CodecMode, Source};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let ram = Arc::new(GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Memfd)?);
/// let builder = Source::builder(ram, Arc::new(StaticLog))
///     .streams(8)
///     .codec(CodecMode::Zstd { level: Some(3) })
///     .downtime_limit(Duration::from_millis(100))
///     .bandwidth(1_000_000_000);
/// let source = builder.clone().build()?;
///
/// let refused = builder.streams(0).build().err().map(|error| error.to_string());
/// assert_eq!(refused.as_deref(), Some("streams: there are 1 to 256"));
/// # Ok(())
/// # }
/// ```
#[doc(inline)]
pub use transport::engine::migration::Source;
#[doc(inline)]
pub use transport::engine::migration::{InvalidOption, SourceBuilder};
#[doc(inline)]
pub use transport::engine::plan::Helps;
/// ```
/// # use std::sync::Arc;
/// # use pageferry::backend::StaticLog;
/// # use pageferry::layout::Layout;
/// # use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
/// # use pageferry::Source;
/// use std::time::Duration;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let ram = Arc::new(GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Memfd)?);
/// # let source = Source::builder(ram, Arc::new(StaticLog)).build()?;
/// // Over 1 Gbit/s, for a downtime of 300 ms.
/// let plan = source.plan(Duration::from_millis(100), 125_000_000, 300)?;
/// assert!(plan.converges && plan.helps.is_none());
/// # Ok(())
/// # }
/// ```
#[doc(inline)]
pub use transport::engine::plan::Plan;
#[doc(inline)]
pub use transport::engine::populated;
/// ```
/// # use std::sync::Arc;
/// # use pageferry::backend::StaticLog;
/// # use pageferry::layout::Layout;
/// # use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
/// # use pageferry::Source;
/// use pageferry::{Refusal, Status};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let ram = Arc::new(GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Memfd)?);
/// # let source = Source::builder(ram, Arc::new(StaticLog)).build()?;
/// let migration = source.start(&"unix:@pageferry/nobody".parse()?)?;
/// let progress = migration.progress();
/// let other = std::thread::spawn(move || {
///     for _ in progress.events() {}
///     assert_eq!(progress.status(), Status::Failed);
///     assert_eq!(progress.switchover(), Err(Refusal::Ended));
/// });
/// assert!(migration.wait().is_err());
/// # other.join().unwrap();
/// # Ok(())
/// # }
/// ```
#[doc(inline)]
pub use transport::engine::progress::Progress;
#[doc(inline)]
pub use transport::engine::progress::Refusal;
#[doc(inline)]
pub use transport::engine::report::{Protection, Remedy, Report, Round, Stalled, Status};
#[doc(inline)]
pub use transport::engine::source::{Cause, Failure, Fate};
/// ```
/// # use std::sync::Arc;
/// # use pageferry::backend::StaticLog;
/// # use pageferry::layout::Layout;
/// # use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
/// # use pageferry::Source;
/// use pageferry::{OnTimeout, Tuning};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut tuning = Tuning::default();
/// tuning.auto_converge = true;
/// tuning.limits.total_ms = Some(60_000);
/// tuning.limits.on_timeout = OnTimeout::Postcopy;
/// # let ram = Arc::new(GuestMemory::create(Layout::flat(1 << 20)?, &Backing::Memfd)?);
/// let source = Source::builder(ram, Arc::new(StaticLog)).tuning(tuning).build()?;
///
/// // And again while it runs.
/// let migration = source.start(&"unix:@pageferry/nobody".parse()?)?;
/// if let Err(refusal) = migration.tune(|tuning| tuning.bandwidth = Some(100_000_000)) {
///     eprintln!("{refusal}");
/// }
/// # let _ = migration.wait();
/// # Ok(())
/// # }
/// ```
#[doc(inline)]
pub use transport::engine::tuning::Tuning;
#[doc(inline)]
pub use transport::rdma::RdmaOptions;
/// ```
/// use pageferry::{Side, Tls, TlsFiles};
///
/// let files = TlsFiles::of_folder("keys".as_ref(), Side::Client);
/// assert_eq!(files.cert, std::path::Path::new("keys/client-cert.pem"));
/// assert!(Tls::is_name("node7.cluster") && Tls::is_name("10.0.0.7") && !Tls::is_name("no name"));
/// ```
#[doc(inline)]
pub use transport::socket::{Side, Tls, TlsError, TlsFiles, certificates};
#[doc(inline)]
pub use transport::source::HostShare;
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// for text in ["tcp:node7:4444", "tcp:[::1]:4444", "unix:/run/ferry.sock", "rdma:node7:4444"] {
///     # if text.starts_with("rdma") { continue }
///     let uri: pageferry::Uri = text.parse()?;
///     assert_eq!(uri.to_string(), text);
/// }
/// # Ok(())
/// # }
/// ```
#[doc(inline)]
pub use transport::uri::Uri;

pub use pagecopy;
pub use transport;
pub use transport::{engine, reserve};
pub use vmm_shim;

/// The examples of `README.md`.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct Readme;
