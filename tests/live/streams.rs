//! Data streams that are cut on the way.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pageferry::transport::wire::Role;
use serde_json::json;
use testkit::{PATIENCE, wait_for};

use crate::common::{Image, Job, MIB, Recv, send};
use crate::proxy::{By, Proxy, Seen, Verdict};
use crate::vm::{NO_RESUME, Spec, World, prove};

/// A guest that is big and busy enough that every stream carries some MiB.
fn busy() -> Spec {
    Spec { cpus: 2, working_set: 24 << 20, rate: 0, ..Spec::counter() }
}

#[test]
fn one_stream_cut_is_one_stream_less() {
    let world = World::new();
    let spec = busy();
    let mut here = world.source("vm0", &spec);
    let mut all = Vec::new();
    // The same guest, from VM to VM: cut early and late, and in either direction.
    for (i, (by, bytes)) in
        [(By::Source, 1), (By::Source, 500_000), (By::Destination, 1000), (By::Source, 2_000_000)]
            .into_iter()
            .enumerate()
    {
        let (there, uri) = world.destination(&format!("vm{}", i + 1), &spec);
        let cut = AtomicBool::new(false);
        let proxy = Proxy::new(&uri, move |seen| match seen {
            // Whichever comes so far: one that opens late may carry little.
            Seen::Data { stream, by: from, total, .. }
                if *stream != 0 && *from == by && *total >= bytes && !cut.swap(true, Ordering::Relaxed) =>
            {
                Verdict::Cut
            }
            _ => Verdict::Pass,
        });
        let ended = here.ctl(&["migrate", &proxy.uri(), "--json", "--codec", "raw"]);
        assert_eq!(ended.code, Some(0), "{by:?} {bytes}: {ended:?}");
        let report = ended.json();
        assert_eq!(report["streams_lost"], 1, "{by:?} {bytes}: {report}");
        assert_eq!(report["mismatches"], 0, "{by:?} {bytes}: {report}");
        all.push(std::mem::replace(&mut here, there));
        let mut chain: Vec<_> = all.iter().collect();
        chain.push(&here);
        prove(&spec, &chain);
    }
}

#[test]
fn a_stream_that_is_lost_while_others_open_is_opened_again() {
    let world = World::new();
    let spec = busy();
    let (source, (destination, uri)) = (world.source("a", &spec), world.destination("b", &spec));
    let (opened, lost) = (Arc::new(AtomicU64::new(0)), AtomicBool::new(false));
    let seen_opened = opened.clone();
    let proxy = Proxy::new(&uri, move |seen| match seen {
        // The last one opens late.
        Seen::Open { role: Role::Stream, stream: 3 } => {
            std::thread::sleep(Duration::from_millis(700));
            Verdict::Pass
        }
        Seen::Open { role: Role::Stream, .. } => {
            seen_opened.fetch_add(1, Ordering::Relaxed);
            Verdict::Pass
        }
        _ => Verdict::Pass,
    });
    let limits = json!({"codec": "raw", "streams": 4, "bandwidth": 20_000_000});
    source.begin_migration(&proxy.uri(), &limits);
    wait_for("three streams are open", PATIENCE, || (opened.load(Ordering::Relaxed) == 3).then_some(()));
    std::thread::sleep(Duration::from_millis(200));
    proxy.cut(|role, stream| role == Role::Stream && stream == 0 && !lost.swap(true, Ordering::Relaxed));
    let report = wait_for("it is opened again", PATIENCE, || {
        let report = source.status()["migration"].clone();
        (report["streams_reconnected"] == 1).then_some(report)
    });
    assert_eq!(report["streams_lost"], 1, "{report}");
    assert_eq!(source.ctl(&["set", "--bandwidth", "0", "--downtime-limit", "10000"]).code, Some(0));
    assert_eq!(source.wait_migration(PATIENCE)["status"], "completed");
    prove(&spec, &[&source, &destination]);
}

