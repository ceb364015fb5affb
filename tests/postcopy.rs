//! Postcopy end to end: a guest that runs at the destination before its pages are there. Real processes, real sockets, a real guest
//! on KVM, whose own output says whether it lost a write or saw a page that is old.
//!
//! Without `/dev/kvm` each test says so and goes with `--no-kvm`.

#[allow(dead_code, reason = "shared with tests/live.rs, of which this is a part")]
#[path = "live/proxy.rs"]
mod proxy;
#[allow(dead_code, reason = "shared with tests/live.rs, of which this is a part")]
#[path = "live/vm.rs"]
mod vm;

#[path = "postcopy/guests.rs"]
mod guests;
#[path = "postcopy/handover.rs"]
mod handover;
#[path = "common/huge_pages.rs"]
mod huge_pages;
#[path = "postcopy/limits.rs"]
mod limits;
#[path = "postcopy/links.rs"]
mod links;
#[path = "postcopy/threads.rs"]
mod threads;
