//! Archives that lie: whoever loads one, or looks into it, ends with an error that says where, and has taken little memory for it.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pageferry::archive::format::{
    Base, Footer, FrameHeader, FrameKind, Header, IndexEntry, MAGIC, PAD_MAGIC, Record, RecordKind,
    STATE_MAX, VERSION, feature,
};
use pageferry::layout::Region;
use pageferry::pagecopy::digest::PageHasher;
use pageferry::vmm_shim::vmm;
use testkit::PATIENCE;

use super::{OF_A_FILE, Watch};
use crate::common::{Ferry, folder, turn};
use crate::hand::Hand;
use crate::vm::have_kvm;

const GUEST: u64 = 64 << 20;
const SEED: u64 = 5;

/// The archive's own.
fn hasher() -> PageHasher {
    PageHasher::new(SEED)
}

fn header() -> Header {
    Header {
        version: VERSION,
        features: feature::ZSTD,
        id: [3; 16],
        seed: SEED,
        created: 1_700_000_000,
        live: true,
        data_bytes: 4096,
        regions: vmm::layout(GUEST).unwrap().regions().to_vec(),
        machine: format!("{} cpus=1", if have_kvm() { "kvm" } else { "process" }),
        base: None,
    }
}

/// Magic and header record.
fn begun(header: &Header) -> Vec<u8> {
    sealed_header(&header.encode())
}

fn sealed_header(payload: &[u8]) -> Vec<u8> {
    let unseeded = PageHasher::new(0);
    let record = Record::of(RecordKind::Header, MAGIC.len() as u64, payload, &unseeded);
    [&MAGIC[..], &record.encode(&unseeded), payload].concat()
}

/// The last record of a file of so many bytes.
fn footer(footer: Footer) -> Vec<u8> {
    let at = footer.bytes - Footer::RECORD_LEN as u64;
    let record = Record::of(RecordKind::Footer, at, &footer.encode(), &hasher());
    [&record.encode(&hasher())[..], &footer.encode()].concat()
}

/// A record that says that it is so long, and of whose payload there is a hole.
fn hollow(kind: RecordKind, offset: u64, len: u64) -> Vec<u8> {
    Record { kind, offset, len, payload: 0 }.encode(&hasher()).to_vec()
}

/// A file of pieces, and holes between them.
fn write(path: &Path, pieces: &[(u64, Vec<u8>)]) {
    let file = File::create(path).unwrap();
    for (at, bytes) in pieces {
        file.write_all_at(bytes, *at).unwrap();
    }
}

/// A file of some kilobytes on the disk, and an index of 40 GiB in its hole.
fn hollow_index(path: &Path) {
    let len = (40 << 30) / IndexEntry::LEN as u64 * IndexEntry::LEN as u64;
    let start = begun(&header());
    let index_at = start.len() as u64;
    let bytes = index_at + Record::LEN as u64 + len + Footer::RECORD_LEN as u64;
    let frames = len / IndexEntry::LEN as u64;
    let end = footer(Footer { state_at: index_at, index_at, frames, pages: 1, bytes });
    write(
        path,
        &[(0, start), (index_at, hollow(RecordKind::Index, index_at, len)), (bytes - end.len() as u64, end)],
    );
}

/// Lengths and places beyond all numbers.
fn huge_numbers(path: &Path) {
    let start = begun(&header());
    let index_at = start.len() as u64;
    let bytes = index_at + (Record::LEN + Footer::RECORD_LEN) as u64;
    let end = footer(Footer { state_at: u64::MAX - 8, index_at, frames: u64::MAX, pages: u64::MAX, bytes });
    let index = hollow(RecordKind::Index, index_at, u64::MAX);
    write(path, &[(0, start), (index_at, index), (bytes - end.len() as u64, end)]);
}

/// A header record with 4 GiB of regions, and a machine of 4 GiB.
fn huge_header(path: &Path) {
    let mut payload = header().encode();
    // Behind 60 bytes of a fixed length comes their number.
    payload[60..64].copy_from_slice(&[0xff; 4]);
    write(path, &[(0, sealed_header(&payload))]);
}

/// A state of the longest length, in a hole.
fn hollow_state(path: &Path) {
    let start = begun(&header());
    let state_at = start.len() as u64;
    let index_at = state_at + Record::LEN as u64 + STATE_MAX;
    let bytes = index_at + (Record::LEN + Footer::RECORD_LEN) as u64;
    let index = Record::of(RecordKind::Index, index_at, &[], &hasher()).encode(&hasher()).to_vec();
    let end = footer(Footer { state_at, index_at, frames: 0, pages: 0, bytes });
    write(
        path,
        &[
            (0, start),
            (state_at, hollow(RecordKind::State, state_at, STATE_MAX)),
            (index_at, index),
            (bytes - end.len() as u64, end),
        ],
    );
}

/// Frames behind a header, each with its section, sealed as they should be.
fn framed(path: &Path, sections: &[Vec<u8>]) {
    let mut bytes = begun(&header());
    let mut entries = Vec::new();
    for (chunk, section) in (0u32..).zip(sections) {
        let offset = bytes.len() as u64;
        let frame = FrameHeader {
            kind: FrameKind::Pages,
            chunk,
            encoded_len: section.len() as u32,
            raw: 0,
            zero: 0,
            zstd: 1,
        };
        frame.encode([7, hasher().checksum(section)], &hasher(), &mut bytes);
        bytes.extend_from_slice(section);
        let len = (bytes.len() as u64 - offset) as u32;
        entries.push(IndexEntry { offset, pages: 1, chunk, len });
    }
    let mut record = |kind, payload: &[u8]| {
        let at = bytes.len() as u64;
        bytes.extend_from_slice(&Record::of(kind, at, payload, &hasher()).encode(&hasher()));
        bytes.extend_from_slice(payload);
        at
    };
    let state_at =
        record(RecordKind::State, &pageferry::archive::format::encode_state_payload(&[crate::hand::ran(1)]));
    let index: Vec<u8> = entries.iter().flat_map(IndexEntry::encode).collect();
    let index_at = record(RecordKind::Index, &index);
    let frames = entries.len() as u64;
    let len = bytes.len() as u64 + Footer::RECORD_LEN as u64;
    bytes.extend(footer(Footer { state_at, index_at, frames, pages: frames, bytes: len }));
    std::fs::write(path, bytes).unwrap();
}

