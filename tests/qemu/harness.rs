//! Whoever dies, and whenever: a guest under KVM goes from QEMU to QEMU, one of the four processes is killed or stopped, the link is cut or
//! the migration is cancelled, while pages move or in the handover. Never do two guests run, and the guest goes on where the table in
//! docs/operations.md says.
//!
//! `PAGEFERRY_QEMU_RUNS=200 cargo test --test qemu harness -- --show-output` runs it so often, `PAGEFERRY_QEMU_SEED` differently.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testkit::{PATIENCE, Rng, wait_until};

use crate::common::{Ended, Ferry, turn};
use crate::counter::Counter;
use crate::faults::Path;
use crate::rig::Qemu;
use crate::{LONG, number, receive_with};

/// A migration takes about so long by the limit of its bandwidth.
const ROUGHLY_MS: u64 = 900;
/// Who is alone waits for so long, until somebody interrupts it.
const ALONE: Duration = Duration::from_secs(8);
/// The handover takes about so long.
const HANDOVER_US: u64 = 30_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Blow {
    KillSender,
    KillReceiver,
    KillSource,
    KillDestination,
    Cut,
    CutForGood,
    StopSender,
    StopReceiver,
    Cancel,
}

const BLOWS: [Blow; 9] = [
    Blow::KillSender,
    Blow::KillReceiver,
    Blow::KillSource,
    Blow::KillDestination,
    Blow::Cut,
    Blow::CutForGood,
    Blow::StopSender,
    Blow::StopReceiver,
    Blow::Cancel,
];

/// Where the guest is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Where {
    Source,
    /// Where it goes on once somebody says so, who looked whether the destination runs it.
    SourceByHand,
    Destination,
    Lost,
}

/// A look at a QEMU, as often as wanted.
struct Eye {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Eye {
    fn on(qemu: &Qemu) -> Self {
        let stream = UnixStream::connect(qemu.beside()).unwrap();
        // Whatever becomes of who moves its guest, QEMU answers.
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut eye = Self { lines: BufReader::new(stream.try_clone().unwrap()), stream };
        eye.line().expect("a greeting");
        eye.ask("qmp_capabilities").expect("an answer");
        eye
    }

    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        let count = self.lines.read_line(&mut line);
        let hangs = |e: &std::io::Error| e.kind() == std::io::ErrorKind::WouldBlock;
        assert!(!count.as_ref().is_err_and(hangs), "QEMU answers nobody");
        count.ok().filter(|&count| count != 0)?;
        serde_json::from_str(&line).ok()
    }

    fn ask(&mut self, command: &str) -> Option<Value> {
        writeln!(self.stream, "{}", json!({ "execute": command, "id": command })).ok()?;
        loop {
            let answer = self.line()?;
            if answer["id"] == command {
                return Some(answer["return"].clone());
            }
        }
    }

    /// What its guest does; `None` of a QEMU that is gone.
    fn status(&mut self) -> Option<String> {
        Some(self.ask("query-status")?["status"].as_str()?.to_owned())
    }

    fn runs(&mut self) -> bool {
        self.status().is_some_and(|status| status == "running")
    }
}

/// One migration that is struck.
struct Run {
    to: Qemu,
    eyes: [Eye; 2],
    sending: Option<Ferry>,
    receiving: Option<Ferry>,
    path: Path,
}

impl Run {
    fn begin(guest: &Counter) -> Self {
        let to = guest.waiting();
        let (receiving, uri) =
            receive_with("tcp:127.0.0.1:0", &to, &["--handover-timeout", "4", "--reconnect-timeout", "6"]);
        let path = Path::to(&uri);
        let eyes = [Eye::on(&guest.at), Eye::on(&to)];
        let (uri, qmp) = (path.port.uri(), guest.at.qmp());
        let command =
            ["qemu", "send", &uri, "--qmp", &qmp, "--json", "--codec", "raw", "--bandwidth", "12MB/s"];
        let patience = ["--reconnect-timeout", "6", "--link-timeout", "2", "--streams", "2"];
        let sending = Ferry::start([&command[..], &patience].concat());
        Self { to, eyes, sending: Some(sending), receiving, path }
    }

    /// Fails where both guests run. A destination runs for good, so whoever runs after it was seen to run runs beside it.
    fn look(&mut self) -> [Option<String>; 2] {
        let there = self.eyes[1].status();
        let here = self.eyes[0].status();
        let running = |status: &Option<String>| status.as_deref() == Some("running");
        assert!(!(running(&here) && running(&there)), "two guests run");
        [here, there]
    }

