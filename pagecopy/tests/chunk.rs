//! Chunks through encoder and decoder: a source whose pages change, streams that die, sections that are damaged.

use pagecopy::bitmap::bits;
use pagecopy::choose::CodecMode;
use pagecopy::chunk::{Announced, ChunkDecoder, ChunkEncoder, Clocks, EncodedChunk, Job, Reference, Shared};
use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use pagecopy::xbzrle::Page;
use proptest::prelude::*;
use testkit::Rng;

const CHUNKS: u32 = 3;

/// What one page of the guest is set to.
#[derive(Clone, Debug)]
enum Write {
    Zero,
    Text(u8),
    Random(u64),
    Poke(u16, u8),
}

/// One step of a migration.
#[derive(Clone, Debug)]
enum Step {
    Write {
        chunk: u32,
        bit: u32,
        write: Write,
    },
    Send {
        chunk: u32,
    },
    /// What was sent for these pages got lost, or arrived as something else.
    Lose {
        chunk: u32,
        pages: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let write = prop_oneof![
        Just(Write::Zero),
        any::<u8>().prop_map(Write::Text),
        any::<u64>().prop_map(Write::Random),
        (0u16..4096, any::<u8>()).prop_map(|(at, value)| Write::Poke(at, value)),
    ];
    prop_oneof![
        12 => (0..CHUNKS, prop_oneof![0u32..8, 0u32..64], write)
            .prop_map(|(chunk, bit, write)| Step::Write { chunk, bit, write }),
        3 => (0..CHUNKS).prop_map(|chunk| Step::Send { chunk }),
        1 => (0..CHUNKS, any::<u64>()).prop_map(|(chunk, pages)| Step::Lose { chunk, pages }),
    ]
}

fn apply(page: &mut [u8], write: &Write) {
    match *write {
        Write::Zero => page.fill(0),
        Write::Text(seed) => {
            page.iter_mut()
                .enumerate()
                .for_each(|(i, byte)| *byte = b"some words, and more"[(i + usize::from(seed)) % 20]);
        }
        Write::Random(seed) => {
            let mut rng = Rng::new(seed);
            page.iter_mut().for_each(|byte| *byte = rng.next() as u8);
        }
        Write::Poke(at, value) => page[usize::from(at)] = value,
    }
}

fn pages_of(memory: &[Vec<u8>], reference: Reference, pages: &mut [Page]) {
    for (page, bit) in pages.iter_mut().zip(bits(reference.pages)) {
        page.copy_from_slice(&memory[reference.chunk as usize][bit as usize * PAGE_SIZE..][..PAGE_SIZE]);
    }
}

/// Applies a chunk as a destination does.
fn deliver(
    sent: &EncodedChunk<'_>,
    chunk: usize,
    source: &[u8],
    destination: &mut [Vec<u8>],
    decoder: &mut ChunkDecoder,
) {
    let of = |bit: u32| bit as usize * PAGE_SIZE..(bit as usize + 1) * PAGE_SIZE;
    let announced = Announced { delta: sent.delta, zstd: sent.zstd, references: !sent.references.is_empty() };
    let mut asked = Vec::new();
    let decoded = decoder
        .decode_with(
            announced,
            sent.encoded,
            |bit, page| page.copy_from_slice(&destination[chunk][of(bit)]),
            |reference, pages| {
                asked.push(reference);
                pages_of(destination, reference, pages);
                true
            },
        )
        .expect("an encoder's output decodes");
    assert_eq!(asked, sent.references);
    for (bit, page) in decoded.iter() {
        destination[chunk][of(bit)].copy_from_slice(page);
    }
    for bit in bits(sent.zero) {
        destination[chunk][of(bit)].fill(0);
    }
    for bit in bits(sent.raw) {
        destination[chunk][of(bit)].copy_from_slice(&source[of(bit)]);
    }
}

fn mode() -> impl Strategy<Value = CodecMode> {
    prop_oneof![
        Just(CodecMode::Auto),
        Just(CodecMode::Raw),
        Just(CodecMode::Delta),
        (-7i32..4).prop_map(|level| CodecMode::Zstd { level: Some(level) }),
        Just(CodecMode::Zstd { level: None }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// The destination ends with the source's memory, whatever was written, sent and lost between, in any mode and with
    /// any cache; masks are disjoint and complete; digests are those of the content.
    #[test]
    fn memory_arrives(mode in mode(), cache in 0u64..1 << 20, steps in prop::collection::vec(step(), 1..120)) {
        let hasher = PageHasher::new(5);
        let shared = Shared::new(hasher.clone(), CHUNKS, cache);
        let mut encoder = ChunkEncoder::new(mode, Clocks { now: || 0, worked: || 0 }).referring(true);
        let mut decoder = ChunkDecoder::new();
        let mut source = vec![vec![0u8; CHUNK_SIZE]; CHUNKS as usize];
        let mut destination = vec![vec![0xeeu8; CHUNK_SIZE]; CHUNKS as usize];
        let (mut dirty, mut first) = ([u64::MAX; CHUNKS as usize], [true; CHUNKS as usize]);
        let last = (0..CHUNKS).map(|chunk| Step::Send { chunk });
        for step in steps.into_iter().chain(last) {
            match step {
                Step::Write { chunk, bit, write } => {
                    apply(&mut source[chunk as usize][bit as usize * PAGE_SIZE..][..PAGE_SIZE], &write);
                    dirty[chunk as usize] |= 1 << bit;
                }
                Step::Lose { chunk, pages } => {
                    shared.void(chunk, pages);
                    for bit in bits(pages) {
                        destination[chunk as usize][bit as usize * PAGE_SIZE..][..PAGE_SIZE].fill(0xdd);
                    }
                    dirty[chunk as usize] |= pages;
                }
                Step::Send { chunk } => {
                    let i = chunk as usize;
                    let plan = encoder.plan(chunk, u64::from(chunk) << 22);
                    let job = Job { chunk, snapshot: &source[i], pages: dirty[i], first_pass: first[i] };
                    // Also pages that were written, or got lost, since they were sent: it must tell them.
                    let sent = encoder.encode_as(plan, &shared, job, &mut |reference, pages| {
                        pages_of(&source, reference, pages);
                        reference.pages & 1 == 0
                    });
                    let masks = [sent.zero, sent.unchanged, sent.delta, sent.zstd, sent.raw];
                    prop_assert_eq!(masks.iter().fold(0, |all, mask| all | mask), dirty[i]);
                    prop_assert_eq!(masks.iter().map(|m| m.count_ones()).sum::<u32>(), dirty[i].count_ones());
                    for bit in bits(dirty[i]) {
                        let page = &source[i][bit as usize * PAGE_SIZE..][..PAGE_SIZE];
                        prop_assert_eq!(sent.digests[bit as usize], hasher.page(page.try_into().unwrap()));
                    }
                    deliver(&sent, i, &source[i], &mut destination, &mut decoder);
                    (dirty[i], first[i]) = (0, false);
                    encoder.chooser().observe_sent(u64::from(chunk) << 24, u64::from(chunk) << 22, || None);
                }
            }
        }
        prop_assert!(source == destination);
    }

    /// A damaged section is an error or other pages, never a panic; and the decoder is as good as new afterwards.
    #[test]
    fn damage_is_harmless(flips in prop::collection::vec((any::<u16>(), 1u8..), 0..4), cut: u16, masks: (u64, u64)) {
        let shared = Shared::new(PageHasher::new(1), 1, 4 << 20);
        let mut encoder = ChunkEncoder::new(CodecMode::Auto, Clocks { now: || 0, worked: || 0 });
        let mut source = vec![0u8; 8 * PAGE_SIZE];
        source.chunks_mut(PAGE_SIZE).zip(0..).for_each(|(page, seed)| apply(page, &Write::Text(seed)));
        encoder.encode(&shared, 0, &source, 0xff, true);
        source.chunks_mut(PAGE_SIZE).for_each(|page| page[77..99].fill(1));
        let sent = encoder.encode(&shared, 0, &source, 0xff, false);
        prop_assert_eq!(sent.delta, 0xff);
        let mut decoder = ChunkDecoder::new();
        let mut damaged = sent.encoded[..sent.encoded.len() - usize::from(cut) % 5].to_vec();
        for (at, flip) in flips {
            let at = usize::from(at) % damaged.len();
            damaged[at] ^= flip;
        }
        let _ = decoder.decode(sent.delta, 0, &damaged, |_, page| page.fill(7));
        let _ = decoder.decode(masks.0, masks.1, &damaged, |_, page| page.fill(7));
        let good = decoder.decode(sent.delta, 0, sent.encoded, |bit, page| {
            page.copy_from_slice(&source[bit as usize * PAGE_SIZE..][..PAGE_SIZE]);
        });
        prop_assert_eq!(good.expect("an encoder's output decodes").pages(), 0xff);
    }
}

/// A second send already is a delta, and a guest that writes a byte a page sends next to nothing.
#[test]
fn the_second_send_is_small() {
    let shared = Shared::new(PageHasher::new(1), 1, 4 << 20);
    let mut encoder = ChunkEncoder::new(CodecMode::Auto, Clocks { now: || 0, worked: || 0 });
    let mut source = vec![0u8; CHUNK_SIZE];
    source.chunks_mut(PAGE_SIZE).zip(1..).for_each(|(page, seed)| apply(page, &Write::Random(seed)));
    assert_eq!(encoder.encode(&shared, 0, &source, u64::MAX, true).raw, u64::MAX);
    source.chunks_mut(PAGE_SIZE).for_each(|page| page[0] ^= 1);
    let sent = encoder.encode(&shared, 0, &source, u64::MAX, false);
    assert_eq!((sent.delta, sent.encoded.len()), (u64::MAX, 64 * 5));
}
