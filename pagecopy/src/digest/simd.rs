//! XXH3-128 of one page under a secret, also of a page that somebody writes meanwhile.
//!
//! Only a page's length is supported, 4096 bytes, which makes all of XXH3's branches constants. Source: the specification,
//! <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>; the `xxhash-rust` crate is what the tests compare with.
//!
//! Pages are read by loads in inline assembly: the compiler may neither repeat them nor assume that two of them see the same
//! memory. So a page that is written meanwhile has some digest, of bytes each of which was there at some time, and that is all.

use std::arch::asm;

use vm_memory::volatile_memory::VolatileSlice;

use crate::layout::PAGE_SIZE;
use crate::simd::{Kind, Level};

/// Bytes of a secret.
pub(super) const SECRET: usize = 192;
/// Bytes that are taken in at a time.
const STRIPE: usize = 64;
/// Stripes before the accumulators are scrambled; each uses the secret from 8 bytes further on.
const STRIPES: usize = (SECRET - STRIPE) / 8;
const BLOCK: usize = STRIPE * STRIPES;
const BLOCKS: usize = PAGE_SIZE / BLOCK;
/// Where in the secret the scrambling and the last stripe find their parts.
const SCRAMBLE_AT: usize = SECRET - STRIPE;
const LAST_AT: usize = SECRET - STRIPE - 7;
/// Where the two halves of the result find theirs.
const LOW_AT: usize = 11;
const HIGH_AT: usize = SECRET - STRIPE - 11;

const _: () = assert!(PAGE_SIZE == BLOCKS * BLOCK);

const PRIME32_1: u64 = 0x9e37_79b1;
const PRIME64_1: u64 = 0x9e37_79b1_85eb_ca87;
const PRIME64_2: u64 = 0xc2b2_ae3d_27d4_eb4f;
const START: [u64; 8] = [
    0xc2b2_ae3d,
    PRIME64_1,
    PRIME64_2,
    0x1656_67b1_9e37_79f9,
    0x85eb_ca77_c2b2_ae63,
    0x85eb_ca77,
    0x27d4_eb2f_1656_67c5,
    PRIME32_1,
];

/// The digest of a page in a buffer.
pub(super) fn slice(level: Level, page: &[u8; PAGE_SIZE], secret: &[u8; SECRET]) -> u128 {
    // SAFETY: a page's bytes.
    unsafe { page_digest(level, page.as_ptr(), secret) }
}

/// The digest of a page of guest memory.
pub(super) fn memory(level: Level, page: &VolatileSlice<'_>, secret: &[u8; SECRET]) -> u128 {
    assert_eq!(page.len(), PAGE_SIZE, "the digest is one of one page");
    // SAFETY: a volatile slice points at as many bytes as it says, readable for as long as it is borrowed.
    unsafe { page_digest(level, page.ptr_guard().as_ptr(), secret) }
}

/// The digest of the page at `page`.
///
/// # Safety
/// `page` points at [`PAGE_SIZE`] readable bytes. They may change meanwhile.
unsafe fn page_digest(level: Level, page: *const u8, secret: &[u8; SECRET]) -> u128 {
    let sums = match level.kind() {
        // SAFETY: the caller's.
        Kind::Portable => unsafe { portable(page, secret) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's; and a level of this kind is only made where AVX2 was detected.
        Kind::Avx2 => unsafe { avx2(page, secret) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's; and a level of this kind is only made where AVX-512 F was detected.
        Kind::Avx512 => unsafe { avx512(page, secret) },
    };
    let len = PAGE_SIZE as u64;
    let low = merge(&sums, secret, LOW_AT, len.wrapping_mul(PRIME64_1));
    let high = merge(&sums, secret, HIGH_AT, !len.wrapping_mul(PRIME64_2));
    u128::from(high) << 64 | u128::from(low)
}

fn word(secret: &[u8; SECRET], at: usize) -> u64 {
    u64::from_le_bytes(*secret[at..].first_chunk().expect("the offsets above lie in a secret"))
}

fn merge(sums: &[u64; 8], secret: &[u8; SECRET], at: usize, start: u64) -> u64 {
    let mut sum = start;
    for (i, pair) in sums.as_chunks::<2>().0.iter().enumerate() {
        let (a, b) = (pair[0] ^ word(secret, at + 16 * i), pair[1] ^ word(secret, at + 16 * i + 8));
        let product = u128::from(a) * u128::from(b);
        sum = sum.wrapping_add(product as u64 ^ (product >> 64) as u64);
    }
    sum ^= sum >> 37;
    sum = sum.wrapping_mul(0x1656_6791_9e37_79f9);
    sum ^ sum >> 32
}

/// Calls `stripe` with the offsets in the page and in the secret of each stripe, and `scramble` after each block but the last.
#[inline(always)]
fn walk<T>(state: &mut T, stripe: impl Fn(&mut T, usize, usize), scramble: impl Fn(&mut T)) {
    for block in 0..BLOCKS {
        let last = block + 1 == BLOCKS;
        // The last stripe of a page is taken in with another part of the secret.
        for n in 0..STRIPES - usize::from(last) {
            stripe(state, block * BLOCK + n * STRIPE, n * 8);
        }
        if !last {
            scramble(state);
        }
    }
    stripe(state, PAGE_SIZE - STRIPE, LAST_AT);
}

/// Eight bytes at `at`, which need no alignment, as a little-endian number.
///
/// # Safety
/// They are readable.
#[inline(always)]
unsafe fn load(at: *const u8) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        let value;
        // SAFETY: reads eight readable bytes and touches nothing else.
        unsafe {
            asm!("mov {}, [{}]", out(reg) value, in(reg) at, options(readonly, nostack, preserves_flags));
        }
        value
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        // SAFETY: eight readable bytes; an array of bytes needs no alignment.
        u64::from_le_bytes(unsafe { std::ptr::read_volatile(at.cast()) })
    }
}

