//! A migration that is cancelled ends at once, whatever it waits for, and says so.
//!
//! Connections have a minute here before they count as lost: whoever waits for that to pass is found out. `PAGEFERRY_CANCELS=200` for more
//! of the random ones than every test run has, `PAGEFERRY_SEED` for others.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::transport::wire::Role;
use serde_json::json;

use crate::proxy::{Proxy, Seen, Verdict};
use crate::vm::{Spec, Vm, World, prove};
use testkit::{PATIENCE, Rng, wait_for};

/// Far less than the minute, and far more than a busy machine takes for what should take some milliseconds.
const SOON: Duration = Duration::from_secs(15);

/// A host that is there and answers no SYN: its backlog is full.
struct BlackHole {
    listener: TcpListener,
    _waiting: Vec<TcpStream>,
}

impl BlackHole {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // Listening again only sets the backlog.
        rustix::net::listen(&listener, 0).unwrap();
        let address = listener.local_addr().unwrap();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(300)).ok();
        let waiting = std::iter::from_fn(connect).take(16).collect();
        Self { listener, _waiting: waiting }
    }

    fn uri(&self) -> String {
        format!("tcp:{}", self.listener.local_addr().unwrap())
    }
}

/// What does not go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Nothing,
    /// Messages of this name.
    Message(&'static str),
    /// Connections of this role, other than the control connection: they are accepted, and nothing is heard on them.
    Opening(Role),
    /// Page data, and receipts.
    Data,
}

/// A proxy, and what it holds, which may change.
struct Holding {
    proxy: Proxy,
    held: Arc<Mutex<Held>>,
    over: Arc<AtomicBool>,
}

