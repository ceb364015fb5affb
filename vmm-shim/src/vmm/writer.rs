//! The writer guest: writes exactly the pages it is told to, for tests of dirty trackers.
//!
//! It runs only inside [`Writer::write`], which resumes the VM and pauses it again, so afterwards the writes
//! are in memory and in the log. Besides the pages it writes nothing. The host puts the list of pages into
//! guest memory, which no KVM log sees.

use std::io;
use std::time::Duration;

use pagecopy::backend::{BackendError, Guest};
use vm_memory::Bytes;

use super::Vm;
use crate::guests::map;

/// Where the list of addresses is: 64-bit words up to [`FIRST_FREE`].
const LIST: u64 = map::FREE;
/// First address that may be written.
pub const FIRST_FREE: u64 = LIST + 8 * LIST_MAX as u64;
/// Most pages in a call.
pub const LIST_MAX: usize = 1 << 17;

/// Longest time a call may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A VM that runs the writer guest.
pub struct Writer<'a> {
    vm: &'a Vm,
    /// Of the next call; every page written gets it as its first word.
    sequence: u64,
}

impl<'a> Writer<'a> {
    /// `vm` was made with [`GuestImage::Writer`](crate::vmm::GuestImage::Writer), is started and paused, and
    /// has not run yet.
    pub fn new(vm: &'a Vm) -> Self {
        Self { vm, sequence: 1 }
    }

    /// Writes the first word of the pages at these guest-physical addresses (multiples of 8 in RAM, from
    /// [`FIRST_FREE`] on), in this order, with a number that goes up by one with every call; returns the
    /// number.
    pub fn write(&mut self, addresses: &[u64]) -> Result<u64, BackendError> {
        let layout = self.vm.ram().layout();
        if addresses.len() > LIST_MAX {
            return Err(BackendError::invalid(format!("{} addresses; at most {LIST_MAX}", addresses.len())));
        }
        let bad =
            |gpa: &&u64| **gpa < FIRST_FREE || !gpa.is_multiple_of(8) || layout.page_at(**gpa).is_none();
        if let Some(gpa) = addresses.iter().find(bad) {
            return Err(BackendError::invalid(format!("the writer guest cannot write at {gpa:#x}")));
        }
        let sequence = self.sequence;
        self.put(LIST, addresses)?;
        self.put(map::PARAMS, &[sequence, addresses.len() as u64, LIST])?;
        self.sequence += 1;
        self.vm.resume()?;
        let done = self.vm.wait_signal(sequence as u32, TIMEOUT);
        self.vm.pause()?;
        if !done {
            let why = io::Error::other(format!("{:?}", self.vm.state()));
            return Err(BackendError::new("the writer guest did not finish", why));
        }
        Ok(sequence)
    }

    fn put(&self, gpa: u64, words: &[u64]) -> Result<(), BackendError> {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        // All of it is in the first 16 MiB, which the loader has seen to be in region 0.
        let ram = self.vm.ram().region(0);
        ram.write_slice(&bytes, gpa as usize)
            .map_err(|e| BackendError::invalid(format!("writing {} bytes at {gpa:#x}: {e}", bytes.len())))
    }
}
