//! TLS end to end: whose certificates are good, what both sides say of others, what a wire shows, and that nobody gets into a session
//! that is not his.

#[path = "tls/certificates.rs"]
mod certificates;
#[path = "tls/command.rs"]
mod command;
mod common;
#[path = "tls/lab.rs"]
mod lab;
#[path = "tls/rogue.rs"]
mod rogue;
#[path = "tls/wire.rs"]
mod wire;
