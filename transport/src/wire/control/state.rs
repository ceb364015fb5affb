//! Device state as it travels.

use pagecopy::backend::StateBlob;
use pagecopy::layout::REGION_NAME_MAX;
use xxhash_rust::xxh3::xxh3_64;

use super::limits::at_most;
use crate::wire::{Reader, WireError, Writer};

/// Most pieces of device state.
pub const STATE_BLOBS_MAX: usize = 4096;
/// Longest message that carries device state.
pub const STATE_LEN_MAX: usize = 64 << 20;

/// Digest of device state as it travels; 0 for none.
pub fn state_digest(blobs: &[StateBlob]) -> u64 {
    if blobs.is_empty() {
        return 0;
    }
    let mut w = Writer::default();
    encode_state(blobs, &mut w);
    xxh3_64(&w.into_vec())
}

pub(crate) fn encode_state(blobs: &[StateBlob], w: &mut Writer) {
    w.u32(blobs.len() as u32);
    for blob in blobs {
        w.blob(blob.name.as_bytes());
        w.u32(blob.version);
        w.blob(&blob.bytes);
    }
}

pub(crate) fn decode_state(r: &mut Reader<'_>) -> Result<Vec<StateBlob>, WireError> {
    let mut blobs = Vec::new();
    for _ in 0..r.count(STATE_BLOBS_MAX, "state blobs")? {
        let name = r.string(REGION_NAME_MAX, "state name")?;
        let version = r.u32("state version")?;
        blobs.push(StateBlob { name, version, bytes: r.blob(STATE_LEN_MAX, "state bytes")?.to_vec() });
    }
    Ok(blobs)
}

/// Whether it keeps within the limits.
pub(super) fn check_state(blobs: &[StateBlob]) -> Result<(), WireError> {
    at_most(blobs.len(), STATE_BLOBS_MAX, "state blobs")?;
    blobs.iter().try_for_each(|blob| at_most(blob.name.len(), REGION_NAME_MAX, "state name"))?;
    // A count, and for each piece two lengths and a version.
    let bytes = blobs.iter().map(|blob| 12 + blob.name.len() + blob.bytes.len()).sum::<usize>();
    at_most(4 + bytes, STATE_LEN_MAX, "STATE")
}
