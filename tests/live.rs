//! Live migration end to end: real processes, real sockets, a real guest on KVM, and everything that can be killed or cut
//! on the way. The judge is the counter guest itself: its output, over all processes, is one unbroken chain.
//!
//! Without `/dev/kvm` each test says so and goes with `--no-kvm`, where that makes sense.

#[path = "live/cancel.rs"]
mod cancel;
#[path = "live/commands.rs"]
mod commands;
#[path = "common/mod.rs"]
mod common;
#[path = "live/demo.rs"]
mod demo;
#[path = "common/ends.rs"]
mod ends;
#[path = "live/flight.rs"]
mod flight;
#[path = "live/guests.rs"]
mod guests;
#[path = "live/handover.rs"]
mod handover;
#[path = "live/kill.rs"]
mod kill;
// glibc keeps what is free, and is told how by its tunables.
#[cfg(target_env = "gnu")]
#[path = "live/memory.rs"]
mod memory;
#[path = "live/proxy.rs"]
mod proxy;
#[path = "live/resume.rs"]
mod resume;
#[path = "live/save.rs"]
mod save;
#[path = "live/session.rs"]
mod session;
#[path = "live/streams.rs"]
mod streams;
#[path = "live/tls.rs"]
mod tls;
#[path = "live/torn.rs"]
mod torn;
#[path = "live/tuning.rs"]
mod tuning;
#[path = "live/vm.rs"]
mod vm;
