//! Control over a guest, and its state.

use std::time::Duration;

use super::BackendError;

/// How long [`Guest::pause`] waits for a vCPU. One in the kernel that touches memory which is still to come cannot be stopped before
/// it has.
pub const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// Control over a running guest.
///
/// At the source it is paused and says its state; it is resumed where the migration fails before the guest was handed over. At the
/// destination it takes the state, and is resumed when it is its.
///
/// A VMM writes four methods: `pause`, `resume`, `save_state` and `load_state`.
pub trait Guest: Send + Sync {
    /// *When*: at the source, for the last pages; with a patient peer perhaps more than once, with `resume` between. Also of a guest that
    /// is paused.
    /// *Must*: stop all vCPUs, and whoever else writes guest memory. Return when none runs and all their writes are in memory and in
    /// the dirty log.
    /// *Error*: the guest is as before, and runs where it ran; the migration fails. A vCPU that does not stop within
    /// [`PAUSE_PATIENCE`] is one.
    fn pause(&self) -> Result<(), BackendError>;

    /// *When*: at the destination after GO, once the guest is its own, and at the source where a migration fails after `pause`. Also of a
    /// guest that runs.
    /// *Must*: let all vCPUs run or, where it fails, none, not for one instruction.
    /// *Error*: none has run. A destination then gives the guest back to its source; at a source the guest stays paused.
    fn resume(&self) -> Result<(), BackendError>;

    /// *When*: at a destination whose guest runs and whose missing pages will never come (postcopy alone).
    /// *Must*: stop all vCPUs for ever, also those that wait for such pages. Once each has been told to stop, call `release`, which lets
    /// go on whoever waits for a page ([`MissingPages::end`](super::MissingPages::end)); nothing that the guest does from then on leaves
    /// it. A guest whose memory is whole whenever it runs need not do more than pause, as this default.
    /// *Error*: the guest may still run. Nothing can be done about it: it is lost all the same.
    fn stop_for_good(&self, release: &dyn Fn() -> Result<(), BackendError>) -> Result<(), BackendError> {
        let _ = release;
        self.pause()
    }

    /// What slows the guest down; `None` where nothing does. A guest that writes faster than its pages are sent is then never slowed
    /// down, whatever was asked for.
    fn throttle(&self) -> Option<&dyn Throttle> {
        None
    }

    /// What tries how long the state takes; `None` where that is not to be tried with a guest that runs, because it takes more than a
    /// moment. The time is then guessed.
    fn rehearsal(&self) -> Option<&dyn Rehearsal> {
        None
    }

    /// *When*: at the source, where there is no [`rehearsal`](Self::rehearsal).
    /// *Must*: tell how long pausing, saving and loading the state and resuming take together, as far as that is known. The default is a
    /// guess for few and small devices.
    fn state_time(&self) -> Duration {
        Duration::from_millis(5)
    }

    /// *When*: at the source, after `pause`, while the guest stands still: it is part of the downtime.
    /// *Must*: give the state of everything but memory to `out`, piece by piece, in whatever order `load_state` understands. `out`
    /// takes large pieces as they come: a device's state need not be in one buffer. All pieces together are at most 64 MiB.
    /// *Error*: also one of `out`'s, which is passed on. The migration fails, and the guest runs on.
    fn save_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError>;

    /// *When*: at the destination, before the guest has run: once, or several times where a handover was taken back and done again.
    /// *Must*: put state into the guest in place of what was loaded before, if anything was. Refuse unknown names and versions, and
    /// what is missing: the state comes from another host.
    /// *Error*: the guest must not run with this state; it runs on at the source.
    fn load_state(&self, state: &[StateBlob]) -> Result<(), BackendError>;
}

/// What slows a guest down that writes faster than its pages are sent.
pub trait Throttle {
    /// *When*: between rounds, while the guest runs, and once more with 0 at the end; where limits are changed, at any time.
    /// *Must*: take `percent` (0..=99) of their time from all vCPUs, in place of what was taken before; 0 ends throttling.
    /// *Error*: the migration fails, and the guest runs on.
    fn set(&self, percent: u8) -> Result<(), BackendError>;

