//! A guest that moves to and fro between two processes, a thousand times: nothing of that may stay with them.
//!
//! ```text
//! cargo run --release --example endurance                                  1,000 migrations, 100 of them cancelled
//! cargo run --release --example endurance -- --migrations 40 --cancelled 8
//! cargo run --release --example endurance -- --tls-dir keys                the same under TLS; `pageferry keys init keys` makes them
//! ```
//!
//! Each process has a VM of its own for as long as the guest is there, and makes another one when it comes back. After every migration
//! this program looks what both processes have, by `/proc`: descriptors, threads, mappings and resident memory, apart for the one
//! with the guest and the one without. The guest's own output tells whether it went back or skipped. The exit code is 0 where
//! descriptors, threads and mappings are in the end what they were in the beginning, and memory has not grown since the first 50.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::backend::{DirtyLog, Guest, GuestRam};
use pageferry::layout::Layout;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::vmm_shim::guests::counter::{self, Checker, CounterParams, PAGE_WORDS_MAX};
use pageferry::vmm_shim::guests::{fill, map};
use pageferry::vmm_shim::uffd_log::UffdLog;
use pageferry::vmm_shim::vmm::{GuestImage, Tracker, Vm, VmConfig};
use pageferry::vmm_shim::writer::{MemoryWriter, WriterOptions};
use pageferry::vmm_shim::{kvm, vmm};
use pageferry::{
    Arriving, Destination, Landing, Progress, Side, Source, Status, Tls, TlsFiles, explain, reserve,
};

type Failed = Box<dyn Error + Send + Sync>;

const MEMORY: u64 = 64 << 20;
const WORKING_SET: u64 = 4 << 20;
const PAGES_PER_S: u64 = 20_000;
/// A migration that is to be cancelled takes some seconds by this; it is cancelled within [`CANCELLED_WITHIN_MS`].
const SLOW_BYTES_PER_S: u64 = 30 << 20;
const CANCELLED_WITHIN_MS: u64 = 120;
/// Every so many-th migration goes by postcopy, where the host lets it.
const POSTCOPY_EACH: u64 = 10;
/// Migrations after which nothing may grow any more.
const WARM: usize = 50;
/// What resident memory may grow by then: pages of the allocator that are in use by chance.
const SLACK_BYTES: u64 = 4 << 20;
/// How long threads that have said their last word may take to be gone.
const SETTLE: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    // As any program may whose processes outlive many migrations.
    reserve::keep_little();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["side", folder] => side(Path::new(folder), None).map(|()| true),
        ["side", folder, keys] => side(Path::new(folder), Some(Path::new(keys))).map(|()| true),
        _ => drive(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("endurance: {}", explain(&*error));
            ExitCode::FAILURE
        }
    }
}

// ---- one of the two processes: does what it is told, a line each ----

/// A VM, on KVM where there is one.
struct Machine {
    ram: Arc<GuestMemory>,
    guest: Arc<dyn Guest>,
    log: Arc<dyn DirtyLog>,
}

impl Machine {
    /// For a guest that comes, or, with `begins`, that begins here. Its output goes to a file.
    fn new(layout: Layout, begins: bool, console: &Path) -> Result<Self, Failed> {
        let ram = Arc::new(GuestMemory::create(layout, &Backing::Anonymous { huge: true })?);
        let mut out = File::create(console)?;
        if begins {
            let mut state = 1u64;
            let mut next = || {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                (state >> 33) as u8
            };
            let content: Vec<u8> = (0..8 << 20).map(|_| next()).collect();
            fill(&*ram, &content)?;
        }
        if kvm::open().is_err() {
            let options =
                WriterOptions { threads: 1, gpa: map::FREE, bytes: WORKING_SET, pages_per_s: PAGES_PER_S };
            let log = Arc::new(UffdLog::new(ram.clone())?);
            let sink = Box::new(move |line: &[u8]| drop(out.write_all(line)));
            let guest = Arc::new(MemoryWriter::new(ram.clone(), options, sink)?);
            return Ok(Self { ram, guest, log });
        }
        let params =
            CounterParams { working_set: WORKING_SET, pages_per_s: PAGES_PER_S, page_words: PAGE_WORDS_MAX };
        let guest = if begins { GuestImage::Counter(params) } else { GuestImage::Incoming };
        let vm = Vm::new(VmConfig { cpus: 1, guest, tracker: Tracker::Bitmap }, ram.clone(), Box::new(out))?;
        vm.start()?;
        let log = vm.dirty_log().ok_or("the VM has no dirty log")?;
        Ok(Self { ram, guest: Arc::new(vm), log })
    }
}

