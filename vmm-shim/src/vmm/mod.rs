//! A small VMM on KVM: enough of a machine for the guests of [`crate::guests`] and for real-mode images to
//! run, and to move.
//!
//! The machine: 1 to 8 vCPUs, each a thread; RAM from a [`GuestRam`], one memory slot for each region; the
//! in-kernel interrupt controllers and timer (PIC, IOAPIC, LAPIC, PIT); a 16550 at port 0x3f8 that only
//! sends. Other ports read as ones and ignore writes. There is no firmware, no disk, no PCI.
//!
//! [`Vm`] implements [`Guest`], so it migrates: [`state`] tells what its state is made of and how time goes
//! on.

mod blobs;
mod boot;
mod clock;
mod last;
mod serial;
pub mod state;
mod state_vcpu;
mod sys;
mod vcpu;
pub mod writer;

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_pit_config};
use kvm_ioctls::{Kvm, VmFd};
use pagecopy::backend::{
    BackendError, DirtyLog, Guest, GuestRam, PAUSE_PATIENCE, Rehearsal, StateBlob, StateSink, Throttle,
};
use pagecopy::layout::{Layout, LayoutError, Region};
use vm_memory::Bytes;

use crate::guests::counter::CounterParams;
use crate::guests::map;
use crate::kvm::sys::install_kick_handler;
use crate::kvm::{DirtyRings, KvmBitmapLog, KvmRingLog, KvmSlots, OpenError, kick};
use serial::Serial;
use vcpu::{Machine, Vcpu, Want, lock};

/// Most vCPUs of a VM.
pub const CPUS_MAX: u8 = 8;
/// Entries of each dirty ring, where KVM allows as many.
const RING_ENTRIES: u32 = 1 << 16;
/// KVM keeps some hundred entries in reserve.
const RING_ENTRIES_MIN: u32 = 1 << 10;
/// A throttled vCPU runs and sleeps in turns that together take about this long.
const THROTTLE_PERIOD: Duration = Duration::from_millis(16);
/// Where KVM may put pages of its own for processors that need them: below 4 GiB, above the interrupt
/// controllers.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a guest begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestImage {
    /// Nothing: RAM and state come from elsewhere.
    Incoming,
    /// The [counter](crate::guests::counter).
    Counter(CounterParams),
    /// The mem-test guest, on an array of `bytes` (a multiple of 1024).
    MemTest {
        /// Length of the array.
        bytes: u64,
    },
    /// The [writer].
    Writer,
    /// 64-bit user-mode code, at most 64 KiB, that all vCPUs begin: `rdi` is the vCPU's number.
    User64(Vec<u8>),
    /// A boot sector or flat image for real mode: loaded at 0x7c00, entered at 0000:7c00 with `dl` = 0x80.
    RealMode(Vec<u8>),
}

/// How the pages that a guest writes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracker {
    /// [`KvmBitmapLog`].
    Bitmap,
    /// [`KvmRingLog`].
    Ring,
    /// [`KvmRingLog`] with smaller rings, which make the vCPUs stop more often.
    RingOf {
        /// Entries of each vCPU's ring: a power of two from 1024 to 65,536.
        entries: u32,
    },
    /// Not by KVM.
    None,
}

/// A VM to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// 1 to [`CPUS_MAX`].
    pub cpus: u8,
    /// What it begins with.
    pub guest: GuestImage,
    /// How writes are tracked.
    pub tracker: Tracker,
}

/// Why a VM could not be made, or started.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A wrong number of vCPUs.
    #[error("{cpus} vCPUs; 1 to {CPUS_MAX} are supported")]
    Cpus {
        /// The number asked for.
        cpus: u8,
    },
    /// A layout that reaches into addresses of devices.
    #[error(
        "region {name:?} reaches into 0xc0000000..0x100000000, which belongs to devices: use vmm::layout"
    )]
    DeviceHole {
        /// The region.
        name: String,
    },
    /// The image does not suit the VM.
    #[error("guest image: {why}")]
    Image {
        /// How.
        why: String,
    },
    /// A ring of no size that KVM takes.
    #[error(
        "a dirty ring of {entries} entries; a power of two from {RING_ENTRIES_MIN} to {RING_ENTRIES} is needed"
    )]
    RingEntries {
        /// The number asked for.
        entries: u32,
    },
    /// Memory slots or their dirty log could not be had.
    #[error(transparent)]
    Log(#[from] BackendError),
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// It was started before.
    #[error("the VM is started already")]
    Started,
}

impl VmError {
    fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }
}

