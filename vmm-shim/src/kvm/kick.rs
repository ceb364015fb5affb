//! Getting a vCPU out of `KVM_RUN` from another thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::sys::{self, ImmediateExit};

/// Longest time that [`flush`] waits for a vCPU to leave the guest.
const FLUSH_MAX: Duration = Duration::from_millis(50);

/// Makes each vCPU that is in the guest leave it once.
pub(crate) fn flush(vcpus: &[Arc<Kicker>]) {
    let until = Instant::now() + FLUSH_MAX;
    let exits: Vec<u64> = vcpus.iter().map(|v| v.start_flush()).collect();
    for (vcpu, since) in vcpus.iter().zip(exits) {
        vcpu.flushed(since, until);
    }
}

/// What other threads need of a vCPU's thread.
pub(crate) struct Kicker {
    stop: ImmediateExit,
    /// 0 while no thread runs the vCPU.
    thread: AtomicI32,
    in_run: AtomicBool,
    /// A signal is on its way to the thread. One that is stuck in the kernel takes none, and signals of this kind queue up, each from a
    /// store that all processes of a user share: once it is empty, nobody can be kicked any more.
    kicked: Arc<AtomicBool>,
    exits: AtomicU64,
}

impl Kicker {
    pub(crate) fn new(vcpu: &VcpuFd) -> io::Result<Self> {
        Ok(Self {
            stop: ImmediateExit::new(vcpu)?,
            thread: AtomicI32::new(0),
            in_run: AtomicBool::new(false),
            kicked: Arc::default(),
            exits: AtomicU64::new(0),
        })
    }

    /// Makes the calling thread the vCPU's, until what this returns is dropped.
    pub(crate) fn attach(&self) -> Attached<'_> {
        let expects = sys::expect_kicks(&self.kicked);
        self.kicked.store(false, Ordering::SeqCst);
        sys::unblock_kick();
        self.thread.store(sys::thread_id(), Ordering::SeqCst);
        Attached { kicker: self, _expects: expects }
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
        if thread != 0 && !self.kicked.swap(true, Ordering::SeqCst) && !sys::kick(thread) {
            // There was no room for it: the next may find some.
            self.kicked.store(false, Ordering::SeqCst);
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

/// The calling thread runs the vCPU.
pub(crate) struct Attached<'a> {
    kicker: &'a Kicker,
    _expects: sys::ExpectsKicks,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        self.kicker.thread.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;

    /// Signals that wait for processes of this user.
    fn queued() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("SigQ:")).unwrap();
        line.trim().split('/').next().unwrap().parse().unwrap()
    }

    #[test]
    fn a_thread_that_takes_no_signal_is_sent_one() {
        let Ok(kvm) = Kvm::new() else { return println!("skipped: no /dev/kvm") };
        sys::install_kick_handler();
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let kicker = Kicker::new(&vcpu).unwrap();
        std::thread::scope(|scope| {
            let (held, attached) = std::sync::mpsc::channel();
            let (go, going) = std::sync::mpsc::channel::<()>();
            let kicker = &kicker;
            let thread = scope.spawn(move || {
                let _attached = kicker.attach();
                let blocked = sys::SignalsBlocked::new();
                held.send(()).unwrap();
                going.recv().unwrap();
                drop(blocked);
                // It has come, and others are taken again.
                assert!(!kicker.kicked.load(Ordering::SeqCst));
                kicker.kick();
                assert!(!kicker.kicked.load(Ordering::SeqCst));
            });
            attached.recv().unwrap();
            let before = queued();
            (0..2000).for_each(|_| kicker.kick());
            // Others may have sent some meanwhile.
            assert!(queued() < before + 1000, "{} signals wait, {before} did before", queued());
            assert!(kicker.kicked.load(Ordering::SeqCst));
            go.send(()).unwrap();
            thread.join().unwrap();
        });
        kicker.kick();
    }
}