    /// Waits for the moment: so long after the beginning, or in the handover. Whether it came before the migration had ended.
    fn wait_for(&mut self, moment: Moment) {
        let begun = Instant::now();
        loop {
            let [here, _] = self.look();
            let stood = here.is_none_or(|status| status != "running");
            let ended = self.sending.as_mut().is_some_and(Ferry::has_ended);
            match moment {
                _ if ended => return,
                Moment::After(time) if begun.elapsed() >= time => return,
                Moment::Handover(time) if stood => return std::thread::sleep(time),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn strike(&mut self, blow: Blow, guest: &mut Counter, rng: &mut Rng) {
        let nap = Duration::from_millis(rng.below(4000));
        let signal = |who: &mut Option<Ferry>, name: &str| {
            if let Some(who) = who
                && !who.has_ended()
            {
                who.signal(name);
            }
        };
        match blow {
            Blow::KillSender => signal(&mut self.sending, "KILL"),
            Blow::KillReceiver => signal(&mut self.receiving, "KILL"),
            Blow::KillSource => guest.at.kill(),
            Blow::KillDestination => self.to.kill(),
            Blow::Cut | Blow::CutForGood => {
                self.path.cut();
                if blow == Blow::Cut {
                    self.watch_for(nap);
                    self.path.mend();
                }
            }
            Blow::StopSender => {
                signal(&mut self.sending, "STOP");
                self.watch_for(nap);
                signal(&mut self.sending, "CONT");
            }
            Blow::StopReceiver => {
                signal(&mut self.receiving, "STOP");
                self.watch_for(nap);
                signal(&mut self.receiving, "CONT");
            }
            Blow::Cancel => signal(&mut self.sending, "TERM"),
        }
    }

    fn watch_for(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while Instant::now() < until {
            self.look();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until both have ended. How the sender has. One that asks whether the destination has the guest does so for as long as
    /// nobody interrupts it, and a receiver that nobody came to listens as long: once one is alone somebody does.
    fn end(&mut self) -> Ended {
        let mut alone = None;
        wait_until("both end", LONG, || {
            self.look();
            let (sending, receiving) = (self.sending.as_mut(), self.receiving.as_mut());
            let ended = [sending, receiving].map(|who| who.is_none_or(Ferry::has_ended));
            if ended[0] != ended[1] && alone.get_or_insert_with(Instant::now).elapsed() > ALONE {
                alone = Some(Instant::now());
                let who = if ended[0] { &self.receiving } else { &self.sending };
                who.as_ref().unwrap().signal("TERM");
            }
            ended == [true, true]
        });
        drop(self.receiving.take());
        self.sending.take().expect("it was started").wait()
    }
}

#[derive(Clone, Copy, Debug)]
enum Moment {
    After(Duration),
    Handover(Duration),
}

/// Says where the guest is, and whether it may be there.
fn judge(run: &mut Run, blow: Blow, sent: &Ended) -> Where {
    let [here, there] = run.look();
    let there_runs = there.as_deref() == Some("running");
    match sent.code {
        Some(0) if blow == Blow::KillDestination && there.is_none() => {}
        Some(0) => assert!(there_runs, "it is said to have arrived: {here:?} {there:?} {sent:?}"),
        // Killed by a signal, or it does not know.
        None | Some(4) => {}
        Some(1 | 130) => assert!(!there_runs, "it is said to have stayed: {here:?} {there:?} {sent:?}"),
        _ => panic!("{sent:?}"),
    }
    match (here.as_deref(), there_runs) {
        (_, true) => Where::Destination,
        (Some("running"), _) => Where::Source,
        (None, _) => {
            assert_eq!(blow, Blow::KillSource, "{sent:?}");
            Where::Lost
        }
        (Some(_), _) => match (blow, sent.code) {
            (Blow::KillSender, None) => Where::SourceByHand,
            // Nobody is there who could say; whoever looks finds that the destination does not run it.
            (_, Some(4)) if there.as_deref() != Some("running") && blow != Blow::KillDestination => {
                Where::SourceByHand
            }
            // It had the guest, and was killed.
            (Blow::KillDestination, Some(0 | 4)) => Where::Lost,
            (_, _) => panic!("the guest stands still: {here:?} {there:?} {sent:?}"),
        },
    }
}

#[test]
fn whoever_dies_the_guest_is_where_the_table_says() {
    let Some(mut guest) = Counter::start() else { return };
    let _turn = turn();
    let (runs, seed) =
        (number("PAGEFERRY_QEMU_RUNS").unwrap_or(12), number("PAGEFERRY_QEMU_SEED").unwrap_or(1));
    let mut outcomes: BTreeMap<(Blow, bool, Where), u64> = BTreeMap::new();
    for number in 0..runs {
        let mut rng = Rng::new(seed.wrapping_mul(1 << 20).wrapping_add(number));
        let blow = BLOWS[rng.below(BLOWS.len() as u64) as usize];
        let handover = rng.below(2) == 0;
        let moment = if handover {
            Moment::Handover(Duration::from_micros(rng.below(HANDOVER_US)))
        } else {
            Moment::After(Duration::from_millis(rng.below(ROUGHLY_MS)))
        };
        println!("run {number}: {blow:?} {moment:?}");
        guest.wait_passes(1);
        let mut run = Run::begin(&guest);
        run.wait_for(moment);
        run.strike(blow, &mut guest, &mut rng);
        let sent = run.end();
        let found = judge(&mut run, blow, &sent);
        println!("run {number}: {found:?}, the sender ended with {:?}", sent.code);
        *outcomes.entry((blow, handover, found)).or_default() += 1;
        match found {
            Where::Source => guest.wait_passes(1),
            Where::SourceByHand => {
                run.eyes[0].ask("cont").expect("an answer");
                assert!(run.eyes[0].runs());
                guest.wait_passes(1);
            }
            Where::Destination => {
                guest.look();
                guest.has_gone_to(run.to);
                guest.wait_passes(1);
            }
            Where::Lost => guest = Counter::start().expect("it was there before"),
        }
    }
    for ((blow, handover, found), count) in outcomes {
        let when = if handover { "handover" } else { "pages" };
        println!("{blow:?} {when} {found:?} {count}");
    }
}
