//! Dirty syncs of 256 MiB: by userfaultfd, and by KVM's bitmap and ring where there is KVM. Writing is not timed; what it takes to
//! find what was written, and to arm the tracker again, is.

use std::io::sink;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pagecopy::backend::{DirtyLog, Guest, GuestRam};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::PAGE_SIZE;
use vm_memory::Bytes;
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::uffd_log::UffdLog;
use vmm_shim::vmm::writer::{FIRST_FREE, Writer};
use vmm_shim::vmm::{self, GuestImage, Tracker, Vm, VmConfig};

const BYTES: u64 = 256 << 20;
/// One page in so many is written; 0: none.
const SHARES: [(&str, usize); 4] = [("nothing", 0), ("1-percent", 100), ("10-percent", 10), ("half", 2)];

fn memory() -> Arc<GuestMemory> {
    let layout = vmm::layout(BYTES).expect("a size that suits");
    let memory = GuestMemory::create(layout, &Backing::Anonymous { huge: false }).expect("memory");
    memory.populate(0, memory.layout().chunks()).expect("populated memory");
    Arc::new(memory)
}

/// Pages that are written, by their addresses.
fn addresses(one_in: usize) -> Vec<u64> {
    let pages = (FIRST_FREE..BYTES).step_by(PAGE_SIZE);
    if one_in == 0 { Vec::new() } else { pages.step_by(one_in).collect() }
}

/// A sync and, for trackers that want it, the clear of what it reported.
fn sync(log: &dyn DirtyLog, dirty: &PageBitmap) -> Duration {
    let begin = Instant::now();
    log.sync(dirty).expect("a sync");
    let words: Vec<u64> = (0..dirty.chunks()).map(|chunk| dirty.take(chunk)).collect();
    log.clear(0, &words).expect("a clear");
    begin.elapsed()
}

fn measure(c: &mut Criterion, log: &dyn DirtyLog, ram: &dyn GuestRam, mut write: impl FnMut(&[u64])) {
    let dirty = PageBitmap::new(ram.layout().chunks());
    let mut group = c.benchmark_group(format!("dirty-sync/{}", log.name()));
    group.throughput(Throughput::Bytes(BYTES)).sample_size(10);
    log.start().expect("a log that starts");
    for (name, one_in) in SHARES {
        let addresses = addresses(one_in);
        group.bench_function(name, |b| {
            b.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    write(&addresses);
                    spent += sync(log, &dirty);
                }
                spent
            });
        });
    }
    log.stop().expect("a log that stops");
    group.finish();
}

fn userfaultfd(c: &mut Criterion) {
    let ram = memory();
    let log = match UffdLog::new(ram.clone()) {
        Ok(log) => log,
        Err(reason) => return eprintln!("userfaultfd is left out: {reason}"),
    };
    let region = ram.region(0);
    let mut value = 0u64;
    measure(c, &log, &*ram, |addresses| {
        value += 1;
        for address in addresses {
            region.write_obj(value, *address as usize).expect("an address within the region");
        }
    });
}

fn kvm(c: &mut Criterion) {
    if let Err(reason) = vmm_shim::kvm::open() {
        return eprintln!("KVM's trackers are left out: {reason}");
    }
    for tracker in [Tracker::Bitmap, Tracker::Ring] {
        let ram = memory();
        let config = VmConfig { cpus: 1, guest: GuestImage::Writer, tracker };
        let vm = Vm::new(config, ram.clone(), Box::new(sink())).expect("a VM");
        vm.start().expect("vCPU threads");
        let log = vm.dirty_log().expect("the tracker that was asked for");
        let mut writer = Writer::new(&vm);
        measure(c, &*log, &*ram, |addresses| {
            if !addresses.is_empty() {
                writer.write(addresses).expect("a guest that writes");
            }
        });
        vm.pause().expect("a guest that stops");
    }
}

criterion_group!(benches, userfaultfd, kvm);
criterion_main!(benches);