/// With the keys of its folder, if there is one.
fn tls(keys: Option<&Path>, side: Side) -> Option<Tls> {
    keys.map(|keys| Tls::new(TlsFiles::of_folder(keys, side)))
}

fn side(folder: &Path, keys: Option<&Path>) -> Result<(), Failed> {
    let machine: Arc<Mutex<Option<Machine>>> = Arc::default();
    let mut arriving: Option<Arriving<Machine>> = None;
    let mut listening: Option<Progress> = None;
    let here = || machine.lock().map_err(|_| "a thread panicked");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match words[..] {
            ["start", name] => {
                let made = Machine::new(vmm::layout(MEMORY)?, true, &folder.join(name))?;
                made.guest.resume()?;
                *here()? = Some(made);
                "started".into()
            }
            ["listen", name] => {
                let destination =
                    Destination::builder().tls(tls(keys, Side::Server)).bind(&"tcp:127.0.0.1:0".parse()?)?;
                let (uri, console) = (destination.uri().to_string(), folder.join(name));
                arriving = Some(destination.receive(move |offer| {
                    let made = Machine::new(offer.layout.clone(), false, &console)?;
                    Ok(Landing::guest(made.ram.clone(), made.guest.clone()).keeping(made))
                })?);
                uri
            }
            ["arrive"] => {
                let arriving = arriving.take().ok_or("nobody listens")?;
                listening = Some(arriving.progress());
                let machine = machine.clone();
                thread::spawn(move || match arriving.wait() {
                    Ok(arrival) => {
                        *machine.lock().expect("nobody panics with it") = Some(arrival.vm);
                        println!("arrived");
                    }
                    Err(error) => println!("not arrived: {}", explain(&error)),
                });
                continue;
            }
            // Where the source was cancelled before it was heard, nobody has told this side.
            ["cancel"] => {
                listening.take().ok_or("nobody listens")?.cancel()?;
                continue;
            }
            ["send", uri, how, ms] => {
                let mut here = here()?;
                let from = here.as_ref().ok_or("no guest is here")?;
                let said = send(from, tls(keys, Side::Client), uri, how, ms.parse()?)?;
                if said == "completed" {
                    *here = None;
                }
                said
            }
            ["pause"] => {
                here()?.as_ref().ok_or("no guest is here")?.guest.pause()?;
                "paused".into()
            }
            _ => return Err(format!("{line:?} means nothing").into()),
        };
        println!("{answer}");
    }
    Ok(())
}

/// Moves the guest away, or begins to and cancels after so many milliseconds; says what came of it.
fn send(from: &Machine, tls: Option<Tls>, uri: &str, how: &str, ms: u64) -> Result<String, Failed> {
    let source =
        Source::builder(from.ram.clone(), from.log.clone()).guest(from.guest.clone()).streams(2).tls(tls);
    let source = match how {
        "cancel" => source.bandwidth(SLOW_BYTES_PER_S),
        "postcopy" if from.ram.missing_unit().is_ok() => source.postcopy_after_rounds(0),
        _ => source,
    };
    let migration = source.build()?.start(&uri.parse()?)?;
    let progress = migration.progress();
    if how == "cancel" {
        thread::sleep(Duration::from_millis(ms));
        migration.cancel()?;
    }
    Ok(match migration.wait() {
        Ok(_) => "completed".into(),
        Err(_) if progress.status() == Status::Cancelled => "cancelled".into(),
        Err(failure) => format!("failed: {}", explain(&failure)),
    })
}

