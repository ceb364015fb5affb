//! Reading and writing little-endian fields, with errors that name the field.

/// Bytes that are not what the protocol says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not ours at all, or out of step.
    #[error(
        "bad magic {found:#x} in {what}: the peer does not speak the pageferry protocol, or the stream is out of step"
    )]
    BadMagic {
        /// Which structure.
        what: &'static str,
        /// What stood there.
        found: u64,
    },
    /// An answer in another protocol.
    #[error("something else than pageferry answers there: its first bytes are {}", shown(.first))]
    Foreign {
        /// Them.
        first: [u8; 8],
    },
    /// The peer is too new or too old.
    #[error(
        "no common protocol version: the peer offers {min} to {max}, this side speaks {} to {}; use matching releases",
        super::VERSION_MIN,
        super::VERSION_MAX
    )]
    NoCommonVersion {
        /// Lowest offered.
        min: u16,
        /// Highest offered.
        max: u16,
    },
    /// A message that ends inside a field.
    #[error("message ends inside field {field}")]
    Truncated {
        /// The field.
        field: &'static str,
    },
    /// A message that goes on after its last field.
    #[error("{extra} bytes after the last field of a {what} message")]
    Trailing {
        /// The message.
        what: &'static str,
        /// How many bytes too many.
        extra: usize,
    },
    /// A length above its limit.
    #[error("field {field} announces {len} bytes or entries; the limit is {max}")]
    TooLong {
        /// The field.
        field: &'static str,
        /// What was announced.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// A value the protocol does not allow, or not here.
    #[error("field {field} has the impossible value {value:#x}")]
    BadValue {
        /// The field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
    /// A checksum that does not match.
    #[error("checksum of {what} is {found:#018x}, expected {expected:#018x}: bytes were damaged on the way")]
    Checksum {
        /// What was damaged.
        what: &'static str,
        /// Checksum that was sent.
        expected: u64,
        /// Checksum of what arrived.
        found: u64,
    },
}

/// Bytes as text, as far as they are.
fn shown(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}

/// Reads fields from a byte slice.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }
    pub(crate) fn bytes(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], WireError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(WireError::Truncated { field })?;
        self.rest = rest;
        Ok(head)
    }
    pub(crate) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(WireError::Truncated { field })?;
        self.rest = rest;
        Ok(*head)
    }
    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.array(field).map(u16::from_le_bytes)
    }
    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.array(field).map(u32::from_le_bytes)
    }
    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.array(field).map(u64::from_le_bytes)
    }
    /// A `u32` length of at most `max`, then that many bytes.
    pub(crate) fn blob(&mut self, max: usize, field: &'static str) -> Result<&'a [u8], WireError> {
        let len = self.u32(field)? as usize;
        if len > max {
            return Err(WireError::TooLong { field, len: len as u64, max: max as u64 });
        }
        self.bytes(len, field)
    }
    /// A [`Self::blob`] that is UTF-8.
    pub(crate) fn string(&mut self, max: usize, field: &'static str) -> Result<String, WireError> {
        let bytes = self.blob(max, field)?;
        String::from_utf8(bytes.to_vec())
            .map_err(|e| WireError::BadValue { field, value: e.utf8_error().valid_up_to() as u64 })
    }
    /// A `u32` count of at most `max`.
    pub(crate) fn count(&mut self, max: usize, field: &'static str) -> Result<usize, WireError> {
        let len = self.u32(field)? as usize;
        if len > max {
            return Err(WireError::TooLong { field, len: len as u64, max: max as u64 });
        }
        Ok(len)
    }
    pub(crate) fn end(&self, what: &'static str) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(WireError::Trailing { what, extra }),
        }
    }
}

/// Writes fields into a vector.
#[derive(Default)]
pub(crate) struct Writer {
    out: Vec<u8>,
}

impl Writer {
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }
    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }
    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }
    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }
    pub(crate) fn blob(&mut self, bytes: &[u8]) {
        self.u32(bytes.len() as u32);
        self.bytes(bytes);
    }
    pub(crate) fn into_vec(self) -> Vec<u8> {
        self.out
    }
    /// The bytes as an array; the caller wrote exactly `N`.
    pub(crate) fn array<const N: usize>(self) -> [u8; N] {
        self.out.try_into().expect("the encoder wrote the structure's fixed length")
    }
}
