//! What is done to a migration, when, and the hand that does it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use pageferry::transport::wire::{Role, stream_number};

use crate::proxy::{By, Proxy, Seen, Verdict};
use crate::tmpfs::Tmpfs;
use crate::vm::{send_signal, stop_process};
use testkit::Rng;

/// A step of the protocol, as it comes by between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Open(Role),
    Message(By, &'static str),
    /// So many bytes of one stream.
    Data(By, u64),
    /// So many bytes of a connection that carries pages, or asks for them, after the guest.
    Pages(By, u64),
}

/// Every step of a migration to which nothing happens.
const STEPS: [Step; 18] = [
    Step::Open(Role::Control),
    Step::Message(By::Source, "HELLO"),
    Step::Message(By::Destination, "WELCOME"),
    Step::Message(By::Destination, "PREPARED"),
    Step::Open(Role::Stream),
    Step::Data(By::Source, 1),
    Step::Data(By::Destination, 1),
    Step::Data(By::Source, 100 << 10),
    Step::Data(By::Destination, 1 << 10),
    Step::Data(By::Source, 300 << 10),
    Step::Message(By::Source, "STATE"),
    Step::Message(By::Source, "FINISH"),
    Step::Message(By::Destination, "READY"),
    Step::Message(By::Source, "GO"),
    Step::Message(By::Destination, "RUNNING"),
    Step::Message(By::Source, "RUNNING"),
    // Twice as often as the others: what they decide is decided nowhere else.
    Step::Message(By::Destination, "READY"),
    Step::Message(By::Source, "GO"),
];

/// Steps that come only after something has happened.
const RECOVERY: [Step; 9] = [
    Step::Open(Role::Resume),
    Step::Message(By::Source, "RESUME"),
    Step::Message(By::Destination, "RESUMED"),
    Step::Message(By::Source, "STREAM_LOST"),
    Step::Message(By::Destination, "STREAM_STOPPED"),
    Step::Open(Role::Query),
    Step::Message(By::Source, "QUERY"),
    Step::Message(By::Destination, "STATUS"),
    Step::Message(By::Destination, "ERROR"),
];

/// Steps of a handover before all pages are there, besides those of every migration.
const POSTCOPY: [Step; 14] = [
    Step::Message(By::Source, "POSTCOPY"),
    Step::Message(By::Destination, "POSTCOPY_READY"),
    Step::Message(By::Source, "MISSING"),
    Step::Open(Role::Postcopy),
    Step::Pages(By::Source, 1),
    Step::Pages(By::Destination, 1),
    Step::Pages(By::Source, 60 << 10),
    Step::Pages(By::Source, 300 << 10),
    Step::Message(By::Source, "SENT"),
    Step::Message(By::Destination, "ARRIVED"),
    // Twice as often as the others, as above.
    Step::Message(By::Source, "MISSING"),
    Step::Pages(By::Source, 60 << 10),
    Step::Message(By::Destination, "READY"),
    Step::Message(By::Source, "GO"),
];

/// What a process is starved of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Descriptors: none beyond those that it has.
    Descriptors,
    /// Address space: no more than so many MiB beyond what it has.
    Memory(u64),
    /// Room in the file system of its guest's memory: all but so many KiB of it.
    Room(u64),
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    Kill(By),
    /// There is no more of something for so many milliseconds.
    Starve(By, Want, u64),
    /// SIGSTOP, and SIGCONT after so many milliseconds.
    Freeze(By, u64),
    /// The control connection, and the streams of this mask.
    Cut {
        control: bool,
        streams: u16,
    },
    /// Everything, and nothing comes through for so many milliseconds.
    Down(u64),
}

impl Harm {
    /// In words, without numbers.
    fn kind(self) -> String {
        let side = |by| if by == By::Source { "source" } else { "destination" };
        match self {
            Self::Kill(by) => format!("the {} was killed", side(by)),
            Self::Freeze(by, _) => format!("the {} was frozen", side(by)),
            Self::Starve(by, Want::Descriptors, _) => format!("the {} had no descriptors", side(by)),
            Self::Starve(by, Want::Memory(_), _) => format!("the {} had no address space", side(by)),
            Self::Starve(by, Want::Room(_), _) => format!("the {} had no room", side(by)),
            Self::Cut { .. } => "connections were cut".into(),
            Self::Down(_) => "the network was down".into(),
        }
    }
}

/// One fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    step: Step,
    /// Which time that the step comes by.
    nth: u32,
    /// Before it reaches the other side, or just after.
    before: bool,
    harm: Harm,
}

/// What one run is.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) streams: u16,
    pub(crate) reconnect_s: u64,
    /// The guest is handed over before its pages, after so many rounds.
    pub(crate) postcopy_after_rounds: Option<u32>,
    /// On KVM, where there is one.
    pub(crate) kvm: bool,
    faults: Vec<Fault>,
}