/// Whether a VM runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmState {
    /// Its vCPUs run.
    Running,
    /// They could.
    Paused,
    /// They never will again; tells why.
    Crashed(String),
}

/// The layout of a PC with `bytes` of memory: up to 3 GiB at 0, the rest at 4 GiB.
pub fn layout(bytes: u64) -> Result<Layout, LayoutError> {
    let low = bytes.min(boot::LOW_END);
    let mut regions = vec![Region::new("ram-low", 0, low)];
    if bytes > low {
        regions.push(Region::new("ram-high", boot::HIGH_START, bytes - low));
    }
    Layout::new(regions)
}

/// A virtual machine.
///
/// Made stopped; [`start`](Self::start) makes the vCPU threads, [`resume`](Guest::resume) lets them run.
/// Dropping it ends them.
///
/// ```no_run
/// use std::sync::Arc;
/// use pagecopy::backend::Guest;
/// use vmm_shim::guest_memory::{Backing, GuestMemory};
/// use vmm_shim::vmm::{GuestImage, Tracker, Vm, VmConfig, layout};
///
/// let ram = Arc::new(GuestMemory::create(layout(256 << 20)?, &Backing::Memfd)?);
/// let guest = GuestImage::MemTest { bytes: 64 << 20 };
/// let vm = Vm::new(VmConfig { cpus: 2, guest, tracker: Tracker::Bitmap }, ram, Box::new(std::io::sink()))?;
/// vm.start()?;
/// vm.resume()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Vm {
    threads: Mutex<Vec<JoinHandle<()>>>,
    ticker: Mutex<Option<Ticker>>,
    status: Mutex<Status>,
    log: Option<Arc<dyn DirtyLog>>,
    tsc_khz: u32,
    /// What KVM supports here.
    cpuid: CpuId,
    /// What each vCPU was told.
    cpuids: Mutex<Vec<CpuId>>,
    kvm: Kvm,
    machine: Arc<Machine>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Status {
    running: bool,
    /// It has run: no state can be loaded any more.
    used: bool,
}

/// The thread that interrupts throttled vCPUs.
struct Ticker {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: JoinHandle<()>,
}

impl Ticker {
    fn end(self) {
        *lock(&self.stop.0) = true;
        self.stop.1.notify_all();
        // It cannot panic; and if it had, there would be nothing to do.
        let _ = self.thread.join();
    }
}

