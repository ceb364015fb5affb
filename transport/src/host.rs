//! Whether both ends of a session run under one kernel, and so share its cores: asked of the peer, never guessed from an address.
//!
//! A tunnel, a proxy or a port forward on this host looks like this host, and this host may well have an address that does not. What
//! tells is the kernel's boot id, a random UUID that every process under that kernel reads alike, in containers and namespaces
//! too. Neither side says it: it is the *key* under which each hashes the session's seed. The source says its hash in
//! HELLO; the destination compares it with what the source would say if it were here, and only then answers with a hash of its own,
//! which the source compares in turn. So
//! - who does not know the boot id cannot find it: SipHash-2-4 hides its key, and 122 of the key's bits are random;
//! - hashes of one host differ from session to session, so that nobody knows it again by them;
//! - a stranger who asks a destination learns nothing, as he has no hash that it would answer;
//! - who does not know the boot id cannot claim to be here, neither by chance (2^-64) nor by saying what he heard: each side's hash is
//!   another. Who has a helper on the host can; what he gains is that a migration reckons with cores that it need not share.
//!
//! Of a host without a readable boot id, nothing is said: it shares its cores with nobody.

use std::hash::Hasher;

use siphasher::sip::SipHasher24;

/// Where Linux says it.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// What is said of a host that cannot tell.
const UNKNOWN: u64 = 0;

/// Who says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Side {
    /// In HELLO.
    Source = 1,
    /// In WELCOME.
    Destination = 2,
}

/// The kernel that a side runs under, as far as it is known.
#[derive(Clone, Copy)]
pub struct Host {
    boot_id: Option<[u8; 16]>,
}

impl Host {
    /// The one that this process runs under.
    pub fn this() -> Self {
        Self { boot_id: std::fs::read_to_string(BOOT_ID).ok().as_deref().and_then(parse) }
    }

    /// A host with this boot id.
    pub fn with_boot_id(boot_id: [u8; 16]) -> Self {
        Self { boot_id: Some(boot_id) }
    }

    /// What a side says of its host in a session; 0 if it does not know.
    pub fn digest(&self, side: Side, seed: u64) -> u64 {
        self.boot_id.map_or(UNKNOWN, |key| {
            let mut hasher = SipHasher24::new_with_key(&key);
            hasher.write(&[side as u8]);
            hasher.write(&seed.to_le_bytes());
            hasher.finish()
        })
    }

    /// What the destination answers to a source that said `theirs`: something only if that one is on this host.
    pub fn answer(&self, theirs: u64, seed: u64) -> u64 {
        if self.is_of(theirs, Side::Source, seed) { self.digest(Side::Destination, seed) } else { UNKNOWN }
    }

    /// Whether a peer that said `theirs` is on this host.
    pub fn is_of(&self, theirs: u64, side: Side, seed: u64) -> bool {
        theirs != UNKNOWN && theirs == self.digest(side, seed)
    }
}

/// A UUID as the kernel writes it, in the order in which it stands there.
fn parse(text: &str) -> Option<[u8; 16]> {
    let text = text.trim_end();
    let dashes = text.bytes().enumerate().all(|(i, byte)| (byte == b'-') == [8, 13, 18, 23].contains(&i));
    let digits = text.replace('-', "");
    let plain = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = u128::from_str_radix(&digits, 16).ok().filter(|&id| dashes && plain && id != 0)?;
    Some(id.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Host = Host { boot_id: Some([7; 16]) };
    const THERE: Host = Host { boot_id: Some([8; 16]) };
    const MUTE: Host = Host { boot_id: None };

    /// What both ends conclude: the source at `source`, the destination at `destination`.
    fn shared(source: Host, destination: Host) -> bool {
        let said = source.digest(Side::Source, 5);
        let answer = destination.answer(said, 5);
        source.is_of(answer, Side::Destination, 5)
    }

    #[test]
    fn only_one_kernel_is_one_host() {
        assert!(shared(HERE, HERE));
        for (source, destination) in [(HERE, THERE), (THERE, HERE), (HERE, MUTE), (MUTE, HERE), (MUTE, MUTE)]
        {
            assert!(!shared(source, destination));
        }
        assert!(shared(Host::this(), Host::this()), "this host has a boot id");
    }

    #[test]
    fn what_was_heard_proves_nothing() {
        let said = HERE.digest(Side::Source, 5);
        // A destination elsewhere that says what it was told, or what it heard in another session.
        assert!(!HERE.is_of(said, Side::Destination, 5));
        let other = HERE.answer(HERE.digest(Side::Source, 6), 6);
        assert!(!HERE.is_of(other, Side::Destination, 5));
        // A stranger who asks is told nothing.
        for guess in [UNKNOWN, 1, said ^ 1, THERE.digest(Side::Source, 5)] {
            assert_eq!(HERE.answer(guess, 5), UNKNOWN);
        }
        assert_eq!(MUTE.answer(UNKNOWN, 5), UNKNOWN);
    }

    #[test]
    fn a_boot_id_is_a_uuid_or_none() {
        let id = parse("00112233-4455-6677-8899-aabbccddeeff\n");
        assert_eq!(id.unwrap()[..4], [0x00, 0x11, 0x22, 0x33]);
        for text in [
            "",
            "\n",
            "00000000-0000-0000-0000-000000000000",
            "00112233445566778899aabbccddeeff",
            "00112233-4455-6677-8899-aabbccddeef",
            "00112233-4455-6677-8899-aabbccddeefff",
            "0011223-34455-6677-8899-aabbccddeeff",
            "+0112233-4455-6677-8899-aabbccddeeff",
            "zz112233-4455-6677-8899-aabbccddeeff",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
