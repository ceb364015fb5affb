//! The mini VMM on real KVM: guests run, stop, and go on in another VM.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use pagecopy::backend::{Guest, StateBlob};
use pagecopy::layout::Layout;
use vmm_shim::guests::boot_sector;
use vmm_shim::guests::counter::{Checker, CounterParams, Side};
use vmm_shim::vmm::{GuestImage, Tracker, Vm, VmConfig, VmError, VmState};

const MIB: u64 = 1 << 20;

fn counter(working_set: u64, page_words: u32) -> CounterParams {
    CounterParams { working_set, pages_per_s: 0, page_words }
}

/// Moves a running guest into a new VM with memory of its own; the new one is running.
fn go_on(a: &Vm, ram_a: &AnonRam) -> (Vm, Console, Arc<AnonRam>) {
    a.pause().unwrap();
    let state = StateBlob::all_of(a).unwrap();
    let ram = AnonRam::new(pagecopy::backend::GuestRam::layout(ram_a).clone());
    copy_ram(ram_a, &ram);
    let (b, console) = vm(a.cpus(), GuestImage::Incoming, Tracker::None, &ram);
    b.load_state(&state).unwrap();
    b.resume().unwrap();
    (b, console, ram)
}

/// Runs a counter, moves it, and checks that it went on.
fn moves(cpus: u8, params: CounterParams) {
    let (ram_a, ram_b) = (AnonRam::flat(32 * MIB), AnonRam::flat(32 * MIB));
    let (a, console_a) = vm(cpus, GuestImage::Counter(params), Tracker::Bitmap, &ram_a);
    assert_eq!(a.state(), VmState::Paused);
    a.resume().unwrap();
    wait_for(&a, "20 passes", || console_a.passes(cpus) >= 20);
    a.pause().unwrap();
    let printed = console_a.len();
    let state = StateBlob::all_of(&a).unwrap();

    let (b, console_b) = vm(cpus, GuestImage::Incoming, Tracker::Bitmap, &ram_b);
    copy_ram(&ram_a, &ram_b);
    b.load_state(&state).unwrap();
    b.resume().unwrap();
    wait_for(&b, "20 more passes", || console_b.passes(cpus) >= 20);
    b.pause().unwrap();

    assert_eq!(console_a.len(), printed, "a paused guest prints nothing");
    let mut checker = Checker::new(cpus, params.pages(cpus));
    checker.feed(Side::Source, &console_a.bytes()).unwrap();
    checker.feed(Side::Destination, &console_b.bytes()).unwrap();
    println!("passes: {:?}", checker.passes());
    assert!(
        checker.passes().iter().all(|&(before, after)| before > 0 && after > 0),
        "{:?}",
        checker.passes()
    );
}

#[test]
fn a_counter_goes_on_in_another_vm() {
    if kvm() {
        moves(1, counter(4 * MIB, 64));
    }
}

#[test]
fn two_vcpus_go_on_in_another_vm() {
    if kvm() {
        moves(2, counter(8 * MIB, 508));
    }
}

/// With memory above 4 GiB, at a pace, the working set across the gap.
#[test]
fn a_counter_with_high_memory_keeps_its_pace() {
    if !kvm() {
        return;
    }
    let params = CounterParams { working_set: 3 * 1024 * MIB + 4 * MIB, pages_per_s: 0, page_words: 0 };
    let layout = vmm_shim::vmm::layout(3 * 1024 * MIB + 64 * MIB).unwrap();
    assert_eq!(layout.regions().len(), 2);
    let ram = AnonRam::new(layout.clone());
    let config = VmConfig { cpus: 1, guest: GuestImage::Counter(params), tracker: Tracker::None };
    Vm::new(config, ram, Box::new(Console::default())).unwrap();
    // Low memory of 16 MiB makes the set cross the gap without touching gigabytes.
    let mut regions = layout.regions().to_vec();
    (regions[0].len, regions[1].len) = (16 * MIB, 16 * MIB);
    let params = CounterParams { working_set: 20 * MIB, pages_per_s: 200_000, page_words: 8 };
    let ram = AnonRam::new(Layout::new(regions).unwrap());
    let (a, console_a) = vm(1, GuestImage::Counter(params), Tracker::None, &ram);
    a.resume().unwrap();
    wait_for(&a, "3 passes", || console_a.lines() >= 3);
    let (b, console_b, _ram) = go_on(&a, &ram);
    wait_for(&b, "3 more passes", || console_b.lines() >= 3);
    b.pause().unwrap();
    let mut checker = Checker::new(1, params.pages(1));
    checker.feed(Side::Source, &console_a.bytes()).unwrap();
    checker.feed(Side::Destination, &console_b.bytes()).unwrap();
}

