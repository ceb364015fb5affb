//! Costs of the mini VMM and of KVM's dirty trackers: pause, save, load, the counter's rate, sync and clear.
//! `cargo run --release -p pageferry-benches --bin kvm-costs`

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pagecopy::backend::{Guest, GuestRam, StateBlob};
use pagecopy::bitmap::PageBitmap;
use pageferry::print;
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::guests::counter::CounterParams;
use vmm_shim::vmm::writer::{FIRST_FREE, Writer};
use vmm_shim::vmm::{self, GuestImage, Tracker, Vm, VmConfig, VmState};

const MIB: u64 = 1 << 20;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn counter(working_set: u64, pages_per_s: u64, page_words: u32) -> GuestImage {
    GuestImage::Counter(CounterParams { working_set, pages_per_s, page_words })
}

/// Counts the lines a guest prints.
#[derive(Clone, Default)]
struct Console(Arc<AtomicUsize>);

impl Console {
    fn lines(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.fetch_add(bytes.iter().filter(|&&b| b == b'\n').count(), Ordering::Relaxed);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn ram(bytes: u64) -> Arc<GuestMemory> {
    let layout = vmm::layout(bytes).expect("a size that suits");
    Arc::new(GuestMemory::create(layout, &Backing::Anonymous { huge: true }).expect("memory"))
}

fn vm(cpus: u8, guest: GuestImage, tracker: Tracker, ram: &Arc<GuestMemory>) -> (Vm, Console) {
    let console = Console::default();
    let config = VmConfig { cpus, guest, tracker };
    let vm = Vm::new(config, ram.clone(), Box::new(console.clone())).expect("a VM");
    vm.start().expect("threads");
    (vm, console)
}

fn main() -> ExitCode {
    print::end("kvm-costs", run())
}

fn run() -> ExitCode {
    if let Err(error) = vmm_shim::kvm::open() {
        print::note(format_args!("kvm-costs: {error}"));
        return ExitCode::FAILURE;
    }
    stop_save_load();
    counter_rates();
    dirty_log_costs();
    ExitCode::SUCCESS
}

/// Pages a second over a while; a line of output is a pass.
fn rate(vm: &Vm, console: &Console, pages: u64) -> f64 {
    let (lines, start) = (console.lines(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let passed = (console.lines() - lines) as f64;
    assert_eq!(vm.state(), VmState::Running);
    passed * pages as f64 / start.elapsed().as_secs_f64()
}

fn stop_save_load() {
    for cpus in [1, 2, 4] {
        let memory = ram(64 * MIB);
        let (a, _) = vm(cpus, counter(32 * MIB, 20_000, 16), Tracker::None, &memory);
        let (mut pause, mut save, mut load) = (vec![], vec![], vec![]);
        for _ in 0..50 {
            a.resume().unwrap();
            std::thread::sleep(Duration::from_millis(5));
            let start = Instant::now();
            a.pause().unwrap();
            pause.push(start.elapsed());
            let start = Instant::now();
            let state = StateBlob::all_of(&a).unwrap();
            save.push(start.elapsed());
            let (b, _) = vm(cpus, GuestImage::Incoming, Tracker::None, &memory);
            let start = Instant::now();
            b.load_state(&state).unwrap();
            load.push(start.elapsed());
        }
        let bytes: usize = StateBlob::all_of(&a).unwrap().iter().map(|b| b.bytes.len()).sum();
        let (pause, save, load) = (median(pause), median(save), median(load));
        print::line(format_args!(
            "{cpus} vCPUs: pause {pause:?}, save {save:?} ({bytes} bytes), load {load:?}"
        ));
    }
}

fn counter_rates() {
    for (cpus, words) in [(1, 0), (1, 64), (1, 508), (2, 64)] {
        let memory = ram(256 * MIB);
        let (a, console) = vm(cpus, counter(128 * MIB, 0, words), Tracker::Bitmap, &memory);
        let pages = 128 * MIB / 4096 / u64::from(cpus);
        a.resume().unwrap();
        while console.lines() < 2 * usize::from(cpus) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let free = rate(&a, &console, pages);
        a.throttle().unwrap().set(50).unwrap();
        let half = rate(&a, &console, pages);
        a.throttle().unwrap().set(0).unwrap();
        print::line(format_args!(
            "{cpus} vCPUs, {words} words: {free:.0} pages/s, throttled by 50 % {half:.0}"
        ));
    }
    let memory = ram(64 * MIB);
    let (a, console) = vm(1, counter(4 * MIB, 50_000, 8), Tracker::None, &memory);
    a.resume().unwrap();
    print::line(format_args!("paced at 50000 pages/s: {:.0} pages/s", rate(&a, &console, 1024)));
}

fn dirty_log_costs() {
    for tracker in [Tracker::Bitmap, Tracker::Ring] {
        let memory = ram(512 * MIB);
        let (a, _) = vm(1, GuestImage::Writer, tracker, &memory);
        let log = a.dirty_log().unwrap();
        let dirty = PageBitmap::new(memory.layout().chunks());
        let mut writer = Writer::new(&a);
        let list: Vec<u64> = (0..60_000).map(|i| FIRST_FREE + i * 4096).collect();
        writer.write(&list).unwrap();
        let timed = |what: &str, run: &mut dyn FnMut()| {
            let start = Instant::now();
            run();
            print::line(format_args!("{}: {what}: {:?}", log.name(), start.elapsed()));
        };
        timed("60000 writes, not logged", &mut || drop(writer.write(&list)));
        timed("start", &mut || log.start().unwrap());
        for _ in 0..2 {
            timed("60000 writes, logged and armed", &mut || drop(writer.write(&list)));
            timed("sync of them", &mut || drop(log.sync(&dirty)));
            let words: Vec<u64> = (0..dirty.chunks()).map(|chunk| dirty.take(chunk)).collect();
            timed("clear of them at once", &mut || log.clear(0, &words).unwrap());
            timed("sync of nothing", &mut || drop(log.sync(&dirty)));
        }
        writer.write(&list).unwrap();
        log.sync(&dirty).unwrap();
        timed("clear of 941 chunks, one by one", &mut || {
            for (chunk, pages) in dirty.iter() {
                log.clear(chunk, &[pages]).unwrap();
            }
        });
        timed("stop", &mut || log.stop().unwrap());
    }
}
