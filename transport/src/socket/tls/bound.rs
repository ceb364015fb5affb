//! What ties a connection to its session.
//!
//! The control connection's secrets give the session a key that only its two ends know (RFC 8446, section 7.5). Each other connection
//! begins with a proof: a keyed hash of what its own secrets say. So nobody else's certificate, however good, gets into a session, and
//! no proof is of use on another connection than its own.

use ring::hmac;

use crate::wire::{Preamble, SessionId};

/// Bytes of a proof.
pub(crate) const PROOF_LEN: usize = 32;
const SESSION_LABEL: &[u8] = b"EXPORTER-pageferry-session";
const CONNECTION_LABEL: &[u8] = b"EXPORTER-pageferry-connection";

/// Known to both ends of a session's first control connection.
#[derive(Clone)]
pub(crate) struct SessionKey(hmac::Key);

/// Without its bytes.
impl std::fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionKey")
    }
}

impl SessionKey {
    /// Of the session with this id, whose control connection this is.
    pub(super) fn of(control: &rustls::Connection, session: &SessionId) -> Result<Self, rustls::Error> {
        let bytes = control.export_keying_material([0; 32], SESSION_LABEL, Some(session))?;
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes)))
    }

    /// That whoever opens a connection with this preamble has the key.
    pub(super) fn prove(
        &self,
        connection: &rustls::Connection,
        preamble: &Preamble,
    ) -> Result<[u8; PROOF_LEN], rustls::Error> {
        let said = own(connection, preamble)?;
        let tag = hmac::sign(&self.0, &said);
        Ok(*tag.as_ref().first_chunk().expect("the length of a SHA-256"))
    }

    /// Whether it does. Takes as long for every proof.
    pub(super) fn check(
        &self,
        connection: &rustls::Connection,
        preamble: &Preamble,
        proof: &[u8; PROOF_LEN],
    ) -> bool {
        own(connection, preamble).is_ok_and(|said| hmac::verify(&self.0, &said, proof).is_ok())
    }
}

/// What nobody knows but the two ends of this connection.
fn own(connection: &rustls::Connection, preamble: &Preamble) -> Result<[u8; 32], rustls::Error> {
    connection.export_keying_material([0; 32], CONNECTION_LABEL, Some(&preamble.encode()))
}
