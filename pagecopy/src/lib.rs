//! What is sent: guest memory as regions, pages and chunks; dirty bitmaps; zero scan; XBZRLE deltas; compression;
//! content digests; and the migration policy as pure state machines.
//!
//! This crate refuses to do I/O, to read a clock, to start a thread or to touch guest memory by reference: bytes,
//! times and events come in as arguments, and whatever looks at page content works on a private copy of it.
//! The one exception to "no guest memory" is [`backend`], which only *declares* the traits a VMM implements.

#![forbid(unsafe_code)]

pub mod backend;
pub mod bitmap;
pub mod digest;
pub mod layout;
