//! Where memory lives: guest memory backends, dirty trackers, and what runs on them.
//!
//! This crate is the only one that knows `mmap`, userfaultfd and KVM. It refuses to know a wire format, a stream or a
//! migration policy: it hands out guest memory, dirty sets and control over a guest through the traits of
//! [`pagecopy::backend`], and nothing else.

pub mod conformance;
pub mod guest_memory;
pub mod guests;
pub mod kvm;
pub mod lost_room;
mod pagemap;
mod ram_file;
pub mod room;
mod sys;
pub mod uffd_log;
pub mod vmm;
pub mod writer;
