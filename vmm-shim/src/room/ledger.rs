//! The account of room that is spoken for: by guests that are on their way to this host, in any process of this user.
//!
//! It is a file in shared memory with a record for each of them, which says how many bytes are still to come and from what they are
//! taken. A record counts for as long as its lock is held, so the claim of a process that was killed is gone with it. What the file holds
//! beside that is believed as far as it goes: whoever may write it is the same user.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::sys::{is_locked, try_lock, unlock};

/// Bytes of a record. The first is the file's head, and its lock guards all others' coming.
const RECORD: usize = 256;
/// Most records.
const RECORDS_MAX: u64 = 1024;
/// Most pools of a record.
pub(super) const POOLS_MAX: usize = (RECORD - 16) / 16;
/// What the file begins with.
const HEAD: &[u8] = b"pageferry: room that is spoken for, version 1\n";
/// Who comes waits so long for others that do at the same time; each takes some microseconds.
const PATIENCE: Duration = Duration::from_millis(500);

/// What room is taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pool {
    dev: u64,
    ino: u64,
}

impl Pool {
    /// This host's memory.
    pub(super) const HOST: Self = Self { dev: 0, ino: 1 };

    /// A file system, by the number of its device.
    pub(super) fn file_system(dev: u64) -> Self {
        Self { dev, ino: 0 }
    }

    /// A cgroup, by its folder.
    pub(super) fn cgroup(folder: &Path) -> io::Result<Self> {
        let folder = folder.metadata()?;
        Ok(Self { dev: folder.dev(), ino: folder.ino() })
    }
}

/// What is spoken for, by pool, in bytes.
pub(super) type Spoken = BTreeMap<Pool, u64>;

/// What a guest that is on its way still takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Record {
    bytes: u64,
    pools: Vec<Pool>,
}

impl Record {
    fn encode(&self) -> [u8; RECORD] {
        let mut record = [0; RECORD];
        let numbers = self.pools.iter().take(POOLS_MAX).flat_map(|pool| [pool.dev, pool.ino]);
        let numbers = [self.bytes, self.pools.len().min(POOLS_MAX) as u64].into_iter().chain(numbers);
        for (at, number) in record.as_chunks_mut().0.iter_mut().zip(numbers) {
            *at = number.to_le_bytes();
        }
        record
    }

    fn decode(record: &[u8; RECORD]) -> Self {
        let mut numbers = record.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        let mut next = || numbers.next().unwrap_or_default();
        let (bytes, count) = (next(), next().min(POOLS_MAX as u64));
        Self { bytes, pools: (0..count).map(|_| Pool { dev: next(), ino: next() }).collect() }
    }
}

/// Where a record lies.
fn place(number: u64) -> Range<u64> {
    let at = number * RECORD as u64;
    at..at + RECORD as u64
}

/// The account, as this process has it open.
#[derive(Debug)]
pub(super) struct Ledger {
    file: File,
    path: PathBuf,
    /// Records of this process, whose locks are of one description and do not tell them apart.
    own: Mutex<BTreeSet<u64>>,
}

/// This process's. It is opened once: later there may be no permission.
static OPEN: Mutex<Option<Arc<Ledger>>> = Mutex::new(None);

impl Ledger {
    /// This user's.
    pub(super) fn of_user() -> io::Result<Arc<Self>> {
        let mut open = lock(&OPEN);
        if let Some(ledger) = open.as_ref().filter(|ledger| !ledger.is_gone()) {
            return Ok(ledger.clone());
        }
        let user = rustix::process::geteuid().as_raw();
        let ledger = Arc::new(Self::open(Path::new(&format!("/dev/shm/pageferry-room.{user}")))?);
        *open = Some(ledger.clone());
        Ok(ledger)
    }

