//! The kernels one by one: zero scan, delta against its scalar form, hashing, compression, bitmap iteration.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pageferry_benches::{CHANGES, Workload, decode_scalar, heap_bytes, page_pairs, random_bytes};

use pagecopy::bitmap::{PageBitmap, bits, runs};
use pagecopy::compress::{Compress, Decompress, looks_compressible};
use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use pagecopy::simd::Level;
use pagecopy::xbzrle::{Encoded, Page, decode, decode_at, encode_at, encode_reference};
use pagecopy::zero::{is_zero_at, zero_pages_at};
use xxhash_rust::xxh3::xxh3_128_with_secret;

/// Pages per iteration of the delta benches; both versions stay in L2.
const PAIRS: usize = 64;

fn zero_scan(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero");
    let zeros = vec![0u8; CHUNK_SIZE];
    let random = random_bytes(1, CHUNK_SIZE);
    let large = vec![0u8; 256 << 20];
    for level in Level::all() {
        group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
        group.bench_function(format!("all-zero/l2/{}", level.name()), |b| {
            b.iter(|| zero_pages_at(level, black_box(&zeros), u64::MAX));
        });
        group.throughput(Throughput::Bytes(large.len() as u64));
        group.bench_function(format!("all-zero/dram/{}", level.name()), |b| {
            b.iter(|| black_box(&large).chunks(PAGE_SIZE).all(|page| is_zero_at(level, page)));
        });
        group.throughput(Throughput::Elements(64));
        group.bench_function(format!("random/l2/{}", level.name()), |b| {
            b.iter(|| zero_pages_at(level, black_box(&random), u64::MAX));
        });
    }
    group.finish();
}

fn delta(c: &mut Criterion) {
    let mut group = c.benchmark_group("delta");
    group.throughput(Throughput::Bytes((PAIRS * PAGE_SIZE) as u64));
    let mut out = vec![0u8; PAGE_SIZE];
    for change in CHANGES {
        let pairs = page_pairs(change, PAIRS);
        group.bench_function(format!("encode/{}/reference", change.name), |b| {
            b.iter(|| {
                for (old, new) in &pairs {
                    let _ = black_box(encode_reference(old, new, &mut out));
                }
            });
        });
        for level in Level::all() {
            group.bench_function(format!("encode/{}/{}", change.name, level.name()), |b| {
                b.iter(|| {
                    for (old, new) in &pairs {
                        let _ = black_box(encode_at(level, old, new, &mut out));
                    }
                });
            });
        }
        let deltas: Vec<_> = pairs
            .iter()
            .filter_map(|(old, new)| match encode_reference(old, new, &mut out) {
                Encoded::Len(length) => Some((*old, out[..length].to_vec())),
                Encoded::Unchanged | Encoded::Overflow => None,
            })
            .collect();
        if deltas.len() == PAIRS {
            let mut page = [0u8; PAGE_SIZE];
            group.bench_function(format!("decode/{}", change.name), |b| {
                b.iter(|| {
                    for (old, delta) in &deltas {
                        page = *old;
                        let _ = black_box(decode(delta, &mut page));
                    }
                });
            });
        }
    }
    group.finish();
}

/// QEMU's workloads, against scalar loops.
fn xbzrle(c: &mut Criterion) {
    let mut group = c.benchmark_group("xbzrle");
    group.throughput(Throughput::Bytes((PAIRS * PAGE_SIZE) as u64));
    let mut out = vec![0u8; PAGE_SIZE];
    for workload in Workload::ALL {
        let (name, pairs) = (workload.name(), workload.pairs(PAIRS));
        let mut encoder = |how: &str, encode: &dyn Fn(&Page, &Page, &mut [u8]) -> Encoded| {
            group.bench_function(format!("encode/{name}/{how}"), |b| {
                b.iter(|| {
                    for (old, new) in &pairs {
                        black_box(encode(old, new, &mut out));
                    }
                });
            });
        };
        encoder("scalar", &encode_reference);
        for level in Level::all() {
            encoder(level.name(), &|old, new, out| encode_at(level, old, new, out));
        }
        let deltas: Vec<Vec<u8>> = (pairs.iter())
            .map(|(old, new)| match encode_reference(old, new, &mut out) {
                Encoded::Len(length) => out[..length].to_vec(),
                Encoded::Unchanged | Encoded::Overflow => Vec::new(),
            })
            .collect();
        let mut pages: Vec<Page> = pairs.iter().map(|(old, _)| *old).collect();
        // Deltas hold new bytes, not differences: applied again they take the same effort.
        let mut decoder = |how: &str, decode: &dyn Fn(&[u8], &mut Page) -> Option<usize>| {
            group.bench_function(format!("decode/{name}/{how}"), |b| {
                b.iter(|| {
                    for (delta, page) in deltas.iter().zip(&mut pages) {
                        black_box(decode(delta, page));
                    }
                });
            });
        };
        decoder("scalar", &decode_scalar);
        decoder("ours", &|delta, page| decode(delta, page).ok());
        for level in Level::all() {
            decoder(level.name(), &|delta, page| decode_at(level, delta, page).ok());
        }
    }
    group.finish();
}

