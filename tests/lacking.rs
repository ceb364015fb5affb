//! What a host lacks, and threads that panic: room in a file system, memory, threads. Each is an error of the migration, told to both
//! sides at once, and never the silent end of a process.

#[path = "lacking/claims.rs"]
mod claims;
#[path = "common/mod.rs"]
mod common;
#[path = "common/ends.rs"]
mod ends;
#[path = "lacking/holes.rs"]
mod holes;
#[path = "lacking/hosts.rs"]
mod hosts;
#[path = "lacking/limits.rs"]
mod limits;
#[path = "lacking/panics.rs"]
mod panics;
#[path = "lacking/room.rs"]
mod room;
