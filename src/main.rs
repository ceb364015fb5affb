//! The `pageferry` command: arguments, output and exit codes; the work is in the library.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: pageferry::reserve::Allocator = pageferry::reserve::Allocator;

fn main() -> ExitCode {
    pageferry::cli::run()
}
