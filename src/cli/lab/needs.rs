//! What the lab needs from the host, what of it is missing, and which Debian packages have it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(super) use pageferry::cli::measure::process::{path, program};

use super::error::LabError;
use crate::cli::say;

/// Something that must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// A program in the path.
    Program(&'static str, &'static str),
    /// busybox, linked statically: the guest has no libraries when it starts.
    StaticBusybox,
    /// A file at this place.
    File(&'static str, &'static str),
}

/// What every guest takes.
pub(super) const GUEST: &[Need] = &[
    Need::Program("qemu-system-x86_64", "qemu-system-x86"),
    Need::StaticBusybox,
    Need::Program("ip", "iproute2"),
    Need::Program("rdma", "iproute2"),
    Need::File("/etc/libibverbs.d/rxe.driver", "ibverbs-providers"),
];
/// What `--host` takes.
pub(super) const HOST: &[Need] = &[Need::Program("ip", "iproute2"), Need::Program("rdma", "iproute2")];
/// What the benches take besides.
pub(super) const BENCH: &[Need] = &[Need::Program("ib_write_bw", "perftest")];
/// What unpacks the modules of some kernels.
pub(super) const XZ: Need = Need::Program("xz", "xz-utils");
/// What gets and unpacks the kernel.
pub(super) const APT: &[Need] = &[Need::Program("apt-get", "apt"), Need::Program("dpkg-deb", "dpkg")];

impl Need {
    fn package(self) -> &'static str {
        match self {
            Self::Program(_, package) | Self::File(_, package) => package,
            Self::StaticBusybox => "busybox-static",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Program(name, _) | Self::File(name, _) => name,
            Self::StaticBusybox => "busybox (statically linked)",
        }
    }

    fn is_there(self) -> bool {
        match self {
            Self::Program(name, _) => program(name).is_some(),
            Self::StaticBusybox => static_busybox().is_some(),
            Self::File(path, _) => Path::new(path).exists(),
        }
    }
}

/// A busybox that needs no libraries.
pub(super) fn static_busybox() -> Option<PathBuf> {
    let path = path();
    let places = env::split_paths(&path).map(|folder| folder.join("busybox")).chain(["/bin/busybox".into()]);
    let mut found = places.filter(|path| path.is_file());
    found.find(|path| std::fs::read(path).is_ok_and(|bytes| is_static(&bytes)))
}

/// Whether a program names no interpreter, as those do that take shared libraries.
fn is_static(program: &[u8]) -> bool {
    let head = &program[..program.len().min(4096)];
    program.starts_with(b"\x7fELF") && !head.windows(9).any(|window| window == b"ld-linux-")
}

/// What of `needs` is missing, as one error.
pub(super) fn check(needs: &[Need]) -> Result<(), LabError> {
    let missing: Vec<Need> = needs.iter().copied().filter(|need| !need.is_there()).collect();
    if missing.is_empty() { Ok(()) } else { Err(complaint(&missing)) }
}

fn complaint(missing: &[Need]) -> LabError {
    let names: Vec<_> = missing.iter().map(|need| need.name()).collect();
    let how = if program("apt-get").is_some() {
        " (or run this with --install)"
    } else {
        " (the names are Debian's; other distributions have the same programs in packages of similar names)"
    };
    LabError::Missing { what: names.join(", "), packages: packages(missing).join(" "), how }
}

/// The packages of what is missing, each once.
fn packages(missing: &[Need]) -> Vec<&'static str> {
    let mut packages: Vec<_> = missing.iter().map(|need| need.package()).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

/// Installs what of `needs` is missing. Only root may.
pub(super) fn install(needs: &[Need]) -> Result<(), LabError> {
    let missing: Vec<Need> = needs.iter().copied().filter(|need| !need.is_there()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() || program("apt-get").is_none() {
        return Err(complaint(&missing));
    }
    let packages = packages(&missing);
    say(format_args!("installing {}", packages.join(" ")));
    // Old package lists may do without a network, so that alone does not fail.
    let _ = apt_get(&["update", "-qq"]);
    apt_get(&[&["install", "-y", "-qq", "--no-install-recommends"], packages.as_slice()].concat())?;
    check(needs)
}

/// Runs apt-get without questions.
pub(super) fn apt_get(args: &[&str]) -> Result<(), LabError> {
    let line = format!("apt-get {}", args.join(" "));
    let mut command = Command::new("apt-get");
    command.args(args).env("PATH", path()).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    let output = command.output().map_err(LabError::file("run", Path::new("apt-get")))?;
    if output.status.success() { Ok(()) } else { Err(LabError::tool(&line, &output)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_error_names_everything() {
        let error = complaint(&[Need::StaticBusybox, GUEST[2], GUEST[3], GUEST[0]]).to_string();
        assert!(error.contains("busybox (statically linked), ip, rdma, qemu-system-x86_64"), "{error}");
        assert!(error.contains("apt-get install busybox-static iproute2 qemu-system-x86"), "{error}");
        assert!(check(&[Need::File("/nowhere/at all", "nothing")]).is_err());
        assert!(check(&[Need::Program("sh", "dash")]).is_ok());
    }

    #[test]
    fn static_programs_are_told_from_others() {
        assert!(is_static(b"\x7fELF\x02\x01"));
        assert!(!is_static(b"\x7fELF\x02\x01\0\0/lib64/ld-linux-x86-64.so.2\0"));
        assert!(!is_static(b"#!/bin/sh\n"));
    }
}
