//! Which pages bytes lie in.

use pagecopy::layout::PAGE_SIZE;

/// Sets the bits of the pages that the bytes `from..to` touch; byte 0 is the start of `words[0]`.
pub(super) fn set_pages(words: &mut [u64], from: u64, to: u64) {
    let mut page = (from / PAGE_SIZE as u64) as usize;
    let end = (to.div_ceil(PAGE_SIZE as u64) as usize).min(words.len() * 64);
    while page < end {
        let (word, bit) = (page / 64, page % 64);
        let count = (end - page).min(64 - bit);
        words[word] |= (u64::MAX >> (64 - count)) << bit;
        page += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_pages_rounds_outwards_and_stays_in_the_words() {
        let mut words = [0u64; 3];
        set_pages(&mut words, 63 * 4096 + 1, 65 * 4096 + 1);
        assert_eq!(words, [1 << 63, 0b11, 0]);
        set_pages(&mut words, 64 * 4096, 128 * 4096);
        assert_eq!(words, [1 << 63, u64::MAX, 0]);
        set_pages(&mut words, 191 * 4096, 400 * 4096);
        assert_eq!(words[2], 1 << 63);
    }
}