impl Vm {
    /// Makes a VM with `ram` as its memory, loads the image into it, and sends console output to `serial`, on
    /// whose writes the guest waits.
    pub fn new(
        config: VmConfig,
        ram: Arc<dyn GuestRam>,
        serial: Box<dyn Write + Send>,
    ) -> Result<Self, VmError> {
        let VmConfig { cpus, guest, tracker } = config;
        if cpus == 0 || cpus > CPUS_MAX {
            return Err(VmError::Cpus { cpus });
        }
        let hole = boot::LOW_END..boot::HIGH_START;
        if let Some(r) = ram
            .layout()
            .regions()
            .iter()
            .find(|r| r.addresses().is_some_and(|of| of.start < hole.end && of.end > hole.start))
        {
            return Err(VmError::DeviceHole { name: r.name.clone() });
        }
        let kvm = crate::kvm::open()?;
        // Making a VM starts a thread of the kernel's, and a signal ends the wait for it.
        let vm = loop {
            match kvm.create_vm() {
                Err(e) if e.errno() == libc::EINTR => {}
                result => break result.map_err(|e| VmError::system("KVM_CREATE_VM", e))?,
            }
        };
        vm.set_tss_address(TSS_ADDRESS).map_err(|e| VmError::system("KVM_SET_TSS_ADDR", e))?;
        vm.create_irq_chip().map_err(|e| VmError::system("KVM_CREATE_IRQCHIP", e))?;
        vm.create_pit2(kvm_pit_config::default()).map_err(|e| VmError::system("KVM_CREATE_PIT2", e))?;
        let rings = enable_rings(&vm, tracker)?;
        let slots = Arc::new(sys::give_memory(&vm, &ram)?);
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| VmError::system("KVM_GET_SUPPORTED_CPUID", e))?;
        install_kick_handler();
        let mut vcpus = Vec::new();
        for index in 0..cpus {
            vcpus.push(Arc::new(make_vcpu(&vm, &cpuid, index)?));
        }
        let tsc_khz = lock(&vcpus[0].fd).get_tsc_khz().map_err(|e| VmError::system("KVM_GET_TSC_KHZ", e))?;
        let ring = rings.map(|rings| make_ring_log(&slots, &vcpus, rings).map(Arc::new)).transpose()?;
        let log: Option<Arc<dyn DirtyLog>> = match (&ring, tracker) {
            (Some(ring), _) => Some(ring.clone()),
            (None, Tracker::Bitmap) => Some(Arc::new(KvmBitmapLog::new(slots)?)),
            _ => None,
        };
        boot::load(&*ram, &guest, cpus, tsc_khz)?;
        for v in &vcpus {
            boot::set_registers(&lock(&v.fd), &guest, v.index)
                .map_err(|e| VmError::system(format!("setting the registers of vCPU {}", v.index), e))?;
        }
        let machine = Machine {
            vcpus,
            serial: Mutex::new(Serial::new(serial)),
            ring,
            crashed: OnceLock::new(),
            lost: AtomicBool::new(false),
            signal: Mutex::new(0),
            signalled: Condvar::new(),
            vm,
            ram,
        };
        Ok(Self {
            threads: Mutex::default(),
            ticker: Mutex::default(),
            status: Mutex::default(),
            log,
            tsc_khz,
            cpuids: Mutex::new((0..cpus).map(|index| state_vcpu::cpuid_of(&cpuid, index)).collect()),
            cpuid,
            kvm,
            machine: Arc::new(machine),
        })
    }

    /// Makes the vCPU threads. They run after [`resume`](Guest::resume).
    pub fn start(&self) -> Result<(), VmError> {
        let mut threads = lock(&self.threads);
        if !threads.is_empty() {
            return Err(VmError::Started);
        }
        for vcpu in &self.machine.vcpus {
            let (machine, vcpu) = (self.machine.clone(), vcpu.clone());
            let name = format!("vcpu-{}", vcpu.index);
            let thread = std::thread::Builder::new()
                .name(name)
                .spawn(move || machine.run_vcpu(&vcpu))
                .map_err(|e| VmError::system("starting a vCPU thread", e))?;
            threads.push(thread);
        }
        Ok(())
    }

    /// Whether it runs.
    pub fn state(&self) -> VmState {
        let running = lock(&self.status).running;
        match self.machine.crashed.get() {
            Some(why) => VmState::Crashed(why.clone()),
            None if running => VmState::Running,
            None => VmState::Paused,
        }
    }

    /// The dirty log of the tracker that was asked for; `None` for [`Tracker::None`].
    pub fn dirty_log(&self) -> Option<Arc<dyn DirtyLog>> {
        self.log.clone()
    }

    /// How often a vCPU stopped because its dirty ring was full; 0 with other trackers.
    pub fn ring_full_exits(&self) -> u64 {
        self.machine.ring.as_ref().map_or(0, |ring| ring.full_exits())
    }

    /// Its memory.
    pub fn ram(&self) -> &Arc<dyn GuestRam> {
        &self.machine.ram
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u8 {
        self.machine.vcpus.len() as u8
    }

    /// Frequency of the guest's TSC in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// The longest time that any vCPU of a [counter](crate::guests::counter) guest stood still, by its own clock, since
    /// [`Self::forget_counter_gap`]. Of other guests this means nothing. Not to be asked while memory is still to come, which this
    /// would wait for.
    pub fn counter_gap(&self) -> Duration {
        let words = (0..u64::from(self.cpus())).map(|cpu| map::GAPS + 8 * cpu);
        let ram = self.ram().region(0);
        // The layout puts them into region 0, which every VM has.
        let ticks = words.filter_map(|gpa| ram.read_obj::<u64>(gpa as usize).ok()).max().unwrap_or(0);
        Duration::from_secs_f64(ticks as f64 / (f64::from(self.tsc_khz.max(1)) * 1e3))
    }

    /// Lets the counter guest begin anew with [`Self::counter_gap`]. Before dirty pages are logged, which this does not do.
    pub fn forget_counter_gap(&self) {
        for cpu in 0..usize::from(self.cpus()) {
            // The layout puts the words into region 0, which every VM has.
            let _ = self.ram().region(0).write_obj(0u64, map::GAPS as usize + 8 * cpu);
        }
    }

    /// Waits until the guest wrote `value` to port 0x4f8; `false` when it crashed or `timeout` passed first.
    pub(crate) fn wait_signal(&self, value: u32, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut signal = lock(&self.machine.signal);
        while *signal != value {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.machine.crashed.get().is_some() {
                return false;
            }
            let wait = left.min(Duration::from_millis(50));
            signal =
                self.machine.signalled.wait_timeout(signal, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Why nothing can be done with the guest any more.
    fn gone(&self, what: &str) -> Option<BackendError> {
        let why = match self.machine.crashed.get() {
            Some(why) => format!("the guest has crashed: {why}"),
            None if self.machine.lost.load(Ordering::SeqCst) => "the guest was stopped for good".into(),
            None => return None,
        };
        Some(BackendError::new(format!("cannot {what}"), io::Error::other(why)))
    }

    /// Waits until all vCPUs are parked; the error names one that is not.
    fn wait_parked(&self, patience: Duration) -> Result<(), BackendError> {
        let until = Some(Instant::now() + patience);
        match self.machine.vcpus.iter().find(|vcpu| !vcpu.wait_parked(until)) {
            None => Ok(()),
            Some(vcpu) => {
                let what = format!(
                    "pausing: vCPU {} does not stop; it waits for a page that has not come, or for this host's memory",
                    vcpu.index
                );
                Err(BackendError::new(what, io::Error::from(io::ErrorKind::TimedOut)))
            }
        }
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("cpus", &self.cpus()).field("state", &self.state()).finish_non_exhaustive()
    }
}

impl Vm {
    /// Stops all vCPUs, each within `patience`; else the guest is as before.
    fn pause_within(&self, patience: Duration) -> Result<(), BackendError> {
        let mut status = lock(&self.status);
        for vcpu in &self.machine.vcpus {
            vcpu.want(Want::Pause);
        }
        self.wait_parked(patience).inspect_err(|_| {
            for vcpu in self.machine.vcpus.iter().filter(|_| status.running) {
                vcpu.want(Want::Run);
            }
        })?;
        lock(&self.machine.serial).flush();
        if status.running {
            for vcpu in &self.machine.vcpus {
                // Tells a guest that uses kvmclock not to take the gap for a lockup; refused by all others.
                let _ = lock(&vcpu.fd).kvmclock_ctrl();
            }
        }
        status.running = false;
        Ok(())
    }
}

impl Guest for Vm {
    fn pause(&self) -> Result<(), BackendError> {
        self.pause_within(PAUSE_PATIENCE)
    }

    fn stop_for_good(&self, release: &dyn Fn() -> Result<(), BackendError>) -> Result<(), BackendError> {
        let mut status = lock(&self.status);
        self.machine.lost.store(true, Ordering::SeqCst);
        for vcpu in &self.machine.vcpus {
            vcpu.want(Want::Pause);
        }
        status.running = false;
        release()?;
        self.wait_parked(PAUSE_PATIENCE)
    }

    fn resume(&self) -> Result<(), BackendError> {
        let mut status = lock(&self.status);
        if let Some(error) = self.gone("resume") {
            return Err(error);
        }
        if lock(&self.threads).len() != self.machine.vcpus.len() {
            return Err(BackendError::new(
                "resume before start",
                io::Error::from(io::ErrorKind::InvalidInput),
            ));
        }
        (status.running, status.used) = (true, true);
        for vcpu in &self.machine.vcpus {
            vcpu.want(Want::Run);
        }
        Ok(())
    }

    fn throttle(&self) -> Option<&dyn Throttle> {
        Some(self)
    }

    fn rehearsal(&self) -> Option<&dyn Rehearsal> {
        Some(self)
    }

    fn save_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError> {
        let status = lock(&self.status);
        if let Some(error) = self.gone("save the guest's state") {
            return Err(error);
        }
        if status.running {
            return Err(BackendError::new(
                "saving the state of a running guest",
                io::Error::from(io::ErrorKind::InvalidInput),
            ));
        }
        state::save(self, out)
    }

    fn load_state(&self, blobs: &[StateBlob]) -> Result<(), BackendError> {
        let status = lock(&self.status);
        if let Some(error) = self.gone("load state") {
            return Err(error);
        }
        if status.used {
            let what = "loading state into a guest that has run";
            return Err(BackendError::new(what, io::Error::from(io::ErrorKind::InvalidInput)));
        }
        let plan = state::check(self, blobs)?;
        state::apply(self, &plan).inspect_err(|e| {
            // Half a state must never run.
            self.machine.crash(format!("loading its state failed: {e}"));
        })
    }
}

impl Throttle for Vm {
    fn set(&self, percent: u8) -> Result<(), BackendError> {
        self.set_each(&vec![percent; self.machine.vcpus.len()])
    }

    fn set_each(&self, percents: &[u8]) -> Result<(), BackendError> {
        let most = percents.iter().copied().max().unwrap_or(0);
        if most > 99 || percents.len() != self.machine.vcpus.len() {
            let what = format!("throttling {} vCPUs by {percents:?} %", self.machine.vcpus.len());
            return Err(BackendError::new(what, io::Error::from(io::ErrorKind::InvalidInput)));
        }
        let mut ticker = lock(&self.ticker);
        for (vcpu, &percent) in self.machine.vcpus.iter().zip(percents) {
            vcpu.throttle.store(percent, Ordering::Relaxed);
        }
        if most == 0 {
            if let Some(ticker) = ticker.take() {
                ticker.end();
            }
        } else if ticker.is_none() {
            let stop = Arc::new((Mutex::new(false), Condvar::new()));
            let (machine, stopping) = (self.machine.clone(), stop.clone());
            let thread = std::thread::Builder::new()
                .name("throttle".into())
                .spawn(move || tick(&machine, &stopping))
                .map_err(|e| BackendError::new("starting the throttling thread", e))?;
            *ticker = Some(Ticker { stop, thread });
        }
        Ok(())
    }
}

impl Rehearsal for Vm {
    fn rehearse(&self, limit: Duration) -> Result<Duration, BackendError> {
        let running = lock(&self.status).running;
        let begun = Instant::now();
        if running {
            self.pause_within(limit)?;
        }
        let saved = self.save_state(&mut Vec::new());
        if running {
            self.resume()?;
        }
        saved.map(|()| begun.elapsed())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(ticker) = lock(&self.ticker).take() {
            ticker.end();
        }
        for vcpu in &self.machine.vcpus {
            vcpu.want(Want::Quit);
        }
        let threads = std::mem::take(&mut *lock(&self.threads));
        if !threads.is_empty() {
            for vcpu in self.machine.vcpus.iter().take(threads.len()) {
                vcpu.wait_parked(None);
            }
        }
        for thread in threads {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
        lock(&self.machine.serial).flush();
    }
}

/// Interrupts all throttled vCPUs at the end of each share of running time, of the one that is throttled most. Each then sleeps for
/// what is taken from it of the time that it ran.
fn tick(machine: &Machine, stop: &(Mutex<bool>, Condvar)) {
    let percent_of = |vcpu: &Arc<Vcpu>| vcpu.throttle.load(Ordering::Relaxed);
    let mut stopped = lock(&stop.0);
    while !*stopped {
        let percent = machine.vcpus.iter().map(percent_of).max().map_or(0, u32::from);
        let asleep = THROTTLE_PERIOD * percent / 100;
        // Two waits to a period: while the vCPUs sleep, and while they run.
        for wait in [asleep, THROTTLE_PERIOD - asleep] {
            if !*stopped {
                stopped = stop.1.wait_timeout(stopped, wait).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        for vcpu in machine.vcpus.iter().filter(|vcpu| percent_of(vcpu) != 0) {
            vcpu.throttle_due.store(true, Ordering::Relaxed);
            vcpu.kicker.kick();
        }
    }
}

/// Gives vCPUs the rings that a tracker needs, before there are vCPUs.
fn enable_rings(vm: &VmFd, tracker: Tracker) -> Result<Option<DirtyRings>, VmError> {
    let entries = match tracker {
        Tracker::Bitmap | Tracker::None => return Ok(None),
        Tracker::RingOf { entries } => entries,
        Tracker::Ring => RING_ENTRIES,
    };
    if !entries.is_power_of_two() || !(RING_ENTRIES_MIN..=RING_ENTRIES).contains(&entries) {
        return Err(VmError::RingEntries { entries });
    }
    Ok(Some(DirtyRings::enable(vm, entries)?))
}

fn make_vcpu(vm: &VmFd, cpuid: &CpuId, index: u8) -> Result<Vcpu, VmError> {
    let fd =
        vm.create_vcpu(index.into()).map_err(|e| VmError::system(format!("KVM_CREATE_VCPU {index}"), e))?;
    fd.set_cpuid2(&state_vcpu::cpuid_of(cpuid, index))
        .map_err(|e| VmError::system(format!("KVM_SET_CPUID2 of vCPU {index}"), e))?;
    Vcpu::new(index, fd).map_err(|e| VmError::system(format!("mapping kvm_run of vCPU {index}"), e))
}

fn make_ring_log(
    slots: &Arc<KvmSlots>,
    vcpus: &[Arc<Vcpu>],
    rings: DirtyRings,
) -> Result<KvmRingLog, BackendError> {
    let fds: Vec<_> = vcpus.iter().map(|v| lock(&v.fd)).collect();
    let fds: Vec<&dyn AsRawFd> = fds.iter().map(|fd| &**fd as &dyn AsRawFd).collect();
    let kickers: Vec<_> = vcpus.iter().map(|v| v.kicker.clone()).collect();
    KvmRingLog::new(slots.clone(), rings, &fds, move || kick::flush(&kickers))
}
