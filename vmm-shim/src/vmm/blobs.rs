//! Blobs of a state: how they are made, looked up and read. See [`super::state`] for what is in them.

use std::io;

use pagecopy::backend::{BackendError, StateBlob};

/// Reads little-endian numbers from bytes whose length was checked.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk().expect("the length was checked");
        self.0 = rest;
        *head
    }
    pub(super) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }
    pub(super) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    pub(super) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// The blobs of a state, by name: each is taken out once.
pub(super) struct Blobs<'a>(pub(super) Vec<&'a StateBlob>);

impl<'a> Blobs<'a> {
    /// Takes a blob of one of the given versions.
    pub(super) fn take(&mut self, name: &str, versions: &[u32]) -> Result<&'a StateBlob, BackendError> {
        let Some(at) = self.0.iter().position(|b| b.name == name) else {
            return Err(BackendError::invalid(format!("state: {name} is missing")));
        };
        let blob = self.0.swap_remove(at);
        if !versions.contains(&blob.version) {
            let version = blob.version;
            return Err(BackendError::invalid(format!(
                "state: {name} has version {version}; known are {versions:?}"
            )));
        }
        Ok(blob)
    }

    /// Takes a blob of version 1 and of exactly `len` bytes.
    pub(super) fn take_sized(&mut self, name: &str, len: usize) -> Result<&'a [u8], BackendError> {
        let blob = self.take(name, &[1])?;
        check_len(blob, len)?;
        Ok(&blob.bytes)
    }
}

pub(super) fn check_len(blob: &StateBlob, len: usize) -> Result<(), BackendError> {
    if blob.bytes.len() == len {
        return Ok(());
    }
    let (name, got) = (&blob.name, blob.bytes.len());
    Err(BackendError::invalid(format!("state: {name} has {got} bytes; it must have {len}")))
}

/// An error of an ioctl on a vCPU.
pub(super) fn vcpu_error(index: u8, what: &str, source: impl Into<io::Error>) -> BackendError {
    let source: io::Error = source.into();
    BackendError::new(format!("vCPU {index}: {what}"), source)
}
