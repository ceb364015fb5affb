//! Guest memory of every backing against a model: content, populated pages, holes, and errors.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use pagecopy::backend::GuestRam;
use pagecopy::bitmap::bits;
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE, Region};
use testkit::Rng;
use vmm_shim::guest_memory::{Backing, GuestMemory};

/// Three chunks and 5 pages at 1 MiB, and one chunk and 1 page above 4 GiB: chunks 0..4 and 4..6.
fn two_regions() -> Layout {
    let (chunk, page) = (CHUNK_SIZE as u64, PAGE_SIZE as u64);
    Layout::new(vec![
        Region::new("low", 1 << 20, 3 * chunk + 5 * page),
        Region::new("high", 1 << 32, chunk + page),
    ])
    .unwrap()
}

/// Where files are made: in tmpfs and wherever temporary files live.
fn directories() -> [PathBuf; 2] {
    ["/dev/shm".into(), std::env::temp_dir()]
}

/// All pages of a layout, as `(chunk, bit)`.
fn all_pages(layout: &Layout) -> Vec<(u32, u32)> {
    (0..layout.chunks()).flat_map(|chunk| bits(layout.valid(chunk)).map(move |bit| (chunk, bit))).collect()
}

fn write_page(memory: &GuestMemory, (chunk, bit): (u32, u32), byte: u8) {
    let slice = memory.chunk(chunk).subslice(bit as usize * PAGE_SIZE, PAGE_SIZE).unwrap();
    slice.copy_from(&[byte; PAGE_SIZE]);
}

fn read_page(memory: &GuestMemory, (chunk, bit): (u32, u32)) -> Vec<u8> {
    let mut page = vec![0xa5u8; PAGE_SIZE];
    let slice = memory.chunk(chunk).subslice(bit as usize * PAGE_SIZE, PAGE_SIZE).unwrap();
    slice.copy_to(&mut page[..]);
    page
}

/// What `populated` says of a run of chunks, as pages.
fn populated(memory: &GuestMemory, first: u32, count: u32) -> BTreeSet<(u32, u32)> {
    // Garbage before, for the words must be set, not added to.
    let mut words = vec![0x5a5a_5a5a_5a5a_5a5au64; count as usize];
    memory.populated(first, &mut words).unwrap();
    words.iter().zip(first..).flat_map(|(&word, chunk)| bits(word).map(move |bit| (chunk, bit))).collect()
}

/// Writes random pages and discards some; checks content, and `populated` over every run of chunks, against a model.
fn follows_the_model(memory: &GuestMemory, seed: u64) {
    let layout = memory.layout().clone();
    let pages = all_pages(&layout);
    let mut random = Rng::new(seed);
    let mut model = BTreeSet::new();
    for round in 0..4 {
        for _ in 0..30 {
            let page = random.pick(&pages);
            write_page(memory, page, page.1 as u8 | 1);
            model.insert(page);
        }
        // The first and last pages of regions are where an off-by-one would show.
        let edge = [(0, 0), (3, 4), (4, 0), (5, 0)][round];
        write_page(memory, edge, edge.1 as u8 | 1);
        model.insert(edge);
        for chunk in 0..layout.chunks() {
            let gone = random.next() & random.next() & layout.valid(chunk);
            memory.discard(chunk, gone).unwrap();
            model.retain(|&(c, bit)| c != chunk || gone >> bit & 1 == 0);
        }
        for first in 0..layout.chunks() {
            for count in 0..=layout.chunks() - first {
                let expected: BTreeSet<_> =
                    model.iter().copied().filter(|p| (first..first + count).contains(&p.0)).collect();
                assert_eq!(
                    populated(memory, first, count),
                    expected,
                    "chunks {first}+{count}, round {round}"
                );
            }
        }
    }
    assert!(!model.is_empty());
    for page in pages {
        let expected = if model.contains(&page) { page.1 as u8 | 1 } else { 0 };
        assert_eq!(read_page(memory, page), [expected; PAGE_SIZE], "page {page:?}");
    }
}

