//! An archive written anew: of the same memory and state, with each page once, and standing on no other.

use std::io;
use std::path::Path;
use std::sync::Arc;

use pagecopy::bitmap::bits;
use pagecopy::choose::CodecMode;
use pagecopy::chunk::ChunkEncoder;
use pagecopy::digest::PageHasher;
use pagecopy::layout::{CHUNK_SIZE, PAGE_SIZE};
use pagecopy::xbzrle::Page;
use vm_memory::volatile_memory::VolatileSlice;

use super::error::ArchiveError;
use super::format::{Header, VERSION, feature};
use super::image::{ChunkReader, Content, Image};
use super::walk::Walk;
use super::writer::{ArchiveWriter, Sender};
use crate::local::{random, zeroed};
use crate::source::CLOCKS;
use crate::uri::Uri;
use crate::wire::SessionId;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Flattened {
    /// The new archive's id.
    pub id: SessionId,
    /// Its bytes.
    pub bytes: u64,
    /// Pages in it.
    pub pages: u64,
}

/// Writes an archive with what `image` has of memory and state, to `path`. It says that it was made when `image` was, which is when the
/// guest was as it is in there.
///
/// # Errors
/// When something of `image` is damaged, the new one cannot be written, or it is cancelled: there is no new archive then.
pub fn flatten(image: &Image, path: &Path, codec: CodecMode, walk: &Walk) -> Result<Flattened, ArchiveError> {
    let (state, held) = (image.state()?, image.held());
    let pages = held.count();
    let header = Header {
        version: VERSION,
        features: feature::ZSTD,
        id: random().map_err(lacks)?,
        seed: random().map(u64::from_le_bytes).map_err(lacks)?,
        data_bytes: pages * PAGE_SIZE as u64,
        base: None,
        ..image.header().clone()
    };
    let writer = Arc::new(ArchiveWriter::create(&Uri::File(path.into()), &header)?);
    let hasher = PageHasher::new(header.seed);
    walk.begin(image.layout().bytes());
    let write = |sealing: &mut Sealing, chunk: usize| {
        sealing.seal(image, chunk as u32, held.get(chunk as u32), &hasher)?;
        walk.step(image.layout().locate(chunk as u32).map_or(0, |place| place.bytes() as u64));
        Ok(())
    };
    let make = || Sealing::new(image, codec, writer.sender());
    let end = |mut sealing: Sealing| sealing.sender.write_rest();
    walk.each(image.layout().chunks() as usize, make, write, end)?;
    let writer = Arc::into_inner(writer).expect("its streams have ended");
    let bytes = writer.finish(&state, pages, &|| !walk.is_cancelled())?;
    Ok(Flattened { id: header.id, bytes, pages })
}

/// One stream of frames into the new archive.
struct Sealing {
    reader: ChunkReader,
    encoder: ChunkEncoder,
    sender: Sender,
    /// The chunk as it is encoded.
    memory: Box<[u8]>,
    /// Room for the encoder.
    snapshot: Box<[u8]>,
    /// Room for a frame's head.
    out: Vec<u8>,
}

impl Sealing {
    fn new(image: &Image, codec: CodecMode, sender: Sender) -> Result<Self, ArchiveError> {
        let room = || zeroed(CHUNK_SIZE).map_err(lacks);
        Ok(Self {
            reader: image.reader()?,
            encoder: ChunkEncoder::new(codec, CLOCKS).each_once(),
            sender,
            memory: room()?,
            snapshot: room()?,
            out: Vec::new(),
        })
    }

    /// Writes a frame of these pages.
    fn seal(
        &mut self,
        image: &Image,
        chunk: u32,
        pages: u64,
        hasher: &PageHasher,
    ) -> Result<(), ArchiveError> {
        if pages == 0 {
            return Ok(());
        }
        let Self { reader, encoder, sender, memory, snapshot, out } = self;
        let content = image.read(chunk, pages, reader)?;
        if content.damaged != 0 {
            return Err(image.damaged(chunk, content.damaged));
        }
        copy(content, pages, memory);
        let plan = encoder.plan(chunk, 0);
        let memory = VolatileSlice::from(&mut memory[..]);
        let encoded = encoder.encode_alone(plan, hasher, &memory, snapshot, pages);
        sender.save(chunk, &encoded, &memory, out)
    }
}

/// What this host lacks.
fn lacks(source: io::Error) -> ArchiveError {
    ArchiveError::Read { offset: 0, source }
}

/// Copies these pages of a chunk to where they lie in it.
fn copy(content: &Content, pages: u64, memory: &mut [u8]) {
    let memory: &mut [Page] = memory.as_chunks_mut().0;
    bits(pages & content.filled).for_each(|bit| memory[bit as usize] = content.pages[bit as usize]);
    bits(pages & !content.filled).for_each(|bit| memory[bit as usize].fill(0));
}
