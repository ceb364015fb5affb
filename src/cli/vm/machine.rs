//! The machine of a `vm` process: KVM guest, or threads that stand for one.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use crate::cli::words::explain;
use pageferry::backend::{DirtyLog, Guest, GuestRam};
use pageferry::pagecopy::layout::Layout;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::vmm_shim::guests::counter::{CounterParams, PAGE_WORDS_MAX};
use pageferry::vmm_shim::guests::{fill, map};
use pageferry::vmm_shim::uffd_log::UffdLog;
use pageferry::vmm_shim::vmm::{self, GuestImage, Tracker, Vm, VmConfig, VmState};
use pageferry::vmm_shim::writer::{MemoryWriter, WriterOptions};
use pageferry::{Source, SourceBuilder};

use super::super::{backing, file};
use super::{TrackerArg, VmArgs};

/// A guest with its memory and its dirty log.
pub(super) struct Machine {
    pub ram: Arc<dyn GuestRam>,
    pub log: Arc<dyn DirtyLog>,
    pub guest: Arc<dyn Guest>,
    /// The same as `guest`, where it is a VM.
    vm: Option<Arc<Vm>>,
    pub cpus: u8,
    pub name: String,
}

impl Machine {
    pub(super) fn new(args: &VmArgs, serial: Box<dyn Write + Send>) -> Result<Self, String> {
        let layout = vmm::layout(args.mem).map_err(|e| format!("--mem: {e}"))?;
        let backing = backing::parse(&args.memory)?;
        if let (Backing::File { path, .. }, Some(base)) = (&backing, &args.base)
            && file::is_same(path, base)
        {
            return Err(format!(
                "--memory {}: it is made anew, and cannot be --base, too; give another path",
                args.memory
            ));
        }
        let ram = Arc::new(GuestMemory::create(layout, &backing).map_err(|e| explain(&e))?);
        ram.require_room().map_err(|e| format!("--memory {}: {}", args.memory, explain(&e)))?;
        if args.no_kvm { Self::process(args, ram, serial) } else { Self::kvm(args, ram, serial) }
    }

    fn kvm(args: &VmArgs, ram: Arc<GuestMemory>, serial: Box<dyn Write + Send>) -> Result<Self, String> {
        let guest = if args.incoming.is_some() { GuestImage::Incoming } else { image(args)? };
        if let (None, Some(path)) = (&args.incoming, &args.content) {
            let complain = |e: &dyn std::fmt::Display| format!("--content {}: {e}", path.display());
            let bytes = file::read(path).map_err(|e| complain(&e))?;
            fill(&*ram, &bytes).map_err(|e| complain(&e))?;
        }
        let tracker = match args.tracker {
            TrackerArg::Bitmap => Tracker::Bitmap,
            TrackerArg::Ring => Tracker::Ring,
            TrackerArg::Uffd => Tracker::None,
        };
        let config = VmConfig { cpus: args.cpus, guest, tracker };
        let vm = Arc::new(Vm::new(config, ram.clone(), serial).map_err(|e| explain(&e))?);
        vm.start().map_err(|e| explain(&e))?;
        let log = match vm.dirty_log() {
            Some(log) => log,
            None => Arc::new(UffdLog::new(ram.clone()).map_err(|e| explain(&e))?),
        };
        Ok(Self { ram, log, guest: vm.clone(), vm: Some(vm), cpus: args.cpus, name: args.guest.clone() })
    }

    fn process(
        args: &VmArgs,
        ram: Arc<GuestMemory>,
        mut serial: Box<dyn Write + Send>,
    ) -> Result<Self, String> {
        if args.guest != "counter" {
            return Err(format!("--guest {}: without KVM there is only the counter", args.guest));
        }
        let options = WriterOptions {
            threads: args.cpus,
            gpa: map::FREE,
            bytes: args.working_set.min(args.mem.saturating_sub(map::FREE)),
            pages_per_s: args.rate,
        };
        let sink = Box::new(move |line: &[u8]| {
            // A console that went away does not stop the guest.
            let _ = serial.write_all(line).and_then(|()| serial.flush());
        });
        let log = UffdLog::new(ram.clone()).map_err(|e| explain(&e))?;
        let writer = MemoryWriter::new(ram.clone(), options, sink).map_err(|e| explain(&e))?;
        let guest = Arc::new(writer);
        Ok(Self { ram, log: Arc::new(log), guest, vm: None, cpus: args.cpus, name: args.guest.clone() })
    }

    /// What the source says of itself and the destination compares.
    fn describe(&self) -> String {
        format!("{} cpus={}", self.accelerator(), self.cpus)
    }

    pub(super) fn accelerator(&self) -> &'static str {
        if self.vm.is_some() { "kvm" } else { "process" }
    }

    /// Lets the counter guest begin anew with [`Self::longest_gap_ms`].
    pub(super) fn forget_gap(&self) {
        if let Some(vm) = self.vm.as_ref().filter(|_| self.name == "counter") {
            vm.forget_counter_gap();
        }
    }

    /// How long a vCPU of the counter guest stood still by its own clock, in milliseconds. Its memory must be here.
    pub(super) fn longest_gap_ms(&self) -> Option<f64> {
        let vm = self.vm.as_ref().filter(|_| self.name == "counter")?;
        Some((vm.counter_gap().as_secs_f64() * 1e6).round() / 1e3)
    }

    /// Why it crashed, if it did.
    pub(super) fn crash(&self) -> Option<String> {
        match self.vm.as_ref()?.state() {
            VmState::Crashed(why) => Some(why),
            _ => None,
        }
    }

    /// Refuses a guest that is not of this machine's shape, and says how to start one that is.
    pub(super) fn fits(&self, layout: &Layout, machine: &str) -> Result<(), String> {
        if layout != self.ram.layout() {
            return Err(format!(
                "the guest has {} MiB of memory in {} regions, this VM {} MiB in {}: start it with the source's --mem",
                layout.bytes() >> 20,
                layout.regions().len(),
                self.ram.layout().bytes() >> 20,
                self.ram.layout().regions().len(),
            ));
        }
        let mine = self.describe();
        if machine != mine {
            return Err(format!(
                "the guest's machine is \"{machine}\", this VM's \"{mine}\": start it with the source's --cpus and --no-kvm"
            ));
        }
        Ok(())
    }

    /// What is moved, and is to stay paused where it is paused.
    pub(super) fn source(&self, paused: bool) -> SourceBuilder {
        Source::builder(self.ram.clone(), self.log.clone())
            .guest(self.guest.clone())
            .paused(paused)
            .machine(self.describe())
    }
}

fn image(args: &VmArgs) -> Result<GuestImage, String> {
    let room = args.mem.min(3 << 30).saturating_sub(map::FREE);
    if args.working_set > room {
        return Err(format!(
            "--working-set {} does not fit: at most {room} bytes with this --mem",
            args.working_set
        ));
    }
    Ok(match args.guest.as_str() {
        "counter" => GuestImage::Counter(CounterParams {
            working_set: args.working_set,
            pages_per_s: args.rate,
            page_words: if args.content.is_some() { 0 } else { PAGE_WORDS_MAX },
        }),
        "mem-test" => GuestImage::MemTest { bytes: args.working_set & !1023 },
        path => GuestImage::RealMode(file::read(Path::new(path)).map_err(|e| {
            format!("--guest {path}: not counter or mem-test, and no image can be read there: {e}")
        })?),
    })
}
