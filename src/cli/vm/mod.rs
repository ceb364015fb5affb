//! `pageferry vm`: the mini VMM as a process, with a control socket.

mod machine;
mod server;

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use clap::{Args, ValueEnum};
use pageferry::cli::print;
use pageferry::{Destination, Landing, Offer, Refused, Uri};

use super::api::ApiAddress;
use super::api::control::Control;
use super::protection::ListenArgs;
use super::sandbox::{Profile, SandboxArgs};
use super::words::explain;
use super::{CliError, Exit, PinnedArgs, backing, file, size, stop};
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
    /// Let this user command the VM, too, besides the one who runs it and root; may be given more than once
    #[arg(long, value_name = "UID")]
    api_allow: Vec<u32>,
    /// Wait for a guest instead of starting one: tcp:HOST:PORT, unix:PATH or rdma:HOST:PORT; or load one that was saved: file:PATH,
    /// exec:COMMAND or fd:N
    #[arg(long, value_name = "URI")]
    incoming: Option<Uri>,
    /// An older copy of the guest that comes from a peer, an archive or a RAM file: what is the same need not come again. Or the archive
    /// that the one that is loaded stands on, where that is not where it says
    #[arg(long, value_name = "FILE", requires = "incoming")]
    base: Option<std::path::PathBuf>,
    /// Let a guest that is loaded from file:PATH run at once; its pages come as it touches them, the rest behind
    #[arg(long, requires = "incoming")]
    on_demand: bool,
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
    #[command(flatten)]
    protection: ListenArgs,
    #[command(flatten)]
    sandbox: SandboxArgs,
}

impl VmArgs {
    /// What it will need.
    fn profile(&self) -> Result<Profile, String> {
        let image = Some(Path::new(&self.guest)).filter(|_| !["counter", "mem-test"].contains(&&*self.guest));
        let (memory, strict) = (backing::parse(&self.memory)?, self.sandbox.is_strict());
        let read = self.content.as_deref().into_iter().chain(image);
        let profile = read.fold(Profile::vm(&self.api.0, &memory, strict), Profile::reading);
        let profile = profile.reading_anew(&self.protection.files());
        Ok(match &self.incoming {
            Some(uri) => profile.incoming(uri, self.base.as_deref(), strict),
            None => profile,
        })
    }
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
    if let Some(uri) = &args.incoming {
        args.sandbox.check(uri)?;
    }
    args.sandbox.enter(args.profile().map_err(fail)?)?;
    let machine = Machine::new(args, serial).map_err(fail)?;
    let server = Server::new(machine, args.incoming.is_some());
    let api = Control::open(&args.api.0, &args.api_allow).and_then(|api| api.serve(&server)).map_err(fail)?;
    let quitting = server.clone();
    stop::on_signals_unless_refused(move || quitting.signalled());
    if let Some(uri) = &args.incoming {
        let destination = Destination::builder()
            .link_timeout(Duration::from_secs(args.link_timeout))
            .handover_timeout(Duration::from_secs(args.handover_timeout))
            .postcopy_timeout(Duration::from_secs(args.postcopy_timeout))
            .reconnect_timeout(Duration::from_secs(args.reconnect_timeout))
            .rdma(args.pinned.options())
            .notice(|notice| tracing::info!("{notice}"))
            .base(args.base.clone())
            .tls(args.protection.tls().map_err(CliError::usage)?)
            .insecure(args.protection.is_insecure())
            .on_demand(args.on_demand)
            .bind(uri)
            .map_err(|e| CliError::cannot_start(&e))?;
        let does = if uri.is_one_way() { "loading" } else { "listening on" };
        tracing::info!("{does} {}", destination.uri());
        server.listening(destination.uri(), &destination.progress());
        let landing = server.clone();
        let arriving = destination
            .receive(move |offer| land(&landing, offer))
            .map_err(|e| fail(format!("cannot start a thread: {e}")))?;
        let waiting = server.clone();
        api.spawn(async move {
            if let Err(error) = arriving.await {
                waiting.not_arrived(explain(&error));
            }
        });
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
fn land(server: &Server, offer: &Offer) -> Result<Landing, Refused> {
    if !offer.live {
        return Err(
            "this destination waits for a running guest, not for memory alone; use `pageferry recv`".into()
        );
    }
    let machine = server.machine();
    machine.fits(&offer.layout, &offer.machine)?;
    let arriving = server.clone();
    let landing = Landing::guest(machine.ram.clone(), machine.guest.clone());
    Ok(landing.on_arrival(move |running| arriving.arrived(running)))
}
