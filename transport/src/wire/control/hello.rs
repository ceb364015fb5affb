//! HELLO and WELCOME: what a session is about, and what both sides agree on.

use std::fmt;

use pagecopy::layout::{CHUNK_PAGES, Layout, PAGE_SIZE, REGION_NAME_MAX, REGIONS_MAX, Region};

use super::limits::at_most;
use crate::wire::{Reader, STREAMS_MAX, WireError, Writer};

/// What a region without a guest-physical address has for one: no multiple of the page size.
const NO_ADDRESS: u64 = u64::MAX;

/// Longest description of a machine, in bytes.
pub const MACHINE_MAX: usize = 64 << 10;
/// Longest presence map: one bit for every 2 MiB of the largest guest.
pub const PRESENCE_MAX: usize = 4 << 20;
/// Longest HELLO; nothing that may come first is longer.
pub const FIRST_LEN_MAX: usize = 2 * PRESENCE_MAX + MACHINE_MAX + REGIONS_MAX * (REGION_NAME_MAX + 32);
/// Chunks that one bit of a presence map stands for (2 MiB).
pub const PRESENCE_CHUNKS: u32 = 8;

/// What a session is about, from the source.
#[derive(Clone, PartialEq, Eq)]
pub struct Hello {
    /// Seed of every digest and checksum of the session's data.
    pub seed: u64,
    /// What the source can do: [`capability`](super::capability) bits; unknown bits are ignored.
    pub capabilities: u64,
    /// Data streams the source wants.
    pub streams: u16,
    /// The guest runs and will be handed over; else it is memory alone.
    pub live: bool,
    /// Silence after which the source gives its peer up, in milliseconds.
    pub timeout_ms: u32,
    /// How long the source tries to connect again what was lost, in milliseconds; means nothing without
    /// [`RESUME`](super::capability::RESUME).
    pub reconnect_ms: u32,
    /// Guest-physical layout.
    pub regions: Vec<Region>,
    /// One bit for every [`PRESENCE_CHUNKS`] chunks: the source may have data there.
    pub presence: Vec<u8>,
    /// The same bits: no page there is a hole, and most are no zeros. May be empty.
    pub dense: Vec<u8>,
    /// Bytes of all pages that are no holes at the source: what the destination needs room for.
    pub data_bytes: u64,
    /// The machine, for the destination to compare with its own; opaque to the protocol.
    pub machine: String,
}

/// Without the seed, which the guest must not learn, and the maps, which are long.
impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Hello");
        f.field("capabilities", &self.capabilities).field("streams", &self.streams);
        f.field("live", &self.live).field("regions", &self.regions).field("machine", &self.machine);
        f.finish_non_exhaustive()
    }
}

/// The destination's answer to [`Hello`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Version of the protocol from here on.
    pub version: u16,
    /// What both sides can do.
    pub capabilities: u64,
    /// Data streams the destination takes, 1 up to what was asked.
    pub streams: u16,
    /// Silence after which the destination gives its peer up, in milliseconds.
    pub timeout_ms: u32,
    /// How long both sides wait for what was lost to be connected again, in milliseconds: at most what the source said.
    pub reconnect_ms: u32,
}

/// The bit of a map for a chunk, where the map goes so far.
fn bit_of(map: &[u8], chunk: u32) -> Option<bool> {
    let bit = chunk / PRESENCE_CHUNKS;
    map.get(bit as usize / 8).map(|byte| byte & (1 << (bit % 8)) != 0)
}

impl Hello {
    pub(super) fn encode(&self, w: &mut Writer) {
        w.u64(self.seed);
        w.u64(self.capabilities);
        w.u16(self.streams);
        w.u16(u16::from(self.live));
        w.u32(self.timeout_ms);
        w.u32(self.reconnect_ms);
        w.u32(PAGE_SIZE as u32);
        w.u32(CHUNK_PAGES as u32);
        write_regions(&self.regions, w);
        w.blob(&self.presence);
        w.blob(&self.dense);
        w.u64(self.data_bytes);
        w.blob(self.machine.as_bytes());
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let (seed, capabilities, streams) = (r.u64("seed")?, r.u64("capabilities")?, r.u16("streams")?);
        check_streams(streams)?;
        let live = match r.u16("live")? {
            0 => false,
            1 => true,
            value => return Err(WireError::BadValue { field: "live", value: value.into() }),
        };
        let (timeout_ms, reconnect_ms) = (timeout_ms(r)?, r.u32("reconnect_ms")?);
        for (field, expected) in [("page_size", PAGE_SIZE), ("chunk_pages", CHUNK_PAGES)] {
            let value = r.u32(field)?;
            if value as usize != expected {
                return Err(WireError::BadValue { field, value: value.into() });
            }
        }
        let regions = read_regions(r)?;
        let presence = r.blob(PRESENCE_MAX, "presence map")?.to_vec();
        let dense = r.blob(PRESENCE_MAX, "dense map")?.to_vec();
        let data_bytes = r.u64("data_bytes")?;
        let machine = r.string(MACHINE_MAX, "machine")?;
        Ok(Self {
            seed,
            capabilities,
            streams,
            live,
            timeout_ms,
            reconnect_ms,
            regions,
            presence,
            dense,
            data_bytes,
            machine,
        })
    }