// ---- who tells them, and looks ----

struct Process {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Process {
    fn start(folder: &Path, keys: Option<&str>) -> Result<Self, Failed> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("side").arg(folder).args(keys).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().ok_or("no standard output")?);
        Ok(Self { child, orders, answers })
    }

    fn tell(&mut self, order: &str) -> Result<(), Failed> {
        let orders = self.orders.as_mut().ok_or("it was told to end")?;
        writeln!(orders, "{order}")?;
        Ok(orders.flush()?)
    }

    fn hear(&mut self) -> Result<String, Failed> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.is_empty() { Err("a process ended".into()) } else { Ok(line.trim_end().into()) }
    }

    fn ask(&mut self, order: &str) -> Result<String, Failed> {
        self.tell(order)?;
        self.hear()
    }

    fn look(&self) -> Result<Seen, Failed> {
        let file = |name: &str| format!("/proc/{}/{name}", self.child.id());
        let status = std::fs::read_to_string(file("status"))?;
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = rss.and_then(|rss| rss.trim().strip_suffix(" kB")).ok_or("no VmRSS")?;
        Ok(Seen {
            descriptors: std::fs::read_dir(file("fd"))?.count(),
            threads: std::fs::read_dir(file("task"))?.count(),
            maps: std::fs::read_to_string(file("maps"))?.lines().count(),
            resident: kib.parse::<u64>()? << 10,
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    descriptors: usize,
    threads: usize,
    maps: usize,
    resident: u64,
}

/// What a process had after each migration, in one of its two roles.
#[derive(Default)]
struct Role(Vec<Seen>);

impl Role {
    /// Looks once its threads have gone, as far as they do.
    fn look(&mut self, process: &Process) -> Result<(), Failed> {
        let begun = Instant::now();
        let mut seen = process.look()?;
        if let Some(before) = self.0.last() {
            let counts = |seen: &Seen| (seen.threads, seen.descriptors);
            while counts(&seen) > counts(before) && begun.elapsed() < SETTLE {
                thread::sleep(Duration::from_millis(5));
                seen = process.look()?;
            }
        }
        self.0.push(seen);
        Ok(())
    }

    /// The most of each, of some of them.
    fn most(seen: &[Seen]) -> Seen {
        seen.iter().fold(Seen::default(), |most, seen| Seen {
            descriptors: most.descriptors.max(seen.descriptors),
            threads: most.threads.max(seen.threads),
            maps: most.maps.max(seen.maps),
            resident: most.resident.max(seen.resident),
        })
    }

    /// Prints how it went; whether all is well.
    fn judge(&self, name: &str) -> bool {
        let Self(looks) = self;
        let warm = WARM.min(looks.len() / 2);
        let tenth = (looks.len() / 10).max(1);
        let (early, late) = looks.split_at(warm);
        let stages = [("first", early), ("warm", &late[..tenth]), ("last", &looks[looks.len() - tenth..])];
        for (when, seen) in stages {
            let most = Self::most(seen);
            println!(
                "{name:<10} {when:<5} {:>4} looks, at most {:>3} descriptors {:>3} threads {:>4} mappings {:>6.1} MiB resident",
                seen.len(),
                most.descriptors,
                most.threads,
                most.maps,
                most.resident as f64 / f64::from(1 << 20),
            );
        }
        let [first, settled, last] = stages.map(|(_, seen)| Self::most(seen));
        let counts = last.descriptors <= first.descriptors && last.threads <= first.threads;
        counts && last.maps <= first.maps.max(settled.maps) && last.resident <= settled.resident + SLACK_BYTES
    }
}

/// A number that is given by name.
fn option(args: &[String], name: &str, default: u64) -> Result<u64, Failed> {
    match args.iter().position(|arg| arg == name) {
        Some(at) => Ok(args.get(at + 1).ok_or(format!("{name} takes a number"))?.parse()?),
        None => Ok(default),
    }
}

fn drive(args: &[String]) -> Result<bool, Failed> {
    let (migrations, cancelled) = (option(args, "--migrations", 1000)?, option(args, "--cancelled", 100)?);
    let each = migrations.checked_div(cancelled).unwrap_or(u64::MAX);
    let folder = std::env::temp_dir().join(format!("pageferry-endurance-{}", std::process::id()));
    std::fs::create_dir(&folder)?;
    let keys = args.iter().position(|arg| arg == "--tls-dir").and_then(|at| args.get(at + 1));
    let result = run(&folder, keys.map(String::as_str), migrations, each);
    let _ = std::fs::remove_dir_all(&folder);
    result
}

fn run(folder: &Path, keys: Option<&str>, migrations: u64, each: u64) -> Result<bool, Failed> {
    let mut processes = [Process::start(folder, keys)?, Process::start(folder, keys)?];
    // Of each process: without the guest, and with it.
    let mut roles = [[Role::default(), Role::default()], [Role::default(), Role::default()]];
    let params = CounterParams { working_set: WORKING_SET, pages_per_s: PAGES_PER_S, page_words: 0 };
    let mut checker = Checker::new(1, params.pages(1));
    let (mut here, mut moves, mut cancels, mut speaks) = (0, 0u64, 0u64, counter::Side::Source);
    processes[0].ask("start 0")?;
    let begun = Instant::now();
    for number in 1..=migrations {
        let is_cancelled = number.is_multiple_of(each);
        let how = match is_cancelled {
            true => "cancel",
            false if number.is_multiple_of(POSTCOPY_EACH) || number % POSTCOPY_EACH == 5 => "postcopy",
            false => "precopy",
        };
        let there = 1 - here;
        let uri = processes[there].ask(&format!("listen {}", moves + 1))?;
        processes[there].tell("arrive")?;
        let sent = processes[here].ask(&format!("send {uri} {how} {}", number * 7 % CANCELLED_WITHIN_MS))?;
        if sent == "cancelled" {
            processes[there].tell("cancel")?;
        }
        let arrived = processes[there].hear()?;
        match (sent.as_str(), arrived.as_str()) {
            ("completed", "arrived") => {
                // What the guest printed where it was: nothing follows.
                checker.feed(speaks, &std::fs::read(folder.join(moves.to_string()))?)?;
                std::fs::remove_file(folder.join(moves.to_string()))?;
                (here, moves, speaks) = (there, moves + 1, counter::Side::Destination);
            }
            ("cancelled", _) if is_cancelled => cancels += 1,
            _ => return Err(format!("migration {number}: {sent}; {arrived}").into()),
        }
        for at in [0, 1] {
            roles[at][usize::from(at == here)].look(&processes[at])?;
        }
    }
    let took = begun.elapsed();
    processes[here].ask("pause")?;
    checker.feed(speaks, &std::fs::read(folder.join(moves.to_string()))?)?;
    let passes: u64 = checker.passes().iter().map(|(a, b)| a + b).sum();
    println!(
        "{moves} migrations and {cancels} cancelled ones of {} MiB in {:.1} s; the guest made {passes} passes, none of them twice",
        MEMORY >> 20,
        took.as_secs_f64()
    );
    let mut well = passes > moves / 4;
    for (name, roles) in ["a", "b"].iter().zip(&roles) {
        for (with, role) in ["without", "with"].iter().zip(roles) {
            well &= role.0.len() < 2 || role.judge(&format!("{name} {with}"));
        }
    }
    println!("{}", if well { "nothing stayed" } else { "SOMETHING STAYED" });
    Ok(well)
}
