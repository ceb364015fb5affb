//! KVM's dirty trackers: they report exactly what was written, and lose nothing while vCPUs write flat out.

mod common;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::*;
use pagecopy::backend::{DirtyLog, Guest, GuestRam, StateBlob};
use pagecopy::bitmap::PageBitmap;
use pagecopy::layout::{Layout, PAGE_SIZE, Region};
use vmm_shim::guests::counter::{Checker, CounterParams, Side};
use vmm_shim::vmm::writer::{FIRST_FREE, Writer};
use vmm_shim::vmm::{GuestImage, Tracker, Vm};

const MIB: u64 = 1 << 20;
const PAGE: u64 = PAGE_SIZE as u64;
const HIGH: u64 = 4 << 30;

/// Two regions, neither a whole number of chunks.
fn ragged() -> Layout {
    Layout::new(vec![Region::new("low", 0, 16 * MIB + 5 * PAGE), Region::new("high", HIGH, MIB + 67 * PAGE)])
        .unwrap()
}

fn started(tracker: Tracker, ram: &Arc<AnonRam>) -> (Vm, Arc<dyn DirtyLog>) {
    let (vm, _) = vm(1, GuestImage::Writer, tracker, ram);
    let log = vm.dirty_log().unwrap();
    (vm, log)
}

/// What a sync reports, as addresses, of what the writer guest may write: KVM may take a first read of its
/// code or list for a write.
fn report(log: &dyn DirtyLog, layout: &Layout) -> BTreeSet<u64> {
    let dirty = PageBitmap::new(layout.chunks());
    assert_eq!(log.sync(&dirty).unwrap(), dirty.count(), "{}", log.name());
    let pages =
        dirty.iter().flat_map(|(chunk, pages)| pagecopy::bitmap::bits(pages).map(move |b| (chunk, b)));
    pages.map(|(chunk, bit)| layout.address(chunk, bit).unwrap()).filter(|&gpa| gpa >= FIRST_FREE).collect()
}

fn clear(log: &dyn DirtyLog, layout: &Layout, addresses: &BTreeSet<u64>) {
    let mut words = vec![0; layout.chunks() as usize];
    for &gpa in addresses {
        let (chunk, bit) = layout.page_at(gpa).unwrap();
        words[chunk as usize] |= 1 << bit;
    }
    log.clear(0, &words).unwrap();
}

fn exact(tracker: Tracker) {
    let ram = AnonRam::new(ragged());
    let layout = ram.layout();
    let (vm, log) = started(tracker, &ram);
    let mut writer = Writer::new(&vm);
    let (low_end, high_end) = (16 * MIB + 5 * PAGE, HIGH + MIB + 67 * PAGE);
    let first = FIRST_FREE;
    let all: BTreeSet<u64> =
        [first, first + PAGE, first + 70 * PAGE, low_end - PAGE, HIGH, HIGH + 63 * PAGE, high_end - PAGE]
            .into();
    let list: Vec<u64> = all.iter().copied().collect();
    let none = BTreeSet::new();

    // Written before the start: the caller's business.
    writer.write(&list).unwrap();
    log.start().unwrap();
    assert_eq!(report(&*log, layout), none, "nothing was written since the start");
    writer.write(&list).unwrap();
    assert_eq!(report(&*log, layout), all, "each page written, no other");
    assert_eq!(report(&*log, layout), none, "each page once");
    clear(&*log, layout, &all);
    assert_eq!(report(&*log, layout), none, "nothing was written since");

    // Clear a part: what was not cleared stays reported, and what is written after the clear is reported
    // again.
    let (some, rest) = (BTreeSet::from([list[0], list[3], list[6]]), list[1]);
    writer.write(&list).unwrap();
    assert_eq!(report(&*log, layout), all);
    clear(&*log, layout, &some);
    writer.write(&[list[0], list[6]]).unwrap();
    assert_eq!(report(&*log, layout), BTreeSet::from([list[0], list[6]]));
    clear(&*log, layout, &all);
    writer.write(&[rest]).unwrap();
    assert_eq!(report(&*log, layout), BTreeSet::from([rest]));

    // Stopped, it tells nothing; started again, nothing from before.
    writer.write(&list).unwrap();
    log.stop().unwrap();
    log.stop().unwrap();
    assert!(log.sync(&PageBitmap::new(layout.chunks())).is_err());
    writer.write(&list).unwrap();
    log.start().unwrap();
    assert_eq!(report(&*log, layout), none);
    writer.write(&list[2..4]).unwrap();
    assert_eq!(report(&*log, layout), list[2..4].iter().copied().collect());
}

#[test]
fn bitmap_is_exact() {
    if kvm() {
        exact(Tracker::Bitmap);
    }
}

#[test]
fn ring_is_exact() {
    if kvm() {
        exact(Tracker::Ring);
    }
}

