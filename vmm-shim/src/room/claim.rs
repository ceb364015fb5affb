//! Room that a guest which is on its way has spoken for.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pagecopy::backend::{BackendError, Claim, Room, Unclaimed};

use super::ledger::{Entry, Ledger, POOLS_MAX, Pool, Spoken};
use super::{Left, of_file, pools};

/// How often it is seen what came meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often others are told.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// They are told before that when so many bytes came.
const TELL_BYTES: u64 = 64 << 20;

/// What a guest is going to take.
#[derive(Debug, Default)]
pub(crate) struct Wanted<'a> {
    /// Bytes.
    pub(crate) bytes: u64,
    /// What this host's memory is called, where they are taken from that.
    pub(crate) of_memory: Option<Room>,
    /// Files that grow by them.
    pub(crate) grown: Vec<&'a File>,
    /// Files whose file system has them, and what it is called.
    pub(crate) of_files: Vec<(&'a File, Room)>,
}

/// Speaks for what a guest is going to take, unless there is too little for it beside what others have spoken for. `None` where nothing
/// has a limit.
pub(crate) fn claim(wanted: &Wanted<'_>) -> Result<Option<Box<dyn Claim>>, Unclaimed> {
    let unknown = |e| Unclaimed::Unknown(BackendError::new("look at what other guests will take", e));
    let ledger = Ledger::of_user().map_err(unknown)?;
    Claimed::of(&ledger, wanted, Path::new("/")).map(|claimed| claimed.map(|c| Box::new(c) as Box<dyn Claim>))
}

/// What each pool has left, in words.
fn rooms(wanted: &Wanted<'_>, root: &Path) -> io::Result<Vec<(Pool, Room)>> {
    let mut rooms = Vec::new();
    if let Some(room) = &wanted.of_memory {
        let of = |(pool, left): (Pool, Left)| (pool, Room { bytes: left.with_swap, ..room.clone() });
        rooms.extend(pools(root).into_iter().map(of));
    }
    for (file, room) in &wanted.of_files {
        if let Some(bytes) = of_file(file)? {
            rooms.push((Pool::file_system(file.metadata()?.dev()), Room { bytes, ..room.clone() }));
        }
    }
    Ok(rooms)
}

/// What is too little, with what others have spoken for taken off.
fn too_little(rooms: &[(Pool, Room)], spoken: &Spoken, bytes: u64) -> Result<(), Room> {
    for (pool, room) in rooms {
        let taken = spoken.get(pool).copied().unwrap_or_default();
        let left = room.bytes.saturating_sub(taken);
        if left < bytes {
            let of = match taken {
                0 => room.of.clone(),
                _ => format!("{} without the {taken} bytes that other guests are bringing here,", room.of),
            };
            return Err(Room { bytes: left, of, ..room.clone() });
        }
    }
    Ok(())
}

/// A claim, and what tells how much of it has come.
#[derive(Debug)]
struct Claimed {
    entry: Entry,
    bytes: u64,
    /// Files that grow, of which each has grown so far before anything came.
    grown: Vec<File>,
    before: u64,
    looked: Instant,
    told: Instant,
}

impl Claimed {
    fn of(ledger: &Arc<Ledger>, wanted: &Wanted<'_>, root: &Path) -> Result<Option<Self>, Unclaimed> {
        let unknown = |e| Unclaimed::Unknown(BackendError::new("look at what other guests will take", e));
        let grown: Vec<File> =
            wanted.grown.iter().map(|file| file.try_clone()).collect::<Result<_, _>>().map_err(unknown)?;
        // Several files may be on one file system.
        let names: BTreeSet<Pool> =
            rooms(wanted, root).map_err(unknown)?.into_iter().map(|(pool, _)| pool).collect();
        let names: Vec<Pool> = names.into_iter().take(POOLS_MAX).collect();
        if names.is_empty() {
            return Ok(None);
        }
        let before = allocated(&grown).map_err(unknown)?;
        let fits = |spoken: &Spoken| {
            // What is left is seen after what is spoken for: who brings pages in meanwhile counts twice, and never not at all.
            let rooms = rooms(wanted, root).map_err(unknown)?;
            too_little(&rooms, spoken, wanted.bytes).map_err(Unclaimed::NoRoom)
        };
        let entry = ledger.claim(wanted.bytes, names, fits).map_err(unknown)??;
        let now = Instant::now();
        Ok(Some(Self { entry, bytes: wanted.bytes, grown, before, looked: now, told: now }))
    }
}