fn hash(c: &mut Criterion) {
    let hasher = PageHasher::new(1);
    let bytes = random_bytes(2, CHUNK_SIZE);
    let mut group = c.benchmark_group("hash");
    group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
    let large = random_bytes(3, 256 << 20);
    for level in Level::all() {
        for (place, bytes) in [("l2", &bytes), ("dram", &large)] {
            let pages = bytes.as_chunks::<PAGE_SIZE>().0;
            group.throughput(Throughput::Bytes(bytes.len() as u64));
            group.bench_function(format!("xxh3-128/{place}/{}", level.name()), |b| {
                b.iter(|| pages.iter().fold(0, |all, page| all ^ hasher.page_at(level, black_box(page))));
            });
        }
    }
    group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
    group.bench_function("xxh3-128/l2/xxhash-rust", |b| {
        let secret = [7; 192];
        b.iter(|| {
            let pages = bytes.chunks(PAGE_SIZE);
            pages.fold(0, |all, page| all ^ xxh3_128_with_secret(black_box(page), &secret))
        });
    });
    group.finish();
}

fn zstd(c: &mut Criterion) {
    let mut group = c.benchmark_group("zstd");
    let (mut compress, mut decompress) = (Compress::new(), Decompress::new());
    let mut frame = vec![0u8; CHUNK_SIZE * 9 / 10];
    let mut content = vec![0u8; CHUNK_SIZE];
    group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
    for (name, bytes) in [("heap", heap_bytes(1, CHUNK_SIZE)), ("random", random_bytes(1, CHUNK_SIZE))] {
        group.bench_function(format!("probe/{name}"), |b| {
            let pages = bytes.as_chunks::<PAGE_SIZE>().0;
            b.iter(|| black_box(pages).iter().filter(|page| looks_compressible(page)).count());
        });
        for level in [-7, -1, 1, 3] {
            group.bench_function(format!("compress/{name}/{level}"), |b| {
                b.iter(|| compress.compress(level, black_box(&bytes), &mut frame));
            });
        }
        if let Some(length) = compress.compress(1, &bytes, &mut frame) {
            group.bench_function(format!("decompress/{name}/1"), |b| {
                b.iter(|| decompress.decompress(&[], black_box(&frame[..length]), &mut content));
            });
        }
    }
    group.finish();
}

fn bitmap(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap");
    // 16 GiB of guest.
    let chunks = 65_536;
    let sparse = PageBitmap::new(chunks);
    let dense = PageBitmap::new(chunks);
    for chunk in 0..chunks {
        dense.insert(chunk, 0x00ff_0ff0_3c3c_ffff);
        if chunk % 100 == 0 {
            sparse.insert(chunk, 1 << (chunk % 64));
        }
    }
    group.throughput(Throughput::Elements(u64::from(chunks)));
    for (name, set) in [("sparse", &sparse), ("dense", &dense)] {
        group.bench_function(format!("runs/{name}"), |b| {
            b.iter(|| set.iter().map(|(_, word)| runs(word).map(|run| run.1).sum::<u32>()).sum::<u32>());
        });
        group.bench_function(format!("bits/{name}"), |b| {
            b.iter(|| set.iter().map(|(_, word)| bits(word).sum::<u32>()).sum::<u32>());
        });
    }
    group.finish();
}

criterion_group!(benches, zero_scan, delta, xbzrle, hash, zstd, bitmap);
criterion_main!(benches);
