//! Bad input from every side: strangers, damaged bytes, cut connections, silent and lying peers, killed processes, wrong
//! arguments. Nothing hangs, nothing panics, every error names what is wrong, and a good transfer afterwards works.

mod common;

#[path = "hostile/arguments.rs"]
mod arguments;
#[path = "hostile/floods.rs"]
mod floods;
#[path = "hostile/hosts.rs"]
mod hosts;
#[path = "hostile/processes.rs"]
mod processes;
#[path = "hostile/to_destination.rs"]
mod to_destination;
#[path = "hostile/to_source.rs"]
mod to_source;
#[path = "hostile/wire.rs"]
mod wire;
