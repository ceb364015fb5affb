//! Guests that run while they are moved: by QEMU itself, or by pageferry from beside it.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use pageferry::engine::report::{Report, Status};
use serde_json::json;

use super::qemu::{Mode, Qemu, Runs};
use super::{Place, Target, ferry};

/// What helps QEMU to move a guest that runs, and writes more than its link carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Help {
    /// Nothing: one connection.
    None,
    /// Throttled vCPUs.
    AutoConverge,
    /// Postcopy after this time.
    Postcopy(Duration),
    /// zstd, over four connections.
    Zstd,
}

/// Who moves a guest.
#[derive(Clone, Copy, Debug)]
pub enum Mover<'a> {
    /// QEMU itself.
    Qemu(Help),
    /// `pageferry qemu send`, with these options, and `recv`: the program.
    Beside(&'a Path, &'a [String]),
}

/// One move of a running guest.
#[derive(Clone, Copy, Debug)]
pub struct LiveJob<'a> {
    /// The guest's RAM, a file.
    pub ram: &'a Path,
    /// What leads from the reset vector into what that holds.
    pub firmware: &'a Path,
    /// Where the source runs.
    pub source: &'a Place,
    /// Where the destination runs.
    pub destination: &'a Place,
    /// Address and port of the destination.
    pub address: &'a str,
    /// A folder for sockets and logs.
    pub folder: &'a Path,
    /// Who moves it.
    pub mover: Mover<'a>,
    /// The downtime limit.
    pub downtime_limit: Duration,
    /// How long the guest runs before it is moved.
    pub warm_up: Duration,
    /// How long the move may take.
    pub patience: Duration,
    /// Address of 8 bytes of the guest's memory that are read in the end.
    pub word: u64,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Lived {
    /// The mover's word for how the migration stands.
    pub status: String,
    /// How long it took, or was waited for.
    pub took: Duration,
    /// Its count of rounds.
    pub rounds: u64,
    /// Downtime that it reports, in milliseconds, where it ended.
    pub downtime_ms: Option<f64>,
    /// Downtime that it expects, in milliseconds.
    pub expected_ms: Option<f64>,
    /// The word that was asked for, where the guest has arrived.
    pub word: Option<u64>,
}

/// Starts a guest under KVM and moves it while it runs.
///
/// # Errors
/// What QEMU or pageferry says, or that it does not answer or is not there.
pub fn migrate_live(job: &LiveJob<'_>) -> Result<Lived, String> {
    match job.mover {
        Mover::Qemu(help) => by_qemu(job, help),
        Mover::Beside(program, options) => from_beside(job, program, options),
    }
}

/// The two QEMUs, of which the source's guest runs; once it has run for its time, all that it counted so far is forgotten.
fn warmed_up(job: &LiveJob<'_>, into: Target<'_>) -> Result<[Qemu; 2], String> {
    let length = job.ram.metadata().map_err(|e| format!("{}: {e}", job.ram.display()))?.len();
    into.make(length)?;
    let runs = Runs::From(job.firmware);
    let start = |ram, name, place, incoming| {
        Qemu::start(ram, length, runs, &job.folder.join(name), place, incoming, None)
    };
    let destination = start(into, "destination.qmp", job.destination, true)?;
    let source = start(Target::File(job.ram), "source.qmp", job.source, false)?;
    std::thread::sleep(job.warm_up);
    let forgotten =
        OpenOptions::new().write(true).open(job.ram).and_then(|ram| ram.write_all_at(&[0; 8], job.word));
    forgotten.map_err(|e| format!("{}: {e}", job.ram.display()))?;
    Ok([source, destination])
}

fn from_beside(job: &LiveJob<'_>, program: &Path, options: &[String]) -> Result<Lived, String> {
    let copy = job.folder.join("copy");
    let [mut source, mut destination] = warmed_up(job, Target::File(&copy))?;
    for qemu in [&mut source, &mut destination] {
        qemu.connect()?;
        qemu.part();
    }
    let uri = format!("tcp:{}", job.address);
    let command = |place: &Place, what: &str, qemu: &Qemu| {
        let mut command = place.command(program);
        command.args(["qemu", what, &uri, "--json", "--qmp", &format!("unix:{}", qemu.socket.display())]);
        command
    };
    let mut receiving = command(job.destination, "recv", &destination);
    let mut receiving = ferry::start(receiving.arg("--insecure"))?;
    ferry::wait_until_ready(&mut receiving)?;
    let mut sending = command(job.source, "send", &source);
    let limit = job.downtime_limit.as_millis().to_string();
    let begin = Instant::now();
    let sending = ferry::start(sending.args(["--downtime-limit", &limit]).args(options))?;
    let sent = sending.wait(job.patience)?;
    let took = begin.elapsed();
    let report: Report = serde_json::from_slice(&sent.stdout)
        .map_err(|e| format!("{e}: {}", String::from_utf8_lossy(&sent.stderr)))?;
    let word = if report.status == Status::Completed {
        receiving.wait(job.patience)?;
        destination.connect()?;
        Some(destination.word_at(job.word, &job.folder.join("word"))?)
    } else {
        None
    };
    Ok(Lived {
        took,
        rounds: report.rounds,
        downtime_ms: Some(report.downtime_ms),
        expected_ms: Some(report.expected_downtime_ms),
        status: format!("{:?}", report.status).to_lowercase(),
        word,
    })
}

fn by_qemu(job: &LiveJob<'_>, help: Help) -> Result<Lived, String> {
    let [mut source, mut destination] = warmed_up(job, Target::Anonymous)?;
    let limit_ms = job.downtime_limit.as_millis() as u64;
    let (mode, capability) = match help {
        Help::None => (Mode::Tcp, None),
        Help::AutoConverge => (Mode::Tcp, Some("auto-converge")),
        Help::Postcopy(_) => (Mode::Tcp, Some("postcopy-ram")),
        Help::Zstd => (Mode::MultifdZstd(4, None), Some("multifd")),
    };
    let mut parameters = mode.parameters();
    parameters["downtime-limit"] = limit_ms.into();
    for qemu in [&mut source, &mut destination] {
        qemu.set_up(capability, &parameters)?;
    }
    let uri = format!("tcp:{}", job.address);
    destination.ask("migrate-incoming", &json!({ "uri": uri }))?;
    let begin = Instant::now();
    source.ask("migrate", &json!({ "uri": uri }))?;
    let mut asked_for_postcopy = false;
    let state = loop {
        std::thread::sleep(Duration::from_millis(100));
        let state = source.ask("query-migrate", &json!({}))?;
        if matches!(state["status"].as_str(), Some("completed" | "failed" | "cancelled"))
            || begin.elapsed() > job.patience
        {
            break state;
        }
        if matches!(help, Help::Postcopy(after) if begin.elapsed() > after && !asked_for_postcopy) {
            source.ask("migrate-start-postcopy", &json!({}))?;
            asked_for_postcopy = true;
        }
    };
    let took = begin.elapsed();
    let status = state["status"].as_str().unwrap_or("unknown").to_owned();
    let word = if status == "completed" {
        destination.wait_for_migration(begin)?;
        Some(destination.word_at(job.word, &job.folder.join("word"))?)
    } else {
        None
    };
    Ok(Lived {
        took,
        rounds: state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0),
        downtime_ms: state["downtime"].as_f64(),
        expected_ms: state["expected-downtime"].as_f64(),
        status,
        word,
    })
}
