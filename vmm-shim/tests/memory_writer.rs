//! The guest without KVM: it runs, pauses, moves to other memory, goes on there, and notices what was lost.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use pagecopy::backend::{DirtyLog, Guest, GuestRam, StateBlob};
use pagecopy::bitmap::{PageBitmap, bits};
use pagecopy::layout::{Layout, PAGE_SIZE, Region};
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::guests::counter::{first_chain, mix};
use vmm_shim::uffd_log::UffdLog;
use vmm_shim::writer::{MemoryWriter, WriterOptions};

/// A guest that hangs fails the test after this long; nothing depends on how fast it is.
const HANG: Duration = Duration::from_secs(60);

const OPTIONS: WriterOptions = WriterOptions { threads: 3, gpa: 0x5000, bytes: 40 << 12, pages_per_s: 0 };

fn layout() -> Layout {
    Layout::new(vec![Region::new("low", 0x4000, 64 << 12), Region::new("high", 1 << 32, 1 << 20)]).unwrap()
}

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::create(layout(), &Backing::Anonymous { huge: false }).unwrap())
}

fn writer(memory: &Arc<GuestMemory>, options: WriterOptions) -> (MemoryWriter, Receiver<String>) {
    let (send, lines) = channel();
    let sink = Box::new(move |line: &[u8]| {
        // Nobody listens at the end of a test.
        let _ = send.send(String::from_utf8(line.to_vec()).unwrap());
    });
    (MemoryWriter::new(memory.clone(), options, sink).unwrap(), lines)
}

/// Follows each thread's passes and chain.
struct Follower {
    pages: u64,
    at: HashMap<u8, (u64, u64)>,
}

impl Follower {
    fn new(options: &WriterOptions) -> Self {
        let at = (0..options.threads).map(|cpu| (cpu, (0, first_chain(cpu)))).collect();
        Self { pages: options.pages(), at }
    }

    fn check(&mut self, line: &str) {
        let cpu = line[1..].chars().next().unwrap().to_digit(16).unwrap() as u8;
        let (pass, chain) = self.at.get_mut(&cpu).unwrap_or_else(|| panic!("unknown thread: {line}"));
        let steps = *pass * self.pages..(*pass + 1) * self.pages;
        *chain = steps.fold(*chain, mix);
        assert_eq!(line, format!("c{cpu:x} p{pass:x} s{chain:x}\n"));
        *pass += 1;
    }

    /// Follows lines until every thread has done this many passes.
    fn until(&mut self, lines: &Receiver<String>, passes: u64) {
        while self.at.values().any(|(pass, _)| *pass < passes) {
            self.check(&lines.recv_timeout(HANG).expect("the guest prints"));
        }
    }
}

fn copy_page(from: &GuestMemory, to: &GuestMemory, chunk: u32, bit: u32) {
    let mut page = vec![0u8; PAGE_SIZE];
    let offset = bit as usize * PAGE_SIZE;
    from.chunk(chunk).subslice(offset, PAGE_SIZE).unwrap().copy_to(&mut page[..]);
    to.chunk(chunk).subslice(offset, PAGE_SIZE).unwrap().copy_from(&page[..]);
}

fn copy_all(from: &GuestMemory, to: &GuestMemory) {
    for chunk in 0..layout().chunks() {
        for bit in bits(layout().valid(chunk)) {
            copy_page(from, to, chunk, bit);
        }
    }
}

#[test]
fn goes_on_in_other_memory_where_it_stood() {
    let source_memory = memory();
    let (source, lines) = writer(&source_memory, OPTIONS);
    let mut follower = Follower::new(&OPTIONS);
    source.resume().unwrap();
    follower.until(&lines, 3);
    source.pause().unwrap();
    for line in lines.try_iter() {
        follower.check(&line);
    }

    let memory = memory();
    copy_all(&source_memory, &memory);
    // Made otherwise: what it does comes with the state.
    let other = WriterOptions { threads: 1, gpa: 1 << 32, bytes: 4096, pages_per_s: 1 };
    let (destination, lines) = writer(&memory, other);
    destination.load_state(&StateBlob::all_of(&source).unwrap()).unwrap();
    assert_eq!(destination.options(), OPTIONS);
    destination.resume().unwrap();
    let passes = follower.at.values().map(|(pass, _)| pass + 2).max().unwrap();
    follower.until(&lines, passes);
    destination.pause().unwrap();
    for line in lines.try_iter() {
        follower.check(&line);
    }
    assert_eq!((source.mismatches(), destination.mismatches()), (0, 0));
    assert!(destination.steps() > 0);
}

