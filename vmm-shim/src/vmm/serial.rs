//! The console: a 16550 UART whose transmitter is always ready, and whose receiver never has anything.

use std::io::Write;
use std::time::{Duration, Instant};

use super::blobs::Reader;

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

    /// Writes what has gathered. A sink that fails is not used again: the guest does not stop for its
    /// console.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_its_registers_over_a_move() {
        let mut a = Serial::new(Box::new(Vec::new()));
        for (register, value) in
            [(3, 0x83), (0, 0x34), (1, 0x12), (3, 0x1b), (1, 0x05), (2, 0x01), (4, 0x0b), (7, 0xa5)]
        {
            a.write(register, value);
        }
        let state = a.save();
        assert_eq!(state, [0x05, 0x1b, 0x0b, 0xa5, 0x34, 0x12, 0x01, 0]);
        assert_eq!(state.len(), Serial::STATE_LEN);
        let mut b = Serial::new(Box::new(Vec::new()));
        b.load(&state);
        assert_eq!(b.save(), state);
        assert_eq!((b.read(5), b.read(2), b.read(7), b.read(1)), (0x60, 0xc1, 0xa5, 0x05));
        b.write(3, 0x80);
        assert_eq!((b.read(0), b.read(1)), (0x34, 0x12));
    }

    #[test]
    fn a_failing_sink_does_not_stop_the_guest() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut serial = Serial::new(Box::new(Broken));
        (0..10_000).for_each(|_| serial.write(0, b'\n'));
        assert!(serial.out.is_empty() && serial.failed);
    }
}