#[test]
fn a_counter_finds_a_changed_page() {
    if !kvm() {
        return;
    }
    use pagecopy::backend::GuestRam;
    use vm_memory::Bytes;
    let params = counter(4 * MIB, 16);
    // In the header, in the pattern, in the last word.
    for offset in [16, 100, 4088] {
        let ram = AnonRam::flat(32 * MIB);
        let (a, console) = vm(1, GuestImage::Counter(params), Tracker::None, &ram);
        a.resume().unwrap();
        wait_for(&a, "2 passes", || console.lines() >= 2);
        a.pause().unwrap();
        ram.region(0).write_obj(0xbau8, 4 * MIB as usize + 77 * 4096 + offset).unwrap();
        a.resume().unwrap();
        wait_for(&a, "the finding", || console.bytes().windows(6).any(|w| w == b"E c0 p"));
        a.pause().unwrap();
        let text = String::from_utf8(console.bytes()).unwrap();
        assert!(text.contains("E c0 p4d want "), "{text}");
        assert!(Checker::new(1, params.pages(1)).feed(Side::Source, text.as_bytes()).is_err());
    }
}

#[test]
fn mem_test_and_boot_sector_go_on() {
    if !kvm() {
        return;
    }
    for guest in [GuestImage::MemTest { bytes: 16 * MIB }, GuestImage::RealMode(boot_sector().to_vec())] {
        let ram = AnonRam::flat(32 * MIB);
        let (a, console) = vm(2, guest.clone(), Tracker::None, &ram);
        a.resume().unwrap();
        wait_for(&a, "dots", || console.len() >= 4);
        let (b, console, _ram) = go_on(&a, &ram);
        wait_for(&b, "more dots", || console.len() >= 4);
        assert!(console.bytes().iter().all(|&c| c == b'.'), "{guest:?}");
    }
}

/// The guest's number lives in a device register: it reads it, adds one, writes it back, and prints it. Any
/// lost or repeated access shows.
#[test]
fn port_accesses_are_neither_lost_nor_repeated() {
    if !kvm() {
        return;
    }
    // mov edx, 0x3ff; again: in al, dx; inc al; out dx, al; mov edx, 0x3f8; out dx, al; mov edx, 0x3ff; jmp
    // again
    let code = [
        0xba, 0xff, 3, 0, 0, 0xec, 0xfe, 0xc0, 0xee, 0xba, 0xf8, 3, 0, 0, 0xee, 0xba, 0xff, 3, 0, 0, 0xeb,
        0xef,
    ];
    let mut ram = AnonRam::flat(16 * MIB);
    let (mut guest, mut console) = vm(1, GuestImage::User64(code.to_vec()), Tracker::None, &ram);
    guest.resume().unwrap();
    let mut printed = Vec::new();
    for _ in 0..15 {
        wait_for(&guest, "output", || console.len() > 1000);
        for _ in 0..10 {
            guest.pause().unwrap();
            guest.resume().unwrap();
        }
        let next = go_on(&guest, &ram);
        printed.extend(console.bytes());
        (guest, console, ram) = next;
    }
    let wrong = printed.iter().zip(1u64..).position(|(&got, want)| got != want as u8);
    assert_eq!(wrong, None, "of {} bytes", printed.len());
}