#[test]
fn migrates_live_with_a_dirty_log() {
    let source_memory = memory();
    let log = match UffdLog::new(source_memory.clone()) {
        Ok(log) => log,
        Err(e) => return println!("skipped: {e}: {}", e.source),
    };
    let (source, lines) = writer(&source_memory, OPTIONS);
    let mut follower = Follower::new(&OPTIONS);
    source.resume().unwrap();
    follower.until(&lines, 2);
    log.start().unwrap();
    let memory = memory();
    let dirty = PageBitmap::full(&layout());
    let copy = || {
        for chunk in 0..dirty.chunks() {
            bits(dirty.take(chunk)).for_each(|bit| copy_page(&source_memory, &memory, chunk, bit));
        }
    };
    for round in 0..20 {
        copy();
        follower.until(&lines, round);
        log.sync(&dirty).unwrap();
    }
    source.pause().unwrap();
    log.sync(&dirty).unwrap();
    copy();
    for line in lines.try_iter() {
        follower.check(&line);
    }
    let (destination, lines) = writer(&memory, OPTIONS);
    destination.load_state(&StateBlob::all_of(&source).unwrap()).unwrap();
    destination.resume().unwrap();
    let passes = follower.at.values().map(|(pass, _)| pass + 2).max().unwrap();
    follower.until(&lines, passes);
    assert_eq!(destination.mismatches(), 0);
}

#[test]
fn memory_that_changed_behind_its_back_is_noticed() {
    let memory = memory();
    let (guest, lines) = writer(&memory, OPTIONS);
    let mut follower = Follower::new(&OPTIONS);
    guest.resume().unwrap();
    follower.until(&lines, 2);
    guest.pause().unwrap();
    for line in lines.try_iter() {
        follower.check(&line);
    }
    // Page 1 of each thread's slice: its last byte, which is 0, for it is the top of a step number.
    for cpu in 0..3 {
        let last = (OPTIONS.gpa - 0x4000) as usize + (cpu * 13 + 1) * PAGE_SIZE + PAGE_SIZE - 1;
        memory.region(0).subslice(last, 1).unwrap().copy_from(&[0x40u8]);
    }
    guest.resume().unwrap();
    let mut errors: Vec<String> = Vec::new();
    while errors.len() < 3 {
        let line = lines.recv_timeout(HANG).unwrap();
        if line.starts_with("E ") { errors.push(line) } else { follower.check(&line) }
    }
    // Each page was repaired by the write that followed.
    let passes = follower.at.values().map(|(pass, _)| pass + 2).max().unwrap();
    follower.until(&lines, passes);
    assert_eq!(guest.mismatches(), 3);
    errors.sort();
    for (cpu, line) in errors.iter().enumerate() {
        assert!(line.starts_with(&format!("E c{cpu} p1 want ")) && line.contains(" got 40"), "{line}");
    }
}

#[test]
fn a_paused_guest_writes_nothing() {
    let (source_memory, copy) = (memory(), memory());
    let (guest, lines) = writer(&source_memory, OPTIONS);
    guest.pause().unwrap();
    assert_eq!(guest.steps(), 0, "made paused");
    for round in 1..20 {
        guest.resume().unwrap();
        lines.recv_timeout(HANG).unwrap();
        guest.throttle().unwrap().set(if round % 2 == 0 { 99 } else { 0 }).unwrap();
        guest.pause().unwrap();
        let (steps, state) = (guest.steps(), StateBlob::all_of(&guest).unwrap());
        copy_all(&source_memory, &copy);
        for _ in 0..100 {
            std::thread::yield_now();
        }
        assert_eq!(guest.steps(), steps);
        assert_eq!(StateBlob::all_of(&guest).unwrap(), state);
        for chunk in 0..layout().chunks() {
            let (mut a, mut b) = (vec![0u8; 64 * PAGE_SIZE], vec![1u8; 64 * PAGE_SIZE]);
            source_memory.chunk(chunk).copy_to(&mut a[..]);
            copy.chunk(chunk).copy_to(&mut b[..]);
            let bytes = layout().locate(chunk).unwrap().bytes();
            assert!(a[..bytes] == b[..bytes], "chunk {chunk}");
        }
    }
}

#[test]
fn paced_and_throttled_guests_pause_and_go_on() {
    // One page is a whole pass, so every round but the first begins in a sleep of a second, or of a throttle's 99
    // parts.
    let slow = WriterOptions { threads: 2, pages_per_s: 1, bytes: 2 << 12, ..OPTIONS };
    let memory = memory();
    let (guest, lines) = writer(&memory, slow);
    let mut follower = Follower::new(&slow);
    guest.resume().unwrap();
    for round in 1..6 {
        guest.throttle().unwrap().set(99).unwrap();
        follower.until(&lines, round);
        guest.pause().unwrap();
        guest.resume().unwrap();
    }
}