/// # Safety
/// As [`page_digest`].
unsafe fn portable(page: *const u8, secret: &[u8; SECRET]) -> [u64; 8] {
    let mut sums = START;
    walk(
        &mut sums,
        |sums, at, key| {
            for i in 0..8 {
                // SAFETY: `walk` calls with offsets of whole stripes of the page.
                let data = unsafe { load(page.add(at + 8 * i)) };
                let keyed = data ^ word(secret, key + 8 * i);
                sums[i ^ 1] = sums[i ^ 1].wrapping_add(data);
                sums[i] = sums[i].wrapping_add((keyed & 0xffff_ffff).wrapping_mul(keyed >> 32));
            }
        },
        |sums| {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = (*sum ^ *sum >> 47 ^ word(secret, SCRAMBLE_AT + 8 * i)).wrapping_mul(PRIME32_1);
            }
        },
    );
    sums
}

/// # Safety
/// As [`page_digest`]; and the CPU has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2(page: *const u8, secret: &[u8; SECRET]) -> [u64; 8] {
    use std::arch::x86_64::*;

    let load = |at: usize| {
        let value: __m256i;
        // SAFETY: offsets below come from `walk`, which stays in the page; the instruction needs no alignment.
        unsafe {
            asm!("vmovdqu {}, [{}]", out(ymm_reg) value, in(reg) page.add(at), options(readonly, nostack, preserves_flags));
        }
        value
    };
    let key = |at: usize| {
        let bytes: &[u8; 32] = secret[at..].first_chunk().expect("in the secret");
        // SAFETY: an unaligned load of 32 bytes from an array of 32 bytes.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    };
    let mut sums = [0, 4].map(|at| {
        let four: &[u64; 4] = START[at..].first_chunk().expect("eight numbers");
        // SAFETY: an unaligned load of 32 bytes from an array of 32 bytes.
        unsafe { _mm256_loadu_si256(four.as_ptr().cast()) }
    });
    let prime = _mm256_set1_epi64x(PRIME32_1 as i64);
    walk(
        &mut sums,
        |sums, at, secret_at| {
            for (half, sum) in sums.iter_mut().enumerate() {
                let data = load(at + 32 * half);
                let keyed = _mm256_xor_si256(data, key(secret_at + 32 * half));
                let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
                let swapped = _mm256_shuffle_epi32::<0b01_00_11_10>(data);
                *sum = _mm256_add_epi64(product, _mm256_add_epi64(*sum, swapped));
            }
        },
        |sums| {
            for (half, sum) in sums.iter_mut().enumerate() {
                let mixed = _mm256_xor_si256(*sum, _mm256_srli_epi64::<47>(*sum));
                let keyed = _mm256_xor_si256(mixed, key(SCRAMBLE_AT + 32 * half));
                let low = _mm256_mul_epu32(keyed, prime);
                let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(keyed), prime);
                *sum = _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high));
            }
        },
    );
    // SAFETY: two vectors of 32 bytes are eight numbers, for which any bits are valid.
    unsafe { std::mem::transmute(sums) }
}

/// # Safety
/// As [`page_digest`]; and the CPU has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(page: *const u8, secret: &[u8; SECRET]) -> [u64; 8] {
    use std::arch::x86_64::*;

    let load = |at: usize| {
        let value: __m512i;
        // SAFETY: offsets below come from `walk`, which stays in the page; the instruction needs no alignment.
        unsafe {
            asm!("vmovdqu64 {}, [{}]", out(zmm_reg) value, in(reg) page.add(at), options(readonly, nostack, preserves_flags));
        }
        value
    };
    let key = |at: usize| {
        let bytes: &[u8; 64] = secret[at..].first_chunk().expect("in the secret");
        // SAFETY: an unaligned load of 64 bytes from an array of 64 bytes.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    };
    // SAFETY: an unaligned load of 64 bytes from eight numbers.
    let mut sum = unsafe { _mm512_loadu_si512(START.as_ptr().cast()) };
    let prime = _mm512_set1_epi64(PRIME32_1 as i64);
    walk(
        &mut sum,
        |sum, at, secret_at| {
            let data = load(at);
            let keyed = _mm512_xor_si512(data, key(secret_at));
            let product = _mm512_mul_epu32(keyed, _mm512_srli_epi64::<32>(keyed));
            let swapped = _mm512_shuffle_epi32::<0b01_00_11_10>(data);
            *sum = _mm512_add_epi64(product, _mm512_add_epi64(*sum, swapped));
        },
        |sum| {
            let mixed = _mm512_xor_si512(*sum, _mm512_srli_epi64::<47>(*sum));
            let keyed = _mm512_xor_si512(mixed, key(SCRAMBLE_AT));
            let low = _mm512_mul_epu32(keyed, prime);
            let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(keyed), prime);
            *sum = _mm512_add_epi64(low, _mm512_slli_epi64::<32>(high));
        },
    );
    // SAFETY: a vector of 64 bytes is eight numbers, for which any bits are valid.
    unsafe { std::mem::transmute(sum) }
}