/// vCPUs compare the TSC with the latest that any of them saw, and say so where it is behind. Where the
/// host's TSC is not stable, KVM keeps no two vCPUs together, and each compares with what it saw itself.
#[test]
fn time_never_goes_back() {
    if !kvm() {
        return;
    }
    let source = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let stable = source.is_ok_and(|s| s.trim() == "tsc");
    println!("one time for all vCPUs: {stable}");
    // A lock at 0x400000, the latest values from 0x400008 on, a count of readings at 0x400060.
    #[rustfmt::skip]
    let code = [
        0xbb, 0, 0, 0x40, 0,                    // mov ebx, 0x400000
        0x83, 0xe7, if stable { 0 } else { 7 }, // and edi, mask
        0xb8, 1, 0, 0, 0,                       // again: mov eax, 1
        0x87, 0x03,                             // xchg [rbx], eax
        0x85, 0xc0,                             // test eax, eax
        0x75, 0xf5,                             // jnz again
        0x0f, 0xae, 0xe8,                       // lfence
        0x0f, 0x31,                             // rdtsc
        0x48, 0xc1, 0xe2, 0x20,                 // shl rdx, 32
        0x48, 0x09, 0xd0,                       // or rax, rdx
        0x48, 0x3b, 0x44, 0xfb, 0x08,           // cmp rax, [rbx + rdi * 8 + 8]
        0x73, 0x0c,                             // jae fine
        0xba, 0xf8, 3, 0, 0,                    // mov edx, 0x3f8
        0xb9, b'B', 0, 0, 0,                    // mov ecx, 'B'
        0x91,                                   // xchg eax, ecx
        0xee,                                   // out dx, al
        0x48, 0x89, 0x44, 0xfb, 0x08,           // fine: mov [rbx + rdi * 8 + 8], rax
        0x48, 0xff, 0x43, 0x60,                 // inc qword [rbx + 0x60]
        0xc7, 0x03, 0, 0, 0, 0,                 // mov dword [rbx], 0
        0xeb, 0xc5,                             // jmp again
    ];
    use pagecopy::backend::GuestRam;
    use vm_memory::Bytes;
    let mut ram = AnonRam::flat(16 * MIB);
    let (mut guest, mut console) = vm(2, GuestImage::User64(code.to_vec()), Tracker::None, &ram);
    guest.resume().unwrap();
    let mut clocks = Vec::new();
    for _ in 0..5 {
        let count = |ram: &AnonRam| ram.region(0).read_obj::<u64>(0x40_0060).unwrap();
        let before = count(&ram);
        wait_for(&guest, "readings", || count(&ram) > before + 1000);
        guest.pause().unwrap();
        clocks.push(clock(&StateBlob::all_of(&guest).unwrap()));
        let next = go_on(&guest, &ram);
        assert_eq!(console.bytes(), b"", "time went back");
        (guest, console, ram) = next;
        guest.pause().unwrap();
        clocks.push(clock(&StateBlob::all_of(&guest).unwrap()));
        guest.resume().unwrap();
    }
    let second = u64::from(guest.tsc_khz()) * 1000;
    for pair in clocks.windows(2) {
        assert!(pair[0].0 < pair[1].0 && pair[0].1 < pair[1].1, "{pair:x?}");
        assert!(
            pair[1].0 - pair[0].0 < 20 * 1_000_000_000 && pair[1].1 - pair[0].1 < 20 * second,
            "{pair:x?}"
        );
    }
}

/// kvmclock and TSC of a state.
fn clock(state: &[StateBlob]) -> (u64, u64) {
    let bytes = &state.iter().find(|b| b.name == "vm/clock").unwrap().bytes;
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    (word(0), word(16))
}

