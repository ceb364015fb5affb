//! The library as a VMM uses it: from plain threads and from async code, without the command.

#[path = "common/ends.rs"]
mod ends;
#[path = "../examples/progress.rs"]
mod progress;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ends::{Still, Taker, Told, differences, empty, ferry, full, source};
use pageferry::backend::{GuestRam, StaticLog};
use pageferry::vmm_shim::guest_memory::GuestMemory;
use pageferry::{
    Cause, Destination, Event, Fate, IncomingError, Landing, Source, SourceBuilder, Status, Tuning, Uri,
    explain,
};
use testkit::PATIENCE;

fn anywhere() -> Uri {
    "tcp:127.0.0.1:0".parse().unwrap()
}

/// Memory with random content, and what moves it.
fn memory_alone() -> (Arc<GuestMemory>, Source) {
    let memory = full(4);
    let source = Source::builder(memory.clone(), Arc::new(StaticLog)).streams(2).build().unwrap();
    (memory, source)
}

/// The phases among events, each once.
fn phases(events: impl IntoIterator<Item = Event>) -> Vec<Status> {
    let phase = |event| if let Event::Phase { status } = event { Some(status) } else { None };
    events.into_iter().filter_map(phase).collect()
}

#[test]
fn memory_moves_and_events_tell_of_it() {
    let (memory, source) = memory_alone();
    let destination = Destination::builder().bind(&anywhere()).unwrap();
    let uri = destination.uri().clone();
    let arrived = empty(memory.layout().clone());
    let ram = arrived.clone();
    let arriving = destination
        .receive(move |offer| {
            assert!(!offer.live && offer.data_bytes == 4 << 20, "{offer:?}");
            Ok(Landing::memory(ram.clone()))
        })
        .unwrap();
    let migration = source.start(&uri).unwrap();
    // From its beginning on, whenever they are asked for.
    let events: Vec<_> = migration.events().collect();
    assert!(arriving.events().any(|event| matches!(event, Event::Done { .. })));
    let report = migration.wait().unwrap();
    assert!(report.verified && arriving.wait().unwrap().report.verified);
    assert_eq!(differences(&memory, &arrived), 0);
    assert_eq!(phases(events.clone()), [Status::Setup, Status::Active, Status::Completed]);
    assert!(
        events.iter().any(|event| matches!(event, Event::Round(round) if round.logical_bytes == 4 << 20))
    );
    assert!(matches!(events.last(), Some(Event::Done { report: last }) if **last == report), "{events:?}");
    let json = serde_json::to_string(&events).unwrap();
    assert!(json.starts_with(r#"[{"event":"phase","status":"setup"}"#), "{json}");
}

#[test]
fn a_guest_is_handed_over() {
    let memory = full(4);
    let from = source(memory.clone(), Arc::new(Told::default()), Arc::new(Still), 2);
    let migrations = from.clone().downtime_limit(Duration::from_secs(1)).build().unwrap();
    let destination = Destination::builder().bind(&anywhere()).unwrap();
    let uri = destination.uri().clone();
    let arrived = empty(memory.layout().clone());
    let (ram, runs) = (arrived.clone(), Arc::new(AtomicBool::new(false)));
    let told = runs.clone();
    let arriving = destination
        .receive(move |offer| {
            assert!(offer.live && offer.machine == "a");
            let told = told.clone();
            let landing = Landing::guest(ram.clone(), Arc::new(Still));
            Ok(landing.on_arrival(move |running| told.store(running, Ordering::SeqCst)))
        })
        .unwrap();
    let migration = migrations.start(&uri).unwrap();
    let (progress, events) = (migration.progress(), migration.events());
    let report = migration.wait().unwrap();
    assert!(arriving.wait().unwrap().running && runs.load(Ordering::SeqCst));
    assert_eq!(differences(&memory, &arrived), 0);
    let events: Vec<_> = events.collect();
    let downtimes: Vec<_> = events
        .iter()
        .filter_map(|e| if let Event::Downtime { ms, .. } = e { Some(*ms) } else { None })
        .collect();
    assert_eq!(downtimes, [report.downtime_ms], "{events:?}");
    assert!(phases(events).contains(&Status::Device));
    // A handle outlives the migration, and says that it is over.
    assert_eq!(progress.status(), Status::Completed);
    assert_eq!(progress.switchover(), Err(pageferry::Refusal::Ended));
}

/// All of it in async code, on a runtime of one thread, which also carries the control link.
#[test]
fn async_code_moves_memory() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    let (sent, received, phases_seen, left) = runtime.block_on(async move {
        let memory = full(4);
        let own = Source::builder(memory.clone(), Arc::new(StaticLog)).runtime(handle.clone());
        let own = own.build().unwrap();
        let destination = Destination::builder().runtime(handle).bind(&anywhere()).unwrap();
        let uri = destination.uri().clone();
        let arrived = empty(memory.layout().clone());
        let ram = arrived.clone();
        let arriving = destination.receive(move |_| Ok(Landing::memory(ram.clone()))).unwrap();
        let migration = own.start(&uri).unwrap();
        let mut events = migration.events();
        let (mut seen, mut beats) = (Vec::new(), 0);
        // Whatever else the runtime does goes on meanwhile.
        loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => seen.push(event),
                    None => break,
                },
                () = tokio::time::sleep(Duration::from_millis(1)) => beats += 1,
            }
        }
        let _: u32 = beats;
        (migration.await, arriving.await, phases(seen), differences(&memory, &arrived))
    });
    assert!(sent.unwrap().verified && received.unwrap().report.verified);
    assert_eq!(phases_seen, [Status::Setup, Status::Active, Status::Completed]);
    assert_eq!(left, 0);
}