    /// Opens an account, which is made where there is none.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let open = || {
            // What another user has put there is no link that is followed, and no pipe that is waited for.
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(path)?;
            let found = file.metadata()?;
            let private = found.is_file() && found.nlink() == 1 && found.mode() & 0o077 == 0;
            if !private || found.uid() != rustix::process::geteuid().as_raw() {
                return Err(io::Error::other("it is not a file of this user alone"));
            }
            if found.len() > place(RECORDS_MAX).end {
                return Err(io::Error::other("it is longer than an account can be"));
            }
            Ok(Self { file, path: path.into(), own: Mutex::default() })
        };
        let ledger = open().map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        drop(ledger.enter()?);
        Ok(ledger)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether somebody has removed it, and others would look elsewhere.
    fn is_gone(&self) -> bool {
        self.file.metadata().is_ok_and(|file| file.nlink() == 0)
    }

    /// Keeps all others out for a moment.
    fn enter(&self) -> io::Result<Entered<'_>> {
        let own = lock(&self.own);
        let begun = Instant::now();
        while !try_lock(&self.file, place(0))? {
            if begun.elapsed() > PATIENCE {
                return Err(io::Error::other(format!("{}: another process keeps it", self.path.display())));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let entered = Entered { ledger: self, own };
        let mut head = [0; HEAD.len()];
        let read = self.file.read_at(&mut head, 0)?;
        if !HEAD.starts_with(&head[..read]) {
            return Err(io::Error::other(format!("{}: it is something else", self.path.display())));
        }
        if read < HEAD.len() {
            self.file.write_all_at(HEAD, 0)?;
        }
        Ok(entered)
    }

    /// Speaks for so many bytes of these pools, if `fits`, which is told what others have spoken for.
    pub(super) fn claim<E>(
        self: &Arc<Self>,
        bytes: u64,
        pools: Vec<Pool>,
        fits: impl FnOnce(&Spoken) -> Result<(), E>,
    ) -> io::Result<Result<Entry, E>> {
        let mut entered = self.enter()?;
        if let Err(why) = fits(&entered.spoken()?) {
            return Ok(Err(why));
        }
        let record = Record { bytes, pools };
        let number = entered.take(&record)?;
        Ok(Ok(Entry { ledger: self.clone(), number, record }))
    }
}

/// The account while nobody else comes or goes.
struct Entered<'a> {
    ledger: &'a Ledger,
    own: MutexGuard<'a, BTreeSet<u64>>,
}

impl Entered<'_> {
    /// What is spoken for.
    fn spoken(&self) -> io::Result<Spoken> {
        let mut spoken = Spoken::new();
        for number in 1..=RECORDS_MAX {
            let mut bytes = [0; RECORD];
            if self.ledger.file.read_at(&mut bytes, place(number).start)? < RECORD {
                break;
            }
            let Record { bytes, pools } = Record::decode(&bytes);
            if bytes == 0 || !(self.own.contains(&number) || is_locked(&self.ledger.file, place(number))?) {
                continue;
            }
            for pool in pools.into_iter().collect::<BTreeSet<_>>() {
                let sum = spoken.entry(pool).or_default();
                *sum = sum.saturating_add(bytes);
            }
        }
        Ok(spoken)
    }

    /// Writes a record where nobody has one; returns its number.
    fn take(&mut self, record: &Record) -> io::Result<u64> {
        let file = &self.ledger.file;
        for number in 1..=RECORDS_MAX {
            if self.own.contains(&number) || !try_lock(file, place(number))? {
                continue;
            }
            if let Err(e) = file.write_all_at(&record.encode(), place(number).start) {
                let _ = unlock(file, place(number));
                return Err(e);
            }
            self.own.insert(number);
            return Ok(number);
        }
        Err(io::Error::other(format!("{}: it is full", self.ledger.path.display())))
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let _ = unlock(&self.ledger.file, place(0));
    }
}

/// What is spoken for by one guest; dropped, it is not any more.
#[derive(Debug)]
pub(super) struct Entry {
    ledger: Arc<Ledger>,
    number: u64,
    record: Record,
}

impl Entry {
    /// So many bytes are still to come.
    pub(super) fn set(&mut self, bytes: u64) -> io::Result<()> {
        self.record.bytes = bytes;
        self.ledger.file.write_all_at(&self.record.encode(), place(self.number).start)
    }

