//! What an archive is.

use pageferry::archive::format::{self, feature};
use pageferry::archive::{Archive, ArchiveError, Survey, Walk};
use pageferry::layout::PAGE_SIZE;
use serde::Serialize;

use super::map::Map;
use super::{Lines, Opened, size};
use crate::cli::log;
use crate::cli::words::explain;

/// What an archive is, in numbers.
#[derive(Debug, Serialize)]
pub(super) struct Description {
    file: String,
    version: u16,
    features: Vec<&'static str>,
    id: String,
    /// Seconds since 1970, and the same for people.
    created_s: u64,
    created: String,
    /// A guest, and not memory alone.
    guest: bool,
    /// Whether the guest runs once it is loaded.
    runs_once_loaded: Option<bool>,
    machine: String,
    regions: Vec<Region>,
    base: Option<Base>,
    page_size: usize,
    pages: Pages,
    file_bytes: u64,
    /// Frames, of the four that follow.
    frame_bytes: u64,
    header_bytes: u64,
    seal_bytes: u64,
    encoded_bytes: u64,
    raw_bytes: u64,
    padding_bytes: u64,
    state_bytes: u64,
    index_bytes: u64,
    frames: u64,
    damaged_frames: u64,
    pads: u64,
    /// Bytes of pages that it holds for each byte of the file.
    ratio: f64,
    state: Vec<Piece>,
    #[serde(skip_serializing_if = "Option::is_none")]
    state_error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Region {
    name: String,
    /// Its address, where it has one.
    gpa: Option<u64>,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Base {
    id: String,
    name: String,
    /// Where it is.
    file: Option<String>,
    /// Why it is not to be had.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// Pages, in the words of a save's report: `zero` to `same` count every time that a page was saved.
#[derive(Debug, Serialize)]
struct Pages {
    total: u64,
    hole: u64,
    zero: u64,
    compressed: u64,
    raw: u64,
    same: u64,
    /// Pages that were saved more than once.
    saved_again: u64,
    /// Pages that later ones stand in the place of, each time.
    superseded: u64,
}

#[derive(Debug, Serialize)]
struct Piece {
    name: String,
    version: u32,
    bytes: usize,
}

/// An id as people see it.
pub(super) fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Description {
    /// Looks at the index, at the heads of all frames, which are entered into the map, and at the state.
    pub(super) fn of(opened: &Opened, map: Option<&Map>, walk: &Walk) -> Result<Self, ArchiveError> {
        let archive = opened.archive();
        let survey = Survey::of(archive, walk, |header, newest| {
            if let Some(map) = map {
                map.enter(header, newest);
            }
        })?;
        let (state, state_error) = match archive.state() {
            Ok(state) => (state, None),
            Err(error) => (Vec::new(), Some(explain(&error))),
        };
        let (header, footer) = (archive.header(), archive.footer());
        let held_bytes = footer.pages * PAGE_SIZE as u64;
        let behind_state = if footer.state_at == 0 { footer.index_at } else { footer.state_at };
        let names = [(feature::ZSTD, "zstd"), (feature::BASE, "base")];
        Ok(Self {
            file: archive.path().display().to_string(),
            version: header.version,
            features: names
                .iter()
                .filter(|(bit, _)| header.features & bit != 0)
                .map(|(_, name)| *name)
                .collect(),
            id: hex(&header.id),
            created_s: header.created,
            created: log::second(header.created) + "Z",
            guest: header.live,
            runs_once_loaded: format::runs_once_loaded(&state),
            machine: header.machine.clone(),
            regions: regions(archive),
            base: header.base.as_ref().map(|base| Base {
                id: hex(&base.id),
                name: base.name.clone(),
                file: opened.base().map(|base| base.archive().path().display().to_string()),
                error: opened.no_base().map(str::to_owned),
            }),
            page_size: PAGE_SIZE,
            pages: Pages::of(archive, &survey),
            file_bytes: footer.bytes,
            frame_bytes: survey.frame_bytes,
            header_bytes: survey.header_bytes,
            seal_bytes: survey.seal_bytes,
            encoded_bytes: survey.encoded_bytes,
            raw_bytes: survey.raw_bytes,
            padding_bytes: survey.padding_bytes,
            state_bytes: footer.index_at.saturating_sub(behind_state),
            index_bytes: footer.bytes.saturating_sub(footer.index_at),
            frames: survey.frames,
            damaged_frames: survey.damaged_frames,
            pads: survey.pads,
            ratio: (held_bytes as f64 / footer.bytes as f64 * 1e3).round() / 1e3,
            state: state
                .iter()
                .map(|piece| Piece {
                    name: piece.name.clone(),
                    version: piece.version,
                    bytes: piece.bytes.len(),
                })
                .collect(),
            state_error,
        })
    }

    /// What was seen to be damaged.
    pub(super) fn damage(&self) -> Option<String> {
        match (self.damaged_frames, &self.state_error) {
            (0, None) => None,
            (0, Some(error)) => Some(format!("{}: {error}", self.file)),
            (frames, _) => Some(format!(
                "{}: {frames} of {} frames are damaged, at least; --verify tells which pages these are",
                self.file, self.frames
            )),
        }
    }

    /// The same in lines.
    pub(super) fn text(&self) -> String {
        let mut lines = Lines::default();
        let features = self.features.join(", ");
        lines.add("archive:", format!("{}, version {} ({features})", self.file, self.version));
        lines.add("id:", &self.id);
        lines.add("made:", &self.created);
        lines.add("of:", self.kind());
        if !self.machine.is_empty() {
            lines.add("machine:", format!("{:?}", self.machine));
        }
        for Region { name, gpa, bytes } in &self.regions {
            let at = gpa.map_or("without an address".into(), |gpa| format!("at {gpa:#x}"));
            lines.add("region:", format!("{name:?}, {}, {at}", size(*bytes)));
        }
        if let Some(Base { id, name, file, error }) = &self.base {
            lines.add("base:", format!("{name:?}, id {id}"));
            match (file, error) {
                (Some(file), _) => lines.add("", format!("found: {file}")),
                (None, error) => lines.add("", format!("not found: {}", error.as_deref().unwrap_or("?"))),
            }
        }
        self.pages.lines(&mut lines);
        lines.add("file:", format!("{} bytes", self.file_bytes));
        let Self { frames, frame_bytes, header_bytes, seal_bytes, encoded_bytes, raw_bytes, .. } = self;
        lines.add("frames:", format!("{frames}, {frame_bytes} bytes: headers {header_bytes}, seals {seal_bytes}, compressed {encoded_bytes}, raw {raw_bytes}"));
        if self.damaged_frames != 0 {
            lines.add("damaged frames:", self.damaged_frames);
        }
        lines.add("padding:", format!("{} bytes in {} pads", self.padding_bytes, self.pads));
        lines.add("state, index:", format!("{} bytes, {} bytes", self.state_bytes, self.index_bytes));
        lines.add("ratio:", format!("{:.2} bytes of pages for a byte of the file", self.ratio));
        for Piece { name, version, bytes } in &self.state {
            lines.add("state:", format!("{name:?}, version {version}, {bytes} bytes"));
        }
        if let Some(error) = &self.state_error {
            lines.add("state:", error);
        }
        lines.0
    }

    fn kind(&self) -> &'static str {
        match (self.guest, self.runs_once_loaded) {
            (false, _) => "memory alone",
            (true, Some(true)) => "a guest, which runs once it is loaded",
            (true, Some(false)) => "a guest, which stays paused once it is loaded",
            (true, None) => "a guest, whose state does not say whether it ran: it cannot be loaded",
        }
    }
}

fn regions(archive: &Archive) -> Vec<Region> {
    let regions = archive.layout().regions().iter();
    regions.map(|region| Region { name: region.name.clone(), gpa: region.gpa, bytes: region.len }).collect()
}

impl Pages {
    fn of(archive: &Archive, survey: &Survey) -> Self {
        let total = archive.layout().pages();
        Self {
            total,
            hole: total - archive.footer().pages,
            zero: survey.zero,
            compressed: survey.compressed,
            raw: survey.raw,
            same: survey.same,
            saved_again: survey.saved_again,
            superseded: survey.superseded,
        }
    }

    fn lines(&self, lines: &mut Lines) {
        let Self { total, hole, zero, compressed, raw, same, saved_again, superseded } = self;
        lines.add("pages:", format!("{total}, of which {hole} are holes"));
        lines
            .add("saved:", format!("{zero} zero, {compressed} compressed, {raw} raw, {same} as in the base"));
        if *saved_again != 0 {
            lines.add(
                "saved again:",
                format!("{saved_again} pages; {superseded} that were saved before are superseded"),
            );
        }
    }
}
