//! The peer of `benches/converge.sh`: QEMU's migration of a guest that runs and writes faster than its link carries, and pageferry's from
//! beside it. That script and `benches/beside.sh` say what is compared, and make the link.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use pageferry::measure::Place;
use pageferry::measure::live::{self, Help, LiveJob, Mover};
use pageferry::print;
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::guests::counter::{CounterParams, PAGE_WORDS_MAX};
use vmm_shim::guests::{self, firmware, map};
use vmm_shim::vmm::{self, GuestImage, Tracker, Vm, VmConfig};

/// After so long postcopy begins, as in converge.sh.
const POSTCOPY_AFTER: Duration = Duration::from_secs(20);
/// How long the guest runs first: two passes over its memory.
const WARM_UP: Duration = Duration::from_secs(6);

/// QEMU, or pageferry from beside it, moves a running guest; prints a line as benches/converge.sh does
#[derive(Debug, Args)]
pub(crate) struct LiveArgs {
    /// The name it has there
    case: Case,
    /// The destination's address and port
    #[arg(long)]
    address: String,
    /// Network namespace of the source
    #[arg(long)]
    source: String,
    /// Network namespace of the destination
    #[arg(long)]
    destination: String,
    /// Memory of the guest
    #[arg(long, default_value = "1G", value_parser = crate::size)]
    mem: u64,
    /// Memory that the guest writes again and again
    #[arg(long, default_value = "512M", value_parser = crate::size)]
    working_set: u64,
    /// Pages that it writes in a second; 0 for as many as it can
    #[arg(long)]
    rate: u64,
    /// What memory holds first, over and over; of each page the guest then writes 32 bytes only
    #[arg(long, value_name = "FILE")]
    content: Option<PathBuf>,
    /// The downtime limit, in milliseconds
    #[arg(long, default_value_t = 300)]
    downtime_limit: u64,
    /// How many seconds the move may take
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Moved from beside QEMU, by this `pageferry`, instead
    #[arg(long, value_name = "PROGRAM")]
    beside: Option<PathBuf>,
    /// How long the guest runs first, in seconds; without, two passes over its memory
    #[arg(long)]
    warm_up: Option<u64>,
    /// Options for `pageferry qemu send`
    #[arg(last = true)]
    options: Vec<String>,
    /// A folder for the guest's RAM; it should be on a tmpfs
    #[arg(long, default_value = "/dev/shm")]
    folder: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    Plain,
    Converge,
    Postcopy,
    Zstd,
    SlowLink,
}

impl Case {
    fn help(self) -> Help {
        match self {
            Self::Plain => Help::None,
            Self::Converge => Help::AutoConverge,
            Self::Postcopy => Help::Postcopy(POSTCOPY_AFTER),
            Self::Zstd | Self::SlowLink => Help::Zstd,
        }
    }
}

pub(crate) fn run(args: &LiveArgs) -> Result<(), String> {
    let folder = args.folder.join(format!("pageferry-live-{}", std::process::id()));
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let done = move_guest(args, &folder);
    let _ = fs::remove_dir_all(&folder);
    done
}

fn move_guest(args: &LiveArgs, folder: &Path) -> Result<(), String> {
    let (ram, rom) = (folder.join("ram"), folder.join("firmware"));
    let tsc_khz = make_guest(args, &ram, &rom)?;
    let [source, destination] = [&args.source, &args.destination].map(Place::namespace);
    let lived = live::migrate_live(&LiveJob {
        ram: &ram,
        firmware: &rom,
        source: &source,
        destination: &destination,
        address: &args.address,
        folder,
        mover: args
            .beside
            .as_deref()
            .map_or(Mover::Qemu(args.case.help()), |program| Mover::Beside(program, &args.options)),
        downtime_limit: Duration::from_millis(args.downtime_limit),
        warm_up: args.warm_up.map_or(WARM_UP, Duration::from_secs),
        patience: Duration::from_secs(args.seconds),
        word: map::GAPS,
    })?;
    let or = |value: Option<f64>| value.map_or_else(|| "?".into(), |value| format!("{value:.0}"));
    print::line(format_args!(
        "{} {}: {} after {} s and {} rounds; downtime {} ms, expected {} ms; the guest stood still for {} ms",
        if args.beside.is_some() { "beside" } else { "QEMU" },
        args.case.to_possible_value().map_or_else(String::new, |name| name.get_name().to_owned()),
        lived.status,
        lived.took.as_secs(),
        lived.rounds,
        or(lived.downtime_ms),
        or(lived.expected_ms),
        or(lived.word.map(|ticks| ticks as f64 / f64::from(tsc_khz)))
    ));
    Ok(())
}

/// Writes the counter guest into a RAM file, as pageferry's own VMM does, and the firmware that leads to it. Returns the frequency of
/// its clock, in kHz.
fn make_guest(args: &LiveArgs, ram: &Path, rom: &Path) -> Result<u32, String> {
    let complain = |e: &dyn std::fmt::Display| format!("the guest cannot be made: {e}");
    let layout = vmm::layout(args.mem).map_err(|e| complain(&e))?;
    let backing = Backing::File { path: ram.into(), create: true };
    let memory = Arc::new(GuestMemory::create(layout, &backing).map_err(|e| complain(&e))?);
    if let Some(path) = &args.content {
        let bytes = fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        guests::fill(&*memory, &bytes).map_err(|e| complain(&e))?;
    }
    let counter = CounterParams {
        working_set: args.working_set,
        pages_per_s: args.rate,
        page_words: if args.content.is_some() { 0 } else { PAGE_WORDS_MAX },
    };
    let config = VmConfig { cpus: 1, guest: GuestImage::Counter(counter), tracker: Tracker::None };
    let vm = Vm::new(config, memory.clone(), Box::new(io::sink())).map_err(|e| complain(&e))?;
    let firmware = firmware::write(&*memory).map_err(|e| complain(&e))?;
    fs::write(rom, firmware).map_err(|e| format!("{}: {e}", rom.display()))?;
    Ok(vm.tsc_khz())
}
