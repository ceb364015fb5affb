//! Getting a vCPU out of `KVM_RUN` from another thread.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::sys::{self, ImmediateExit};

/// What other threads need of a vCPU's thread.
pub(crate) struct Kicker {
    stop: ImmediateExit,
    /// 0 while no thread runs the vCPU.
    thread: AtomicI32,
    in_run: AtomicBool,
    exits: AtomicU64,
}

impl Kicker {
    pub(crate) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        Ok(Self {
            stop: ImmediateExit::new(vcpu)?,
            thread: AtomicI32::new(0),
            in_run: AtomicBool::new(false),
            exits: AtomicU64::new(0),
        })
    }

    /// Makes the calling thread the vCPU's.
    pub(crate) fn attach(&self) {
        sys::unblock_kick();
        self.thread.store(sys::thread_id(), Ordering::SeqCst);
    }
    /// The calling thread will not run the vCPU any more.
    pub(crate) fn detach(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// To be called just before `KVM_RUN`.
    pub(crate) fn enter(&self) {
        self.in_run.store(true, Ordering::SeqCst);
    }
    /// To be called just after it.
    pub(crate) fn left(&self) {
        self.exits.fetch_add(1, Ordering::SeqCst);
        self.in_run.store(false, Ordering::SeqCst);
    }

    /// Whether the vCPU was asked to stop.
    pub(crate) fn stopping(&self) -> bool {
        self.stop.get()
    }
    /// Asks the vCPU to stop: `KVM_RUN` will complete what is pending and return `EINTR`, now and every time.
    pub(crate) fn stop(&self) {
        self.stop.set(true);
        self.kick();
    }
    /// Lets `KVM_RUN` run again.
    pub(crate) fn go(&self) {
        self.stop.set(false);
    }

    /// Interrupts the thread, whatever it does.
    pub(crate) fn kick(&self) {
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            sys::kick(thread);
        }
    }

    /// Starts what [`flushed`](Self::flushed) waits for: tells the number of exits so far, and interrupts the
    /// vCPU if it runs.
    pub(crate) fn start_flush(&self) -> u64 {
        let exits = self.exits.load(Ordering::SeqCst);
        if self.in_run.load(Ordering::SeqCst) {
            self.kick();
        }
        exits
    }

    /// Waits until the vCPU was outside `KVM_RUN` once since [`start_flush`](Self::start_flush), so that the
    /// hardware's page-modification log is in the dirty ring. Gives up at `until`.
    pub(crate) fn flushed(&self, since: u64, until: Instant) {
        let mut pause = Duration::from_micros(20);
        while self.in_run.load(Ordering::SeqCst) && self.exits.load(Ordering::SeqCst) == since {
            if Instant::now() >= until {
                return;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(1));
            // The first signal may have come before the thread entered KVM_RUN.
            self.kick();
        }
    }
}
