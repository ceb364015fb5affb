//! The `pageferry` command: arguments, output and exit codes; the work is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    pageferry::cli::run()
}
