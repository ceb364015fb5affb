//! Records what each chunk of an image costs and becomes, by the encoder and decoder that migrations use.

use std::fs::File;
use std::hint::black_box;
use std::path::Path;

use pagecopy::choose::{CodecMode, Plan};
use pagecopy::chunk::{Announced, ChunkDecoder, ChunkEncoder, Clocks, Job, Reference, Shared};
use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_PAGES, CHUNK_SIZE, PAGE_SIZE};
use pagecopy::xbzrle::Page;
use pageferry_benches::images::Holes;
use rustix::time::{ClockId, clock_gettime};
use vm_memory::volatile_memory::VolatileSlice;

use super::trace::{ChunkCosts, Cost, Trace, WAYS, Way};

/// So many chunks are encoded in one way before the next way's turn, so that each finds its own tables in the caches, and the chunk's
/// pages not.
const TURN: usize = 32;
const CLOCKS: Clocks = Clocks { now: nanos, worked: nanos };

/// Nanoseconds that this thread has run.
fn nanos() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// An encoder with all that it needs, which sees the image for the first time.
struct One {
    shared: Shared,
    encoder: ChunkEncoder,
    decoder: ChunkDecoder,
}

impl One {
    fn new(chunks: u32, references: bool) -> Self {
        Self {
            shared: Shared::new(PageHasher::new(7), chunks, 0),
            encoder: ChunkEncoder::new(CodecMode::Auto, CLOCKS).each_once().referring(references),
            decoder: ChunkDecoder::new(),
        }
    }

    /// Copies, encodes and decodes a chunk.
    fn cost(
        &mut self,
        way: Way,
        image: &[u8],
        chunk: u32,
        pages: u64,
        copy: &mut [u8],
    ) -> Result<Cost, String> {
        let begun = nanos();
        let at = chunk as usize * CHUNK_SIZE;
        let snapshot = &mut copy[..CHUNK_SIZE.min(image.len() - at)];
        snapshot.copy_from_slice(&image[at..at + snapshot.len()]);
        let plan = Plan {
            delta: false,
            fill: false,
            delta_bytes_max: PAGE_SIZE / 8,
            zstd_level: Some(way.level),
            references: way.references,
            probe: None,
        };
        let job = Job { chunk, snapshot, pages, first_pass: true };
        let lent = |reference, pages: &mut [Page]| {
            refer(image, reference, pages);
            true
        };
        let encoded = self.encoder.encode_as(plan, &self.shared, job, &mut { lent });
        let encode = (nanos() - begun) as u32;
        let bytes = encoded.encoded.len() + encoded.raw.count_ones() as usize * PAGE_SIZE;
        let begun = nanos();
        if encoded.zstd != 0 {
            let announced =
                Announced { delta: 0, zstd: encoded.zstd, references: !encoded.references.is_empty() };
            let decoded = self.decoder.decode_with(
                announced,
                encoded.encoded,
                |_, _| {},
                |reference, pages| {
                    refer(image, reference, pages);
                    true
                },
            );
            black_box(decoded.map_err(|e| format!("chunk {chunk}: {e}"))?.pages());
        }
        let decode = (nanos() - begun) as u32;
        Ok(Cost { encode, bytes: bytes as u32, pages: encoded.zstd.count_ones() as u8, decode })
    }
}

fn refer(image: &[u8], reference: Reference, pages: &mut [Page]) {
    let at = reference.chunk as usize * CHUNK_SIZE;
    for (page, bit) in pages.iter_mut().zip(pagecopy::bitmap::bits(reference.pages)) {
        let from = at + bit as usize * PAGE_SIZE;
        page.copy_from_slice(&image[from..from + PAGE_SIZE]);
    }
}

/// Records an image.
pub(super) fn record(path: &Path, progress: impl Fn(usize, usize)) -> Result<Trace, String> {
    let complain = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let holes = Holes::of(path).map_err(|e| complain(&e))?;
    let file = File::open(path).map_err(|e| complain(&e))?;
    // Nobody writes to an image that is being recorded.
    let mut image = vec![0; file.metadata().map_err(|e| complain(&e))?.len() as usize];
    std::io::Read::read_exact(&mut &file, &mut image).map_err(|e| complain(&e))?;
    let chunks = image.len().div_ceil(CHUNK_SIZE) as u32;
    let mut plain = One::new(chunks, false);
    let mut others: Vec<_> = WAYS.iter().map(|way| One::new(chunks, way.references)).collect();
    let mut copy = vec![0; CHUNK_SIZE];
    let wanted: Vec<u32> = (0..chunks)
        .filter(|&chunk| holes.has_data(u64::from(chunk) * CHUNK_SIZE as u64, CHUNK_SIZE as u64))
        .collect();
    let mut found = Vec::with_capacity(wanted.len());
    for (done, turn) in wanted.chunks(TURN).enumerate() {
        progress(done * TURN, wanted.len());
        let from = found.len();
        for &chunk in turn {
            let at = chunk as usize * CHUNK_SIZE;
            let end = image.len().min(at + CHUNK_SIZE);
            let count = ((end - at) / PAGE_SIZE).min(CHUNK_PAGES) as u32;
            let begun = nanos();
            let memory = VolatileSlice::from(&mut image[at..end]);
            let seen = plain.encoder.survey(&plain.shared, chunk, &memory, u64::MAX >> (64 - count));
            let (raw, zeros) = (seen.raw, count - seen.raw.count_ones());
            let scan = (nanos() - begun) as u32;
            let costs = Vec::with_capacity(WAYS.len());
            found.push((raw, ChunkCosts { chunk, pages: count as u8, zeros: zeros as u8, scan, costs }));
        }
        for (way, one) in WAYS.iter().zip(&mut others) {
            for (raw, chunk) in &mut found[from..] {
                if *raw != 0 {
                    let mut cost = one.cost(*way, &image, chunk.chunk, *raw, &mut copy)?;
                    cost.encode = cost.encode.saturating_sub(chunk.scan);
                    chunk.costs.push(cost);
                }
            }
        }
    }
    let image = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Trace { image, chunks: found.into_iter().map(|(_, chunk)| chunk).collect() })
}
