//! What an archive is made of: by its index, and by the heads of its frames. No page is read.

use std::sync::Mutex;

use pagecopy::bitmap::PageBitmap;

use super::error::ArchiveError;
use super::format::{FrameHeader, FrameKind};
use super::reader::Archive;
use super::walk::Walk;
use crate::local::lock;

/// What frames an archive has, and what they come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Survey {
    /// Frames.
    pub frames: u64,
    /// Frames of which not even the head is whole; of these only the bytes are counted.
    pub damaged_frames: u64,
    /// Pads.
    pub pads: u64,
    /// Pages of zeros, each as often as it was saved; so for the next three.
    pub zero: u64,
    /// Pages in zstd frames.
    pub compressed: u64,
    /// Pages as they are.
    pub raw: u64,
    /// Pages that are as in the base.
    pub same: u64,
    /// Pages that were saved more than once, each counted once.
    pub saved_again: u64,
    /// Pages in frames that later frames have in their place, each as often as that happened.
    pub superseded: u64,
    /// Bytes of frames: of the four that follow, and of frames that are damaged.
    pub frame_bytes: u64,
    /// Bytes of their headers.
    pub header_bytes: u64,
    /// Bytes of their seals.
    pub seal_bytes: u64,
    /// Bytes of what is compressed.
    pub encoded_bytes: u64,
    /// Bytes of raw pages.
    pub raw_bytes: u64,
    /// Bytes of pads.
    pub padding_bytes: u64,
}

impl Survey {
    /// Looks at all frames. `each` is told every frame whose head is whole, with those of its pages that no later frame has, by
    /// several threads and in any order.
    ///
    /// # Errors
    /// When it is cancelled. A frame that is damaged is counted as such.
    pub fn of(
        archive: &Archive,
        walk: &Walk,
        each: impl Fn(&FrameHeader, u64) + Sync,
    ) -> Result<Self, ArchiveError> {
        let (entries, newest) = (archive.entries(), archive.newest());
        let all = Mutex::new(Self::of_index(archive, &newest));
        walk.begin(archive.footer().bytes);
        let look = |own: &mut Self, at: usize| {
            let entry = &entries[at];
            walk.step(entry.len.into());
            if entry.pages == 0 {
                return Ok(());
            }
            match archive.head(entry) {
                Ok((header, _)) => {
                    own.add(&header);
                    each(&header, newest[at]);
                }
                Err(_) => own.damaged_frames += 1,
            }
            Ok(())
        };
        let end = |own: Self| {
            lock(&all).join(&own);
            Ok(())
        };
        walk.each::<_, ArchiveError>(entries.len(), || Ok(Self::default()), look, end)?;
        let all = lock(&all).clone();
        Ok(all)
    }

    /// What the index says of all, and the bytes of frames and pads.
    fn of_index(archive: &Archive, newest: &[u64]) -> Self {
        let mut survey = Self::default();
        let again = PageBitmap::new(archive.layout().chunks());
        for (entry, newest) in archive.entries().iter().zip(newest) {
            if entry.pages == 0 {
                survey.pads += 1;
                survey.padding_bytes += u64::from(entry.len);
                continue;
            }
            survey.frames += 1;
            survey.frame_bytes += u64::from(entry.len);
            let superseded = entry.pages & !newest;
            survey.superseded += u64::from(superseded.count_ones());
            again.insert(entry.chunk, superseded);
        }
        survey.saved_again = again.count();
        survey
    }

    /// Counts what only a frame's head says.
    fn add(&mut self, header: &FrameHeader) {
        let pages = |mask: u64| u64::from(mask.count_ones());
        match header.kind {
            FrameKind::Pages => self.raw += pages(header.raw),
            FrameKind::Same => self.same += pages(header.raw),
        }
        self.zero += pages(header.zero);
        self.compressed += pages(header.zstd);
        self.header_bytes += FrameHeader::LEN as u64;
        self.seal_bytes += header.seals_len() as u64;
        self.encoded_bytes += u64::from(header.encoded_len);
        self.raw_bytes += header.raw_len() as u64;
    }

    /// Counts what another thread's frames said in their heads.
    fn join(&mut self, other: &Self) {
        self.damaged_frames += other.damaged_frames;
        self.zero += other.zero;
        self.compressed += other.compressed;
        self.raw += other.raw;
        self.same += other.same;
        self.header_bytes += other.header_bytes;
        self.seal_bytes += other.seal_bytes;
        self.encoded_bytes += other.encoded_bytes;
        self.raw_bytes += other.raw_bytes;
    }
}