    /// Whether the source may have data in a chunk, by the presence map; chunks beyond the map count as present.
    pub fn present(&self, chunk: u32) -> bool {
        bit_of(&self.presence, chunk).unwrap_or(true)
    }

    /// Whether memory around a chunk is full of data, by the dense map.
    pub fn is_dense(&self, chunk: u32) -> bool {
        bit_of(&self.dense, chunk).unwrap_or(false)
    }

    /// The bytes a presence map of this layout has.
    pub fn presence_len(layout: &Layout) -> usize {
        layout.chunks().div_ceil(PRESENCE_CHUNKS).div_ceil(8) as usize
    }

    /// Whether it keeps within the limits.
    pub(super) fn check(&self) -> Result<(), WireError> {
        check_streams(self.streams)?;
        at_most(self.regions.len(), REGIONS_MAX, "regions")?;
        self.regions.iter().try_for_each(|r| at_most(r.name.len(), REGION_NAME_MAX, "region name"))?;
        at_most(self.presence.len(), PRESENCE_MAX, "presence map")?;
        at_most(self.dense.len(), PRESENCE_MAX, "dense map")?;
        at_most(self.machine.len(), MACHINE_MAX, "machine")
    }
}

impl Welcome {
    pub(super) fn encode(&self, w: &mut Writer) {
        w.u16(self.version);
        w.u16(self.streams);
        w.u32(self.timeout_ms);
        w.u32(self.reconnect_ms);
        w.u64(self.capabilities);
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, WireError> {
        let (version, streams) = (r.u16("version")?, r.u16("streams")?);
        Ok(Self {
            version,
            streams,
            timeout_ms: timeout_ms(r)?,
            reconnect_ms: r.u32("reconnect_ms")?,
            capabilities: r.u64("capabilities")?,
        })
    }
}

/// Writes a guest's regions: their number, and of each its address, length and name.
pub(crate) fn write_regions(regions: &[Region], w: &mut Writer) {
    w.u32(regions.len() as u32);
    for region in regions {
        w.u64(region.gpa.unwrap_or(NO_ADDRESS));
        w.u64(region.len);
        w.blob(region.name.as_bytes());
    }
}

/// Reads them.
pub(crate) fn read_regions(r: &mut Reader<'_>) -> Result<Vec<Region>, WireError> {
    let mut regions = Vec::new();
    for _ in 0..r.count(REGIONS_MAX, "regions")? {
        let (gpa, len) = (r.u64("region gpa")?, r.u64("region length")?);
        let gpa = Some(gpa).filter(|&gpa| gpa != NO_ADDRESS);
        regions.push(Region { gpa, len, name: r.string(REGION_NAME_MAX, "region name")? });
    }
    Ok(regions)
}

fn check_streams(streams: u16) -> Result<(), WireError> {
    match streams {
        1..=STREAMS_MAX => Ok(()),
        value => Err(WireError::BadValue { field: "streams", value: value.into() }),
    }
}

/// A peer's time-out; one below a second would call this side dead between two of its pings.
fn timeout_ms(r: &mut Reader<'_>) -> Result<u32, WireError> {
    match r.u32("timeout_ms")? {
        short @ 0..1000 => Err(WireError::BadValue { field: "timeout_ms", value: short.into() }),
        timeout => Ok(timeout),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_without_an_address_has_all_ones_for_it() {
        let hello = Hello {
            regions: vec![Region::unplaced("vram", 4096)],
            seed: 0,
            capabilities: 0,
            streams: 1,
            live: false,
            timeout_ms: 1000,
            reconnect_ms: 0,
            presence: Vec::new(),
            dense: Vec::new(),
            data_bytes: 0,
            machine: String::new(),
        };
        let mut w = Writer::default();
        hello.encode(&mut w);
        let bytes = w.into_vec();
        // Behind seed, capabilities, streams, live, two times, page size, chunk pages, and the number of regions.
        assert_eq!(bytes[40..56], [[0xff; 8], 4096u64.to_le_bytes()].concat());
        assert!(Hello::decode(&mut Reader::new(&bytes)).is_ok_and(|read| read == hello));
    }
}
