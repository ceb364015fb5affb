//! The limits that messages keep within: asked by who sends before it does, and by who receives after it has read.

use pagecopy::backend::StateBlob;
use pagecopy::layout::{REGION_NAME_MAX, REGIONS_MAX};

use super::control::{
    Hello, MACHINE_MAX, MISSING_RUNS_MAX, Message, PRESENCE_MAX, STATE_BLOBS_MAX, STATE_LEN_MAX,
};
use super::{STREAMS_MAX, WireError};

impl Message {
    /// Whether the message keeps within the protocol's limits. Both sides ask: who sends before it does, who receives after it has read.
    ///
    /// # Errors
    /// The field that does not, by name.
    pub fn check(&self) -> Result<(), WireError> {
        match self {
            Self::Hello(hello) => hello.check(),
            Self::State(blobs) => state(blobs),
            Self::Finish(totals) | Self::Ready(totals) => {
                at_most(totals.streams.len(), STREAMS_MAX.into(), "streams")
            }
            Self::Missing(runs) => {
                at_most(runs.len(), MISSING_RUNS_MAX, "runs of missing pages")?;
                match runs.iter().find(|run| run.count == 0 || run.pages == 0) {
                    None => Ok(()),
                    Some(run) => Err(WireError::BadValue {
                        field: "run of missing pages (empty)",
                        value: run.first.into(),
                    }),
                }
            }
            _ => Ok(()),
        }
    }
}

impl Hello {
    fn check(&self) -> Result<(), WireError> {
        streams(self.streams)?;
        at_most(self.regions.len(), REGIONS_MAX, "regions")?;
        self.regions.iter().try_for_each(|r| at_most(r.name.len(), REGION_NAME_MAX, "region name"))?;
        at_most(self.presence.len(), PRESENCE_MAX, "presence map")?;
        at_most(self.dense.len(), PRESENCE_MAX, "dense map")?;
        at_most(self.machine.len(), MACHINE_MAX, "machine")
    }
}

pub(super) fn streams(streams: u16) -> Result<(), WireError> {
    match streams {
        1..=STREAMS_MAX => Ok(()),
        value => Err(WireError::BadValue { field: "streams", value: value.into() }),
    }
}

fn state(blobs: &[StateBlob]) -> Result<(), WireError> {
    at_most(blobs.len(), STATE_BLOBS_MAX, "state blobs")?;
    blobs.iter().try_for_each(|blob| at_most(blob.name.len(), REGION_NAME_MAX, "state name"))?;
    // A count, and for each piece two lengths and a version.
    let bytes = blobs.iter().map(|blob| 12 + blob.name.len() + blob.bytes.len()).sum::<usize>();
    at_most(4 + bytes, STATE_LEN_MAX, "STATE")
}

fn at_most(len: usize, max: usize, field: &'static str) -> Result<(), WireError> {
    if len > max { Err(WireError::TooLong { field, len: len as u64, max: max as u64 }) } else { Ok(()) }
}
