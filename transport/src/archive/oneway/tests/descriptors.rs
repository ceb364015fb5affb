//! Descriptors by their numbers.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};

use rustix::fs::{OFlags, fcntl_getfl};

use super::super::error::OneWayError;
use super::*;

const MUCH: usize = 8 << 20;

fn write_to(fd: &impl AsRawFd) -> Result<OneWayWriter, OneWayError> {
    OneWayWriter::open(&Uri::Fd(fd.as_raw_fd()))
}

fn read_from(fd: &impl AsRawFd) -> Result<OneWayReader, OneWayError> {
    OneWayReader::open(&Uri::Fd(fd.as_raw_fd()))
}

/// Whether calls on the description that all who have it share wait, as they did before.
fn waits(fd: impl AsFd) -> bool {
    !fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK)
}

#[test]
fn descriptors_that_do_not_serve_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = io::pipe().unwrap();
    let path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(folder.path()).unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let datagrams = UnixDatagram::unbound().unwrap();
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/ptmx").unwrap();
    let fd = |fd: &dyn AsRawFd| fd.as_raw_fd();
    for (number, write, why) in [
        (i32::MAX, true, "is not open"),
        (fd(&reader), true, "is open for reading only"),
        (fd(&writer), false, "is open for writing only"),
        (fd(&path), true, "neither for reading nor for writing"),
        (fd(&event), true, "is no pipe, socket, file or device"),
        (fd(&datagrams), true, "keeps no order"),
        (fd(&terminal), true, "is a terminal"),
    ] {
        let uri = Uri::Fd(number);
        let error = if write { OneWayWriter::open(&uri).err() } else { OneWayReader::open(&uri).err() };
        let text = error.unwrap().to_string();
        assert!(text.contains(why) && text.contains(&format!("fd:{number} ")), "{why}: {text}");
    }
    let open = File::open(folder.path()).unwrap();
    assert!(read_from(&open).err().unwrap().to_string().contains("is a folder"));
}

#[test]
fn a_pipe_gets_all_of_it_and_stays_as_it_was() {
    let (mut theirs, ours) = io::pipe().unwrap();
    let bytes = content(MUCH);
    let mut writer = write_to(&ours).unwrap();
    let reading = std::thread::spawn(move || {
        let mut all = Vec::new();
        theirs.read_to_end(&mut all).unwrap();
        all
    });
    writer.write_all(&bytes, &go).unwrap();
    writer.finish(&go).unwrap();
    assert!(waits(&ours));
    (&ours).write_all(b"and it is open").unwrap();
    drop(ours);
    let all = reading.join().unwrap();
    assert!(all[..MUCH] == bytes && &all[MUCH..] == b"and it is open");
}

#[test]
fn a_pipe_is_read_and_stays_as_it_was() {
    let (ours, mut theirs) = io::pipe().unwrap();
    let bytes = content(MUCH);
    let mut reader = read_from(&ours).unwrap();
    let mut back = vec![0; MUCH];
    std::thread::scope(|scope| {
        scope.spawn(|| theirs.write_all(&bytes).unwrap());
        reader.read_exact(&mut back, &go).unwrap();
    });
    assert!(back == bytes && waits(&ours));
    assert!(matches!(reader.read(&mut back, &until(3)).unwrap_err(), OneWayError::Cancelled));
    // Whoever writes may keep it open.
    reader.finish(&go).unwrap();
    theirs.write_all(b"ab").unwrap();
    let mut reader = read_from(&ours).unwrap();
    reader.read_exact(&mut back[..1], &go).unwrap();
    assert!(matches!(reader.finish(&go).unwrap_err(), OneWayError::MoreFollows { .. }));
    drop(theirs);
    let mut reader = read_from(&ours).unwrap();
    assert_eq!(reader.read(&mut back, &go).unwrap(), 0);
    assert!(matches!(reader.read_exact(&mut back, &go).unwrap_err(), OneWayError::Truncated { got: 0, .. }));
}

#[test]
fn nobody_who_does_not_read_is_waited_for_once_cancelled() {
    let (_pipe, into_pipe) = io::pipe().unwrap();
    let (_socket, into_socket) = UnixStream::pair().unwrap();
    for fd in [OwnedFd::from(into_pipe), into_socket.into()] {
        let mut writer = write_to(&fd).unwrap();
        let error = writer.write_all(&content(MUCH), &until(4)).unwrap_err();
        assert!(matches!(error, OneWayError::Cancelled), "{error}");
        assert!(waits(&fd));
    }
}

