//! Files that do not shrink any more, in the page cache: compressed and encrypted ones. The host makes them of its own files.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use pageferry_benches::Random;

use super::cache::{self, Files};
use super::host;

/// Bytes of the host's files that go into one file.
const PIECE_BYTES: usize = 8 << 20;
/// How they are made, each with its share of the bytes.
const WAYS: [(Way, u64); 3] = [(Way::ChaCha, 50), (Way::Gzip, 35), (Way::Xz, 15)];

/// How a file is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ChaCha,
    Gzip,
    Xz,
}

impl Way {
    /// The end of the file's name, and the command that makes it of its standard input. Each file has a key of its own.
    fn command(self, number: u64) -> Result<(&'static str, Command), String> {
        let (ending, name, package) = match self {
            Self::ChaCha => ("enc", "openssl", "openssl"),
            Self::Gzip => ("gz", "gzip", "gzip"),
            Self::Xz => ("xz", "xz", "xz-utils"),
        };
        let mut command = Command::new(host::tool(name, package)?);
        match self {
            Self::ChaCha => {
                let mut random = Random::new(number);
                let mut hex =
                    |words| (0..words).map(|_| format!("{:016x}", random.next_u64())).collect::<String>();
                command.args(["enc", "-chacha20", "-K", &hex(4), "-iv", &hex(2)]);
            }
            Self::Gzip => drop(command.arg("-6")),
            Self::Xz => drop(command.arg("-0")),
        }
        Ok((ending, command))
    }
}

/// Makes files of `bytes` together in `folder`, or fewer where the host has not as much.
pub(super) fn prepare(folder: &Path, bytes: u64) -> Result<(), String> {
    make_all(folder, bytes, PIECE_BYTES)
}

/// The same, each of so many bytes of the host's files.
fn make_all(folder: &Path, bytes: u64, piece_bytes: usize) -> Result<(), String> {
    for (way, _) in WAYS {
        way.command(0)?;
    }
    let mut made = [0; WAYS.len()];
    let (mut piece, mut number) = (Vec::with_capacity(piece_bytes), 0);
    host::files(&mut |path| {
        let Ok(mut file) = File::open(path) else { return Ok(true) };
        loop {
            let room = (piece_bytes - piece.len()) as u64;
            // A file that cannot be read is one less.
            let read = Read::by_ref(&mut file).take(room).read_to_end(&mut piece).unwrap_or(0);
            if piece.len() < piece_bytes {
                return Ok(true);
            }
            number += 1;
            // What is furthest behind its share comes next.
            let behind = (0..WAYS.len()).min_by_key(|at| made[*at] * 100 / WAYS[*at].1).unwrap_or(0);
            made[behind] += make(folder, WAYS[behind].0, number, &piece)?;
            piece.clear();
            if made.iter().sum::<u64>() >= bytes {
                return Ok(false);
            }
            if read == 0 {
                return Ok(true);
            }
        }
    })
}

/// Makes one file; returns its length.
fn make(folder: &Path, way: Way, number: u64, piece: &[u8]) -> Result<u64, String> {
    let (ending, mut command) = way.command(number)?;
    let path = folder.join(format!("{number:05}.{ending}"));
    let out = File::create(&path).map_err(host::at(&path))?;
    let mut child =
        command.stdin(Stdio::piped()).stdout(out).spawn().map_err(|e| format!("{ending}: {e}"))?;
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(piece));
    let status = child.wait().map_err(|e| format!("{ending}: {e}"))?;
    written
        .and(if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) })
        .map_err(host::at(&path))?;
    fs::metadata(&path).map(|m| m.len()).map_err(host::at(&path))
}

/// Fills the guest: reads what the host prepared.
pub(super) fn fill(total: u64, prepared: &Path) -> Result<(), String> {
    let mut left = total;
    cache::read_all(prepared, Files::All, total * cache::FREE_PERCENT / 100, &mut left)
}

#[cfg(test)]
mod tests {
    use pagecopy::compress::Compress;

    use super::*;

    #[test]
    fn files_that_do_not_shrink_have_their_shares() {
        let (folder, bytes) = (tempfile::tempdir().unwrap(), 2 << 20);
        if let Err(error) = make_all(folder.path(), bytes, 1 << 16) {
            assert!(error.contains("apt-get install"), "{error}");
            return println!("skipped: {error}");
        }
        let mut made = [0; WAYS.len()];
        let (mut plain, mut shrunk) = (0, 0);
        for entry in fs::read_dir(folder.path()).unwrap() {
            let path = entry.unwrap().path();
            let ending = path.extension().unwrap().to_str().unwrap();
            let content = fs::read(&path).unwrap();
            made[["enc", "gz", "xz"].iter().position(|known| *known == ending).unwrap()] +=
                content.len() as u64;
            let mut out = vec![0; content.len()];
            plain += content.len();
            shrunk += Compress::new().compress(1, &content, &mut out).unwrap_or(content.len());
        }
        let all: u64 = made.iter().sum();
        assert!((bytes..bytes + (1 << 17)).contains(&all), "{made:?}");
        for ((way, share), made) in WAYS.iter().zip(made) {
            assert!((made * 100 / all).abs_diff(*share) < 4, "{way:?}: {made} of {all}");
        }
        assert!(shrunk > plain / 100 * 98, "{shrunk} of {plain}");
    }

    #[test]
    fn keys_differ() {
        let first = match Way::ChaCha.command(1) {
            Ok((_, command)) => command,
            Err(lack) => return println!("skipped: {lack}"),
        };
        let (_, second) = Way::ChaCha.command(2).unwrap();
        let keys = |command: &Command| command.get_args().map(|a| a.len()).collect::<Vec<_>>();
        assert_eq!(keys(&first), [3, 9, 2, 64, 3, 32]);
        assert!(first.get_args().ne(second.get_args()));
    }
}
