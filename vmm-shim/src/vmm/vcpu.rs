//! vCPUs and their threads: running, stopping between two instructions, exits, throttling.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use pagecopy::backend::{GuestRam, Room};

use super::last::Last;
use super::serial::{self, Serial};
use crate::kvm::KvmRingLog;
use crate::kvm::kick::Kicker;
use crate::kvm::sys::internal_error;

/// A port to which a guest writes a 32-bit number to tell the VMM that it is done with something.
pub(crate) const SIGNAL_PORT: u16 = 0x4f8;
/// Longest sleep for throttling at a time. On a busy host a vCPU seems to have run for long that only waited for a CPU: it is not to
/// stand still for a hundred times that.
const SLEEP_MAX: Duration = Duration::from_millis(100);

/// What a vCPU's thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    Pause,
    Run,
    Quit,
}

/// One vCPU.
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    /// Held by the thread while it runs the vCPU, and by others while that is parked.
    pub(crate) fd: Mutex<VcpuFd>,
    pub(crate) kicker: Arc<Kicker>,
    control: Mutex<Control>,
    changed: Condvar,
    /// Percent of its time that is taken from it.
    pub(crate) throttle: AtomicU8,
    /// The next interruption is for throttling.
    pub(crate) throttle_due: AtomicBool,
}

struct Control {
    want: Want,
    parked: bool,
}

