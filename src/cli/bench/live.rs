//! Memory that is written while it moves, at the source, and what stands for its guest at the destination.

use std::path::PathBuf;
use std::sync::Arc;

use crate::cli::words::explain;
use pageferry::engine::populated;
use pageferry::pagecopy::backend::{BackendError, Guest, GuestRam, StateBlob, StateSink};
use pageferry::pagecopy::layout::PAGE_SIZE;
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::vmm_shim::uffd_log::UffdLog;
use pageferry::{Source, SourceBuilder};
use serde::{Deserialize, Serialize};

use super::dirtier::{Dirtier, STATE_NAME, STATE_VERSION};
use super::mix;
use super::pattern::Targets;
use crate::cli::backing;
use crate::cli::trace::Trace;

/// How memory is dirtied, as strings where the command line has strings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Dirtying {
    /// Bytes of pages that are written a second, by all writers together; none where a trace tells.
    pub bytes_per_s: Option<u64>,
    /// The trace that the pattern `trace` replays.
    pub trace: Option<PathBuf>,
    /// Where.
    pub pattern: String,
    /// Threads that write.
    pub writers: u8,
    /// Bytes that change in a page.
    pub write_bytes: u64,
}

/// What the writers did in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Writing {
    /// Pages written; a page that was written again counts again.
    pub pages: u64,
    /// CPU time it took them, in seconds; not in the source's.
    pub cpu_s: f64,
}

/// Memory with its writers, which run.
pub(super) struct Live {
    pub ram: Arc<GuestMemory>,
    pub source: SourceBuilder,
    dirtier: Arc<Dirtier>,
    before: Writing,
}

impl Live {
    /// Makes memory of this kind with the content of `image`, and lets writers loose on it.
    pub(super) fn start(image: &GuestMemory, memory: &str, dirtying: &Dirtying) -> Result<Self, String> {
        let backing = match backing::parse(memory)? {
            // A file is the destination's.
            Backing::File { .. } => Backing::Memfd,
            own => own,
        };
        let layout = image.layout().clone();
        let ram = Arc::new(GuestMemory::create(layout, &backing).map_err(|e| explain(&e))?);
        mix::copy(image, &*ram).map_err(|e| explain(&e))?;
        let targets = match &dirtying.trace {
            Some(trace) => Targets::replay(Trace::read(trace)?, ram.layout())?,
            None => Targets::new(
                &dirtying.pattern.parse()?,
                dirtying.bytes_per_s.unwrap_or_default() / PAGE_SIZE as u64,
                &populated(&*ram).map_err(|e| explain(&e))?,
            )?,
        };
        let log = UffdLog::new(ram.clone()).map_err(|e| explain(&e))?;
        let dirtier = Dirtier::new(ram.clone(), &targets, dirtying.writers, dirtying.write_bytes as usize);
        let dirtier = Arc::new(dirtier.map_err(|e| explain(&e))?);
        dirtier.resume().map_err(|e| explain(&e))?;
        let source = Source::builder(ram.clone(), Arc::new(log)).guest(dirtier.clone());
        let before = Writing { pages: dirtier.written_pages(), cpu_s: dirtier.cpu_s() };
        Ok(Self { ram, source, dirtier, before })
    }

    /// Tells how many pages the writers have written.
    pub(super) fn written(&self) -> impl Fn() -> u64 + Send + use<> {
        let (dirtier, before) = (self.dirtier.clone(), self.before.pages);
        move || dirtier.written_pages() - before
    }

    /// What the writers did since they started. They are paused.
    pub(super) fn writing(&self) -> Writing {
        Writing {
            pages: self.dirtier.written_pages() - self.before.pages,
            cpu_s: self.dirtier.cpu_s() - self.before.cpu_s,
        }
    }
}

/// The guest at the destination: takes the writers' state, and writes nothing.
pub(super) struct Arrived;

impl Guest for Arrived {
    fn pause(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn save_state(&self, _out: &mut dyn StateSink) -> Result<(), BackendError> {
        Err(BackendError::invalid("save the state of a bench's destination, which has none"))
    }

    fn load_state(&self, state: &[StateBlob]) -> Result<(), BackendError> {
        match state {
            [blob] if blob.name == STATE_NAME && blob.version == STATE_VERSION => Ok(()),
            _ => {
                Err(BackendError::invalid("the guest is not a bench's; use `pageferry bench` on both sides"))
            }
        }
    }
}
