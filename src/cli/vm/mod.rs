//! `pageferry vm`: the mini VMM as a process, with a control socket.

mod machine;
mod server;
mod sys;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use pageferry::engine::destination::{Destination, Incoming};
use pageferry::engine::progress::Progress;
use pageferry::engine::{Options, explain};
use pageferry::pagecopy::backend::{Guest, GuestRam};
use pageferry::pagecopy::layout::Layout;
use pageferry::print;
use pageferry::transport::uri::Uri;
use pageferry::transport::wire::control::Hello;

use super::api::ApiAddress;
use super::{CliError, Exit, PinnedArgs, file, size, stop};
use machine::Machine;
use server::Server;

/// Runs a small virtual machine that can be migrated
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  pageferry vm --guest counter --mem 256M --api unix:/run/a.sock --serial stdio\n  \
pageferry vm --mem 256M --api unix:/run/b.sock --incoming tcp:0:4444\n  pageferry ctl unix:/run/a.sock migrate tcp:127.0.0.1:4444"
)]
pub(super) struct VmArgs {
    /// counter, mem-test, or a boot sector / flat image for real mode
    #[arg(long, default_value = "counter")]
    guest: String,
    /// Guest memory
    #[arg(long, default_value = "256M", value_parser = size::memory)]
    mem: u64,
    /// vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    cpus: u8,
    /// Control socket: unix:PATH
    #[arg(long)]
    api: ApiAddress,
    /// Wait for a guest instead of starting one: tcp:HOST:PORT, unix:PATH or rdma:HOST:PORT
    #[arg(long, value_name = "URI")]
    incoming: Option<Uri>,
    /// Where console output goes: stdio, none, or a file
    #[arg(long, default_value = "none", value_name = "stdio|none|FILE")]
    serial: String,
    /// What guest memory is made of: anon (2 MiB pages where the host has them), anon4k, memfd, hugetlb, file:PATH
    #[arg(long, default_value = "anon")]
    memory: String,
    /// How written pages are found
    #[arg(long, value_enum, default_value_t = TrackerArg::Bitmap)]
    tracker: TrackerArg,
    /// Without KVM: threads of this process write its memory as the counter guest does
    #[arg(long)]
    no_kvm: bool,
    /// Memory that the counter or mem-test guest writes over and over
    #[arg(long, default_value = "16M", value_parser = size::parse)]
    working_set: u64,
    /// Pages that each vCPU of the counter guest writes in a second; 0: as fast as it can
    #[arg(long, default_value_t = 20000)]
    rate: u64,
    /// Fill memory with this file's bytes, over and over, before the counter guest starts; of each page it then writes 32 bytes
    /// only, instead of all
    #[arg(long, value_name = "FILE", conflicts_with = "no_kvm")]
    content: Option<std::path::PathBuf>,
    /// Start paused
    #[arg(long, short = 'S')]
    paused: bool,
    /// Give a silent source up after this many seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    link_timeout: u64,
    /// Wait this many seconds for a source that was lost after the guest had come whole, before it was handed over
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86400))]
    handover_timeout: u64,
    /// Wait this many seconds for a source that was lost while pages of the running guest were missing; then the guest is lost
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86400))]
    postcopy_timeout: u64,
    /// Wait this many seconds for a source that was lost on the way and connects again; 0: give up at once
    #[arg(long, default_value_t = 300, value_name = "S", value_parser = clap::value_parser!(u64).range(0..=86400))]
    reconnect_timeout: u64,
    #[command(flatten)]
    pinned: PinnedArgs,
}

/// How written pages are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum TrackerArg {
    /// KVM's dirty bitmap
    Bitmap,
    /// KVM's dirty ring
    Ring,
    /// userfaultfd write protection
    Uffd,
}

pub(super) fn run(args: &VmArgs) -> Result<(), CliError> {
    let fail = |text: String| CliError { exit: Exit::CannotStart, text };
    let serial = open_serial(&args.serial).map_err(fail)?;
    let machine = Machine::new(args, serial).map_err(fail)?;
    let server = Server::new(machine, args.incoming.is_some());
    let api = server.serve(&args.api.0).map_err(fail)?;
    let quitting = server.clone();
    stop::on_signals_unless_refused(move || quitting.signalled());
    if let Some(uri) = &args.incoming {
        let options = Options {
            timeout: std::time::Duration::from_secs(args.link_timeout),
            handover_timeout: std::time::Duration::from_secs(args.handover_timeout),
            postcopy_timeout: std::time::Duration::from_secs(args.postcopy_timeout),
            reconnect_timeout: std::time::Duration::from_secs(args.reconnect_timeout),
            rdma: args.pinned.options(),
            ..Options::default()
        };
        let progress = Progress::default();
        let destination = Destination::bind(uri, &options, &progress, |notice| tracing::info!("{notice}"))
            .map_err(|e| CliError::cannot_start(&e))?;
        tracing::info!("listening on {}", destination.uri());
        server.listening(destination.uri(), &progress);
        let taking = server.clone();
        std::thread::Builder::new()
            .name("incoming".into())
            .spawn(move || {
                let mut taker = Taker { machine: taking.machine(), server: taking.clone() };
                match catch_unwind(AssertUnwindSafe(|| destination.receive(&mut taker))) {
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => taking.not_arrived(explain(&error)),
                    Err(_) => taking.incoming_panicked(),
                }
                sys::give_free_memory_back();
            })
            .map_err(|e| fail(format!("cannot start a thread: {e}")))?;
    } else if !args.paused {
        server.resume(false).map_err(fail)?;
    }
    server.wait(api)
}

fn open_serial(target: &str) -> Result<Box<dyn Write + Send>, String> {
    Ok(match target {
        "stdio" => Box::new(print::console()),
        "none" => Box::new(std::io::sink()),
        path => {
            let file = file::write(Path::new(path), false);
            Box::new(file.map_err(|e| format!("--serial: cannot write to {path}: {e}"))?)
        }
    })
}

/// Takes a guest into the machine that was made for it.
struct Taker {
    machine: Arc<Machine>,
    server: Server,
}

impl Incoming for Taker {
    fn open(&mut self, hello: &Hello, layout: Layout) -> Result<Arc<dyn GuestRam>, String> {
        if !hello.live {
            return Err(
                "this destination waits for a running guest, not for memory alone; use `pageferry recv`"
                    .into(),
            );
        }
        self.machine.fits(&layout, &hello.machine)?;
        Ok(self.machine.ram.clone())
    }

    fn guest(&self) -> Option<Arc<dyn Guest>> {
        Some(self.machine.guest.clone())
    }

    fn arrived(&mut self, running: bool) {
        self.server.arrived(running);
    }
}