#[test]
fn anonymous_memory_follows_the_model() {
    follows_the_model(&GuestMemory::create(two_regions(), &Backing::Anonymous { huge: false }).unwrap(), 1);
}

#[test]
fn small_regions_of_huge_anonymous_memory_follow_the_model() {
    // No region is large enough for a huge page, so populated pages are exact here too.
    follows_the_model(&GuestMemory::create(two_regions(), &Backing::Anonymous { huge: true }).unwrap(), 2);
}

#[test]
fn a_memfd_follows_the_model() {
    follows_the_model(&GuestMemory::create(two_regions(), &Backing::Memfd).unwrap(), 3);
}

#[test]
fn files_follow_the_model() {
    for dir in directories() {
        let file = tempfile::NamedTempFile::new_in(dir).unwrap();
        let backing = Backing::File { path: file.path().into(), create: true };
        follows_the_model(&GuestMemory::create(two_regions(), &backing).unwrap(), 4);
    }
}

#[test]
fn reading_an_anonymous_hole_does_not_populate_it() {
    let memory = GuestMemory::create(two_regions(), &Backing::Anonymous { huge: false }).unwrap();
    assert_eq!(read_page(&memory, (1, 7)), [0; PAGE_SIZE]);
    write_page(&memory, (1, 9), 1);
    assert_eq!(populated(&memory, 0, 6), BTreeSet::from([(1, 9)]));
}

#[test]
fn huge_pages_are_populated_whole_and_discarded_in_part() {
    let memory =
        GuestMemory::create(Layout::flat(4 << 20).unwrap(), &Backing::Anonymous { huge: true }).unwrap();
    write_page(&memory, (0, 3), 9);
    let found = populated(&memory, 0, 16);
    assert!(found.contains(&(0, 3)), "the written page is populated");
    assert!(found.iter().all(|&(chunk, _)| chunk < 8), "the second huge page was not touched");
    memory.discard(0, 1 << 3).unwrap();
    assert!(!populated(&memory, 0, 16).contains(&(0, 3)));
    assert_eq!(read_page(&memory, (0, 3)), [0; PAGE_SIZE]);
}

#[test]
fn populate_brings_pages_in_and_only_those() {
    for backing in [Backing::Anonymous { huge: false }, Backing::Memfd] {
        let memory = GuestMemory::create(two_regions(), &backing).unwrap();
        memory.populate(3, 2).unwrap();
        let expected: BTreeSet<_> =
            all_pages(memory.layout()).into_iter().filter(|p| (3..5).contains(&p.0)).collect();
        assert_eq!(populated(&memory, 0, 6), expected, "{backing:?}");
    }
}

#[test]
fn discarding_gives_blocks_of_files_back() {
    for dir in directories() {
        let file = tempfile::NamedTempFile::new_in(&dir).unwrap();
        let backing = Backing::File { path: file.path().into(), create: true };
        let memory = GuestMemory::create(two_regions(), &backing).unwrap();
        let blocks = || {
            memory.persist().unwrap();
            file.as_file().metadata().unwrap().blocks()
        };
        assert_eq!(blocks(), 0, "a new file is all holes");
        for bit in 0..64 {
            write_page(&memory, (1, bit), 7);
        }
        assert!(blocks() >= 64 * 8, "{dir:?}: 64 pages take {} blocks", blocks());
        memory.discard(1, u64::MAX).unwrap();
        assert!(blocks() <= 8, "{dir:?}: {} blocks are left", blocks());
        assert_eq!(file.as_file().metadata().unwrap().len(), memory.layout().bytes());
    }
}

#[test]
fn pages_that_came_through_the_descriptor_are_populated() {
    let memory = GuestMemory::create(two_regions(), &Backing::Memfd).unwrap();
    let (fd, offset) = memory.fd_of(1).unwrap();
    assert_eq!(offset, memory.layout().regions()[0].len);
    let file = File::from(fd.try_clone_to_owned().unwrap());
    file.write_all_at(b"from outside", offset + CHUNK_SIZE as u64).unwrap();
    assert_eq!(populated(&memory, 0, 6), BTreeSet::from([(5, 0)]));
    assert_eq!(&read_page(&memory, (5, 0))[..12], b"from outside");
    assert!(memory.fd_of(2).is_none());
    assert!(file.set_len(4096).is_err(), "a memfd is sealed against truncation");
    let anonymous = GuestMemory::create(two_regions(), &Backing::Anonymous { huge: false }).unwrap();
    assert!(anonymous.fd_of(0).is_none());
}