fn crash(guest: GuestImage) -> String {
    let ram = AnonRam::flat(16 * MIB);
    let (a, _) = vm(2, guest, Tracker::None, &ram);
    a.resume().unwrap();
    for _ in 0..5000 {
        if let VmState::Crashed(why) = a.state() {
            a.pause().unwrap();
            assert!(a.resume().is_err() && StateBlob::all_of(&a).is_err());
            return why;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("it never crashed");
}

#[test]
fn a_crash_is_told_and_survived() {
    if !kvm() {
        return;
    }
    // ud2
    let why = crash(GuestImage::User64(vec![0x0f, 0x0b]));
    assert!(why.contains("KVM_EXIT_SHUTDOWN"), "{why}");
    // mov dx, 0x80; out dx, al; ud2: where it was at the exit before, which the registers after a shutdown do not tell.
    let why = crash(GuestImage::User64(vec![0x66, 0xba, 0x80, 0, 0xee, 0x0f, 0x0b]));
    assert!(why.contains("rip 0x1000"), "{why}");
    assert!(why.contains("code now"), "{why}");
    // mov byte [0x20000000], 1: mapped by the page tables, but no memory.
    let why = crash(GuestImage::User64(vec![0xc6, 0x04, 0x25, 0, 0, 0, 0x20, 1]));
    assert!(why.contains("wrote 1 bytes at 0x20000000"), "{why}");
    // mov al, [0x20000000]
    let why = crash(GuestImage::User64(vec![0x8a, 0x04, 0x25, 0, 0, 0, 0x20]));
    assert!(why.contains("read 1 bytes at 0x20000000"), "{why}");
}

#[test]
fn a_halted_guest_stops_and_moves() {
    if !kvm() {
        return;
    }
    let ram = AnonRam::flat(MIB);
    // cli; hlt
    let (a, _) = vm(2, GuestImage::RealMode(vec![0xfa, 0xf4]), Tracker::None, &ram);
    a.resume().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let (b, _, _ram) = go_on(&a, &ram);
    assert_eq!((a.state(), b.state()), (VmState::Paused, VmState::Running));
}

#[test]
fn pausing_works_at_any_time() {
    if !kvm() {
        return;
    }
    let ram = AnonRam::flat(32 * MIB);
    let (a, console) = vm(4, GuestImage::Counter(counter(4 * MIB, 8)), Tracker::None, &ram);
    assert!(a.throttle().unwrap().set(100).is_err());
    for percent in [0, 50, 99, 0] {
        a.throttle().unwrap().set(percent).unwrap();
        for _ in 0..50 {
            a.resume().unwrap();
            a.pause().unwrap();
            let printed = console.len();
            a.pause().unwrap();
            assert_eq!(a.state(), VmState::Paused);
            assert_eq!(console.len(), printed);
        }
        let lines = console.lines();
        a.resume().unwrap();
        wait_for(&a, "progress", || console.lines() >= lines + 4);
        a.pause().unwrap();
    }
    Checker::new(4, counter(4 * MIB, 8).pages(4)).feed(Side::Source, &console.bytes()).unwrap();
}

#[test]
fn refuses_state_that_is_not_right() {
    if !kvm() {
        return;
    }
    let ram = AnonRam::flat(16 * MIB);
    let (a, _) = vm(2, GuestImage::Writer, Tracker::None, &ram);
    let good = StateBlob::all_of(&a).unwrap();
    let (b, _) = vm(2, GuestImage::Incoming, Tracker::None, &ram);
    let refused = |state: &[StateBlob], name: &str| {
        let why = b.load_state(state).unwrap_err().to_string();
        assert!(why.contains(name), "{name}: {why}");
        assert_eq!(b.state(), VmState::Paused, "{name}");
    };
    for at in 0..good.len() {
        let name = good[at].name.clone();
        let with = |change: &dyn Fn(&mut StateBlob)| {
            let mut state = good.clone();
            change(&mut state[at]);
            state
        };
        refused(&[&good[..at], &good[at + 1..]].concat(), &name);
        refused(&[&good[..], &good[at..=at]].concat(), &name);
        refused(&with(&|blob| blob.version = 77), &name);
        refused(&with(&|blob| blob.bytes.clear()), &name);
        refused(&with(&|blob| blob.bytes.truncate(blob.bytes.len() - 1)), &name);
        refused(&with(&|blob| blob.name = "vcpu/9/x".into()), &name);
    }
    let extra = StateBlob { name: "vm/floppy".into(), version: 1, bytes: vec![] };
    refused(&[&good[..], &[extra]].concat(), "vm/floppy");
    let (other, _) = vm(1, GuestImage::Incoming, Tracker::None, &ram);
    assert!(other.load_state(&good).unwrap_err().to_string().contains("2 vCPUs"));
    // A feature that no processor has.
    let mut lacking = good.clone();
    let cpuid = lacking.iter_mut().find(|b| b.name == "vcpu/1/cpuid").unwrap();
    let leaf = cpuid.bytes.chunks_exact(40).position(|e| e[..8] == [7, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    cpuid.bytes[leaf * 40 + 16..][..4].fill(0xff);
    refused(&lacking, "CPUID 0x7");
    // Nothing was applied: the right state still loads.
    b.load_state(&good).unwrap();
    // A handover that was taken back comes again.
    b.load_state(&good).unwrap();
}

#[test]
fn a_state_that_the_kernel_refuses_never_runs() {
    if !kvm() {
        return;
    }
    let ram = AnonRam::flat(16 * MIB);
    let (a, _) = vm(1, GuestImage::Writer, Tracker::None, &ram);
    let mut state = StateBlob::all_of(&a).unwrap();
    // An MSR that does not exist.
    let msrs = state.iter_mut().find(|b| b.name == "vcpu/0/msrs").unwrap();
    msrs.bytes[..4].copy_from_slice(&0x5eed_5eedu32.to_le_bytes());
    let (b, _) = vm(1, GuestImage::Incoming, Tracker::None, &ram);
    let why = b.load_state(&state).unwrap_err().to_string();
    assert!(why.contains("0x5eed5eed"), "{why}");
    assert!(matches!(b.state(), VmState::Crashed(_)) && b.resume().is_err());
}

#[test]
fn refuses_what_is_no_vm() {
    if !kvm() {
        return;
    }
    let new = |cpus, guest, ram: Arc<AnonRam>| {
        let config = VmConfig { cpus, guest, tracker: Tracker::None };
        Vm::new(config, ram, Box::new(Console::default())).err().unwrap()
    };
    let ram = || AnonRam::flat(16 * MIB);
    assert!(matches!(new(0, GuestImage::Writer, ram()), VmError::Cpus { cpus: 0 }));
    assert!(matches!(new(9, GuestImage::Writer, ram()), VmError::Cpus { cpus: 9 }));
    let flat = AnonRam::flat(4096 * MIB);
    assert!(matches!(new(1, GuestImage::Writer, flat), VmError::DeviceHole { .. }));
    for (guest, bytes) in [
        (GuestImage::Writer, 8 * MIB),
        (GuestImage::Counter(counter(13 * MIB, 0)), 16 * MIB),
        (GuestImage::Counter(counter(4095, 0)), 16 * MIB),
        (GuestImage::Counter(counter(4 * MIB, 509)), 16 * MIB),
        (GuestImage::MemTest { bytes: 1000 }, 16 * MIB),
        (GuestImage::User64(vec![]), 16 * MIB),
        (GuestImage::User64(vec![0; 65537]), 16 * MIB),
        (GuestImage::RealMode(vec![0; 2 * MIB as usize]), MIB),
    ] {
        assert!(matches!(new(1, guest, AnonRam::flat(bytes)), VmError::Image { .. }));
    }
}
