//! The guest's state, as it is saved for the wire.

use pagecopy::backend::{BackendError, Guest, StateBlob, StateSink};
use pagecopy::layout::REGION_NAME_MAX;

use super::{Cause, RUN_STATE, check};
use crate::wire::control::{Message, STATE_BLOBS_MAX, STATE_LEN_MAX, state_digest};

/// The message with a paused guest's state, and the state's digest. `ran`: whether the guest ran before it was paused.
pub(super) fn save(guest: &dyn Guest, ran: u8) -> Result<(Message, u64), Cause> {
    let state = pieces(guest, ran)?;
    let digest = state_digest(&state);
    Ok((Message::State(state), digest))
}

/// The pieces of it, within the limits of a message.
pub(super) fn pieces(guest: &dyn Guest, ran: u8) -> Result<Vec<StateBlob>, Cause> {
    let mut buffer = Buffer { pieces: Vec::new(), left: STATE_LEN_MAX };
    guest.save_state(&mut buffer)?;
    let mut state = buffer.pieces;
    state.push(StateBlob { name: RUN_STATE.into(), version: 1, bytes: vec![ran] });
    let message = Message::State(state);
    check(&message)?;
    let Message::State(state) = message else { unreachable!("it was made so") };
    Ok(state)
}

/// Pieces of state, as many as a message takes: a guest with more learns so before it has said all of it.
struct Buffer {
    pieces: Vec<StateBlob>,
    left: usize,
}

impl StateSink for Buffer {
    fn begin(&mut self, name: &str, version: u32) -> Result<(), BackendError> {
        if self.pieces.len() == STATE_BLOBS_MAX {
            let what =
                format!("save device state: piece {name:?} is one too many; {STATE_BLOBS_MAX} are supported");
            return Err(BackendError::invalid(what));
        }
        if name.len() > REGION_NAME_MAX {
            let what = format!(
                "save device state: a piece's name of {} bytes, {name:?}, is longer than {REGION_NAME_MAX}",
                name.len()
            );
            return Err(BackendError::invalid(what));
        }
        self.pieces.begin(name, version)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BackendError> {
        let Some(left) = self.left.checked_sub(bytes.len()) else {
            let name = self.pieces.last().map_or("", |piece| &piece.name);
            let what =
                format!("save device state: with piece {name:?} it is larger than {STATE_LEN_MAX} bytes");
            return Err(BackendError::invalid(what));
        };
        self.left = left;
        StateSink::write(&mut self.pieces, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_taken_than_a_message_holds() {
        let mut buffer = Buffer { pieces: Vec::new(), left: STATE_LEN_MAX };
        assert!(buffer.begin(&"x".repeat(REGION_NAME_MAX + 1), 1).is_err());
        buffer.begin("vfio/0", 1).unwrap();
        let part = vec![0; STATE_LEN_MAX / 4];
        for _ in 0..4 {
            buffer.write(&part).unwrap();
        }
        let text = buffer.write(&[1]).unwrap_err().to_string();
        assert!(text.contains("vfio/0") && text.contains("67108864"), "{text}");
        for _ in 1..STATE_BLOBS_MAX {
            buffer.begin("more", 1).unwrap();
        }
        assert!(buffer.begin("one too many", 1).is_err());
    }
}
