//! Least privilege: what a command gives up before it starts a thread, for most of it holds for a thread and for what that starts.
//!
//! A command makes a [`Profile`] of what it will need and enters it: capabilities are dropped for good, nothing that it runs gains
//! any (`no_new_privs`), files and TCP ports are bounded by landlock, and system calls that it never makes are refused by seccomp.
//! What is refused is an error, never a signal: whoever was wrong about a profile loses a request and not a guest.

mod calls;
mod caps;
mod files;
mod profile;

use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use clap::{Args, ValueEnum};
use pageferry::Uri;
use pageferry::vmm_shim::room;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{CliError, Exit};
pub(super) use profile::Profile;

/// Options of every command that listens.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sandbox")]
pub(super) struct SandboxArgs {
    /// What the process may still do once it has started
    #[arg(long, value_enum, default_value_t = Mode::On, value_name = "MODE")]
    sandbox: Mode,
    /// The same as --sandbox off: to see whether the sandbox is in the way of something
    #[arg(long, conflicts_with_all = ["sandbox", "allow_path"])]
    no_sandbox: bool,
    /// A file or folder that may be read and written, besides those that the command names; may be given more than once
    #[arg(long, value_name = "PATH")]
    allow_path: Vec<PathBuf>,
}

/// How much is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Mode {
    /// What the command never needs
    On,
    /// Other programs (exec:), too, and all files but those that are named
    Strict,
    /// Nothing
    Off,
}

/// How a process is confined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(super) struct Confinement {
    /// What was asked for.
    pub mode: Mode,
    /// What of it this kernel does not have.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub lacks: Vec<String>,
}

/// Something of a sandbox that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Lack {
    text: String,
    /// The rest is worth little without it.
    essential: bool,
}

/// Why `exec:` is refused.
pub(super) const NO_PROGRAMS: &str =
    "--sandbox strict runs no other program, and so no exec: command; use --sandbox on for that";

/// This process's; there is one.
static ENTERED: OnceLock<Confinement> = OnceLock::new();

/// How this process is confined.
pub(super) fn confinement() -> Confinement {
    ENTERED.get().cloned().unwrap_or(Confinement { mode: Mode::Off, lacks: Vec::new() })
}

impl SandboxArgs {
    /// How much is asked for.
    pub(super) fn mode(&self) -> Mode {
        if self.no_sandbox { Mode::Off } else { self.sandbox }
    }

    /// Whether files are only those that are named, and programs none.
    pub(super) fn is_strict(&self) -> bool {
        self.mode() == Mode::Strict
    }

    /// Refuses a command to load a guest through, where none is to be run.
    pub(super) fn check(&self, uri: &Uri) -> Result<(), CliError> {
        match uri {
            Uri::Exec(_) if self.is_strict() => Err(CliError { exit: Exit::Usage, text: NO_PROGRAMS.into() }),
            _ => Ok(()),
        }
    }

    /// Gives up all that `profile` has not, for good. The calling thread has started none that it matters for.
    ///
    /// # Errors
    /// When a path of --allow-path is not there, or `strict` is more than this kernel can do.
    pub(super) fn enter(&self, mut profile: Profile) -> Result<(), CliError> {
        let mode = self.mode();
        let mut lacks = Vec::new();
        if mode != Mode::Off {
            for path in &self.allow_path {
                profile.allow(path).map_err(|e| CliError {
                    exit: Exit::CannotStart,
                    text: format!("--allow-path {}: {e}", path.display()),
                })?;
            }
            // Programs that it runs keep account there, too. Where it cannot be had, guests are told of when they come.
            if let Ok(account) = room::open_account() {
                profile.keep(&account);
            }
            let missing = engage(&profile);
            if let (Mode::Strict, Some(lack)) = (mode, missing.iter().find(|lack| lack.essential)) {
                let text = format!("--sandbox strict cannot be had here: {}; use --sandbox on", lack.text);
                return Err(CliError { exit: Exit::CannotStart, text });
            }
            lacks = missing.into_iter().map(|lack| lack.text).collect();
            for lack in &lacks {
                tracing::warn!("the sandbox is not complete: {lack}");
            }
        }
        tracing::debug!(?mode, ?profile, "sandbox");
        let _ = ENTERED.set(Confinement { mode, lacks });
        Ok(())
    }
}

/// Gives up all that `profile` has not; what could not be given up. In this order: the later steps take calls that the first needs.
fn engage(profile: &Profile) -> Vec<Lack> {
    let dropped = caps::keep(profile.capabilities()).err().map(|e| Lack {
        text: format!("capabilities and no_new_privs could not be set ({e})"),
        essential: true,
    });
    let files = files::restrict(profile);
    let calls = calls::refuse(profile.runs_programs()).err().map(|e| Lack {
        text: format!("system calls are not filtered ({e}); seccomp takes CONFIG_SECCOMP_FILTER"),
        essential: true,
    });
    wait_for_leaving();
    [dropped, files, calls].into_iter().flatten().collect()
}

/// Threads that are about to give everything up, and word of those that have.
static LEAVING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());
/// How long a command waits for them: they start at once, where a host has the time.
const LEAVING_PATIENCE: Duration = Duration::from_secs(10);

fn leaving() -> MutexGuard<'static, usize> {
    LEAVING.0.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread that starts before its process knows what it will need, and then only computes, and uses descriptors that are open.
#[derive(Debug)]
pub(super) struct Leaving(());

impl Leaving {
    /// Before it starts: whoever enters a profile waits for it.
    pub(super) fn begin() -> Self {
        *leaving() += 1;
        Self(())
    }

    /// Gives up everything for the calling thread.
    pub(super) fn leave_nothing(self) {
        // What cannot be given up is the process's to tell.
        let _ = caps::keep(caps::NONE);
        let _ = files::restrict(&Profile::nothing());
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        *leaving() -= 1;
        LEAVING.1.notify_all();
    }
}

/// Waits until all who begin have ended.
fn wait_for_leaving() {
    let patience = LEAVING.1.wait_timeout_while(leaving(), LEAVING_PATIENCE, |leaving| *leaving != 0);
    drop(patience);
}

/// What is refused to whoever lacks a privilege, and its text says which: the sandbox has nothing to do with it.
const NAMED: &[&str] = &["cannot listen on", "/dev/kvm", "userfaultfd"];

/// What a user can do where the sandbox may have refused what failed with this text.
pub(super) fn hint(text: &str) -> Option<&'static str> {
    let refused = ["(os error 13)", "(os error 1)"].iter().any(|refused| text.contains(refused));
    match confinement().mode {
        Mode::Off => None,
        _ if !refused || NAMED.iter().any(|named| text.contains(named)) => None,
        Mode::On => Some("; this process's sandbox may be the reason: see --allow-path and --no-sandbox"),
        Mode::Strict => Some("; --sandbox strict may be the reason: see --allow-path and --sandbox on"),
    }
}

#[cfg(test)]
mod tests;
