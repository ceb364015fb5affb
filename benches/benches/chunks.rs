//! Whole chunks through the codec, as a stream worker drives it.

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pageferry_benches::{heap_bytes, random_bytes};

use pagecopy::choose::CodecMode;
use pagecopy::chunk::{ChunkDecoder, ChunkEncoder, Clocks, Shared};
use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};

fn clock() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

const CLOCKS: Clocks = Clocks { now: clock, worked: clock };

fn encode(c: &mut Criterion) {
    let mut group = c.benchmark_group("encode");
    group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
    let zeros = vec![0u8; CHUNK_SIZE];
    let heap = heap_bytes(1, CHUNK_SIZE);
    let random = random_bytes(1, CHUNK_SIZE);
    for (data, bytes) in [("zeros", &zeros), ("heap", &heap), ("random", &random)] {
        for mode in [CodecMode::Raw, CodecMode::Zstd { level: Some(1) }] {
            let shared = Shared::new(PageHasher::new(1), 1, 64 << 20);
            let mut encoder = ChunkEncoder::new(mode, CLOCKS);
            group.bench_function(format!("{data}/{mode}"), |b| {
                b.iter(|| {
                    shared.void(0, u64::MAX);
                    black_box(encoder.encode(&shared, 0, black_box(bytes), u64::MAX, false)).raw
                });
            });
        }
    }
    let shared = Shared::new(PageHasher::new(1), 1, 64 << 20);
    let mut encoder = ChunkEncoder::new(CodecMode::Delta, CLOCKS);
    group.bench_function("heap/unchanged", |b| {
        b.iter(|| black_box(encoder.encode(&shared, 0, &heap, u64::MAX, false)).unchanged);
    });
    let mut versions = [heap.clone(), heap];
    versions[1].chunks_mut(PAGE_SIZE).for_each(|page| page[800..808].fill(0xa5));
    let mut round = 0;
    group.bench_function("heap/delta-one-word", |b| {
        b.iter(|| {
            round ^= 1;
            black_box(encoder.encode(&shared, 0, &versions[round], u64::MAX, false)).delta
        });
    });
    group.finish();
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
    let mut heap = heap_bytes(1, CHUNK_SIZE);
    let shared = Shared::new(PageHasher::new(1), 1, 64 << 20);
    let mut decoder = ChunkDecoder::new();
    let mut encoder = ChunkEncoder::new(CodecMode::Zstd { level: Some(1) }, CLOCKS);
    let sent = encoder.encode(&shared, 0, &heap, u64::MAX, true);
    group.bench_function("heap/zstd-1", |b| {
        b.iter(|| decoder.decode(0, sent.zstd, black_box(sent.encoded), |_, _| {}).is_ok());
    });
    let mut encoder = ChunkEncoder::new(CodecMode::Delta, CLOCKS);
    shared.void(0, u64::MAX);
    encoder.encode(&shared, 0, &heap, u64::MAX, true);
    let old = heap.clone();
    heap.chunks_mut(PAGE_SIZE).for_each(|page| page[800..808].fill(0xa5));
    let sent = encoder.encode(&shared, 0, &heap, u64::MAX, false);
    let base = old.as_chunks::<PAGE_SIZE>().0;
    group.bench_function("heap/delta-one-word", |b| {
        b.iter(|| {
            decoder
                .decode(sent.delta, 0, black_box(sent.encoded), |bit, page| *page = base[bit as usize])
                .is_ok()
        });
    });
    group.finish();
}

criterion_group!(benches, encode, decode);
criterion_main!(benches);