impl Holding {
    fn new(uri: &str, held: Held) -> Self {
        let held = Arc::new(Mutex::new(held));
        let over = Arc::new(AtomicBool::new(false));
        let (holds, ends) = (held.clone(), over.clone());
        let wait = move |now: &dyn Fn(Held) -> bool| {
            while now(*holds.lock().unwrap()) && !ends.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        let names = held.clone();
        let proxy = Proxy::new(uri, move |seen| {
            match seen {
                Seen::Message { message, .. } if *names.lock().unwrap() == Held::Message(message.name()) => {
                    return Verdict::Lose;
                }
                Seen::Message { .. } => {}
                Seen::Open { role, .. } => wait(&|held| held == Held::Opening(*role)),
                Seen::Data { .. } => wait(&|held| held == Held::Data),
            }
            Verdict::Pass
        });
        Self { proxy, held, over }
    }

    fn hold(&self, held: Held) {
        *self.held.lock().unwrap() = held;
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Cancels; returns how long it took until the source said so.
fn cancel(source: &Vm, what: &str) -> Duration {
    let begun = Instant::now();
    let answer = source.ask(&json!({"execute": "cancel"}));
    assert!(answer.is_ok(), "{what}: {answer:?}");
    let report = wait_for(&format!("{what}: it is cancelled"), SOON, || {
        let report = source.status()["migration"].clone();
        (!["setup", "active", "reconnecting", "device", "pre-switchover"]
            .contains(&report["status"].as_str().unwrap()))
        .then_some(report)
    });
    assert_eq!(report["status"], "cancelled", "{what}: {report}");
    assert_eq!(source.state(), "running", "{what}");
    begun.elapsed()
}

/// A guest that is not through at once, and slowly enough for this machine.
fn spec() -> Spec {
    Spec { mem_mib: 128, working_set: 64 << 20, ..Spec::counter() }.with(&["--memory", "memfd"])
}

/// The least that a migration of these tests sets.
fn options() -> serde_json::Value {
    json!({"link_timeout_s": 60, "reconnect_timeout_s": 600, "downtime_limit_ms": 0, "bandwidth": 30_000_000})
}

fn with(more: &serde_json::Value) -> serde_json::Value {
    let mut all = options();
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

fn wait_status(source: &Vm, what: &str, status: &str) {
    wait_for(&format!("{what}: {status}"), PATIENCE, || {
        (source.status()["migration"]["status"] == status).then_some(())
    });
}

/// Enough for whoever is to wait to have begun.
fn settle() {
    std::thread::sleep(Duration::from_millis(400));
}

#[test]
fn cancelled_in_every_phase() {
    let world = World::new();
    let spec = spec();
    let source = world.source("a", &spec);
    let mut longest = (Duration::ZERO, "");
    let mut ended = |what: &'static str| longest = longest.max((cancel(&source, what), what));

    let hole = BlackHole::new();
    source.begin_migration(&hole.uri(), &options());
    settle();
    ended("SYNs are dropped");

    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    source.begin_migration(&format!("tcp:{}", silent.local_addr().unwrap()), &options());
    settle();
    ended("nobody says WELCOME");

    let postcopy = json!({"postcopy_after_rounds": 0});
    for (what, held, more) in [
        ("nobody says PREPARED", Held::Message("PREPARED"), json!({})),
        ("streams are not attached", Held::Opening(Role::Stream), json!({})),
        ("no page gets through", Held::Data, json!({})),
        ("READY is lost", Held::Message("READY"), json!({"downtime_limit_ms": 600_000, "bandwidth": 0})),
        ("POSTCOPY_READY is lost", Held::Message("POSTCOPY_READY"), postcopy.clone()),
        ("postcopy is not attached", Held::Opening(Role::Postcopy), postcopy.clone()),
        ("READY of postcopy is lost", Held::Message("READY"), postcopy),
    ] {
        let (_destination, uri) = world.destination("b", &spec);
        let holding = Holding::new(&uri, held);
        source.begin_migration(&holding.proxy.uri(), &with(&more));
        if what.starts_with("READY") {
            wait_status(&source, what, "device");
        }
        settle();
        ended(what);
    }

    let (_destination, uri) = world.destination("b", &spec);
    source.begin_migration(
        &uri,
        &with(&json!({"pause_before_switchover": true, "downtime_limit_ms": 600_000, "bandwidth": 0})),
    );
    wait_status(&source, "it waits for the word", "pre-switchover");
    ended("it waits for the word");

    let (_destination, uri) = world.destination("b", &spec);
    let holding = Holding::new(&uri, Held::Nothing);
    source.begin_migration(&holding.proxy.uri(), &options());
    wait_status(&source, "an outage", "active");
    holding.hold(Held::Opening(Role::Resume));
    holding.proxy.cut_all();
    wait_status(&source, "an outage", "reconnecting");
    settle();
    ended("an outage, and silence");

    println!("the longest answer to cancel: {} ms ({})", longest.0.as_millis(), longest.1);
    prove(&spec, &[&source]);
}

/// Whoever asks what came of GO can be told to stop; what came of it stays unknown.
#[test]
fn asking_ends_when_it_is_cancelled() {
    let world = World::new();
    let spec = Spec::counter();
    let source = world.source("a", &spec);
    let (_destination, uri) = world.destination("b", &spec);
    let holding = Holding::new(&uri, Held::Opening(Role::Query));
    let phase = Arc::new(AtomicU8::new(0));
    let seen_go = phase.clone();
    let to = holding.proxy.uri();
    let cutting = Proxy::new(&to, move |seen| match seen {
        Seen::Message { message, .. } if message.name() == "GO" => {
            seen_go.store(1, Ordering::Relaxed);
            Verdict::Cut
        }
        _ => Verdict::Pass,
    });
    source.begin_migration(&cutting.uri(), &json!({"link_timeout_s": 60}));
    wait_status(&source, "it asks", "unknown");
    settle();
    let asked = source.ask(&json!({"execute": "cancel"}));
    assert!(asked.is_ok(), "{asked:?}");
    wait_for("it asks no more", SOON, || {
        let again = source.ask(&json!({"execute": "cancel"}));
        again.is_err_and(|text| text.contains("no migration is under way")).then_some(())
    });
    assert_eq!((phase.load(Ordering::Relaxed), source.state().as_str()), (1, "unknown"));
}

#[test]
fn cancelled_at_random_moments() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (count, seed) = (number("PAGEFERRY_CANCELS").unwrap_or(8), number("PAGEFERRY_SEED").unwrap_or(1));
    let mut rng = Rng::new(seed);
    let world = World::new();
    let spec = spec();
    let source = world.source("a", &spec);
    let hole = BlackHole::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let (mut longest, mut cancelled) = ((Duration::ZERO, String::new()), 0);
    for run in 0..count {
        let trouble = rng.below(8);
        let (before, after) = (rng.below(1200), rng.below(600));
        let what =
            format!("run {run} of seed {seed}: trouble {trouble} at {before} ms, cancelled {after} ms later");
        let mut keep = None;
        let uri = match trouble {
            0 => hole.uri(),
            1 => format!("tcp:{}", silent.local_addr().unwrap()),
            _ => {
                let (destination, uri) = world.destination("b", &spec);
                let held = if trouble == 2 { Held::Opening(Role::Stream) } else { Held::Nothing };
                let holding = Holding::new(&uri, held);
                let uri = holding.proxy.uri();
                keep = Some((holding, destination));
                uri
            }
        };
        source.begin_migration(&uri, &options());
        std::thread::sleep(Duration::from_millis(before));
        if let Some((holding, destination)) = &keep {
            match trouble {
                3 => holding.hold(Held::Data),
                4 => holding.proxy.cut_all(),
                5 => {
                    holding.hold(Held::Opening(Role::Resume));
                    holding.proxy.cut_all();
                }
                6 => {
                    holding.hold(Held::Opening(Role::Stream));
                    holding.proxy.cut(|role, _| role == Role::Stream);
                }
                7 => destination.kill(),
                _ => {}
            }
        }
        std::thread::sleep(Duration::from_millis(after));
        // Before the streams are open, what happens to the connections may end it first.
        if (4..=7).contains(&trouble) && source.status()["migration"]["status"] == "failed" {
            continue;
        }
        longest = longest.max((cancel(&source, &what), what));
        cancelled += 1;
    }
    assert!(cancelled > count / 2, "{cancelled} of {count} were there to be cancelled");
    println!("{cancelled} cancels, the longest answer: {} ms ({})", longest.0.as_millis(), longest.1);
    prove(&spec, &[&source]);
}