#[test]
fn bad_options_and_states_are_refused() {
    let memory = memory();
    let refused = |options: WriterOptions| {
        let result = MemoryWriter::new(memory.clone(), options, Box::new(|_| ()));
        result.err().expect("refused").to_string()
    };
    assert!(refused(WriterOptions { threads: 0, ..OPTIONS }).contains("1 to 8"));
    assert!(refused(WriterOptions { threads: 9, ..OPTIONS }).contains("1 to 8"));
    assert!(refused(WriterOptions { bytes: 2 * 4096, ..OPTIONS }).contains("each of 3 threads"));
    for (gpa, bytes) in
        [(0x5001, 40 << 12), (0x3000, 40 << 12), (0x4000, 65 << 12), (u64::MAX - 4095, 40 << 12)]
    {
        let text = refused(WriterOptions { gpa, bytes, ..OPTIONS });
        assert!(text.contains(&format!("{gpa:#x}")), "{text}");
    }

    let (guest, lines) = writer(&memory, OPTIONS);
    let good = StateBlob::all_of(&guest).unwrap();
    let load = |name: &str, version, bytes: &[u8]| {
        let blob = StateBlob { name: name.into(), version, bytes: bytes.to_vec() };
        guest.load_state(&[blob]).unwrap_err().to_string()
    };
    let StateBlob { name, version, bytes } = good[0].clone();
    assert!(load("vcpu/0", version, &bytes).contains("vcpu/0"));
    assert!(load(&name, version + 1, &bytes).contains("version 2"));
    assert!(load(&name, version, &bytes[1..]).contains(&name));
    assert!(guest.load_state(&[]).is_err());
    assert!(guest.load_state(&[good[0].clone(), good[0].clone()]).is_err());
    // A working set that is not in this memory.
    let mut elsewhere = bytes.clone();
    elsewhere[8..16].copy_from_slice(&(1u64 << 40).to_le_bytes());
    assert!(load(&name, version, &elsewhere).contains("0x10000000000"));
    assert_eq!(guest.options(), OPTIONS, "a refused state changes nothing");
    assert!(guest.throttle().unwrap().set(100).is_err());

    guest.resume().unwrap();
    lines.recv_timeout(HANG).unwrap();
    assert!(StateBlob::all_of(&guest).unwrap_err().to_string().contains("pause"));
    guest.pause().unwrap();
    assert!(guest.load_state(&good).unwrap_err().to_string().contains("has run"));
}

#[test]
fn a_thread_that_dies_is_an_error_and_not_a_hang() {
    let (send, gone) = channel();
    let sink = Box::new(move |_: &[u8]| {
        send.send(()).unwrap();
        panic!("on purpose");
    });
    let guest = MemoryWriter::new(memory(), OPTIONS, sink).unwrap();
    guest.resume().unwrap();
    gone.recv_timeout(HANG).unwrap();
    assert!(guest.pause().unwrap_err().to_string().contains("panic"));
    assert!(StateBlob::all_of(&guest).is_err());
    assert!(guest.resume().is_err());
}

/// Threads that wait for pages which never come are let go, and what they find then is not the guest's word.
#[test]
fn a_writer_whose_pages_never_come_is_stopped_for_good() {
    let source_memory = memory();
    let (source, lines) = writer(&source_memory, OPTIONS);
    source.resume().unwrap();
    Follower::new(&OPTIONS).until(&lines, 3);
    source.pause().unwrap();

    let memory = memory();
    if let Err(error) = memory.missing_unit() {
        println!("skipped: {error}");
        return;
    }
    let all = PageBitmap::new(layout().chunks());
    for chunk in 0..layout().chunks() {
        all.insert(chunk, layout().valid(chunk));
    }
    let missing = memory.clone().miss(&all).unwrap();
    let (destination, lines) = writer(&memory, OPTIONS);
    destination.load_state(&StateBlob::all_of(&source).unwrap()).unwrap();
    destination.resume().unwrap();
    let mut faults = Vec::new();
    while faults.len() < usize::from(OPTIONS.threads) {
        missing.wait(&mut faults, HANG).unwrap();
    }
    let error = destination.pause().unwrap_err();
    assert!(error.what.contains("3 of 3 writer threads"), "{error}");
    destination.stop_for_good(&|| missing.end()).unwrap();
    assert_eq!(lines.try_iter().collect::<Vec<_>>(), Vec::<String>::new());
    assert_eq!(destination.mismatches(), 0);
    assert!(destination.resume().unwrap_err().what.contains("stopped for good"));
}