    /// The same with a percentage for each vCPU, by its number: as many as [`DirtyLog::written_by_vcpu`](super::DirtyLog::written_by_vcpu)
    /// told of. A guest that cannot do that takes the highest from all, as this default.
    fn set_each(&self, percents: &[u8]) -> Result<(), BackendError> {
        self.set(percents.iter().copied().max().unwrap_or(0))
    }
}

/// What tries how long a guest's state takes.
pub trait Rehearsal {
    /// *When*: a few times in precopy, while the guest runs or is paused.
    /// *Must*: tell how long pausing, saving the state and resuming take together, by doing it; the guest is as before. Wait at most
    /// `limit` for a vCPU to stop.
    /// *Error*: there is no estimate, and it is not tried again. Whoever called resumes a guest that is to run.
    fn rehearse(&self, limit: Duration) -> Result<Duration, BackendError>;
}

/// One named, versioned piece of device or vCPU state, opaque to the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateBlob {
    /// Name, such as `vcpu/0`: at most 255 bytes.
    pub name: String,
    /// Version of the encoding of `bytes`.
    pub version: u32,
    /// The state.
    pub bytes: Vec<u8>,
}

impl StateBlob {
    /// The whole state of a paused guest at once.
    ///
    /// # Errors
    /// As of [`Guest::save_state`].
    pub fn all_of(guest: &dyn Guest) -> Result<Vec<Self>, BackendError> {
        let mut state = Vec::new();
        guest.save_state(&mut state)?;
        Ok(state)
    }
}

/// Where a guest's state goes, piece by piece. A vector of [`StateBlob`] is one.
///
/// ```
/// use pagecopy::backend::{StateBlob, StateSink};
///
/// let mut state = Vec::new();
/// let out: &mut dyn StateSink = &mut state;
/// out.piece("serial", 1, &[3, 0x60])?;
/// // A device that hands its state out in parts.
/// out.begin("vfio/0", 2)?;
/// for part in [[0u8; 4096], [1; 4096]] {
///     out.write(&part)?;
/// }
/// assert_eq!(state[1].bytes.len(), 8192);
/// # Ok::<(), pagecopy::backend::BackendError>(())
/// ```
pub trait StateSink {
    /// Begins a piece, and ends the one before.
    ///
    /// # Errors
    /// When there are too many.
    fn begin(&mut self, name: &str, version: u32) -> Result<(), BackendError>;

    /// Adds bytes to the piece that was begun last.
    ///
    /// # Errors
    /// When no piece was begun, or all of them together are too large.
    fn write(&mut self, bytes: &[u8]) -> Result<(), BackendError>;

    /// A whole piece.
    ///
    /// # Errors
    /// As of [`begin`](Self::begin) and [`write`](Self::write).
    fn piece(&mut self, name: &str, version: u32, bytes: &[u8]) -> Result<(), BackendError> {
        self.begin(name, version)?;
        self.write(bytes)
    }
}

impl StateSink for Vec<StateBlob> {
    fn begin(&mut self, name: &str, version: u32) -> Result<(), BackendError> {
        self.push(StateBlob { name: name.into(), version, bytes: Vec::new() });
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BackendError> {
        let none = || BackendError::invalid("write device state before any piece of it was begun");
        self.last_mut().ok_or_else(none)?.bytes.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_comes_in_parts_of_pieces() {
        let mut state = Vec::new();
        assert!(StateSink::write(&mut state, b"x").is_err());
        StateSink::begin(&mut state, "a", 1).unwrap();
        state.piece("b", 2, b"12").unwrap();
        StateSink::write(&mut state, b"3").unwrap();
        let piece =
            |name: &str, version, bytes: &[u8]| StateBlob { name: name.into(), version, bytes: bytes.into() };
        assert_eq!(state, [piece("a", 1, b""), piece("b", 2, b"123")]);
    }
}
