//! pageferry moves the RAM of a running virtual machine between hosts.
//!
//! The library joins three crates: [`pagecopy`] (what is sent), [`transport`] (how it travels) and [`vmm_shim`] (where
//! memory lives). A VMM implements the traits of [`pagecopy::backend`] and calls [`engine::source::migrate`] on one host and
//! [`engine::destination::Destination`] on the other.
//!
//! See `docs/design.md` for the rules that hold throughout and `docs/protocol.md` for the wire format.

// The command line lives here rather than in the binary, so that its parsers can be fuzzed; it uses the public API only.
extern crate self as pageferry;

// Help texts are for terminals: brackets in them are no links.
#[allow(rustdoc::broken_intra_doc_links)]
#[doc(hidden)]
pub mod cli;
pub mod measure;
pub mod print;

pub use pagecopy;
pub use transport;
pub use transport::{engine, reserve};
pub use vmm_shim;
