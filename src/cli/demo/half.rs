//! One side of the demo, for two hosts that share a folder: the destination leaves its address there, the source the guest's output.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::ValueEnum;
use pageferry::cli::print;
use pageferry::vmm_shim::guests::counter::{Checker, Side};

use super::super::api::RunState;
use super::super::{CliError, Exit, output};
use super::{DemoArgs, PATIENCE, VmProcess, migrate, pages_of_each, print_passes, prove, tell, wait_passes};

/// Which side this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Which {
    /// The guest starts here.
    Source,
    /// It comes here.
    Destination,
}

pub(super) fn run(
    args: &DemoArgs,
    side: Which,
    meet: &Path,
    process: bool,
    folder: &Path,
) -> Result<(), CliError> {
    let mut check = Checker::new(args.cpus, pages_of_each(args));
    let (address, printed) = (meet.join("address"), meet.join("source.serial"));
    if side == Which::Destination {
        let mut vm = VmProcess::start(args, process, folder, "destination", args.uri.as_deref())?;
        let uri = vm.wait(|status| status.listening.clone())?;
        publish(&address, uri.as_bytes())?;
        appear(&printed, "the source's output")?;
        prove(&printed, &vm.serial, &mut check).map_err(|e| vm.explain(e))?;
        if args.json {
            print::line(serde_json::json!({ "passes": check.passes() }));
        } else {
            print_passes(&check.passes());
        }
        return Ok(());
    }
    let mut vm = VmProcess::start(args, process, folder, "source", None)?;
    vm.wait(|status| (status.state == RunState::Running).then_some(()))?;
    wait_passes(&vm.serial, &mut check, Side::Source).map_err(|e| vm.explain(e))?;
    appear(&address, "the destination's address")?;
    let uri = fs::read_to_string(&address).map_err(|e| CliError::cannot_start(&e))?;
    tell(args.json, "the guest runs at the source and keeps writing; moving it to the other host");
    let end = migrate(args, &vm, uri);
    // Whatever came of it: the destination must not wait for a file that never comes.
    let text = fs::read(&vm.serial).map_err(|e| CliError::cannot_start(&e))?;
    publish(&printed, &text)?;
    let end = end?;
    output::print(&end.report, args.json);
    end.verdict()
}

/// Makes a file that appears whole.
fn publish(path: &Path, content: &[u8]) -> Result<(), CliError> {
    let new: PathBuf = path.with_extension("new");
    let written = fs::write(&new, content).and_then(|()| fs::rename(&new, path));
    written.map_err(|e| CliError::cannot_start(&e))
}

/// Waits for a file of the other side. Starting takes each side its time, migrating as well.
fn appear(path: &Path, what: &str) -> Result<(), CliError> {
    let deadline = Instant::now() + 10 * PATIENCE;
    while !path.exists() {
        if Instant::now() > deadline {
            let text = format!("{what} does not come to {}; what does the other host say?", path.display());
            return Err(CliError { exit: Exit::Failed, text });
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(())
}