impl Plan {
    /// The same for the same seed. Where there is no file system whose room could be taken, address space is taken instead.
    pub(crate) fn of(seed: u64, has_room_to_take: bool) -> Self {
        let rng = &mut Rng::new(seed);
        let streams = 1 + rng.below(3) as u16;
        let reconnect_s = [0, 1, 3, 3][rng.index(4)];
        let postcopy_after_rounds = [None, None, Some(0), Some(1)][rng.index(4)];
        let mut steps = STEPS.to_vec();
        if postcopy_after_rounds.is_some() {
            steps.extend(POSTCOPY);
        }
        let mut faults: Vec<Fault> = (0..1 + rng.below(3))
            .map(|i| {
                if i == 1 {
                    steps.extend(RECOVERY);
                }
                Fault::any(rng, &steps)
            })
            .collect();
        for fault in faults.iter_mut().filter(|_| !has_room_to_take) {
            if let Harm::Starve(_, want @ Want::Room(_), _) = &mut fault.harm {
                *want = Want::Memory(4);
            }
        }
        // A guest that is threads ends with its process where its memory cannot be had, which no other guest does.
        let kvm = rng.below(3) != 0 || !faults.iter().any(Fault::takes_room);
        Self { seed, streams, reconnect_s, postcopy_after_rounds, kvm, faults }
    }

    /// Whether room for the guest's memory is taken.
    pub(crate) fn takes_room(&self) -> bool {
        self.faults.iter().any(Fault::takes_room)
    }
}

impl Fault {
    fn any(rng: &mut Rng, steps: &[Step]) -> Self {
        let step = steps[rng.index(steps.len())];
        let side = if rng.below(2) == 0 { By::Source } else { By::Destination };
        let harm = match rng.below(11) {
            0 | 1 => Harm::Kill(side),
            2 | 3 => Harm::Freeze(side, [100, 500, 1500, 3500][rng.index(4)]),
            4..7 => Harm::Cut { control: rng.below(3) != 0, streams: rng.below(8) as u16 },
            7 => Harm::Down([200, 1500, 4000][rng.index(3)]),
            8 => {
                let want = [Want::Descriptors, Want::Memory(4), Want::Memory(16)][rng.index(3)];
                Harm::Starve(side, want, [300, 2000, 5000][rng.index(3)])
            }
            _ => {
                let want = Want::Room([0, 64, 1 << 10][rng.index(3)]);
                // Short ones are over before the guest comes to what could not be brought in.
                Harm::Starve(side, want, [10, 60, 1000][rng.index(3)])
            }
        };
        Self { step, nth: 1 + rng.below(4) as u32 / 3, before: rng.below(2) == 0, harm }
    }

    fn takes_room(&self) -> bool {
        matches!(self.harm, Harm::Starve(_, Want::Room(_), _))
    }
}

/// One of the two processes.
pub(crate) struct Victim {
    pub(crate) pid: i32,
    /// Where its guest's memory is, if that can be filled.
    pub(crate) room: Option<Arc<Tmpfs>>,
}

/// Harms the migration by a plan, and knows what it has done.
pub(crate) struct Hand {
    proxy: Arc<Proxy>,
    deeds: Arc<Deeds>,
}

/// What ends a harm.
type Ending = Box<dyn FnOnce(&Deeds) + Send>;

struct Deeds {
    source: Victim,
    destination: Victim,
    proxy: OnceLock<Weak<Proxy>>,
    down: AtomicBool,
    /// Signals and silences that are still to end.
    unfinished: AtomicU32,
    done: Mutex<Vec<Fault>>,
}

impl Hand {
    /// A way to the destination at `uri` on which the plan happens.
    pub(crate) fn new(uri: &str, plan: &Plan, source: Victim, destination: Victim) -> Self {
        let deeds = Arc::new(Deeds {
            source,
            destination,
            proxy: OnceLock::new(),
            down: AtomicBool::new(false),
            unfinished: AtomicU32::new(0),
            done: Mutex::default(),
        });
        let seen: Vec<AtomicU32> = plan.faults.iter().map(|_| AtomicU32::new(0)).collect();
        let (faults, acting) = (plan.faults.clone(), deeds.clone());
        let proxy = Proxy::new(uri, move |event| {
            if acting.down.load(Ordering::Acquire) {
                return Verdict::Cut;
            }
            let mut verdict = Verdict::Pass;
            for (fault, seen) in faults.iter().zip(&seen) {
                if is(fault.step, event) && seen.fetch_add(1, Ordering::Relaxed) + 1 == fault.nth {
                    verdict = acting.strike(*fault, event, verdict);
                }
            }
            verdict
        });
        let proxy = Arc::new(proxy);
        let _ = deeds.proxy.set(Arc::downgrade(&proxy));
        Self { proxy, deeds }
    }

    /// Where the source connects.
    pub(crate) fn uri(&self) -> String {
        self.proxy.uri()
    }

    /// Whether a process was killed.
    pub(crate) fn killed(&self, side: By) -> bool {
        self.deeds.done.lock().unwrap().iter().any(|fault| fault.harm == Harm::Kill(side))
    }

    /// Whether a process had no room for its guest's memory.
    pub(crate) fn took_room(&self, side: By) -> bool {
        let of_side = |fault: &Fault| matches!(fault.harm, Harm::Starve(of, ..) if of == side);
        self.deeds.done.lock().unwrap().iter().any(|fault| fault.takes_room() && of_side(fault))
    }

