//! Files and TCP ports, bounded by landlock. It holds for the calling thread and for what it starts from then on.

use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, RestrictionStatus, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};

use super::Lack;
use super::profile::{Access, Profile};

/// What is asked for; an older kernel does what it knows.
const WANTED: ABI = ABI::V6;

/// Folders of the system, which nobody saves a guest to and whoever took this process over would like to write to.
const SYSTEM: &[&str] =
    &["bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "sys", "usr"];

/// Restricts the calling thread; what this kernel lacks for it.
pub(super) fn restrict(profile: &Profile) -> Option<Lack> {
    let essential =
        |why: String| Some(Lack { text: format!("files are not restricted ({why})"), essential: true });
    match apply(profile) {
        Ok(RestrictionStatus { ruleset: RulesetStatus::FullyEnforced, .. }) => None,
        Ok(RestrictionStatus { landlock: LandlockStatus::Available { effective_abi, .. }, .. }) => {
            Some(Lack {
                text: format!(
                    "landlock of this kernel is of ABI {}, and does only a part of ABI {}",
                    effective_abi as i32, WANTED as i32
                ),
                essential: effective_abi < ABI::V3,
            })
        }
        Ok(RestrictionStatus { landlock: LandlockStatus::NotEnabled, .. }) => {
            essential("landlock is off: add it to the kernel's lsm= list".into())
        }
        Ok(_) => essential("this kernel has no landlock, which takes Linux 5.13".into()),
        Err(e) => essential(pageferry::explain(&e)),
    }
}

fn apply(profile: &Profile) -> Result<RestrictionStatus, RulesetError> {
    let mut wanted = Ruleset::default()
        .handle_access(AccessFs::from_all(WANTED))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::Signal)?;
    if !profile.connects() {
        wanted = wanted.handle_access(AccessNet::ConnectTcp)?.scope(Scope::AbstractUnixSocket)?;
    }
    let mut rules = wanted.create()?;
    for (path, access) in profile.files() {
        rules = rules.add_rules(path_beneath_rules([path], rights(*access)))?;
    }
    if profile.writes_most() {
        for folder in others() {
            rules = rules.add_rules(path_beneath_rules([folder], rights(Access::Folder)))?;
        }
    }
    for &port in profile.ports() {
        rules = rules.add_rule(NetPort::new(port, AccessNet::BindTcp))?;
    }
    rules.restrict_self()
}

/// What is in the root folder besides the system's.
fn others() -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(Path::new("/")).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let wanted = folders.filter(|entry| !SYSTEM.iter().any(|name| entry.file_name() == *name));
    wanted.map(|entry| entry.path()).collect()
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let file = read | AccessFs::WriteFile | AccessFs::Truncate;
    match access {
        Access::Read => read,
        Access::Run => read | AccessFs::Execute,
        Access::Kept => read | AccessFs::WriteFile,
        Access::Device => read | AccessFs::WriteFile | AccessFs::IoctlDev,
        Access::Sockets => AccessFs::MakeSock | AccessFs::RemoveFile,
        Access::Files => file | AccessFs::MakeReg | AccessFs::RemoveFile,
        Access::Folder => {
            let make = AccessFs::MakeReg
                | AccessFs::MakeDir
                | AccessFs::MakeSock
                | AccessFs::MakeFifo
                | AccessFs::MakeSym;
            file | make | AccessFs::RemoveFile | AccessFs::RemoveDir | AccessFs::Refer
        }
    }
}