/// Nothing that is dropped where tasks run panics, and everything ends.
#[test]
fn async_code_drops_what_it_has() {
    for workers in [0, 2] {
        let mut builder = match workers {
            0 => tokio::runtime::Builder::new_current_thread(),
            _ => tokio::runtime::Builder::new_multi_thread(),
        };
        let runtime = builder.enable_all().build().unwrap();
        let task = async {
            let (_, source) = memory_alone();
            let given = Destination::builder().runtime(tokio::runtime::Handle::current());
            let given = given.bind(&anywhere()).unwrap();
            let address = given.uri().to_string().replace("tcp:", "");
            tokio::net::TcpStream::connect(&address).await.unwrap();
            drop(given);
            // Its runtime goes on, and it does not listen there any more.
            while tokio::net::TcpStream::connect(&address).await.is_ok() {
                tokio::task::yield_now().await;
            }
            let unused = Destination::builder().bind(&anywhere()).unwrap();
            let (uri, mut events) = (unused.uri().clone(), unused.progress().events());
            drop(unused);
            // Nobody listens there any more.
            let failure = source.start(&uri).unwrap().await.unwrap_err();
            assert_eq!(failure.fate, Fate::Unmoved);
            assert!(matches!(failure.cause, Cause::Socket(_)), "{failure:?}");
            while let Some(event) = events.recv().await {
                assert!(matches!(event, Event::Done { .. }), "{event:?}");
            }
            // Those that go on by themselves are ended by a handle.
            let waiting = Destination::builder().bind(&anywhere()).unwrap();
            let arriving = waiting.receive::<()>(|_| Err("nobody comes in here".into())).unwrap();
            let progress = arriving.progress();
            drop(arriving);
            progress.cancel().unwrap();
            let mut events = progress.events();
            while events.recv().await.is_some() {}
            assert_eq!(progress.status(), Status::Cancelled);
        };
        runtime.block_on(async { tokio::time::timeout(PATIENCE, task).await.expect("everything ends") });
    }
}

