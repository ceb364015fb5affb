//! What travels around the pages: frame headers, receipts, the first control message.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pagecopy::digest::PageHasher;
use pagecopy::layout::CHUNK_SIZE;
use transport::wire::frame::{
    FrameHeader, FrameKind, RECEIPT_HEADER_LEN, check_receipt, decode_receipt_header, encode_receipt,
    fold_receipt,
};

/// Pages of a full frame.
const PAGES: u64 = 64;

fn header(seq: u64) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Pages,
        seq,
        chunk: 77,
        encoded_len: 3000,
        raw: 0xffff_ffff_0000_0000,
        zero: 0x0000_0000_0000_ffff,
        delta: 0,
        zstd: 0x0000_0000_ffff_0000,
        encoded_checksum: 0x1234_5678_9abc_def0,
        placed: false,
        references: false,
    }
}

fn frames(c: &mut Criterion) {
    let hasher = PageHasher::new(1);
    let mut group = c.benchmark_group("frame");
    // What a header stands for: with it goes this much of guest memory.
    group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
    group.bench_function("encode", |b| {
        let mut seq = 0;
        b.iter(|| {
            seq += 1;
            black_box(header(seq).encode(&hasher))
        });
    });
    let bytes = header(9).encode(&hasher);
    group.bench_function("decode", |b| {
        b.iter(|| FrameHeader::decode(black_box(&bytes), &hasher).is_ok_and(|header| header.pages() != 0));
    });
    group.finish();
}

fn receipts(c: &mut Criterion) {
    let hasher = PageHasher::new(1);
    let digests: Vec<u64> = (0..PAGES).map(|page| page.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
    let mut group = c.benchmark_group("receipt");
    group.throughput(Throughput::Bytes(CHUNK_SIZE as u64));
    let mut out = Vec::new();
    group.bench_function("encode", |b| {
        b.iter(|| {
            out.clear();
            encode_receipt(&mut out, 9, black_box(&digests), &hasher);
            out.len()
        });
    });
    out.clear();
    encode_receipt(&mut out, 9, &digests, &hasher);
    group.bench_function("decode", |b| {
        b.iter(|| {
            let bytes = black_box(&out[..]);
            let head = bytes.first_chunk::<RECEIPT_HEADER_LEN>();
            let head = head.is_some_and(|head| decode_receipt_header(head).is_ok());
            head && check_receipt(bytes, &hasher).is_ok_and(|body| body.len() == PAGES as usize * 8)
        });
    });
    group.bench_function("fold", |b| {
        let mut fold = 0;
        b.iter(|| {
            fold = fold_receipt(fold, black_box(&out), &hasher);
            fold
        });
    });
    group.finish();
}

criterion_group!(benches, frames, receipts);
criterion_main!(benches);
