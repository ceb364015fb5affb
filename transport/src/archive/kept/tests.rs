//! Files that are there only when they are complete.

use std::io::{Seek, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Command, Stdio};

use super::*;
use crate::engine::explain;

/// What is in a folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// A file of the other kind: with a name from the beginning.
fn create_named(path: &Path) -> KeptFile {
    let (folder, name) = open_folder(path).unwrap();
    let (file, part) = named(&folder, &name).unwrap();
    KeptFile { file, folder, path: path.into(), name, part: Some(part) }
}

/// Both kinds of file. The first is the other one, too, where the file system knows nothing else.
const KINDS: [fn(&Path) -> KeptFile; 2] = [|path| KeptFile::create(path).unwrap(), create_named];

#[test]
fn it_is_there_once_it_is_complete() {
    for create in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        let kept = create(&path);
        let mut file = kept.file();
        file.write_all(b"whole").unwrap();
        assert!(!path.exists());
        kept.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(names(folder.path()), ["kept"]);
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!((found.mode() & 0o777, found.nlink()), (0o600, 1));
    }
}

#[test]
fn what_was_there_is_there_until_then() {
    for create in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        std::fs::write(&path, "old").unwrap();
        let mut old = File::open(&path).unwrap();
        let kept = create(&path);
        let mut file = kept.file();
        file.write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        kept.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["kept"]);
        // Whoever reads the old one reads on.
        old.rewind().unwrap();
        assert_eq!(io::read_to_string(old).unwrap(), "old");
    }
}

#[test]
fn nothing_is_left_of_what_was_not_completed() {
    for create in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        std::fs::write(&path, "old").unwrap();
        let kept = create(&path);
        let mut file = kept.file();
        file.write_all(b"half").unwrap();
        drop(kept);
        assert_eq!(names(folder.path()), ["kept"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
}

#[test]
fn nothing_is_left_where_a_process_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kept");
    let kept = KeptFile::create(&path).unwrap();
    let unnamed = kept.part.is_none();
    // As if the process were gone: nothing is done any more.
    let KeptFile { file, .. } = &kept;
    let file = file.try_clone().unwrap();
    if !unnamed {
        println!("skipped: this file system has no files without a name");
        return;
    }
    std::mem::forget(kept);
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert!(names(folder.path()).is_empty());
    // The other kind says what it is.
    std::mem::forget(create_named(&path));
    let left = names(folder.path());
    assert!(left.len() == 1 && left[0].starts_with(".kept.") && left[0].ends_with(".part"), "{left:?}");
    assert_eq!(left[0].len(), ".kept.XXXXXX.part".len());
}

#[test]
fn what_is_no_file_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("folder")).unwrap();
    assert!(Command::new("mkfifo").arg(at("pipe")).status().unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    symlink("nowhere", at("dead")).unwrap();
    symlink("/dev/null", at("device")).unwrap();
    let before = names(folder.path());
    for (path, why) in [
        (at("folder"), "a folder is there"),
        (at("pipe"), "a pipe is there"),
        (at("socket"), "a socket is there"),
        (at("dead"), "leads nowhere"),
        (at("device"), "a device is there"),
        ("/dev/null".into(), "a device is there"),
        (at("new/"), "names a folder"),
        (at("folder/.."), "names a folder"),
        ("/".into(), "names a folder"),
        ("".into(), "names a folder"),
        (at(&"x".repeat(256)), "longer than 255 bytes"),
        (at("no/such/file"), "its folder does not exist"),
        (at("pipe/file"), "its folder does not exist"),
    ] {
        let error = KeptFile::create(&path).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains(path.to_str().unwrap()), "{path:?}: {error}");
    }
    assert_eq!(names(folder.path()), before);
}

#[test]
fn what_came_there_meanwhile_is_left_alone_unless_it_is_a_file() {
    for create in KINDS {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kept");
        let kept = create(&path);
        symlink("elsewhere", &path).unwrap();
        let error = kept.commit().unwrap_err().to_string();
        assert!(error.contains("a symbolic link is there"), "{error}");
        assert_eq!(names(folder.path()), ["kept"]);
        std::fs::remove_file(&path).unwrap();
        let kept = create(&path);
        std::fs::write(&path, "came").unwrap();
        kept.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        assert_eq!(names(folder.path()), ["kept"]);
    }
}