#[test]
fn a_file_opened_for_reading_keeps_writes_to_the_process() {
    for dir in directories() {
        let file = tempfile::NamedTempFile::new_in(dir).unwrap();
        file.as_file().set_len(3 * CHUNK_SIZE as u64 + 4096).unwrap();
        file.as_file().write_all_at(&[1; PAGE_SIZE], 5 * PAGE_SIZE as u64).unwrap();
        let memory = GuestMemory::open_ram_file(file.path(), false).unwrap();
        assert_eq!(memory.layout().regions()[0].name, "ram");
        assert_eq!(populated(&memory, 0, 4), BTreeSet::from([(0, 5)]));
        write_page(&memory, (3, 0), 2);
        assert_eq!(read_page(&memory, (3, 0)), [2; PAGE_SIZE]);
        assert_eq!(populated(&memory, 0, 4), BTreeSet::from([(0, 5), (3, 0)]), "private pages count too");
        let mut page = [9u8; PAGE_SIZE];
        file.as_file().read_exact_at(&mut page, 3 * CHUNK_SIZE as u64).unwrap();
        assert_eq!(page, [0; PAGE_SIZE], "the file is as it was");
        assert!(memory.discard(0, 1 << 5).unwrap_err().to_string().contains("reading only"));
        memory.populate(0, 4).unwrap();
    }
}

#[test]
fn a_written_file_is_found_again() {
    for dir in directories() {
        let file = tempfile::NamedTempFile::new_in(dir).unwrap();
        let backing = |create| Backing::File { path: file.path().into(), create };
        {
            let memory = GuestMemory::create(two_regions(), &backing(true)).unwrap();
            write_page(&memory, (4, 2), 8);
            memory.persist().unwrap();
        }
        let opened = GuestMemory::create(two_regions(), &backing(false)).unwrap();
        assert_eq!(populated(&opened, 0, 6), BTreeSet::from([(4, 2)]));
        assert_eq!(read_page(&opened, (4, 2)), [8; PAGE_SIZE]);
        let flat = GuestMemory::open_ram_file(file.path(), true).unwrap();
        assert_eq!(flat.layout().bytes(), two_regions().bytes());
        drop((opened, flat));
        // Made anew, it is empty again.
        let again = GuestMemory::create(two_regions(), &backing(true)).unwrap();
        assert_eq!(populated(&again, 0, 6), BTreeSet::new());
        assert_eq!(read_page(&again, (4, 2)), [0; PAGE_SIZE]);
    }
}

#[test]
fn errors_name_what_and_where() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ram");
    let error = |path: &Path, create| {
        let backing = Backing::File { path: path.into(), create };
        GuestMemory::create(two_regions(), &backing).unwrap_err().to_string()
    };
    let missing = error(&path, false);
    assert!(missing.contains(path.to_str().unwrap()), "{missing}");
    let file = File::create(&path).unwrap();
    for (len, part) in [(0, "not empty"), (4097, "4097 bytes"), (8192, "but the layout")] {
        file.set_len(len).unwrap();
        let text = error(&path, false);
        assert!(text.contains(part) && text.contains(path.to_str().unwrap()), "{text}");
    }
    let text = error(dir.path(), true);
    assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
    let text = error(Path::new("/dev/null"), true);
    assert!(text.contains("regular file"), "{text}");
    let text = GuestMemory::create(two_regions(), &Backing::MemfdHuge).unwrap_err().to_string();
    assert!(text.contains("\"low\"") && text.contains("2097152"), "{text}");

    let memory = GuestMemory::create(two_regions(), &Backing::Memfd).unwrap();
    assert!(memory.populated(5, &mut [0; 2]).unwrap_err().to_string().contains("5..7"));
    assert!(memory.populated(u32::MAX, &mut [0; 2]).is_err());
    assert!(memory.populate(6, 1).is_err());
    assert!(memory.discard(6, 1).unwrap_err().to_string().contains("chunk 6"));
    assert!(memory.discard(3, 1 << 5).unwrap_err().to_string().contains("chunk 3"));
}

