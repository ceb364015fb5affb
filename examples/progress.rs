//! Moves memory that is written meanwhile, and shows what becomes of it one line an event: `cargo run --release --example progress`.
//!
//! Both sides are in this process; a VMM has one of them.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use pageferry::backend::{DirtyLog, Guest};
use pageferry::layout::Layout;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::vmm_shim::uffd_log::UffdLog;
use pageferry::vmm_shim::writer::{MemoryWriter, WriterOptions};
use pageferry::{Destination, Event, Landing, Source, explain};

const MEMORY: u64 = 256 << 20;

/// Memory, and a thread that writes it when it is let run: a guest, as far as a migration goes.
fn machine(layout: Layout) -> Result<(Arc<GuestMemory>, Arc<MemoryWriter>), Box<dyn Error + Send + Sync>> {
    let ram = Arc::new(GuestMemory::create(layout, &Backing::Memfd)?);
    let options = WriterOptions { threads: 1, gpa: 1 << 20, bytes: 64 << 20, pages_per_s: 20_000 };
    let guest = Arc::new(MemoryWriter::new(ram.clone(), options, Box::new(|_| {}))?);
    Ok((ram, guest))
}

pub(crate) fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let (ram, guest) = machine(Layout::flat(MEMORY)?)?;
    let log: Arc<dyn DirtyLog> = match UffdLog::new(ram.clone()) {
        Ok(log) => Arc::new(log),
        Err(error) => {
            println!("skipped: this host cannot tell which pages are written: {}", explain(&error));
            return Ok(());
        }
    };
    guest.resume()?;

    let destination = Destination::builder().bind(&"tcp:127.0.0.1:0".parse()?)?;
    let uri = destination.uri().clone();
    let arriving = destination.receive(|offer| {
        let (ram, guest) = machine(offer.layout.clone())?;
        Ok(Landing::guest(ram, guest.clone()).keeping(guest))
    })?;

    let source = Source::builder(ram, log).guest(guest).streams(2).build()?;
    let began = Instant::now();
    let migration = source.start(&uri)?;
    for event in migration.events() {
        let at = began.elapsed().as_secs_f64() * 1e3;
        match event {
            Event::Phase { status } => println!("{at:8.1} ms  {status:?}"),
            Event::Round(round) => println!(
                "{at:8.1} ms  a round: {} MiB delivered so far, {} pages written meanwhile",
                round.logical_bytes >> 20,
                round.dirtied_pages
            ),
            Event::Stalled(stalled) => println!("{at:8.1} ms  {stalled}"),
            Event::Downtime { ms, expected_ms } => {
                println!(
                    "{at:8.1} ms  it runs at the destination; it ran nowhere for {ms} ms, {expected_ms} predicted"
                );
            }
            Event::Done { report } => {
                println!("{at:8.1} ms  {:?}, verified: {}", report.status, report.verified);
            }
            other => println!("{at:8.1} ms  {other:?}"),
        }
    }
    let report = migration.wait()?;
    let arrival = arriving.wait()?;
    arrival.vm.pause()?;
    assert!(report.verified && arrival.running);
    Ok(())
}