#[test]
fn a_reader_that_is_gone_is_an_error() {
    let (reader, into_pipe) = io::pipe().unwrap();
    let (socket, into_socket) = UnixStream::pair().unwrap();
    let mut open = [write_to(&into_pipe).unwrap(), write_to(&into_socket).unwrap()];
    drop((reader, socket));
    for writer in &mut open {
        let error = writer.write_all(&content(MUCH), &go).unwrap_err();
        assert!(matches!(error, OneWayError::Io { .. }), "{error:?}");
        assert!(error.to_string().contains("cannot write to fd:"), "{error}");
        assert!(error.to_string().contains("nobody reads it any more"), "{error}");
    }
}

#[test]
fn a_named_pipe_serves() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let both = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut writer = write_to(&both).unwrap();
    let mut reader = read_from(&both).unwrap();
    writer.write_all(b"through", &go).unwrap();
    let mut back = [0; 7];
    reader.read_exact(&mut back, &go).unwrap();
    assert_eq!(&back, b"through");
    writer.finish(&go).unwrap();
    reader.finish(&go).unwrap();
    let only = OpenOptions::new().write(true).open(&path).unwrap();
    drop(both);
    let error = write_to(&only).err().unwrap();
    assert!(error.to_string().contains("nobody reads it any more"), "{error}");
}

#[test]
fn a_socket_ends_after_the_last_byte_whoever_has_it_open() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let bytes = content(MUCH);
    let mut writer = write_to(&ours).unwrap();
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).unwrap();
            all
        });
        writer.write_all(&bytes, &go).unwrap();
        writer.finish(&go).unwrap();
        assert!(reading.join().unwrap() == bytes);
    });
    assert!(waits(&ours));
    // The other half is as it was.
    theirs.write_all(b"back").unwrap();
    let mut reader = read_from(&ours).unwrap();
    reader.read_exact(&mut [0; 4], &go).unwrap();
    reader.finish(&go).unwrap();
}

#[test]
fn the_peer_of_a_socket_that_was_given_up_does_not_wait() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut writer = write_to(&ours).unwrap();
    writer.write_all(b"some", &go).unwrap();
    drop(writer);
    let mut all = Vec::new();
    theirs.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"some");
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    drop(read_from(&ours).unwrap());
    assert_eq!(theirs.write_all(b"some").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[test]
fn a_file_is_written_and_read_where_it_stands() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"before").unwrap();
    let bytes = content(3 << 20);
    let mut writer = write_to(&file).unwrap();
    writer.write_all(&bytes, &go).unwrap();
    writer.finish(&go).unwrap();
    assert_eq!(file.stream_position().unwrap(), 6 + bytes.len() as u64);
    file.seek(SeekFrom::Start(6)).unwrap();
    let mut back = vec![0; bytes.len()];
    let mut reader = read_from(&file).unwrap();
    reader.read_exact(&mut back, &go).unwrap();
    assert!(back == bytes);
    assert!(matches!(
        reader.read_exact(&mut [0; 2], &go).unwrap_err(),
        OneWayError::Truncated { got: 0, .. }
    ));
    reader.finish(&go).unwrap();
    file.seek(SeekFrom::End(-2)).unwrap();
    let mut reader = read_from(&file).unwrap();
    reader.read_exact(&mut [0], &go).unwrap();
    assert!(matches!(reader.finish(&go).unwrap_err(), OneWayError::MoreFollows { .. }));
    let error = read_from(&file).unwrap().read(&mut [0], &|| false).unwrap_err();
    assert!(matches!(error, OneWayError::Cancelled));
}

#[test]
fn devices_serve() {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    let mut writer = write_to(&null).unwrap();
    writer.write_all(&content(100_000), &go).unwrap();
    writer.finish(&go).unwrap();
    let mut reader = read_from(&null).unwrap();
    assert_eq!(reader.read(&mut [0], &go).unwrap(), 0);
    let zero = File::open("/dev/zero").unwrap();
    let mut back = vec![1; 100_000];
    read_from(&zero).unwrap().read_exact(&mut back, &go).unwrap();
    assert!(back.iter().all(|&byte| byte == 0));
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = write_to(&full).unwrap().write_all(b"x", &go).unwrap_err();
    let OneWayError::Io { source, .. } = &error else { panic!("{error:?}") };
    assert!(crate::local::is_no_room(source), "{error:?}");
}
