//! zstd with a prefix: what its safe interface takes only of memory that outlives the context.

use zstd::zstd_safe::{CCtx, CParameter, ResetDirective};

/// Levels up to this one have a single small table, which the prefix would overrun.
const SMALL_TABLE_LEVEL_MAX: i32 = 1;
/// Their table for twice as much content: entries, as a power of two, and the shortest match that fills it with what is worth it.
const TABLE_BITS: u32 = 15;
const MATCH_MIN: u32 = 6;

/// A context for frames that have a prefix.
pub(super) struct Behind {
    context: CCtx<'static>,
    level: Option<i32>,
}

impl Behind {
    /// Its memory comes with the first use.
    pub(super) fn new() -> Self {
        Self { context: CCtx::create(), level: None }
    }

    /// Compresses what follows the first `prefix` bytes of `content` into one frame, which may repeat what is in them; returns its
    /// length, or `None` where it does not fit or the library refuses.
    pub(super) fn compress(
        &mut self,
        level: i32,
        content: &[u8],
        prefix: usize,
        frame: &mut [u8],
    ) -> Option<usize> {
        let (prefix, source) = content.split_at(prefix);
        // A frame that did not fit was left unfinished.
        self.context.reset(ResetDirective::SessionOnly).ok()?;
        if self.level != Some(level) {
            self.level = None;
            // 0: what the level has.
            let (table, least) =
                if level <= SMALL_TABLE_LEVEL_MAX { (TABLE_BITS, MATCH_MIN) } else { (0, 0) };
            for parameter in
                [CParameter::CompressionLevel(level), CParameter::HashLog(table), CParameter::MinMatch(least)]
            {
                self.context.set_parameter(parameter).ok()?;
            }
            self.level = Some(level);
        }
        // SAFETY: the context reads its prefix only while it compresses, which it does nowhere but below, and there never before it
        // was given another prefix, here: no read comes after `content` has gone.
        let lasting: &'static [u8] = unsafe { std::slice::from_raw_parts(prefix.as_ptr(), prefix.len()) };
        self.context.ref_prefix(lasting).ok()?;
        self.context.compress2(frame, source).ok()
    }
}
