//! What both sides can do beyond raw and zero pages; a bit each.

/// XBZRLE deltas.
pub const DELTA: u64 = 1;
/// zstd frames.
pub const ZSTD: u64 = 2;
/// Lost streams are connected anew, and the session goes on over a new control connection.
pub const RESUME: u64 = 4;
/// Pages that follow a guest which runs at the destination already.
pub const POSTCOPY: u64 = 8;
/// zstd frames that refer to pages which were sent before.
pub const REFERENCES: u64 = 16;
/// zstd frames in the sealed frames of postcopy.
pub const POSTCOPY_ZSTD: u64 = 32;
/// What threads of the destination do, told beside receipts.
pub const LOAD: u64 = 64;
/// The destination says what an older copy of the guest holds, and pages that are the same are taken from there.
pub const BASE: u64 = 128;
/// What encoded pages in postcopy need.
pub const SEALED: u64 = ZSTD | POSTCOPY | POSTCOPY_ZSTD;
/// What `auto` chooses from.
pub const CODECS: u64 = DELTA | ZSTD;
/// What says how pages may be encoded, and helps to choose.
pub const ENCODINGS: u64 = CODECS | REFERENCES | POSTCOPY_ZSTD | LOAD;
/// All that this version knows.
pub const ALL: u64 = ENCODINGS | RESUME | POSTCOPY | BASE;
