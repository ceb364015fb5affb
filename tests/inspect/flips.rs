//! No byte of an archive can be another, and none be missing, without being noticed: by whoever reads the file by its index, and by
//! whoever reads it from its beginning.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pageferry::CodecMode;
use pageferry::archive::frames::Opener;
use pageferry::archive::reader::{Item, Sequence};
use pageferry::archive::{
    Archive, ArchiveError, CompareError, Image, Survey, Walk, compare, flatten, verify,
};
use pageferry::layout::{PAGE_SIZE, Region};

use super::hand::{Hand, ZERO, noise, piece, ran, text};
use crate::common::folder;

/// Everything that an archive can have, in some ten thousand bytes.
fn small() -> Vec<u8> {
    let regions =
        [Region::new("ram", 0, 64 * PAGE_SIZE as u64), Region::unplaced("rom", 2 * PAGE_SIZE as u64)];
    let mut hand = Hand::new(7, true, &regions);
    hand.frame(0, &[(0, noise(1)), (3, ZERO), (5, text(1)), (6, text(2)), (63, text(3))]);
    hand.pad().frame(1, &[(0, ZERO)]).frame(0, &[(5, text(4))]);
    hand.finish(&[piece("vcpu/0", 3, b"registers"), piece("empty", 1, b""), ran(1)])
}

/// Whether reading by the index says that it is whole.
fn is_whole(path: &Path) -> bool {
    let checked = Archive::open(path).and_then(|archive| verify(&archive, None, &Walk::new(1)));
    checked.is_ok_and(|checked| checked.faults.is_empty())
}

/// Whether reading from the beginning comes to the end.
fn reads_through(bytes: &[u8], opener: &mut Opener) -> Result<(), ArchiveError> {
    let mut sequence = Sequence::begin(|offset, buffer: &mut [u8]| {
        let wanted = bytes.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        let wanted = wanted.ok_or(ArchiveError::Truncated { offset, what: "it" })?;
        buffer.copy_from_slice(wanted);
        Ok(())
    })?;
    let layout = sequence.start().layout.clone();
    loop {
        match sequence.next(opener)? {
            Item::Frame(offset, opened) => opened.whole(offset, &layout)?,
            Item::State(_) => {}
            Item::End(_) => return Ok(()),
        }
    }
}

#[test]
fn every_byte_counts() {
    let folder = folder();
    let path = folder.path().join("small");
    let mut bytes = small();
    assert!(bytes.len() > 8192 && bytes.len() < 24 << 10, "{}", bytes.len());
    std::fs::write(&path, &bytes).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let mut opener = Opener::new().unwrap();
    assert!(is_whole(&path));
    reads_through(&bytes, &mut opener).unwrap();
    let mut unnoticed = Vec::new();
    for at in 0..bytes.len() {
        let right = bytes[at];
        for flips in [1 << (at % 8), 1 << ((at + 4) % 8), 0xff] {
            bytes[at] = right ^ flips;
            file.write_all_at(&bytes[at..=at], at as u64).unwrap();
            if is_whole(&path) || reads_through(&bytes, &mut opener).is_ok() {
                unnoticed.push((at, flips));
            }
        }
        bytes[at] = right;
        file.write_all_at(&[right], at as u64).unwrap();
    }
    assert!(
        unnoticed.is_empty(),
        "of {} bytes, these may be others (offset, bits): {unnoticed:x?}",
        bytes.len()
    );
    assert!(is_whole(&path), "the test leaves it as it was");
}

#[test]
fn who_cancels_hears_that_it_is_cancelled() {
    let folder = folder();
    let path = folder.path().join("small");
    std::fs::write(&path, small()).unwrap();
    let image = Image::open(&path, None).unwrap();
    let walk = Walk::new(1);
    walk.cancel();
    assert!(verify(image.archive(), None, &walk).unwrap_err().is_cancelled());
    assert!(Survey::of(image.archive(), &walk, |_, _| {}).unwrap_err().is_cancelled());
    let compared = compare(&image, &image, &walk).unwrap_err();
    assert!(matches!(compared, CompareError::Walk(error) if error.is_cancelled()));
    let flat = folder.path().join("flat");
    assert!(flatten(&image, &flat, CodecMode::Raw, &walk).unwrap_err().is_cancelled());
    assert!(!flat.exists());
}

#[test]
fn no_end_may_be_missing_or_added() {
    let folder = folder();
    let path = folder.path().join("small");
    let mut bytes = small();
    bytes.push(0);
    std::fs::write(&path, &bytes).unwrap();
    assert!(!is_whole(&path), "a byte too many");
    let file = File::options().write(true).open(&path).unwrap();
    let whole = bytes.len() - 1;
    let mut opener = Opener::new().unwrap();
    for len in (0..=whole).rev() {
        file.set_len(len as u64).unwrap();
        assert_eq!(is_whole(&path), len == whole, "{len} of {whole} bytes");
        assert_eq!(reads_through(&bytes[..len], &mut opener).is_ok(), len == whole, "{len} of {whole} bytes");
    }
}
