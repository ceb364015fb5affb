//! What is run, in which order.

use std::path::PathBuf;

use crate::cli::words::explain;
use pageferry::pagecopy::backend::GuestRam;
use pageferry::pagecopy::layout::Layout;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::vmm_shim::room::spare_memory_bytes;

use super::BenchArgs;
use super::listening::Listening;
use super::live::Dirtying;
use super::pair::{self, Running};
use super::result::{Row, Run};
use super::series::Series;
use super::side::{DestinationOrder, SourceOrder, Transfer};
use crate::cli::{CliError, Exit};

/// All that the runs have in common.
pub(super) struct Plan<'a> {
    pub args: &'a BenchArgs,
    pub image: &'a Image,
    pub dirtying: Option<&'a Dirtying>,
    /// Where a destination on this host listens.
    pub destination: String,
    pub running: &'a Running,
}

impl Plan<'_> {
    /// Runs all configurations in turns.
    pub(super) fn measure(&self) -> Result<Vec<Row>, CliError> {
        let args = self.args;
        let configurations =
            args.codecs.iter().flat_map(|codec| args.streams.iter().map(move |n| (*n, codec)));
        let mut rows: Vec<_> = configurations.map(|(n, codec)| Row::new(n, codec.to_string())).collect();
        for turn in u32::from(args.no_warm_up)..=args.runs {
            for row in rows.iter_mut().filter(|row| row.failed.is_none()) {
                let result = self.run(row);
                if self.running.is_cancelled() {
                    return Err(CliError { exit: Exit::Cancelled, text: "cancelled".into() });
                }
                if turn != 0 || result.is_err() {
                    row.add(result);
                }
            }
        }
        Ok(rows)
    }

    /// One run of a configuration.
    fn run(&self, row: &mut Row) -> Result<(Run, Series), String> {
        let args = self.args;
        let order = DestinationOrder {
            uri: self.destination.clone(),
            memory: args.memory.clone(),
            tls_dir: args.tls_dir.clone(),
            live: self.dirtying.is_some(),
            digest: args.digest,
            timeout_s: args.link_timeout,
        };
        let mut listening = Listening::start(args.uri.as_ref(), order, self.running)?;
        row.memory = Some(listening.place().memory.clone());
        let order = SourceOrder {
            uri: listening.place().uri.clone(),
            image: self.image.path.clone(),
            memory: args.memory.clone(),
            tls_dir: args.tls_dir.clone(),
            dirtying: self.dirtying.cloned(),
            digest: args.digest,
            series: args.report.is_some(),
            transfer: Transfer {
                streams: row.streams,
                codec: row.codec.clone(),
                timeout_s: args.link_timeout,
                tuning: args.tuning.clone(),
            },
        };
        let mut source = pair::send(order, self.running)?;
        let destination = listening.outcome()?;
        if source.report.digest != destination.report.digest {
            return Err("the destination's memory differs from the source's: please report it".into());
        }
        let series = source.series.take().unwrap_or_default();
        Ok((Run::new(&source, &destination), series))
    }
}

/// The content of guest RAM, as a file that sources map.
pub(super) struct Image {
    pub path: PathBuf,
    pub bytes: u64,
    /// What was made here; gone with it.
    _made: Option<GuestMemory>,
}

impl Image {
    /// Opens the image that `args` names, or makes what they describe.
    pub(super) fn new(args: &BenchArgs, live: bool) -> Result<Self, String> {
        if let Some(path) = &args.image {
            let ram = GuestMemory::open_ram_file(path, false).map_err(|e| explain(&e))?;
            let path = std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?;
            return Ok(Self { path, bytes: ram.layout().bytes(), _made: None });
        }
        // Of what is no hole: the image, memory that is written, the destination's.
        let copies = 1 + u64::from(live) + u64::from(args.uri.is_none());
        let (needed, free) = (args.ram as f64 * args.mix.present() * copies as f64, spare_memory_bytes());
        if needed > free as f64 {
            return Err(format!(
                "--ram {}: this composition takes {} MiB of this host, and {} MiB are free; take less, or more holes",
                args.ram,
                needed as u64 >> 20,
                free >> 20
            ));
        }
        let layout = Layout::flat(args.ram).map_err(|e| format!("--ram: {e}"))?;
        let ram = GuestMemory::create(layout, &Backing::Memfd).map_err(|e| explain(&e))?;
        args.mix.fill(&ram);
        let (fd, _) = ram.fd_of(0).ok_or("a memfd has no descriptor")?;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&fd);
        let path = format!("/proc/{}/fd/{fd}", std::process::id()).into();
        Ok(Self { path, bytes: args.ram, _made: Some(ram) })
    }
}
