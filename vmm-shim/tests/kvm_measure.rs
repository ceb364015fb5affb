//! Figures of the VMM and the dirty trackers: `cargo test --release --test kvm_measure -- --ignored
//! --nocapture`.

mod common;

use std::time::{Duration, Instant};

use common::*;
use pagecopy::backend::{Guest, GuestRam};
use pagecopy::bitmap::PageBitmap;
use vmm_shim::guests::counter::CounterParams;
use vmm_shim::guests::writer::{FIRST_FREE, Writer};
use vmm_shim::vmm::{GuestImage, Tracker};

const MIB: u64 = 1 << 20;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn counter(working_set: u64, pages_per_s: u64, page_words: u32) -> GuestImage {
    GuestImage::Counter(CounterParams { working_set, pages_per_s, page_words })
}

/// Pages a second over a while; a line of output is a pass.
fn rate(vm: &vmm_shim::vmm::Vm, console: &Console, pages: u64) -> f64 {
    let (lines, start) = (console.lines(), Instant::now());
    std::thread::sleep(Duration::from_secs(2));
    let passed = (console.lines() - lines) as f64;
    assert_eq!(vm.state(), vmm_shim::vmm::VmState::Running);
    passed * pages as f64 / start.elapsed().as_secs_f64()
}

#[test]
#[ignore = "a measurement"]
fn stop_save_load() {
    if !kvm() {
        return;
    }
    for cpus in [1, 2, 4] {
        let ram = AnonRam::flat(64 * MIB);
        let (a, _) = vm(cpus, counter(32 * MIB, 20_000, 16), Tracker::None, &ram);
        let (mut pause, mut save, mut load) = (vec![], vec![], vec![]);
        for _ in 0..50 {
            a.resume().unwrap();
            std::thread::sleep(Duration::from_millis(5));
            let start = Instant::now();
            a.pause().unwrap();
            pause.push(start.elapsed());
            let start = Instant::now();
            let state = a.save_state().unwrap();
            save.push(start.elapsed());
            let (b, _) = vm(cpus, GuestImage::Incoming, Tracker::None, &ram);
            let start = Instant::now();
            b.load_state(&state).unwrap();
            load.push(start.elapsed());
        }
        let bytes: usize = a.save_state().unwrap().iter().map(|b| b.bytes.len()).sum();
        let (pause, save, load) = (median(pause), median(save), median(load));
        println!("{cpus} vCPUs: pause {pause:?}, save {save:?} ({bytes} bytes), load {load:?}");
    }
}

#[test]
#[ignore = "a measurement"]
fn counter_rates() {
    if !kvm() {
        return;
    }
    for (cpus, words) in [(1, 0), (1, 64), (1, 508), (2, 64)] {
        let ram = AnonRam::flat(256 * MIB);
        let (a, console) = vm(cpus, counter(128 * MIB, 0, words), Tracker::Bitmap, &ram);
        let pages = 128 * MIB / 4096 / u64::from(cpus);
        a.resume().unwrap();
        wait_for(&a, "two passes", || console.lines() >= 2 * usize::from(cpus));
        let free = rate(&a, &console, pages);
        a.throttle(50).unwrap();
        let half = rate(&a, &console, pages);
        a.throttle(0).unwrap();
        println!("{cpus} vCPUs, {words} words: {free:.0} pages/s, throttled by 50 % {half:.0}");
    }
    let ram = AnonRam::flat(64 * MIB);
    let (a, console) = vm(1, counter(4 * MIB, 50_000, 8), Tracker::None, &ram);
    a.resume().unwrap();
    println!("paced at 50000 pages/s: {:.0} pages/s", rate(&a, &console, 1024));
}

#[test]
#[ignore = "a measurement"]
fn dirty_log_costs() {
    if !kvm() {
        return;
    }
    for tracker in [Tracker::Bitmap, Tracker::Ring] {
        let ram = AnonRam::flat(512 * MIB);
        let (a, _) = vm(1, GuestImage::Writer, tracker, &ram);
        let log = a.dirty_log().unwrap();
        let dirty = PageBitmap::new(ram.layout().chunks());
        let mut writer = Writer::new(&a);
        let list: Vec<u64> = (0..60_000).map(|i| FIRST_FREE + i * 4096).collect();
        writer.write(&list).unwrap();
        let timed = |what: &str, run: &mut dyn FnMut()| {
            let start = Instant::now();
            run();
            println!("{}: {what}: {:?}", log.name(), start.elapsed());
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