#[test]
fn a_guest_larger_than_the_address_space_is_refused() {
    // User space is 128 TiB (or, if asked for, 64 PiB), so two guests of 64 TiB do not fit beside anything else.
    let big = || GuestMemory::create(Layout::flat(64 << 40).unwrap(), &Backing::Anonymous { huge: false });
    let first = big();
    let text = big().unwrap_err().to_string();
    assert!(text.contains("\"ram\"") && text.contains(&(64u64 << 40).to_string()), "{text}");
    drop(first);
}

#[test]
fn huge_page_memory_works_or_says_what_is_missing() {
    let layout = Layout::flat(4 << 20).unwrap();
    let memory = match GuestMemory::create(layout, &Backing::MemfdHuge) {
        Ok(memory) => memory,
        Err(e) => {
            let text = e.to_string();
            assert!(text.contains("/proc/sys/vm/nr_hugepages") || text.contains("hugetlbfs"), "{text}");
            println!("skipped but for the error, as no huge pages are reserved here: {text}");
            return;
        }
    };
    assert_eq!(populated(&memory, 0, 16), BTreeSet::new(), "untouched");
    write_page(&memory, (0, 3), 9);
    write_page(&memory, (0, 4), 9);
    assert!(populated(&memory, 0, 16).contains(&(0, 3)));
    memory.discard(0, 1 << 3).unwrap();
    assert_eq!(read_page(&memory, (0, 3)), [0; PAGE_SIZE]);
    assert_eq!(read_page(&memory, (0, 4)), [9; PAGE_SIZE]);
    memory.populate(0, 16).unwrap();
    let (fd, offset) = memory.fd_of(0).unwrap();
    let file = File::from(fd.try_clone_to_owned().unwrap());
    assert_eq!((file.metadata().unwrap().len(), offset), (4 << 20, 0));
}

#[test]
fn enlarging_keeps_what_is_there_and_what_comes_meanwhile() {
    let chunks = 32u32;
    let layout = Layout::flat(u64::from(chunks) * CHUNK_SIZE as u64).unwrap();
    let memory = GuestMemory::create(layout.clone(), &Backing::Memfd).unwrap();
    assert!(!memory.enlarges() && !memory.enlarge(0, 8), "only memory that was told to");
    let memory = memory.enlarging();
    if !memory.enlarges() {
        println!("skipped: this kernel makes no large pages of shared memory on request (Linux 6.1)");
        return;
    }
    // One page here and there; another thread writes others all the time.
    let page = |chunk: u32, bit: u32| (chunk, bit);
    (0..chunks).for_each(|chunk| write_page(&memory, page(chunk, chunk % 64), 7));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for byte in 1..=200u8 {
                (0..chunks).for_each(|chunk| write_page(&memory, page(chunk, 40), byte));
            }
        });
        // All but the first 2 MiB. The kernel may find pages in use; a range that is no whole block is refused.
        assert!((0..1000).any(|_| memory.enlarge(8, 24)));
        assert!(!memory.enlarge(3, 2));
        writer.join().unwrap();
    });
    for (chunk, bit) in all_pages(&layout) {
        let expected = match bit {
            40 => 200,
            bit if bit == chunk % 64 => 7,
            _ => 0,
        };
        assert!(read_page(&memory, (chunk, bit)).iter().all(|&byte| byte == expected), "{chunk} {bit}");
    }
    // What was enlarged is no hole any more, and nothing else was filled.
    let there = populated(&memory, 0, chunks);
    assert!(there.iter().filter(|(chunk, _)| *chunk >= 8).count() == 24 * 64);
}
