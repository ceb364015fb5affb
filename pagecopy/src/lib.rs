//! What is sent: guest memory as regions, pages and chunks; dirty bitmaps; zero scan; XBZRLE deltas; compression;
//! content digests; and the migration policy as pure state machines.
//!
//! This crate refuses to do I/O, to read a clock, to start a thread or to touch guest memory by reference: bytes,
//! times and events come in as arguments, and whatever looks at page content works on a private copy of it.
//! The one exception to "no guest memory" is [`backend`], which only *declares* the traits a VMM implements.

// Only `simd`, `digest::simd` and `xbzrle::simd` may hold unsafe code, which call functions compiled for CPU features that were found
// at run time; and `compress::sys`, for a lifetime that the compressor's interface cannot express.
#![deny(unsafe_code)]

pub mod backend;
pub mod bitmap;
pub mod cache;
pub mod choose;
pub mod chunk;
pub mod compress;
pub mod digest;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod layout;
pub mod plan;
pub mod policy;
pub mod postcopy;
#[allow(unsafe_code)]
pub mod simd;
pub mod similar;
mod sync;
pub mod table;
pub mod throttle;
pub mod xbzrle;
pub mod zero;

pub use vm_memory;