#[test]
fn every_page_once() {
    if !kvm() {
        return;
    }
    for tracker in [Tracker::Bitmap, Tracker::Ring] {
        let ram = AnonRam::new(ragged());
        let layout = ram.layout();
        let (vm, log) = started(tracker, &ram);
        let mut writer = Writer::new(&vm);
        let low = (FIRST_FREE..16 * MIB + 5 * PAGE).step_by(PAGE_SIZE);
        let list: Vec<u64> = low.chain((HIGH..HIGH + MIB + 67 * PAGE).step_by(PAGE_SIZE)).collect();
        log.start().unwrap();
        for _ in 0..3 {
            writer.write(&list).unwrap();
            let all = report(&*log, layout);
            assert!(
                all == list.iter().copied().collect(),
                "{tracker:?}: {} of {} pages",
                all.len(),
                list.len()
            );
            clear(&*log, layout, &all);
        }
    }
}

#[test]
fn clear_refuses_chunks_that_are_not_there() {
    if !kvm() {
        return;
    }
    let ram = AnonRam::flat(16 * MIB);
    let (_vm, log) = started(Tracker::Bitmap, &ram);
    assert!(log.clear(0, &[1]).is_err(), "not started");
    log.start().unwrap();
    let error = log.clear(63, &[1, 1]).unwrap_err().to_string();
    assert!(error.contains("63..65"), "{error}");
}

/// Copies memory round by round while the guest writes flat out, then stops it: nothing may differ, and the
/// guest goes on with the copy.
fn loses_nothing(cpus: u8, tracker: Tracker, one_by_one: bool) {
    let params = CounterParams { working_set: 12 * MIB, pages_per_s: 0, page_words: 32 };
    let (ram_a, ram_b) = (AnonRam::flat(24 * MIB), AnonRam::flat(24 * MIB));
    let (a, console_a) = vm(cpus, GuestImage::Counter(params), tracker, &ram_a);
    let log = a.dirty_log().unwrap();
    let chunks = ram_a.layout().chunks();
    a.resume().unwrap();
    wait_for(&a, "the first pass", || console_a.lines() >= usize::from(cpus));
    log.start().unwrap();
    copy_ram(&ram_a, &ram_b);
    let dirty = PageBitmap::new(chunks);
    let mut moved = 0;
    // A small ring fills up where a vCPU has more pages than it has entries.
    let fills = matches!(tracker, Tracker::RingOf { entries } if params.pages(cpus) > entries.into());
    let rounds = if fills { 8 } else { 40 };
    for round in 0..=rounds {
        let full = a.ring_full_exits();
        if round == rounds {
            a.pause().unwrap();
        } else if fills {
            wait_for(&a, "a full ring", || a.ring_full_exits() > full);
        } else {
            std::thread::sleep(Duration::from_millis(2));
        }
        log.sync(&dirty).unwrap();
        moved += dirty.count();
        let words: Vec<u64> = (0..chunks).map(|chunk| dirty.take(chunk)).collect();
        if !one_by_one {
            log.clear(0, &words).unwrap();
        }
        for (chunk, &pages) in (0..).zip(&words) {
            if one_by_one && pages != 0 {
                log.clear(chunk, &[pages]).unwrap();
            }
            copy_pages(&ram_a, &ram_b, chunk, pages);
        }
    }
    let wrong: Vec<_> =
        (0..chunks).map(|c| (c, differing(&ram_a, &ram_b, c))).filter(|&(_, d)| d != 0).collect();
    assert!(wrong.is_empty(), "{tracker:?}, {cpus} vCPUs: lost writes to {wrong:x?}");
    let full = a.ring_full_exits();
    println!("{tracker:?}, {cpus} vCPUs: {moved} pages in {rounds} rounds, {full} full rings");
    assert!(moved > 1000, "the guest wrote all the time: {moved} pages moved");

    let state = StateBlob::all_of(&a).unwrap();
    let (b, console_b) = vm(cpus, GuestImage::Incoming, Tracker::None, &ram_b);
    b.load_state(&state).unwrap();
    b.resume().unwrap();
    wait_for(&b, "passes at the destination", || console_b.lines() >= 3 * usize::from(cpus));
    b.pause().unwrap();
    let mut checker = Checker::new(cpus, params.pages(cpus));
    checker.feed(Side::Source, &console_a.bytes()).unwrap();
    checker.feed(Side::Destination, &console_b.bytes()).unwrap();
}

#[test]
fn bitmap_loses_nothing() {
    if kvm() {
        for cpus in [1, 2, 4] {
            loses_nothing(cpus, Tracker::Bitmap, cpus == 2);
        }
    }
}

#[test]
fn ring_loses_nothing() {
    if kvm() {
        for cpus in [1, 2, 4] {
            loses_nothing(cpus, Tracker::Ring, false);
            loses_nothing(cpus, Tracker::RingOf { entries: 1024 }, false);
        }
    }
}

/// Stops this process and lets it go on, all the time.
struct Stopped(std::process::Child);

impl Stopped {
    fn now_and_then() -> Self {
        // Until its input ends; never between the two.
        let script = "while kill -STOP $PPID; kill -CONT $PPID; read -t 0.002; [ $? -gt 128 ]; do :; done";
        Self(Command::new("bash").args(["-c", script]).stdin(Stdio::piped()).spawn().unwrap())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// A pending signal ends KVM_RESET_DIRTY_RINGS early (Linux 6.16), and this one cannot be held back.
#[test]
fn ring_loses_nothing_while_the_process_is_stopped() {
    if kvm() {
        let _stopped = Stopped::now_and_then();
        for _ in 0..3 {
            loses_nothing(2, Tracker::RingOf { entries: 1024 }, false);
        }
    }
}
