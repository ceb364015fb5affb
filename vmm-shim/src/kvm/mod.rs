//! KVM: opening it with errors that help, and its two dirty trackers.
//!
//! [`KvmBitmapLog`] reads the per-slot bitmap (`KVM_GET_DIRTY_LOG`, with manual protection where the kernel
//! has it), [`KvmRingLog`] the per-vCPU dirty rings. Both serve any VM of this process, whoever made it: [`KvmSlots`] tells them its
//! descriptor and its memory slots.
//!
//! Both track what *vCPUs* write. What the VMM itself writes into guest RAM is not in them, nor what devices write, in the VMM or
//! beside it: a guest with such devices loses pages unless [`UnionLog`](crate::union_log::UnionLog) adds what they write. And KVM may
//! report a page that the guest has only read: when it first maps the page, it maps it writable where it may, and takes that for a
//! write.
//!
//! The loader of [`crate::vmm`] writes to guest RAM, but only before the guest and any log start.

pub(crate) mod bitmap_log;
pub(crate) mod kick;
pub(crate) mod ring_log;
pub(crate) mod sys;

use std::io;

use kvm_ioctls::Kvm;

pub use bitmap_log::KvmBitmapLog;
pub use ring_log::{DirtyRings, KvmRingLog};
pub use sys::slots::{KvmSlots, Slot};

/// Why KVM cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no `/dev/kvm`.
    #[error(
        "/dev/kvm does not exist: load kvm_intel or kvm_amd (modprobe) and see that virtualisation is enabled in the \
         firmware, or go without a virtual machine (--no-kvm)"
    )]
    Missing {
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// `/dev/kvm` may not be opened.
    #[error(
        "no permission to open /dev/kvm: add the user to group kvm (usermod -aG kvm USER, then log in again), or go \
         without a virtual machine (--no-kvm)"
    )]
    Permission {
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// Opening it failed in another way.
    #[error("/dev/kvm cannot be opened; --no-kvm goes without a virtual machine")]
    Open {
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// It is not the KVM API that every kernel since 2.6.22 has.
    #[error("/dev/kvm speaks API version {version}; this program speaks 12 only")]
    Version {
        /// The version it reports.
        version: i32,
    },
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// Where it cannot be; the text says what to do.
///
/// ```
/// match vmm_shim::kvm::open() {
///     Ok(kvm) => assert_eq!(kvm.get_api_version(), 12),
///     Err(error) => println!("no VM here: {error}"),
/// }
/// ```
pub fn open() -> Result<Kvm, OpenError> {
    let kvm = Kvm::new().map_err(|e| open_error(e.into()))?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        version => Err(OpenError::Version { version }),
    }
}

fn open_error(source: io::Error) -> OpenError {
    match source.kind() {
        io::ErrorKind::NotFound => OpenError::Missing { source },
        io::ErrorKind::PermissionDenied => OpenError::Permission { source },
        // ENODEV, ENXIO: the node is there (made by hand, or in a container) and no driver behind it.
        _ if matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
            OpenError::Missing { source }
        }
        _ => OpenError::Open { source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        for (errno, hint) in [
            (libc::ENOENT, "load kvm_intel or kvm_amd"),
            (libc::ENODEV, "load kvm_intel or kvm_amd"),
            (libc::EACCES, "add the user to group kvm"),
            (libc::EPERM, "add the user to group kvm"),
            (libc::EMFILE, "cannot be opened"),
        ] {
            let text = open_error(io::Error::from_raw_os_error(errno)).to_string();
            assert!(text.contains(hint) && text.contains("--no-kvm"), "{errno}: {text}");
        }
    }
}
