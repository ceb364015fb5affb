//! What each chunk of an image costs and becomes under every codec: recorded once, played as often as one likes.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A way to encode a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Way {
    /// The level of zstd.
    pub(crate) level: i32,
    /// With references to pages that resemble the chunk's.
    pub(crate) references: bool,
}

/// The ways that are recorded, beside sending pages as they are.
pub(crate) const WAYS: [Way; 12] = [
    Way { level: -7, references: false },
    Way { level: -3, references: false },
    Way { level: -2, references: false },
    Way { level: -2, references: true },
    Way { level: -1, references: false },
    Way { level: -1, references: true },
    Way { level: 1, references: false },
    Way { level: 1, references: true },
    Way { level: 3, references: false },
    Way { level: 3, references: true },
    Way { level: 6, references: false },
    Way { level: 6, references: true },
];

/// Where a way stands among [`WAYS`].
pub(crate) fn way(level: i32, references: bool) -> Option<usize> {
    WAYS.iter().position(|way| *way == Way { level, references })
}

/// What a chunk costs and becomes in one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cost {
    /// Nanoseconds of a core to copy and encode it, beyond looking at it.
    pub(crate) encode: u32,
    /// Bytes after the frame's header.
    pub(crate) bytes: u32,
    /// Pages that the codec got; others go as they are.
    pub(crate) pages: u8,
    /// Nanoseconds of a core to decode it.
    pub(crate) decode: u32,
}

/// A chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChunkCosts {
    /// Its number.
    pub(crate) chunk: u32,
    /// Its pages, and those of zeros among them.
    pub(crate) pages: u8,
    pub(crate) zeros: u8,
    /// Nanoseconds of a core to look at it where it lies.
    pub(crate) scan: u32,
    /// By [`WAYS`]; empty where all pages are zeros.
    pub(crate) costs: Vec<Cost>,
}

impl ChunkCosts {
    /// Pages that are not zeros.
    pub(crate) fn full(&self) -> u32 {
        u32::from(self.pages - self.zeros)
    }
}

/// An image, chunk by chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trace {
    /// Its name.
    pub(crate) image: String,
    /// Its chunks that are no holes.
    pub(crate) chunks: Vec<ChunkCosts>,
}

/// The first line of a file.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    image: String,
    ways: Vec<Way>,
}

impl Trace {
    /// Writes it: a line about the file, and one for each chunk.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        serde_json::to_writer(&mut file, &Head { image: self.image.clone(), ways: WAYS.into() })?;
        for chunk in &self.chunks {
            file.write_all(b"\n")?;
            let costs: Vec<_> = chunk.costs.iter().map(|c| (c.encode, c.bytes, c.pages, c.decode)).collect();
            serde_json::to_writer(&mut file, &(chunk.chunk, chunk.pages, chunk.zeros, chunk.scan, costs))?;
        }
        file.write_all(b"\n")?;
        file.flush()
    }

    /// Reads it.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let complain = |what: &dyn std::fmt::Display| format!("{}: {what}", path.display());
        let mut lines = BufReader::new(File::open(path).map_err(|e| complain(&e))?).lines();
        let first = lines.next().ok_or_else(|| complain(&"it is empty"))?.map_err(|e| complain(&e))?;
        let head: Head = serde_json::from_str(&first).map_err(|e| complain(&e))?;
        if head.ways != WAYS {
            return Err(complain(&"it was recorded with other levels; record it again"));
        }
        let mut chunks = Vec::new();
        for line in lines {
            let line = line.map_err(|e| complain(&e))?;
            type Line = (u32, u8, u8, u32, Vec<(u32, u32, u8, u32)>);
            let (chunk, pages, zeros, scan, costs): Line =
                serde_json::from_str(&line).map_err(|e| complain(&e))?;
            let cost = |(encode, bytes, pages, decode)| Cost { encode, bytes, pages, decode };
            let costs: Vec<_> = costs.into_iter().map(cost).collect();
            if zeros > pages || pages > 64 || (zeros < pages && costs.len() != WAYS.len()) {
                return Err(complain(&format_args!("chunk {chunk} makes no sense")));
            }
            chunks.push(ChunkCosts { chunk, pages, zeros, scan, costs });
        }
        Ok(Self { image: head.image, chunks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace");
        let costs = vec![Cost { encode: 5, bytes: 7, pages: 60, decode: 9 }; WAYS.len()];
        let trace = Trace {
            image: "x".into(),
            chunks: vec![
                ChunkCosts { chunk: 3, pages: 64, zeros: 4, scan: 8, costs },
                ChunkCosts { chunk: 9, pages: 2, zeros: 2, scan: 1, costs: vec![] },
            ],
        };
        trace.write(&path).unwrap();
        assert_eq!(Trace::read(&path).unwrap(), trace);
        std::fs::write(&path, "{\"image\":\"x\",\"ways\":[]}\n").unwrap();
        assert!(Trace::read(&path).unwrap_err().contains("record it again"));
    }
}