/// Sections of 240 KB that are gigabytes.
fn bombs(path: &Path) {
    let content = |bytes: u64| [&[0xe0][..], &bytes.to_le_bytes()].concat();
    let headers = [content(4096), content(8 << 30), content(u64::MAX), vec![0x00, 0xff]];
    framed(path, &headers.map(|header| super::session::bomb(&header, 60_000)));
}

/// The difference to itself.
fn own_base(path: &Path) {
    let name = path.file_name().unwrap().to_str().unwrap();
    let page = crate::hand::noise(1);
    let mut hand = Hand::new(9, true, &header().regions).on(9, name);
    hand.header.machine = header().machine;
    let bytes = hand.same(0, &[(0, page)]).finish(&[crate::hand::ran(1)]);
    std::fs::write(path, bytes).unwrap();
}

/// A guest of 64 TiB.
fn huge_guest(path: &Path) {
    let region = Region::new("ram", 0, 64 << 40);
    std::fs::write(path, Hand::new(9, true, &[region]).finish(&[crate::hand::ran(1)])).unwrap();
}

/// A base whose name is as long as one may be, and leads out of the folder.
fn far_base(path: &Path) {
    let name = format!("/{}", "../".repeat(1300));
    let base = Some(Base { id: [1; 16], name });
    let start = begun(&Header { features: feature::ZSTD | feature::BASE, base, ..header() });
    write(path, &[(0, start)]);
}

/// An archive that lies.
struct Attack {
    name: &'static str,
    write: fn(&Path),
    /// `inspect` has nothing to object to what it looks at.
    looks_well: bool,
}

const ATTACKS: [Attack; 8] = [
    Attack { name: "an index of 40 GiB in a hole", write: hollow_index, looks_well: false },
    Attack { name: "counts and lengths beyond all numbers", write: huge_numbers, looks_well: false },
    Attack { name: "a header of 4 GiB of regions", write: huge_header, looks_well: false },
    Attack { name: "a state of 64 MiB in a hole", write: hollow_state, looks_well: false },
    Attack { name: "zip bombs", write: bombs, looks_well: false },
    Attack { name: "an archive that stands on itself", write: own_base, looks_well: false },
    Attack { name: "a guest of 64 TiB", write: huge_guest, looks_well: true },
    Attack { name: "a base far away", write: far_base, looks_well: false },
];

/// Runs a command on an archive; how it ended, within the bounds.
fn watched(row: &str, args: &[&str]) -> crate::common::Ended {
    let ferry = Ferry::start(args);
    let watch = Watch::of(ferry.id());
    let ended = ferry.wait_for(PATIENCE);
    watch.end(row, OF_A_FILE);
    ended
}

#[test]
fn an_archive_that_lies_is_refused_by_all_who_read_it() {
    for attack in &ATTACKS {
        let _turn = turn();
        let folder = folder();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let archive = path("archive");
        (attack.write)(Path::new(&archive));
        let on = |who: &str| format!("{}, on {who}", attack.name);
        let looked = watched(&on("inspect"), &["inspect", &archive, "--verify"]);
        let fails = matches!(looked.code, Some(1 | 3));
        assert_eq!(fails, !attack.looks_well, "{}: {looked:?}", attack.name);
        let (uri, api, ram) = (format!("file:{archive}"), format!("unix:{}", path("api")), path("ram"));
        let mut vm = vec!["vm", "--mem", "64M", "--memory", "memfd", "--api", &api, "--incoming", &uri];
        if !have_kvm() {
            vm.push("--no-kvm");
        }
        let loaded = watched(&on("vm --incoming"), &vm);
        assert_eq!(loaded.code, Some(1), "{}: {loaded:?}", attack.name);
        let received = watched(&on("recv"), &["recv", &uri, "--ram-file", &ram]);
        assert!(matches!(received.code, Some(1 | 3)), "{}: {received:?}", attack.name);
    }
}

/// Pads without end, out of a command: the bytes of a few kilobytes that were compressed. They are passed over and not remembered.
#[test]
fn what_comes_without_end_is_not_remembered() {
    let _turn = turn();
    let folder = folder();
    let (start, pads) = (folder.path().join("start"), folder.path().join("pads"));
    let mut bytes = begun(&Header { live: false, ..header() });
    std::fs::write(&start, &bytes).unwrap();
    bytes.clear();
    for _ in 0..1 << 17 {
        bytes.extend_from_slice(&PAD_MAGIC.to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
    }
    File::create(&pads).unwrap().write_all(&bytes).unwrap();
    let (start, pads) = (start.display(), pads.display());
    // 64 MiB of them, of which an entry each would take three times as much.
    let uri = format!("exec:cat {start}; for i in $(seq 64); do cat {pads}; done");
    let ram = folder.path().join("ram");
    let ended = watched("pads without end, on recv", &["recv", &uri, "--ram-file", ram.to_str().unwrap()]);
    ended.code(1).says(&["not all that was saved"]);
}