    /// How many that are.
    pub(super) fn bytes(&self) -> u64 {
        self.record.bytes
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut own = lock(&self.ledger.own);
        // Without its lock it would count for nothing, too.
        let _ = self.ledger.file.write_all_at(&[0; RECORD], place(self.number).start);
        let _ = unlock(&self.ledger.file, place(self.number));
        own.remove(&self.number);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: Pool = Pool { dev: 7, ino: 0 };
    const OTHER: Pool = Pool { dev: 7, ino: 9 };

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    /// As another process has it, which has a description of its own.
    fn open(folder: &tempfile::TempDir) -> Arc<Ledger> {
        Arc::new(Ledger::open(&folder.path().join("room")).unwrap())
    }

    fn claim(ledger: &Arc<Ledger>, bytes: u64, pools: &[Pool]) -> Entry {
        ledger.claim(bytes, pools.to_vec(), |_| Ok::<(), ()>(())).unwrap().unwrap()
    }

    /// What is spoken for, as this one sees it.
    fn seen(ledger: &Arc<Ledger>) -> Spoken {
        ledger.claim(1, Vec::new(), |spoken| Err::<(), _>(spoken.clone())).unwrap().unwrap_err()
    }

    #[test]
    fn claims_are_seen_by_others_and_by_this_process_until_they_are_dropped() {
        let folder = folder();
        let (here, there) = (open(&folder), open(&folder));
        let mut first = claim(&here, 100, &[POOL, OTHER]);
        let second = claim(&here, 20, &[POOL]);
        let third = claim(&there, 3, &[OTHER]);
        for ledger in [&here, &there] {
            assert_eq!(seen(ledger), [(POOL, 120), (OTHER, 103)].into());
        }
        first.set(50).unwrap();
        assert_eq!(seen(&there), [(POOL, 70), (OTHER, 53)].into());
        drop((first, third));
        assert_eq!(seen(&here), [(POOL, 20)].into());
        drop(second);
        assert_eq!(seen(&there), Spoken::new());
    }

    /// A process that was killed has closed its description.
    #[test]
    fn a_claim_without_its_lock_is_none_and_its_place_is_taken_again() {
        let folder = folder();
        let (here, there) = (open(&folder), open(&folder));
        let stale = claim(&there, 5, &[POOL]);
        unlock(&there.file, place(stale.number)).unwrap();
        assert_eq!(seen(&here), Spoken::new());
        assert_eq!(claim(&here, 6, &[POOL]).number, stale.number);
    }

    #[test]
    fn a_refusal_leaves_nothing_and_the_account_is_free() {
        let folder = folder();
        let (here, there) = (open(&folder), open(&folder));
        assert_eq!(here.claim(9, vec![POOL], |_| Err("no")).unwrap().unwrap_err(), "no");
        assert_eq!(seen(&there), Spoken::new());
        assert_eq!(claim(&there, 9, &[POOL]).number, 1);
    }

    #[test]
    fn whoever_keeps_the_account_is_not_waited_for_for_ever() {
        let folder = folder();
        let (here, there) = (open(&folder), open(&folder));
        assert!(try_lock(&there.file, place(0)).unwrap());
        let error = here.claim(1, vec![POOL], |_| Ok::<(), ()>(())).unwrap_err();
        assert!(error.to_string().contains("another process keeps it"), "{error}");
    }

    #[test]
    fn what_a_file_holds_by_accident_or_malice_is_borne() {
        let folder = folder();
        let path = folder.path().join("room");
        let ledger = open(&folder);
        let _first = claim(&ledger, 5, &[POOL]);
        let _second = claim(&ledger, u64::MAX, &[POOL, POOL]);
        assert_eq!(seen(&ledger), [(POOL, u64::MAX)].into());
        // Numbers of every kind, and half a record.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        for fill in [0xff, 0x01, 0x80] {
            file.write_all_at(&[fill; 2 * RECORD + 100], RECORD as u64).unwrap();
            assert!(!seen(&ledger).is_empty(), "{fill:#x}");
        }
        file.set_len(10).unwrap();
        drop(seen(&ledger));
        file.write_all_at(b"a file", 0).unwrap();
        let error = Ledger::open(&path).unwrap_err();
        assert!(error.to_string().contains("it is something else"), "{error}");
        file.set_len(place(RECORDS_MAX).end + 1).unwrap();
        assert!(Ledger::open(&path).is_err());
    }

    #[test]
    fn what_others_put_in_its_place_is_no_account() {
        let folder = folder();
        let path = |name: &str| folder.path().join(name);
        drop(open(&folder));
        std::os::unix::fs::symlink(path("room"), path("link")).unwrap();
        std::fs::create_dir(path("folder")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        std::fs::write(path("open"), "").unwrap();
        std::fs::hard_link(path("room"), path("another")).unwrap();
        for name in ["link", "folder", "pipe", "open", "room", "another", "none/room"] {
            assert!(Ledger::open(&path(name)).is_err(), "{name}");
        }
        std::fs::remove_file(path("another")).unwrap();
        assert!(Ledger::open(&path("room")).is_ok());
    }

    #[test]
    fn an_account_takes_so_many_and_no_more() {
        let folder = folder();
        let (here, there) = (open(&folder), open(&folder));
        let mut all: Vec<Entry> = (0..RECORDS_MAX).map(|_| claim(&here, 1, &[POOL])).collect();
        let error = there.claim(1, vec![POOL], |_| Ok::<(), ()>(())).unwrap_err();
        assert!(error.to_string().contains("it is full"), "{error}");
        assert_eq!(seen(&there)[&POOL], RECORDS_MAX);
        all.pop();
        claim(&there, 1, &[POOL]);
        drop(all);
        assert!(!here.is_gone());
        std::fs::remove_file(here.path()).unwrap();
        assert!(here.is_gone());
    }
}
