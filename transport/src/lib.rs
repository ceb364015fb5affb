//! How pages travel: wire format, session machines, streams, flow control and acknowledgement.
//!
//! [`wire`] and [`session`] are pure: bytes in, bytes out, no socket, no clock. [`socket`] opens real connections, [`source`] and
//! [`destination`] hold the stream workers. [`engine`] drives a migration from end to end over them. This crate knows bytes and the
//! addresses of pages; it refuses to know guests, KVM, or where a dirty log comes from: those come in through the traits of
//! [`pagecopy::backend`].

pub mod accept;
pub mod archive;
pub mod carrier;
mod clock;
pub mod destination;
pub mod dial;
pub mod engine;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
#[cfg(any(test, fuzzing))]
mod guest_memory;
mod limit;
pub mod link;
pub mod local;
#[cfg(test)]
mod nowhere;
pub mod postcopy;
#[cfg(feature = "rdma")]
pub mod rdma;
#[cfg(not(feature = "rdma"))]
#[path = "rdma/absent.rs"]
pub mod rdma;
pub mod reserve;
pub mod session;
#[cfg(test)]
mod simulation;
pub mod socket;
pub mod source;
pub mod spent;
pub mod streams;
mod sys;
pub mod uri;
pub mod wire;

/// What a panic said, from what [`std::panic::catch_unwind`] or a thread's end gives.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it did not say why".into())
}
