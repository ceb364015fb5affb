//! Why the lab does not start, or did not come to an end.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use super::super::{CliError, Exit};

/// A failure of the lab itself, as opposed to one of the command that runs in it.
#[derive(Debug, thiserror::Error)]
pub(super) enum LabError {
    /// Programs that the host lacks.
    #[error("the lab needs {what}; as root: apt-get install {packages}{how}")]
    Missing {
        /// The missing things.
        what: String,
        /// The packages that have them.
        packages: String,
        /// What else to know.
        how: &'static str,
    },
    /// A kernel for the guest is neither cached nor installed, and none can be downloaded.
    #[error("there is no kernel for the lab guest: {reason}")]
    NoKernel {
        /// What was tried, and what to do.
        reason: String,
    },
    /// A kernel that lacks modules.
    #[error("the kernel {kernel} has no module {module}; name another with --kernel PACKAGE")]
    NoModule {
        /// Its version.
        kernel: String,
        /// The module.
        module: String,
    },
    /// A file or folder.
    #[error("{what} {}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A program that the lab calls.
    #[error("`{command}` failed: {reason}")]
    Tool {
        /// The command line.
        command: String,
        /// Its last words.
        reason: String,
    },
    /// The guest cannot make what the command needs.
    #[error("the lab guest cannot run the command: {reason}{console}")]
    Setup {
        /// The guest's words.
        reason: String,
        /// The last lines of the console.
        console: String,
    },
    /// QEMU ended, or the guest's kernel panicked or rebooted.
    #[error("the lab guest stopped before its command had ended{reason}{console}")]
    Stopped {
        /// What QEMU said.
        reason: String,
        /// The last lines of the console.
        console: String,
    },
    /// It took too long.
    #[error(
        "the lab's command had not ended after {} s and was killed; more time: --timeout S{console}",
        after.as_secs()
    )]
    TimedOut {
        /// The limit.
        after: Duration,
        /// The last lines of the console.
        console: String,
    },
    /// Somebody asked.
    #[error("cancelled; the lab's command was ended")]
    Cancelled,
    /// `--host` cannot be.
    #[error("the lab cannot use this host's RDMA: {reason}")]
    Host {
        /// Why not, and what to do.
        reason: String,
    },
    /// What ran in the guest did not do what it should.
    #[error("{0}")]
    Inside(String),
}

impl LabError {
    /// For `map_err` of an operation on a file.
    pub(super) fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { what, path, source }
    }

    /// For a program that ended badly.
    pub(super) fn tool(command: &str, output: &Output) -> Self {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().rev().find(|line| !line.trim().is_empty());
        let reason = last.map_or_else(|| output.status.to_string(), str::to_owned);
        Self::Tool { command: command.into(), reason }
    }
}

impl From<LabError> for CliError {
    fn from(error: LabError) -> Self {
        let exit = match error {
            LabError::Setup { .. } | LabError::Stopped { .. } => Exit::LabStopped,
            LabError::TimedOut { .. } => Exit::TimedOut,
            LabError::Cancelled => Exit::Cancelled,
            LabError::Inside(_) => Exit::Failed,
            _ => Exit::CannotStart,
        };
        Self { exit, text: crate::cli::words::explain(&error) }
    }
}
