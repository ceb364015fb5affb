//! What the KVM tests share: anonymous guest memory, a console that collects, and leave to skip.
#![allow(dead_code, reason = "each test file uses a part")]

use std::io::{self, Write};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::layout::{Layout, PAGE_SIZE};
use vm_memory::Bytes;
use vm_memory::volatile_memory::VolatileSlice;
use vmm_shim::vmm::{GuestImage, Tracker, Vm, VmConfig, VmState};

/// Guest memory of private anonymous mappings.
pub(crate) struct AnonRam {
    layout: Layout,
    maps: Vec<(NonNull<u8>, usize)>,
}

// SAFETY: the mappings belong to the process, and are accessed through volatile slices only.
unsafe impl Send for AnonRam {}
// SAFETY: as above.
unsafe impl Sync for AnonRam {}

impl AnonRam {
    pub(crate) fn new(layout: Layout) -> Arc<Self> {
        let map = |len: usize| {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
            let at =
                unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags | libc::MAP_NORESERVE, -1, 0) };
            assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
            (NonNull::new(at.cast()).unwrap(), len)
        };
        let maps = layout.regions().iter().map(|r| map(r.len as usize)).collect();
        Arc::new(Self { layout, maps })
    }

    pub(crate) fn flat(bytes: u64) -> Arc<Self> {
        Self::new(Layout::flat(bytes).unwrap())
    }
}

impl Drop for AnonRam {
    fn drop(&mut self) {
        for (at, len) in &self.maps {
            // SAFETY: the mapping is ours, and slices of it do not outlive `self`.
            unsafe { libc::munmap(at.as_ptr().cast(), *len) };
        }
    }
}

impl GuestRam for AnonRam {
    fn layout(&self) -> &Layout {
        &self.layout
    }
    fn region(&self, region: usize) -> VolatileSlice<'_> {
        let (at, len) = self.maps[region];
        // SAFETY: the mapping is that long and lives as long as `self`.
        unsafe { VolatileSlice::new(at.as_ptr(), len) }
    }
    fn populated(&self, first: u32, pages: &mut [u64]) -> Result<(), BackendError> {
        for (chunk, word) in (first..).zip(pages) {
            *word = self.layout.valid(chunk);
        }
        Ok(())
    }
    fn discard(&self, chunk: u32, pages: u64) -> Result<(), BackendError> {
        for bit in pagecopy::bitmap::bits(pages) {
            self.chunk(chunk).write_slice(&[0; PAGE_SIZE], bit as usize * PAGE_SIZE).unwrap();
        }
        Ok(())
    }
}

/// Copies pages of a chunk.
pub(crate) fn copy_pages(from: &AnonRam, to: &AnonRam, chunk: u32, pages: u64) {
    let mut page = [0u8; PAGE_SIZE];
    for bit in pagecopy::bitmap::bits(pages) {
        from.chunk(chunk).read_slice(&mut page, bit as usize * PAGE_SIZE).unwrap();
        to.chunk(chunk).write_slice(&page, bit as usize * PAGE_SIZE).unwrap();
    }
}

/// Copies all of memory.
pub(crate) fn copy_ram(from: &AnonRam, to: &AnonRam) {
    for chunk in 0..from.layout.chunks() {
        copy_pages(from, to, chunk, from.layout.valid(chunk));
    }
}

/// The pages of a chunk that differ.
pub(crate) fn differing(a: &AnonRam, b: &AnonRam, chunk: u32) -> u64 {
    let (mut x, mut y) = ([0u8; PAGE_SIZE], [0u8; PAGE_SIZE]);
    pagecopy::bitmap::bits(a.layout.valid(chunk))
        .filter(|bit| {
            a.chunk(chunk).read_slice(&mut x, *bit as usize * PAGE_SIZE).unwrap();
            b.chunk(chunk).read_slice(&mut y, *bit as usize * PAGE_SIZE).unwrap();
            x != y
        })
        .fold(0, |word, bit| word | 1 << bit)
}

/// A console that keeps what is printed.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Console {
    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
    /// Whole lines of each of `cpus` vCPUs of a counter: at least this many.
    pub(crate) fn passes(&self, cpus: u8) -> usize {
        let text = self.bytes();
        let of = |cpu: u8| {
            text.split_inclusive(|&b| b == b'\n')
                .filter(|l| l.starts_with(&[b'c', b'0' + cpu]) && l.ends_with(b"\n"))
                .count()
        };
        (0..cpus).map(of).min().unwrap_or(0)
    }
    pub(crate) fn lines(&self) -> usize {
        self.0.lock().unwrap().iter().filter(|&&b| b == b'\n').count()
    }
}

/// Whether KVM is there; prints why not.
pub(crate) fn kvm() -> bool {
    match vmm_shim::kvm::open() {
        Ok(_) => true,
        Err(e) => {
            println!("skipped: {e}");
            false
        }
    }
}

/// A started, paused VM.
pub(crate) fn vm(cpus: u8, guest: GuestImage, tracker: Tracker, ram: &Arc<AnonRam>) -> (Vm, Console) {
    let console = Console::default();
    let vm = Vm::new(VmConfig { cpus, guest, tracker }, ram.clone(), Box::new(console.clone())).unwrap();
    vm.start().unwrap();
    (vm, console)
}

/// Waits until something holds, and fails where it never does, or the guest crashes.
pub(crate) fn wait_for(vm: &Vm, what: &str, mut holds: impl FnMut() -> bool) {
    testkit::wait_until(what, Duration::from_secs(60), || {
        assert!(!matches!(vm.state(), VmState::Crashed(_)), "waiting for {what}: {:?}", vm.state());
        holds()
    });
}