/// Bytes that files have taken of their file systems.
fn allocated(files: &[File]) -> io::Result<u64> {
    let mut seen = Vec::new();
    let mut sum = 0u64;
    for file in files {
        let file = file.metadata()?;
        if !seen.contains(&(file.dev(), file.ino())) {
            seen.push((file.dev(), file.ino()));
            sum = sum.saturating_add(file.blocks().saturating_mul(512));
        }
    }
    Ok(sum)
}

impl Claim for Claimed {
    fn update(&mut self, populated: u64) {
        let now = Instant::now();
        if now - self.looked < LOOK_EVERY {
            return;
        }
        self.looked = now;
        let grown = allocated(&self.grown).map_or(0, |bytes| bytes.saturating_sub(self.before));
        let left = self.bytes.saturating_sub(grown.max(populated));
        let came = self.entry.bytes().abs_diff(left);
        if came >= TELL_BYTES || (came != 0 && now - self.told >= TELL_EVERY) {
            self.told = now;
            // Others then take this guest for larger than it still is.
            let _ = self.entry.set(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn room(of: &str) -> Room {
        Room { bytes: 0, of: of.into(), hint: "wait" }
    }

    /// A host of 100 MiB, in a cgroup of 30 MiB.
    fn host() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in [
            ("proc/meminfo", "MemAvailable: 102400 kB\n"),
            ("proc/self/cgroup", "0::/a\n"),
            ("sys/fs/cgroup/a/memory.current", "0\n"),
            ("sys/fs/cgroup/a/memory.max", "31457280\n"),
        ] {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    fn of_memory(mib: u64) -> Wanted<'static> {
        Wanted { bytes: mib << 20, of_memory: Some(room("memory")), ..Wanted::default() }
    }

    fn refused(claimed: Result<Option<Claimed>, Unclaimed>) -> Room {
        match claimed {
            Err(Unclaimed::NoRoom(room)) => room,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_same_room_is_given_once() {
        let (root, other) = (host(), host());
        let ledger = Arc::new(Ledger::open(&root.path().join("account")).unwrap());
        let first = Claimed::of(&ledger, &of_memory(20), root.path()).unwrap().unwrap();
        let refused_one = refused(Claimed::of(&ledger, &of_memory(11), root.path()));
        assert_eq!(refused_one.bytes, 10 << 20);
        assert_eq!(refused_one.of, "memory without the 20971520 bytes that other guests are bringing here,");
        let second = Claimed::of(&ledger, &of_memory(10), root.path()).unwrap().unwrap();
        // Another cgroup of the same host is not full, and the host is not either.
        let third = Claimed::of(&ledger, &of_memory(30), other.path()).unwrap().unwrap();
        assert_eq!(
            refused(Claimed::of(&ledger, &of_memory(41), root.path())).of,
            "memory without the 62914560 \
            bytes that other guests are bringing here,"
        );
        drop((first, second, third));
        assert!(Claimed::of(&ledger, &of_memory(30), root.path()).unwrap().is_some());
        // Alone it would not fit either.
        assert_eq!(refused(Claimed::of(&ledger, &of_memory(31), root.path())).of, "memory");
    }

    #[test]
    fn what_has_come_is_not_spoken_for() {
        let root = host();
        let ledger = Arc::new(Ledger::open(&root.path().join("account")).unwrap());
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        File::write_all_at(&file, &[1; 1 << 20], 0).unwrap();
        let wanted = Wanted {
            bytes: 8 << 20,
            of_memory: Some(room("memory")),
            grown: vec![&file],
            of_files: vec![(&file, room("files"))],
        };
        let mut claimed = Claimed::of(&ledger, &wanted, root.path()).unwrap().unwrap();
        let later = |claimed: &mut Claimed| {
            for at in [&mut claimed.looked, &mut claimed.told] {
                *at -= TELL_EVERY;
            }
        };
        // What was there before is not of this guest.
        later(&mut claimed);
        claimed.update(0);
        assert_eq!(claimed.entry.bytes(), 8 << 20);
        file.write_all_at(&[1; 3 << 20], 1 << 20).unwrap();
        claimed.update(0);
        assert_eq!(claimed.entry.bytes(), 8 << 20, "others are told now and then");
        later(&mut claimed);
        claimed.update(0);
        assert_eq!(claimed.entry.bytes(), 5 << 20);
        later(&mut claimed);
        claimed.update(6 << 20);
        assert_eq!(claimed.entry.bytes(), 2 << 20);
        later(&mut claimed);
        claimed.update(u64::MAX);
        assert_eq!(claimed.entry.bytes(), 0);
    }

    #[test]
    fn memory_without_limits_is_not_claimed() {
        let root = tempfile::tempdir().unwrap();
        let ledger = Arc::new(Ledger::open(&root.path().join("account")).unwrap());
        assert!(Claimed::of(&ledger, &of_memory(1 << 30), root.path()).unwrap().is_none());
    }
}