    /// The kinds of harm that were done, in words.
    pub(crate) fn kinds(&self) -> Vec<String> {
        self.deeds.done.lock().unwrap().iter().map(|fault| fault.harm.kind()).collect()
    }

    /// Whether something is still frozen, starved or cut off.
    pub(crate) fn is_busy(&self) -> bool {
        self.deeds.unfinished.load(Ordering::Acquire) != 0
    }

    /// What happened, in short.
    pub(crate) fn deeds(&self) -> String {
        let done = self.deeds.done.lock().unwrap();
        if done.is_empty() { "nothing".into() } else { format!("{done:?}") }
    }
}

fn is(step: Step, seen: &Seen<'_>) -> bool {
    match (step, seen) {
        (Step::Open(at), Seen::Open { role, .. }) => at == *role,
        (Step::Message(from, name), Seen::Message { by, message, .. }) => {
            from == *by && message.name() == name
        }
        (Step::Data(from, bytes), Seen::Data { role: Role::Stream, by, total, len, .. })
        | (Step::Pages(from, bytes), Seen::Data { role: Role::Postcopy, by, total, len, .. }) => {
            from == *by && *total >= bytes && *total - (*len as u64) < bytes
        }
        _ => false,
    }
}

impl Deeds {
    /// Does it, now or just after what was seen has gone on.
    fn strike(self: &Arc<Self>, fault: Fault, seen: &Seen<'_>, verdict: Verdict) -> Verdict {
        self.unfinished.fetch_add(1, Ordering::AcqRel);
        self.done.lock().unwrap().push(fault);
        if fault.before {
            self.harm(fault.harm);
            let lost = match fault.harm {
                // What a process has sent before it died may arrive, or not.
                Harm::Kill(_) => fault.nth == 1,
                Harm::Freeze(..) | Harm::Starve(..) => false,
                Harm::Cut { control, streams } => match seen {
                    Seen::Open { role: Role::Stream | Role::Postcopy, stream }
                    | Seen::Data { stream, .. } => streams >> stream_number(*stream) & 1 != 0,
                    _ => control,
                },
                Harm::Down(_) => true,
            };
            return if lost { Verdict::Cut } else { verdict };
        }
        let later = self.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2));
            later.harm(fault.harm);
        });
        verdict
    }

    fn victim(&self, side: By) -> &Victim {
        match side {
            By::Source => &self.source,
            By::Destination => &self.destination,
        }
    }

    fn harm(self: &Arc<Self>, harm: Harm) {
        let cut = |which: &dyn Fn(Role, u16) -> bool| {
            if let Some(proxy) = self.proxy.get().and_then(Weak::upgrade) {
                proxy.cut(which);
            }
        };
        let (after_ms, end): (u64, Ending) = match harm {
            Harm::Kill(side) => {
                send_signal(self.victim(side).pid, libc::SIGKILL);
                (0, Box::new(|_| {}))
            }
            Harm::Starve(side, want, ms) => (ms, starve(self.victim(side), want)),
            Harm::Freeze(side, ms) => {
                stop_process(self.victim(side).pid);
                (ms, Box::new(move |deeds| send_signal(deeds.victim(side).pid, libc::SIGCONT)))
            }
            Harm::Cut { control, streams } => {
                cut(&|role, stream| match role {
                    Role::Stream | Role::Postcopy => streams >> stream & 1 != 0,
                    _ => control,
                });
                (0, Box::new(|_| {}))
            }
            Harm::Down(ms) => {
                self.down.store(true, Ordering::Release);
                cut(&|_, _| true);
                (ms, Box::new(|deeds| deeds.down.store(false, Ordering::Release)))
            }
        };
        let deeds = self.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(after_ms));
            end(&deeds);
            deeds.unfinished.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

/// Takes away what a process has not got yet; returns what gives it back. It may have ended.
fn starve(victim: &Victim, want: Want) -> Ending {
    let pid = victim.pid;
    let Some(process) = rustix::process::Pid::from_raw(pid) else { return Box::new(|_| {}) };
    let (resource, limit) = match want {
        Want::Descriptors => {
            let open = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
            (rustix::process::Resource::Nofile, open as u64)
        }
        Want::Memory(mib) => {
            let pages = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
            let pages: u64 = pages.split(' ').next().and_then(|pages| pages.parse().ok()).unwrap_or(0);
            (rustix::process::Resource::As, pages * 4096 + (mib << 20))
        }
        Want::Room(kib) => {
            let room = victim.room.as_ref().expect("room is taken where there is some");
            let ballast = room.fill(kib << 10).expect("a tmpfs can be filled");
            return Box::new(move |_| drop(ballast));
        }
    };
    let before = rustix::process::getrlimit(resource);
    let limit = rustix::process::Rlimit { current: Some(limit), maximum: before.maximum };
    if rustix::process::prlimit(Some(process), resource, limit).is_err() {
        return Box::new(|_| {});
    }
    // Its limits are those of this process, which has started it.
    Box::new(move |_| {
        let _ = rustix::process::prlimit(Some(process), resource, before);
    })
}