/// Pages that were hashed and wait for room to be sent are written meanwhile. Nobody's memory is broken.
#[test]
fn a_file_that_is_written_while_it_is_sent_is_said_to_be() {
    let job = Job::new(Image::Random, 32 * MIB);
    let recv = Recv::to_file(&job.to, 30);
    let holding = Arc::new(AtomicBool::new(true));
    let held = holding.clone();
    let proxy = Proxy::new(&recv.uri, move |seen| {
        if let Seen::Data { by: By::Source, .. } = seen {
            while held.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Verdict::Pass
    });
    let sending =
        send(&proxy.uri(), &job.from, &["--codec", "raw", "--streams", "4", "--link-timeout", "30"]);
    // All streams fill what there is of buffers, and then wait with a chunk each.
    std::thread::sleep(Duration::from_secs(2));
    let other: Vec<u8> = job.content.iter().map(|byte| !byte).collect();
    std::fs::OpenOptions::new().write(true).open(&job.from).unwrap().write_all_at(&other, 0).unwrap();
    holding.store(false, Ordering::Relaxed);
    let ended = sending.wait();
    assert_ne!(ended.code, Some(0), "{ended:?}");
    ended.says(&["the memory was written during the transfer"]);
    assert!(!ended.stderr.contains("damages data"), "{ended:?}");
}

#[test]
fn all_streams_but_one_cut() {
    let world = World::new();
    let spec = busy();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = Proxy::new(&uri, |seen| match seen {
        Seen::Data { role: Role::Stream, stream: stream @ 1.., by: By::Source, total, .. }
            if *total > 300_000 * u64::from(*stream) =>
        {
            Verdict::Cut
        }
        _ => Verdict::Pass,
    });
    let ended = source.ctl(&["migrate", &proxy.uri(), "--json", "--codec", "raw"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.json()["streams_lost"], 3, "{ended:?}");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn all_streams_cut_fails_and_says_so() {
    let world = World::new();
    let spec = busy().with(NO_RESUME);
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let total = AtomicU64::new(0);
    let proxy = Proxy::new(&uri, move |seen| match seen {
        Seen::Data { by: By::Source, len, .. }
            if total.fetch_add(*len as u64, Ordering::Relaxed) > 3_000_000 =>
        {
            Verdict::Cut
        }
        _ => Verdict::Pass,
    });
    // Compressed the guest may be through before anything is cut.
    let ended = source.ctl(&["migrate", &proxy.uri(), "--json", "--codec", "raw"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let report = ended.json();
    assert_eq!(report["streams_lost"], 4, "{report}");
    assert!(ended.err.contains("runs on at the source: all data streams are lost"), "{ended:?}");
    prove(&spec, &[&source]);
    let status = destination.wait_exit(PATIENCE);
    assert_eq!(status.code(), Some(1));
    assert!(destination.errors().contains("all data streams are lost"), "{}", destination.errors());
    assert!(destination.serial().is_empty());
    let (destination, uri) = world.destination("c", &spec);
    source.begin_migration(&uri, &json!({}));
    assert_eq!(source.wait_migration(PATIENCE)["status"], "completed");
    prove(&spec, &[&source, &destination]);
}

#[test]
fn a_stream_that_cannot_be_opened_fails_and_says_which() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (destination, uri) = world.destination("b", &spec);
    let proxy = Proxy::new(&uri, |seen| match seen {
        Seen::Open { role: Role::Stream, stream: 3 } => Verdict::Cut,
        _ => Verdict::Pass,
    });
    let ended = source.ctl(&["migrate", &proxy.uri()]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.contains("data stream 3 could not be opened"), "{ended:?}");
    prove(&spec, &[&source]);
    assert_eq!(destination.wait_exit(PATIENCE).code(), Some(1));
    assert!(destination.serial().is_empty());
}

/// The guest runs on meanwhile, and writes; receipts tell damage from that.
#[test]
fn what_arrives_damaged_is_sent_again() {
    let world = World::new();
    let spec = busy();
    let source = world.source("a", &spec);
    prove(&spec, &[&source]);
    let (destination, uri) = world.destination("b", &spec);
    let pieces = AtomicU64::new(0);
    let proxy = Proxy::new(&uri, move |seen| match seen {
        // Small pieces may be headers: a stream that carries a wrong one is lost, and connected again.
        Seen::Data { role: Role::Stream, by: By::Source, len: 16_384.., .. } => {
            let flip = [5, 100, 300].contains(&pieces.fetch_add(1, Ordering::Relaxed));
            if flip { Verdict::Flip } else { Verdict::Pass }
        }
        _ => Verdict::Pass,
    });
    source.begin_migration(&proxy.uri(), &json!({"codec": "raw"}));
    let report = source.wait_migration(PATIENCE);
    assert_eq!(report["status"], "completed", "{report}");
    let noticed = ["mismatches", "torn", "streams_lost"].map(|name| report[name].as_u64().unwrap());
    assert!(noticed.iter().sum::<u64>() > 0, "{report}");
    prove(&spec, &[&source, &destination]);
}