#[test]
fn what_a_vmm_refuses_is_told_to_the_source() {
    let (_, source) = memory_alone();
    let destination = Destination::builder().bind(&anywhere()).unwrap();
    let uri = destination.uri().clone();
    let arriving =
        destination.receive::<()>(|offer| Err(format!("no {} bytes here", offer.data_bytes).into())).unwrap();
    for _ in 0..2 {
        let failure = source.start(&uri).unwrap().wait().unwrap_err();
        assert!(explain(&failure).contains("no 4194304 bytes here"), "{}", explain(&failure));
        assert!(!arriving.is_over(), "it listens on");
    }
    let wrong = empty(pageferry::layout::Layout::flat(1 << 20).unwrap());
    arriving.cancel().unwrap();
    assert!(matches!(arriving.wait(), Err(IncomingError::Cancelled)));
    let destination = Destination::builder().bind(&anywhere()).unwrap();
    let uri = destination.uri().clone();
    let arriving = destination.receive(move |_| Ok(Landing::memory(wrong.clone()))).unwrap();
    let failure = source.start(&uri).unwrap().wait().unwrap_err();
    assert!(explain(&failure).contains("of another layout"), "{}", explain(&failure));
    arriving.cancel().unwrap();
    arriving.wait().unwrap_err();
}

#[test]
fn limits_change_and_requests_are_heard_while_it_runs() {
    let memory = full(16);
    // As good as nothing, until somebody says more.
    let from = source(memory.clone(), Arc::new(Told::default()), Arc::new(Still), 1).bandwidth(1 << 20);
    let destination = Destination::builder().bind(&anywhere()).unwrap();
    let uri = destination.uri().clone();
    let arrived = empty(memory.layout().clone());
    let ram = arrived.clone();
    let arriving = destination.receive(move |_| Ok(Landing::guest(ram.clone(), Arc::new(Still)))).unwrap();
    let migration = from.build().unwrap().start(&uri).unwrap();
    let active = |event: &Event| matches!(event, Event::Phase { status: Status::Active });
    let mut events = migration.events();
    assert!(events.any(|event| active(&event)));
    migration.tune(|tuning| (tuning.bandwidth, tuning.pause_before_switchover) = (None, true)).unwrap();
    assert!(events.any(|event| matches!(event, Event::Phase { status: Status::PreSwitchover })));
    assert!(!migration.is_over());
    let unlimited = Tuning::default();
    assert!(unlimited.bandwidth.is_none());
    migration.continue_().unwrap();
    migration.wait().unwrap();
    arriving.wait().unwrap();
    assert_eq!(differences(&memory, &arrived), 0);
}

#[test]
fn options_out_of_their_range_are_named() {
    let builder = || Source::builder(full(1), Arc::new(StaticLog));
    let refused = |source: SourceBuilder| source.build().err().map(|error| error.option);
    let mut brake = Tuning::default();
    brake.throttle_max = 100;
    for (source, option) in [
        (builder(), None),
        (builder().streams(0), Some("streams")),
        (builder().streams(257), Some("streams")),
        (builder().link_timeout(Duration::ZERO), Some("link_timeout")),
        (builder().reconnect_timeout(Duration::from_secs(5_000_000)), Some("reconnect_timeout")),
        (builder().bandwidth(0), Some("bandwidth")),
        (builder().tuning(brake), Some("throttle_max")),
        (builder().paused(true), Some("paused")),
    ] {
        assert_eq!(refused(source), option);
    }
}

#[test]
fn a_source_is_moved_again_after_an_attempt_that_failed() {
    let memory = full(2);
    let from = source(memory.clone(), Arc::new(Told::default()), Arc::new(Still), 1);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let failed = from.clone().build().unwrap().start(&format!("tcp:{nobody}").parse().unwrap()).unwrap();
    assert_eq!(failed.wait().unwrap_err().fate, Fate::RunsOn);
    let arrived = empty(memory.layout().clone());
    let to = Taker { ram: arrived.clone(), guest: Arc::new(Still) };
    let (sent, received) = ferry("tcp:127.0.0.1:0", from, Destination::builder(), to);
    assert!(sent.unwrap().verified && received.unwrap().running);
    assert_eq!(differences(&memory, &arrived), 0);
}

#[test]
fn the_example_shows_the_progress_of_a_guest_that_writes() {
    progress::main().unwrap();
}
