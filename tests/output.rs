//! What commands print, and what becomes of them where nobody takes it: standard output and standard error that are a closed pipe, a
//! full file system, or a pipe that nobody reads. Real processes; guests on KVM where there is it.

#[allow(dead_code, reason = "shared with tests/live.rs, of which this is a part")]
#[path = "live/proxy.rs"]
mod proxy;
#[allow(dead_code, reason = "shared with tests/live.rs, of which this is a part")]
#[path = "live/vm.rs"]
mod vm;

#[path = "output/answers.rs"]
mod answers;
#[path = "output/control.rs"]
mod control;
#[path = "output/postcopy.rs"]
mod postcopy;
#[path = "output/sinks.rs"]
mod sinks;
#[path = "output/table.rs"]
mod table;