/// What the threads of a VM share.
pub(crate) struct Machine {
    pub(crate) vcpus: Vec<Arc<Vcpu>>,
    pub(crate) serial: Mutex<Serial>,
    pub(crate) ring: Option<Arc<KvmRingLog>>,
    /// Why the guest stopped for good.
    pub(crate) crashed: OnceLock<String>,
    /// Memory that it ran on is lost: it never runs again, and what it does until it stops goes nowhere.
    pub(crate) lost: AtomicBool,
    /// The last number written to [`SIGNAL_PORT`].
    pub(crate) signal: Mutex<u32>,
    pub(crate) signalled: Condvar,
    /// After everything that refers to the VM's mappings.
    pub(crate) vm: VmFd,
    /// After the VM.
    pub(crate) ram: Arc<dyn GuestRam>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked left no half-done change that matters: these locks guard plain values.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vcpu {
    pub(crate) fn new(index: u8, fd: VcpuFd) -> io::Result<Self> {
        Ok(Self {
            index,
            kicker: Arc::new(Kicker::new(&fd)?),
            fd: Mutex::new(fd),
            // Parked until there is a thread.
            control: Mutex::new(Control { want: Want::Pause, parked: true }),
            changed: Condvar::new(),
            throttle: AtomicU8::new(0),
            throttle_due: AtomicBool::new(false),
        })
    }

    /// Tells the thread what to do; does not wait.
    pub(crate) fn want(&self, want: Want) {
        let mut control = lock(&self.control);
        if control.want != Want::Quit {
            control.want = want;
        }
        if want == Want::Run {
            // Under the lock, so that a stop that follows is not undone.
            self.kicker.go();
            control.parked = false;
        } else {
            self.kicker.stop();
        }
        self.changed.notify_all();
    }

    /// Waits until the thread is parked, interrupting it again where a signal was lost. `false` when it is not by `until`.
    ///
    /// Where KVM reads the guest's memory by itself, as page tables and instructions that it emulates, no signal gets it out of a wait
    /// for a page that a userfaultfd holds back.
    pub(crate) fn wait_parked(&self, until: Option<Instant>) -> bool {
        let mut control = lock(&self.control);
        while !control.parked {
            if until.is_some_and(|until| Instant::now() >= until) {
                return false;
            }
            let wait = self.changed.wait_timeout(control, Duration::from_millis(2));
            control = wait.unwrap_or_else(PoisonError::into_inner).0;
            if !control.parked {
                self.kicker.kick();
            }
        }
        true
    }

    /// Sleeps for throttling; a change of what is wanted ends it.
    fn sleep(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut control = lock(&self.control);
        while control.want == Want::Run {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return };
            control = self.changed.wait_timeout(control, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// How a stretch of running ended.
enum Ended {
    /// It was asked to stop; nothing is pending.
    Stopped,
    /// The guest cannot go on.
    Crashed(String),
}

impl Machine {
    /// The body of a vCPU's thread.
    pub(crate) fn run_vcpu(&self, vcpu: &Vcpu) {
        let attached = vcpu.kicker.attach();
        let mut last = Last::new(&self.vm, &mut lock(&vcpu.fd));
        loop {
            let mut control = lock(&vcpu.control);
            while control.want == Want::Pause || (control.want == Want::Run && self.crashed.get().is_some()) {
                control.parked = true;
                vcpu.changed.notify_all();
                control = vcpu.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
            }
            if control.want == Want::Quit {
                control.parked = true;
                drop(attached);
                vcpu.changed.notify_all();
                return;
            }
            drop(control);
            let ended = self.run_until_stopped(vcpu, &mut lock(&vcpu.fd), &mut last);
            if let Ended::Crashed(why) = ended {
                self.crash(why);
            }
        }
    }

    /// Stops the guest for good. Only the first reason counts.
    pub(crate) fn crash(&self, why: String) {
        if self.crashed.set(why).is_ok() {
            lock(&self.serial).flush();
        }
        for vcpu in &self.vcpus {
            vcpu.want(Want::Pause);
        }
    }

    /// Runs the guest until the vCPU is asked to stop, and then what is needed for KVM to hold nothing back:
    /// the effects of an I/O exit reach registers and memory only on the next `KVM_RUN` (KVM API, section 5).
    fn run_until_stopped(&self, vcpu: &Vcpu, fd: &mut VcpuFd, last: &mut Last) -> Ended {
        let mut slice = Instant::now();
        let mut pending = false;
        while pending || !vcpu.kicker.stopping() {
            vcpu.kicker.enter();
            let exit = fd.run();
            vcpu.kicker.left();
            pending = false;
            match exit {
                // With a stop requested, whatever was pending has been completed before this.
                Err(e) if e.errno() == libc::EINTR => {
                    if vcpu.throttle_due.swap(false, Ordering::Relaxed) {
                        Self::throttle(vcpu, slice);
                        slice = Instant::now();
                    }
                }
                Err(e) if e.errno() == libc::EAGAIN => {}
                Err(e) => {
                    let error = io::Error::from(e);
                    let lost = if e.errno() == libc::EFAULT { self.lost_page() } else { String::new() };
                    return Ended::Crashed(format!("vCPU {}: KVM_RUN: {error}{lost}", vcpu.index));
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    self.port_out(port, data);
                    pending = true;
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    self.port_in(port, data);
                    pending = true;
                }
                Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    let harvested = self.ring.as_ref().map(|ring| ring.harvest());
                    if !matches!(harvested, Some(Ok(()))) {
                        return Ended::Crashed(format!(
                            "vCPU {}: dirty ring full: {harvested:?}",
                            vcpu.index
                        ));
                    }
                }
                Ok(exit) => {
                    let internal = matches!(exit, VcpuExit::InternalError);
                    let shutdown = matches!(exit, VcpuExit::Shutdown);
                    let what = format!("{}{}", describe(&exit), self.lost_by(&exit));
                    let regs = fd.get_regs().map_or_else(
                        |_| String::new(),
                        |r| format!(" at rip {:#x}, rflags {:#x}", r.rip, r.rflags),
                    );
                    let detail = if internal {
                        let (suberror, data) = internal_error(fd.get_kvm_run());
                        format!(", suberror {suberror}, data {data:x?}")
                    } else if shutdown {
                        last.tell(&*self.ram)
                    } else {
                        String::new()
                    };
                    return Ended::Crashed(format!("vCPU {}: {what}{regs}{detail}", vcpu.index));
                }
            }
            last.note(fd);
        }
        Ended::Stopped
    }

    /// A page of the guest's memory could not be had: who has no room for it.
    fn lost_page(&self) -> String {
        let room = self
            .ram
            .room()
            .map_or_else(String::new, |Room { bytes, of, .. }| format!("; {of} has {bytes} bytes left"));
        format!(": a page of the guest's memory could not be had{room}")
    }

    /// The same for an exit that says so: what KVM emulates and cannot read or write counts as no memory to it.
    fn lost_by(&self, exit: &VcpuExit<'_>) -> String {
        let (VcpuExit::MmioRead(gpa, _) | VcpuExit::MmioWrite(gpa, _) | VcpuExit::MemoryFault { gpa, .. }) =
            exit
        else {
            return String::new();
        };
        if self.ram.layout().find(*gpa, 1).is_some() { self.lost_page() } else { String::new() }
    }

    /// Sleeps so long that the time since `slice` is the share that throttling leaves.
    fn throttle(vcpu: &Vcpu, slice: Instant) {
        let percent = u32::from(vcpu.throttle.load(Ordering::Relaxed).min(99));
        let ran = slice.elapsed();
        vcpu.sleep((ran * percent / (100 - percent)).min(SLEEP_MAX));
    }

    fn port_out(&self, port: u16, data: &[u8]) {
        if self.lost.load(Ordering::SeqCst) {
            return;
        }
        if let Some(register) = port.checked_sub(serial::PORT).filter(|&r| r < 8) {
            let mut serial = lock(&self.serial);
            // A string of bytes to one port; wider accesses spread over neighbouring ports, which no guest
            // does.
            data.iter().for_each(|&byte| serial.write(register, byte));
        } else if port == SIGNAL_PORT
            && let Ok(value) = data.try_into()
        {
            *lock(&self.signal) = u32::from_le_bytes(value);
            self.signalled.notify_all();
        }
    }

    fn port_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(register) = port.checked_sub(serial::PORT).filter(|&r| r < 8) {
            data.fill(lock(&self.serial).read(register));
        }
    }
}

/// An exit that ends the guest, in words, with its raw reason.
fn describe(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::Shutdown => "the guest shut down (KVM_EXIT_SHUTDOWN): a triple fault".into(),
        VcpuExit::Hlt => "halted for ever (KVM_EXIT_HLT)".into(),
        VcpuExit::FailEntry(reason, cpu) => {
            format!(
                "the processor refused the guest's state (KVM_EXIT_FAIL_ENTRY), reason {reason:#x} on CPU {cpu}"
            )
        }
        VcpuExit::InternalError => {
            "KVM could not run or emulate an instruction (KVM_EXIT_INTERNAL_ERROR)".into()
        }
        VcpuExit::MmioRead(gpa, data) => {
            format!("read {} bytes at {gpa:#x}, where KVM has no memory (KVM_EXIT_MMIO)", data.len())
        }
        VcpuExit::MmioWrite(gpa, data) => {
            format!("wrote {} bytes at {gpa:#x}, where KVM has no memory (KVM_EXIT_MMIO)", data.len())
        }
        VcpuExit::MemoryFault { flags, gpa, size } => {
            format!("KVM could not map {size} bytes at {gpa:#x} (KVM_EXIT_MEMORY_FAULT), flags {flags:#x}")
        }
        VcpuExit::Unsupported(reason) => format!("unknown exit, reason {reason}"),
        other => format!("unexpected exit: {other:?}"),
    }
}
