//! The choice over simulated links.

mod near;

use super::*;
use crate::layout::CHUNK_SIZE;

/// What took so long where a core has to do for so many.
fn took(nanos: f64, crowding: f64) -> Took {
    Took { nanos: nanos as u64, worked_nanos: (nanos / crowding) as u64 }
}

/// Of one worker.
fn alone(bytes: u64) -> Delivered {
    Delivered { own: bytes, all: bytes }
}

/// The same of all that a thread did.
fn busy(nanos: f64, crowding: f64) -> Busy {
    let worked = nanos / crowding;
    Busy { worked_nanos: worked as u64, ready_nanos: (nanos - worked) as u64 }
}

/// A link that drains a bounded buffer, behind a worker that encodes chunks as `LEVELS` says.
struct Sim {
    chooser: Chooser,
    /// Bytes per nanosecond.
    link: f64,
    buffer: f64,
    queued: f64,
    nanos: f64,
    /// For how long the worker only waited.
    waited: f64,
    /// How many times as long its work takes, for others want its core.
    crowding: f64,
    chunks: u32,
    sent: u64,
    switches: u32,
    last: Option<i32>,
    /// How the data shrinks, against the assumed.
    out_factor: f64,
}

impl Sim {
    fn new(mode: CodecMode, bytes_per_s: f64) -> Self {
        let link = bytes_per_s / 1e9;
        Self {
            chooser: Chooser::new(mode),
            link,
            buffer: (link * 50e6).max(256e3),
            queued: 0.0,
            nanos: 0.0,
            waited: 0.0,
            crowding: 1.0,
            chunks: 0,
            sent: 0,
            switches: 0,
            last: None,
            out_factor: 1.0,
        }
    }

    fn pass(&mut self, nanos: f64) {
        self.nanos += nanos;
        self.queued = (self.queued - nanos * self.link).max(0.0);
    }

    fn chunk(&mut self) {
        let before = self.nanos;
        let plan = self.chooser.plan(self.chunks);
        self.chunks += 1;
        let bytes = CHUNK_SIZE as f64;
        let scan = bytes * 0.08;
        self.chooser.observe_encode(EncodeKind::Scan, bytes as u64, bytes as u64, took(scan, 1.0));
        self.pass(scan);
        let cost = |level: i32, bytes: f64| {
            let (_, nanos, out) = *LEVELS.iter().find(|l| l.0 == level).unwrap();
            (bytes * nanos * self.crowding, (bytes * out * self.out_factor).min(bytes))
        };
        let probe = plan.probe.map(|level| (level, cost(level, 16384.0)));
        let sent = plan.zstd_level.map(|level| (level, cost(level, bytes)));
        if let Some((level, (nanos, out))) = probe {
            self.chooser.observe_encode(
                EncodeKind::Probe { level },
                16384,
                out as u64,
                took(nanos, self.crowding),
            );
            self.pass(nanos);
        }
        let mut wire = bytes;
        if let Some((level, (nanos, out))) = sent {
            self.chooser.observe_encode(
                EncodeKind::Zstd { level },
                bytes as u64,
                out as u64,
                took(nanos, self.crowding),
            );
            self.pass(nanos);
            wire = out;
        }
        let level = self.chooser.current.map(|current| LEVELS[current.level].0);
        self.switches += u32::from(level != self.last);
        self.last = level;
        // The write: a copy into the buffer, and waiting until it fits.
        self.pass(wire * 0.2);
        self.queued += wire;
        let over = self.queued - self.buffer;
        if over > 0.0 {
            self.pass(over / self.link);
            self.waited += over / self.link;
        }
        self.sent += wire as u64;
        let busy = busy(self.nanos - self.waited, self.crowding);
        let delivered = alone(self.sent - self.queued as u64);
        self.chooser.observe_link(wire as u64, (self.nanos - before) as u64, delivered, || Some(busy));
    }