#[test]
fn a_link_leads_to_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let (link, path) = (folder.path().join("link"), folder.path().join("inside").join("kept"));
    std::fs::create_dir(folder.path().join("inside")).unwrap();
    std::fs::write(&path, "old").unwrap();
    symlink("inside/kept", &link).unwrap();
    let kept = KeptFile::create(&link).unwrap();
    let mut file = kept.file();
    file.write_all(b"new").unwrap();
    kept.commit().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert!(link.is_symlink());
}

#[test]
fn the_longest_name_serves() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("n".repeat(NAME_MAX));
    for create in KINDS {
        create(&path).commit().unwrap();
        assert_eq!(names(folder.path()), ["n".repeat(NAME_MAX)]);
    }
    assert_eq!(part_name(path.file_name().unwrap()).unwrap().len(), NAME_MAX);
    assert_ne!(part_name(OsStr::new("a")), part_name(OsStr::new("a")));
}

#[test]
fn many_at_one_path_leave_one_whole_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = &folder.path().join("kept");
    std::thread::scope(|scope| {
        for at in 0..20u8 {
            scope.spawn(move || {
                let kept = KINDS[usize::from(at % 2)](path);
                let mut file = kept.file();
                file.write_all(&[at; 100_000]).unwrap();
                kept.commit().unwrap();
            });
        }
    });
    let bytes = std::fs::read(path).unwrap();
    assert!(bytes.len() == 100_000 && bytes.iter().all(|byte| *byte == bytes[0]));
    assert_eq!(names(folder.path()), ["kept"]);
}

/// A file system of this size, gone in the end; none where nobody may mount one, which is said.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(options: &str) -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("pageferry-test-").tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "pageferry-test"]).arg(folder.path()).stderr(Stdio::null());
        if mount.status().is_ok_and(|status| status.success()) {
            return Some(Self(folder));
        }
        println!("skipped: no tmpfs can be mounted here (it takes root)");
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_lack_of_room_says_where_and_how_much_there_is() {
    let Some(system) = Tmpfs::new("size=1M") else { return };
    let path = system.0.path().join("kept");
    for create in KINDS {
        let kept = create(&path);
        assert_eq!(kept.room().unwrap(), 1 << 20);
        let mut file = kept.file();
        file.write_all(&[1; 1 << 19]).unwrap();
        assert_eq!(kept.room().unwrap(), 1 << 19);
        let error = kept.failed("write", file.write_all(&[1; 1 << 20]).unwrap_err());
        let KeptError::NoRoom { room: 0, source, .. } = &error else { panic!("{error:?}") };
        assert!(crate::local::is_no_room(source));
        let text = explain(&error);
        assert!(text.contains(path.to_str().unwrap()) && text.contains("0 bytes left"), "{text}");
        drop(kept);
        assert!(names(system.0.path()).is_empty());
        // What it took is there again, once no child that another test starts has a copy of the descriptor any more.
        let kept = create(&path);
        let began = std::time::Instant::now();
        while kept.room().unwrap() != 1 << 20 {
            assert!(began.elapsed().as_secs() < 60, "{} bytes", kept.room().unwrap());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[test]
fn a_file_system_that_is_read_only_says_so() {
    let Some(system) = Tmpfs::new("size=1M,ro") else { return };
    let path = system.0.path().join("kept");
    let text = explain(&KeptFile::create(&path).unwrap_err());
    assert!(text.contains(path.to_str().unwrap()) && text.contains("is read-only"), "{text}");
}

#[test]
fn a_lack_of_permission_names_the_path() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o500)).unwrap();
    let path = folder.path().join("kept");
    match KeptFile::create(&path) {
        Ok(_) => println!("skipped: this user may write anywhere"),
        Err(error) => {
            let text = explain(&error);
            assert!(text.contains(path.to_str().unwrap()) && text.contains("no permission"), "{text}");
        }
    }
    // Where nobody may make a file.
    let path = Path::new("/sys/kernel/kept");
    let text = explain(&KeptFile::create(path).unwrap_err());
    assert!(text.contains("/sys/kernel/kept") && text.contains("; choose "), "{text}");
    // What the system says to others.
    let path = folder.path().join("kept");
    let error = KeptError::io("make a file for", &path, io::Error::from_raw_os_error(libc::EACCES));
    let text = explain(&error);
    assert!(text.contains(path.to_str().unwrap()) && text.contains("no permission"), "{text}");
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
}
