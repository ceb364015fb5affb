//! Where memory lives: guest memory backends, dirty trackers, and what runs on them.
//!
//! This crate is the only one that knows `mmap`, userfaultfd and KVM. It refuses to know a wire format, a stream or a
//! migration policy: it hands out guest memory, dirty sets and control over a guest through the traits of
//! [`pagecopy::backend`], and nothing else.
//!
//! What a VMM of its own takes from here:
//!
//! | it has | it takes |
//! |---|---|
//! | guest memory of vm-memory ([`vm_memory`], re-exported) | [`adapter::VmMemory`] |
//! | guest memory of another kind | [`holes`], [`uffd_missing::UffdMissing`], [`uffd_guard::UffdGuard`], or [`guest_memory::GuestMemory`] |
//! | vCPUs of KVM, in a VM that anybody made | [`kvm::KvmBitmapLog`] or [`kvm::KvmRingLog`], over [`kvm::KvmSlots`] |
//! | devices that write guest memory of vm-memory | [`bitmap_log::BitmapLog`], in a [`union_log::UnionLog`] with that of its vCPUs |
//! | memory that this process writes, without KVM | [`uffd_log::UffdLog`] |
//! | memory of another process, which knows nothing of it | [`foreign::SoftDirtyLog`], over a [`foreign::Process`] |
//! | a dirty log of its own | [`conformance::run`], to try it |

pub mod adapter;
pub mod bitmap_log;
pub mod conformance;
pub mod foreign;
pub mod guest_memory;
pub mod guests;
pub mod holes;
pub mod kvm;
pub mod lost_room;
mod mapped;
mod pagemap;
pub mod qemu;
mod ram_file;
pub mod room;
mod sys;
pub mod uffd_guard;
pub mod uffd_log;
pub mod uffd_missing;
pub mod union_log;
pub mod vmm;
mod watched;
pub mod writer;

pub use vm_memory;
