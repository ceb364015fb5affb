//! Options of memory that is written while it moves.

use std::path::PathBuf;

use clap::Args;
use pageferry::pagecopy::layout::PAGE_SIZE;

use super::live::Dirtying;
use super::pattern::Pattern;
use crate::cli::size;
use crate::cli::trace::Trace;

/// Memory that is written while it moves.
#[derive(Debug, Args)]
pub(super) struct LiveArgs {
    /// Write memory while it moves: so many 10^6 bytes of pages a second
    #[arg(long, value_name = "MB/S", value_parser = rate, group = "written")]
    dirty_rate: Option<u64>,
    /// Where: uniform, hot:PERCENT (nine writes of ten go there), sequential, or as --trace has it
    #[arg(long, default_value = "uniform", requires = "written")]
    pattern: Pattern,
    /// The pages of this trace, which `ctl ... record-trace` made, over and over
    #[arg(long, value_name = "FILE", group = "written")]
    trace: Option<PathBuf>,
    /// Threads that write
    #[arg(long, default_value_t = 1, requires = "written", value_parser = clap::value_parser!(u8).range(1..=64))]
    writers: u8,
    /// Bytes that change in a page that is written
    #[arg(long, default_value = "64", requires = "written", value_name = "BYTES", value_parser = write_bytes)]
    write_bytes: u64,
}

impl LiveArgs {
    /// Refuses arguments that do not go together.
    pub(super) fn check(&self) -> Result<(), String> {
        match (&self.trace, &self.pattern) {
            (None, Pattern::Trace) => Err("--pattern trace takes --trace FILE".into()),
            (Some(_), Pattern::Hot(_) | Pattern::Sequential) => {
                Err(format!("--trace tells which pages are written: leave out --pattern {}", self.pattern))
            }
            _ => Ok(()),
        }
    }

    /// How memory is written, if it is.
    ///
    /// # Errors
    /// When the trace cannot be read.
    pub(super) fn dirtying(&self) -> Result<Option<Dirtying>, String> {
        let (pattern, trace) = match &self.trace {
            None if self.dirty_rate.is_none() => return Ok(None),
            None => (&self.pattern, None),
            Some(path) => {
                // Before anything is begun; the source reads it again.
                Trace::read(path)?;
                let path = std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?;
                (&Pattern::Trace, Some(path))
            }
        };
        Ok(Some(Dirtying {
            bytes_per_s: self.dirty_rate,
            trace,
            pattern: pattern.to_string(),
            writers: self.writers,
            write_bytes: self.write_bytes,
        }))
    }
}

fn rate(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.01..=1e6).contains(&rate) => Ok((rate * 1e6) as u64),
        _ => Err("a rate is 0.01 to 1000000, in 10^6 bytes a second".into()),
    }
}

fn write_bytes(text: &str) -> Result<u64, String> {
    match size::parse(text)? {
        bytes if bytes % 8 != 0 || !(8..=PAGE_SIZE as u64).contains(&bytes) => {
            Err("a multiple of 8, from 8 to 4096".into())
        }
        bytes => Ok(bytes),
    }
}
