//! Bad input from every side: strangers, damaged bytes, cut connections, silent and lying peers, killed processes, wrong
//! arguments. Nothing hangs, nothing panics, every error names what is wrong, and a good transfer afterwards works.

mod common;

#[allow(dead_code, reason = "shared with tests/inspect.rs, of which this is a part")]
#[path = "inspect/hand.rs"]
mod hand;
#[allow(dead_code, reason = "shared with tests/tls.rs, of which this is a part")]
#[path = "tls/lab.rs"]
mod lab;
#[allow(dead_code, reason = "shared with tests/live.rs, of which this is a part")]
#[path = "live/vm.rs"]
mod vm;

#[path = "hostile/arguments.rs"]
mod arguments;
#[path = "hostile/floods.rs"]
mod floods;
#[path = "hostile/processes.rs"]
mod processes;
#[path = "hostile/table.rs"]
mod table;
#[path = "hostile/to_destination.rs"]
mod to_destination;
#[path = "hostile/to_source.rs"]
mod to_source;
#[path = "hostile/wire.rs"]
mod wire;
