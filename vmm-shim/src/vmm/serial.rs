//! The console: a 16550 UART whose transmitter is always ready, and whose receiver never has anything.

use std::io::Write;
use std::time::{Duration, Instant};

use crate::vmm::state::Reader;

/// First port of COM1.
pub(crate) const PORT: u16 = 0x3f8;
/// Output is written to the sink at a line's end, when this much has gathered, or
const BATCH: usize = 512;
/// when a byte comes this long after the last write.
const BATCH_TIME: Duration = Duration::from_millis(50);

const LCR_DLAB: u8 = 0x80;
const LSR_IDLE: u8 = 0x60;
const MSR_CONNECTED: u8 = 0xb0;

/// The UART's registers and its output.
pub(crate) struct Serial {
    ier: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    fcr: u8,
    out: Vec<u8>,
    written: Instant,
    sink: Box<dyn Write + Send>,
    failed: bool,
}

impl Serial {
    pub(crate) fn new(sink: Box<dyn Write + Send>) -> Self {
        let written = Instant::now();
        let out = Vec::with_capacity(BATCH);
        Self { ier: 0, lcr: 3, mcr: 0, scratch: 0, divisor: 12, fcr: 0, out, written, sink, failed: false }
    }

    pub(crate) fn write(&mut self, register: u16, value: u8) {
        let dlab = self.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => self.divisor = self.divisor & 0xff00 | u16::from(value),
            1 if dlab => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            0 => self.transmit(value),
            1 => self.ier = value & 0xf,
            2 => self.fcr = value,
            3 => self.lcr = value,
            4 => self.mcr = value & 0x1f,
            7 => self.scratch = value,
            _ => {}
        }
    }

    pub(crate) fn read(&self, register: u16) -> u8 {
        let dlab = self.lcr & LCR_DLAB != 0;
        match register {
            0 if dlab => self.divisor as u8,
            1 if dlab => (self.divisor >> 8) as u8,
            0 => 0,
            1 => self.ier,
            // No interrupt pending; the upper bits tell that the FIFOs are on.
            2 => 1 | if self.fcr & 1 != 0 { 0xc0 } else { 0 },
            3 => self.lcr,
            4 => self.mcr,
            5 => LSR_IDLE,
            6 => MSR_CONNECTED,
            7 => self.scratch,
            _ => 0xff,
        }
    }

    fn transmit(&mut self, byte: u8) {
        self.out.push(byte);
        if byte == b'\n' || self.out.len() >= BATCH || self.written.elapsed() >= BATCH_TIME {
            self.flush();
        }
    }

    /// Writes what has gathered. A sink that fails is not used again: the guest does not stop for its console.
    pub(crate) fn flush(&mut self) {
        if !self.out.is_empty() && !self.failed {
            self.failed = self.sink.write_all(&self.out).and_then(|()| self.sink.flush()).is_err();
        }
        self.out.clear();
        self.written = Instant::now();
    }

    /// The registers; output is not among them: flush first, then what was printed is in the sink.
    pub(crate) fn save(&self) -> Vec<u8> {
        let [dll, dlm] = self.divisor.to_le_bytes();
        vec![self.ier, self.lcr, self.mcr, self.scratch, dll, dlm, self.fcr, 0]
    }

    /// Bytes of [`save`](Self::save).
    pub(crate) const STATE_LEN: usize = 8;

    pub(crate) fn load(&mut self, bytes: &[u8]) {
        let mut r = Reader::new(bytes);
        (self.ier, self.lcr, self.mcr, self.scratch) = (r.u8() & 0xf, r.u8(), r.u8() & 0x1f, r.u8());
        self.divisor = u16::from(r.u8()) | u16::from(r.u8()) << 8;
        self.fcr = r.u8();
    }
}