    /// Logical bytes per second over the last of these chunks.
    fn run(&mut self, warm: u32, chunks: u32) -> f64 {
        (0..warm).for_each(|_| self.chunk());
        let start = self.nanos;
        self.switches = 0;
        (0..chunks).for_each(|_| self.chunk());
        f64::from(chunks) * CHUNK_SIZE as f64 * 1e9 / (self.nanos - start)
    }
}

fn best_fixed(bytes_per_s: f64, out_factor: f64) -> (f64, String) {
    let fixed = LEVELS.iter().map(|l| CodecMode::Zstd { level: Some(l.0) }).chain([CodecMode::Raw]);
    fixed
        .map(|mode| {
            let mut sim = Sim { out_factor, ..Sim::new(mode, bytes_per_s) };
            (sim.run(2000, 2000), mode.to_string())
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap()
}

#[test]
fn nothing_is_kept_of_what_is_sent_once() {
    for mode in [CodecMode::Auto, CodecMode::Delta] {
        let mut chooser = Chooser::new(mode).each_once();
        let plans: Vec<Plan> = (0..200).map(|chunk| chooser.plan(chunk)).collect();
        assert!(plans.iter().all(|plan| !plan.delta && !plan.fill));
        assert!(plans.iter().any(|plan| plan.in_place(true)));
    }
}

#[test]
fn nearly_as_good_as_the_best_fixed_choice_on_every_link() {
    for mbit in [50.0, 100.0, 400.0, 1000.0, 2500.0, 5000.0, 10_000.0, 25_000.0, 60_000.0] {
        for out_factor in [1.0, 0.3, 2.0, 5.0] {
            let rate = mbit * 1e6 / 8.0;
            let (best, name) = best_fixed(rate, out_factor);
            let mut sim = Sim { out_factor, ..Sim::new(CodecMode::Auto, rate) };
            let got = sim.run(2000, 4000);
            assert!(
                got > 0.85 * best,
                "{mbit} Mbit/s, output x{out_factor}: auto {got:.3e}, {name} {best:.3e}, now {:?}",
                sim.last
            );
            let whole = |current: Compression| current.level == 0 || current.part == 1.0;
            assert!(sim.chooser.current.is_none_or(whole), "{mbit} Mbit/s: {:?}", sim.chooser.current);
            assert!(sim.switches < 100, "{mbit} Mbit/s: flaps, {} switches", sim.switches);
        }
    }
}

/// Where the link carries a chunk sooner than the worker compresses it, but later than the worker sends it raw.
#[test]
fn compresses_as_much_as_there_is_time_for() {
    for (mbit, out_factor, gain) in [(2500.0, 0.3, 1.1), (5000.0, 1.0, 1.2), (5000.0, 0.3, 1.4)] {
        let rate = mbit * 1e6 / 8.0;
        let (best, name) = best_fixed(rate, out_factor);
        let mut sim = Sim { out_factor, ..Sim::new(CodecMode::Auto, rate) };
        let got = sim.run(2000, 4000);
        assert!(got > gain * best, "{mbit} Mbit/s: auto {got:.3e}, {name} {best:.3e}");
        assert!(sim.chooser.current.is_some_and(|current| (0.3..0.8).contains(&current.part)));
    }
    let mut sim = Sim::new(CodecMode::Zstd { level: None }, 625e6);
    sim.run(2000, 1);
    assert_eq!(sim.chooser.current, Some(Compression { level: 0, part: 1.0 }), "as the user wants it");
}

#[test]
fn settles_on_raw_at_once_on_loopback_and_on_zstd_on_a_gigabit() {
    let mut loopback = Sim::new(CodecMode::Auto, 4e9);
    loopback.run(16, 1000);
    assert_eq!((loopback.last, loopback.switches), (None, 0));
    let mut gigabit = Sim::new(CodecMode::Auto, 125e6);
    gigabit.run(60, 1);
    assert!(gigabit.last.is_some());
}

/// Chunks of zeros: a header each, and a system call for many of them.
#[test]
fn zeros_say_nothing_about_the_link() {
    let mut chooser = Chooser::new(CodecMode::Auto).each_once();
    for chunk in 0..20_000u64 {
        assert!(chooser.plan(chunk as u32).zstd_level.is_none());
        chooser.observe_encode(EncodeKind::Scan, CHUNK_SIZE as u64, 0, took(12e3, 1.0));
        chooser.observe_link(72, 16_000, alone((chunk + 1) * 72), || None);
    }
    assert_eq!(chooser.link_bytes_per_s(), None);
    // A link that is slow is waited for, however few the bytes.
    for chunk in 0..2000u64 {
        chooser.plan(chunk as u32);
        chooser.observe_encode(EncodeKind::Scan, CHUNK_SIZE as u64, CHUNK_SIZE as u64, took(12e3, 1.0));
        chooser.observe_link(1000, 112_000, alone(20_000 * 72 + (chunk + 1) * 1000), || None);
    }
    assert!(chooser.plan(0).zstd_level.is_some());
}

/// Four workers on two cores, each with its part of 25 Gbit/s: compression that would pay for one of them alone does not.
#[test]
fn a_crowded_core_is_reckoned_with() {
    let run = |(workers, cores): (u16, u16), mbit: f64| {
        let mut sim = Sim::new(CodecMode::Auto, mbit * 1e6 / 8.0);
        sim.crowding = f64::from(workers) / f64::from(cores);
        sim.chooser = sim.chooser.sharing(workers, cores.into(), false);
        sim.run(2000, 1);
        sim.last
    };
    assert!(run((4, 4), 6250.0).is_some());
    assert_eq!(run((4, 2), 6250.0), None);
    assert!(run((4, 2), 250.0).is_some());
}

/// Two streams on 10 Gbit/s, of which now one and now the other gets most: what the one that waits sees is no slower link.
#[test]
fn streams_that_take_turns_see_one_link() {
    let compressed = |tells_all: bool| {
        let mut chooser = Chooser::new(CodecMode::Auto).sharing(2, 2, false);
        let mut all = 0.0;
        let mut compressed = 0;
        for chunk in 0..4000u32 {
            compressed += u32::from(chooser.plan(chunk).zstd_level.is_some());
            let share = if chunk / 100 % 4 == 0 { 0.25 } else { 1.25 };
            let bytes = CHUNK_SIZE as f64;
            let nanos = bytes * 0.6 / share;
            all += nanos / 0.3;
            let own = u64::from(chunk + 1) * CHUNK_SIZE as u64;
            let delivered = Delivered { own, all: if tells_all { all as u64 } else { 0 } };
            chooser.observe_link(bytes as u64, nanos as u64, delivered, || None);
        }
        compressed
    };
    assert_eq!(compressed(true), 0);
    assert_ne!(compressed(false), 0);
}

/// The same with two sessions of a stream each, which are told of each other while they run.
#[test]
fn sessions_that_take_turns_see_one_link() {
    let moved = |told: bool| {
        let mut chooser = Chooser::new(CodecMode::Auto).sharing(1, 2, false);
        let (mut own, mut all, mut compressed) = (0, 0.0, 0);
        for chunk in 0..4000u32 {
            compressed += u32::from(chooser.plan(chunk).zstd_level.is_some());
            let share = if chunk / 100 % 4 == 0 { 0.25 } else { 1.25 };
            let nanos = CHUNK_SIZE as f64 * 0.6 / share;
            own += CHUNK_SIZE as u64;
            all += nanos / 0.3;
            let delivered = if told { Delivered { own, all: all as u64 } } else { alone(own) };
            chooser.share_with(if told { 2 } else { 1 });
            chooser.observe_link(CHUNK_SIZE as u64, nanos as u64, delivered, || None);
        }
        (compressed, chooser.link_bytes_per_s().unwrap() * 0.6e-9)
    };
    let (compressed, part) = moved(true);
    assert!(compressed == 0 && (0.99..1.01).contains(&part), "{compressed} chunks, {part} of its part");
    assert_ne!(moved(false).0, 0);
}

/// Who is told of workers that came later reckons with them as with those that were there from the start.
#[test]
fn sessions_that_come_and_go_share_the_cores() {
    for near in [false, true] {
        let [mut told, knew] = [(1, 2), (8, 2)].map(|(workers, cores)| {
            let chooser = Chooser::new(CodecMode::Auto);
            chooser.sharing(workers, cores, near)
        });
        let before = told.crowding;
        told.share_with(8);
        assert_eq!((told.workers(), told.crowding), (8, knew.crowding));
        assert!(told.crowding >= 4.0);
        told.share_with(1);
        assert_eq!((told.workers(), told.crowding), (1, before));
    }
}

/// 2 MiB pass in a millisecond or two, in which whoever receives may just not have run.
#[test]
fn no_link_is_judged_by_a_moment() {
    let mut chooser = Chooser::new(CodecMode::Auto);
    for ms in 1..10 {
        chooser.observe_link(2 << 20, 1_000_000, alone(ms * (2 << 20)), || None);
        assert_eq!(chooser.link_bytes_per_s(), None);
    }
    chooser.observe_link(2 << 20, 1_000_000, alone(10 * (2 << 20)), || None);
    assert!(chooser.link_bytes_per_s().is_some_and(|rate| (1.8e9..2.2e9).contains(&rate)));
}

/// Writing takes its time, also where nothing waits for a link.
#[test]
fn copying_is_not_waiting() {
    let compressed = |share_busy: u64| {
        let mut chooser = Chooser::new(CodecMode::Auto);
        let bytes = CHUNK_SIZE as u64;
        let mut compressed = 0;
        for chunk in 0..1000 {
            let plan = chooser.plan(chunk as u32);
            compressed += u32::from(plan.zstd_level.is_some());
            chooser.observe_encode(EncodeKind::Scan, bytes, bytes, took(bytes as f64 / 5.0, 1.0));
            let mut passed = bytes / 5 + bytes * 2;
            if let Some(level) = plan.zstd_level {
                chooser.observe_encode(EncodeKind::Zstd { level }, bytes, bytes / 3, took(bytes as f64, 1.0));
                passed += bytes;
            }
            let encoded = (bytes / 5) * (chunk + 1);
            let busy = busy((encoded + bytes * 2 * (chunk + 1) * share_busy / 100) as f64, 1.0);
            chooser.observe_link(bytes, passed, alone(bytes * (chunk + 1)), || Some(busy));
        }
        compressed
    };
    // Nor in the first window.
    assert_eq!(compressed(100), 0);
    assert_ne!(compressed(0), 0);
}

#[test]
fn follows_a_link_that_changes() {
    let mut sim = Sim::new(CodecMode::Auto, 4e9);
    sim.run(1000, 1);
    assert_eq!(sim.last, None);
    for _ in 0..3 {
        (sim.link, sim.buffer) = (0.06, 3e6);
        sim.run(400, 1);
        assert!(sim.last.is_some());
        (sim.link, sim.buffer) = (4.0, 8e6);
        sim.run(8000, 1);
        assert_eq!(sim.last, None);
    }
}

#[test]
fn references_come_with_levels_that_are_worth_them() {
    let mut sim = Sim::new(CodecMode::Auto, 4e9);
    sim.chooser = sim.chooser.referring(true);
    let mut probed = std::collections::BTreeSet::new();
    for chunk in 0..1000 {
        let plan = sim.chooser.plan(chunk);
        assert!(!plan.references);
        probed.extend(plan.probe);
        sim.chunk();
    }
    assert_eq!(Vec::from_iter(probed), [-7, -3]);
    // A gigabit for four streams.
    (sim.link, sim.buffer) = (0.03, 3e6);
    sim.run(2000, 1);
    assert!(sim.last.is_some_and(|level| level >= REFERENCES_LEVEL_MIN), "{:?}", sim.last);
    let plans: Vec<Plan> = (0..1000).map(|chunk| sim.chooser.plan(chunk)).collect();
    assert!(plans.iter().all(|plan| plan.references));
    assert!(plans.iter().any(|plan| plan.probe == Some(3)));
    for (level, references) in [(1, false), (2, true), (19, true)] {
        let mode = CodecMode::Zstd { level: Some(level) };
        assert_eq!(Chooser::new(mode).referring(true).plan(0).references, references);
        assert!(!Chooser::new(mode).plan(0).references);
    }
}

#[test]
fn deltas_stay_only_while_they_pay() {
    let run = |link_nanos: u64, delta_nanos: u64, out: u64| {
        let mut chooser = Chooser::new(CodecMode::Auto);
        let bytes = CHUNK_SIZE as u64;
        for chunk in 0..200 {
            let kind = EncodeKind::Delta { chunk };
            let mut passed = bytes * link_nanos / 100;
            if chooser.plan(chunk).delta {
                let nanos = bytes * delta_nanos / 100;
                chooser.observe_encode(kind, bytes, bytes * out / 100, took(nanos as f64, 1.0));
                passed += nanos;
            }
            let delivered = alone(u64::from(chunk + 1) * bytes);
            chooser.observe_link(bytes, passed, delivered, || None);
        }
        (0..200).filter(|&chunk| chooser.plan(chunk).delta).count()
    };
    // 0.25 ns a byte on the link, 0.1 ns for the delta: pays when it saves most, not when it saves 10 %.
    assert_eq!(run(25, 10, 5), 200);
    let sampled = run(25, 10, 90);
    assert!((1..40).contains(&sampled), "{sampled}");
    // On 1 Gbit/s even 10 % pay.
    assert_eq!(run(800, 10, 90), 200);
}

#[test]
fn pinned_modes_stay_pinned() {
    for (mode, delta, level) in [
        (CodecMode::Raw, false, None),
        (CodecMode::Delta, true, None),
        (CodecMode::Zstd { level: Some(9) }, false, Some(9)),
    ] {
        let mut chooser = Chooser::new(mode);
        for chunk in 0..300 {
            let plan = chooser.plan(chunk);
            assert_eq!((plan.delta, plan.zstd_level, plan.probe), (delta, level, None));
            chooser.observe_link(1 << 20, 1 << 30, alone(u64::from(chunk + 1) << 20), || None);
        }
    }
    let mut sim = Sim::new(CodecMode::Zstd { level: None }, 4e9);
    sim.run(1000, 1);
    assert_eq!(sim.last, Some(-7));
}

#[test]
fn names_round_trip() {
    for name in ["auto", "raw", "delta", "zstd", "zstd:-7", "zstd:19"] {
        assert_eq!(name.parse::<CodecMode>().unwrap().to_string(), name);
    }
    assert!(matches!("lz4".parse::<CodecMode>(), Err(CodecModeError::Unknown { .. })));
    assert!(matches!("raw:1".parse::<CodecMode>(), Err(CodecModeError::Unknown { .. })));
    for level in ["zstd:", "zstd:99", "zstd:x"] {
        assert!(matches!(level.parse::<CodecMode>(), Err(CodecModeError::Level { .. })));
    }
}

#[test]
fn survives_any_observation() {
    let mut chooser = Chooser::new(CodecMode::Auto);
    for (a, b) in [(0, 0), (0, u64::MAX), (u64::MAX, 0), (u64::MAX, u64::MAX), (1, 1)] {
        chooser.observe_encode(EncodeKind::Zstd { level: 1 }, a, b, took(b as f64, 1.0));
        chooser.observe_encode(EncodeKind::Delta { chunk: 0 }, a, b, took(a as f64, 1.0));
        chooser.observe_link(a, b, Delivered { own: b, all: a }, || Some(busy(b as f64, 1.0)));
        let plan = chooser.plan(0);
        assert!((PAGE_SIZE / 8..=DELTA_BYTES_MAX).contains(&plan.delta_bytes_max));
        assert!(chooser.link.nanos().is_none_or(f64::is_finite));
    }
}

/// What is sent before anything is known is not compressed; so a link that is slow is judged early, and one that is fast is not.
#[test]
fn a_slow_link_is_known_before_much_is_sent() {
    let known_after = |rate: f64, window: u64| {
        let mut chooser = Chooser::new(CodecMode::Auto);
        let (mut sent, mut nanos) = (0, 0.0f64);
        while chooser.link_bytes_per_s().is_none() {
            sent += CHUNK_SIZE as u64;
            // It waits until there is room in the window.
            let passed = ((sent.saturating_sub(window)) as f64 / rate * 1e9 - nanos).max(20e3);
            nanos += passed;
            let delivered = alone((nanos * rate / 1e9).min(sent as f64) as u64);
            chooser.observe_link(CHUNK_SIZE as u64, passed as u64, delivered, || Some(busy(0.0, 1.0)));
        }
        assert!(chooser.link_bytes_per_s().is_some_and(|found| (found / rate - 1.0).abs() < 0.1));
        sent
    };
    assert!(known_after(31e6, 1 << 20) < 2 << 20);
    assert!(known_after(1e9, 1 << 20) >= 2 << 20);
}

/// A path so long that no receipt has come yet.
#[test]
fn what_is_still_on_its_way_tells_nothing() {
    let mut chooser = Chooser::new(CodecMode::Auto);
    for _ in 0..100 {
        chooser.observe_link(1 << 20, 2_000_000, Delivered::default(), || None);
    }
    assert_eq!(chooser.link_bytes_per_s(), None);
    chooser.observe_link(1 << 20, 2_000_000, alone(101 << 20), || None);
    assert!(chooser.link_bytes_per_s().is_some());
}

/// Work that takes three times as long as it runs, because others want the core, is reckoned with at that.
#[test]
fn waiting_for_a_core_makes_a_level_dearer() {
    let run = |crowding: f64| {
        let mut sim = Sim::new(CodecMode::Auto, 6250e6 / 8.0);
        sim.crowding = crowding;
        sim.run(2000, 1);
        sim.last
    };
    assert!(run(1.0).is_some());
    assert_eq!(run(3.0), None);
}

/// What a level costs is what its thread ran, however long others had the core meanwhile.
#[test]
fn a_chunk_that_was_made_to_wait_is_no_dearer() {
    let estimate = |waited: u64| {
        let mut chooser = Chooser::new(CodecMode::Auto);
        for _ in 0..100 {
            let bytes = CHUNK_SIZE as u64;
            let took = Took { nanos: 3 * bytes + waited, worked_nanos: 3 * bytes };
            chooser.observe_encode(EncodeKind::Zstd { level: 1 }, bytes, bytes / 3, took);
        }
        chooser.estimate(index_of(1).unwrap()).nanos
    };
    assert!((2.9..3.1).contains(&estimate(0)), "{}", estimate(0));
    assert_eq!(estimate(0), estimate(10_000_000));
}

/// A stream that is connected while the others have sent for long.
#[test]
fn what_others_sent_before_is_not_counted() {
    let mut chooser = Chooser::new(CodecMode::Auto).sharing(2, 2, false);
    for chunk in 0..20 {
        let own = chunk << 20;
        let delivered = Delivered { own, all: (1 << 40) + 2 * own };
        // The first call is where it begins.
        chooser.observe_link(1 << 20, if chunk == 0 { 0 } else { 10_000_000 }, delivered, || None);
        if chooser.link_bytes_per_s().is_some() {
            break;
        }
    }
    // 1 MiB in 10 ms.
    assert!(chooser.link_bytes_per_s().is_some_and(|rate| (1.0e8..1.1e8).contains(&rate)));
}
