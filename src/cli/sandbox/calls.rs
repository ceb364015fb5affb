//! System calls that are refused, by seccomp. All others are let through: a list of what is allowed would have to be complete, also in
//! what a library does once in a while, and what it misses costs a guest.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

/// What no command of this program, and no program that one runs for it, has a use for.
const NEVER: &[libc::c_long] = &[
    // Looking into other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    // The file system as others see it.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    // Namespaces; `clone` is below.
    libc::SYS_unshare,
    libc::SYS_setns,
    // The kernel itself.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_reboot,
    libc::SYS_vhangup,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_personality,
    // Calls by another way, which a filter does not see.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Keys.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // The host's clock and name.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];

/// The same, of this architecture alone.
#[cfg(target_arch = "x86_64")]
const NEVER_HERE: &[libc::c_long] = &[
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS__sysctl,
    libc::SYS_ustat,
    libc::SYS_sysfs,
];
#[cfg(not(target_arch = "x86_64"))]
const NEVER_HERE: &[libc::c_long] = &[];

/// What only programs have a use for that are run: to become another one, or another user.
const PROGRAMS: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
];
#[cfg(target_arch = "x86_64")]
const FORKS: &[libc::c_long] = &[libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const FORKS: &[libc::c_long] = &[];

/// Namespaces that `clone` makes.
const NEW_NAMESPACES: &[libc::c_int] = &[
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];
/// Kinds of sockets that there are: of the host, of both internets, and to ask the kernel about addresses.
const FAMILIES: &[libc::c_int] = &[libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
/// What types into a terminal as if its user had.
const TYPES: &[u64] = &[libc::TIOCSTI, 0x541c];

/// Calls of the x32 ABI have this bit, and reach the same code; nothing here is built for it.
#[cfg(target_arch = "x86_64")]
const X32_BIT: i64 = 0x4000_0000;
/// Calls that x32 has numbers of its own for.
#[cfg(target_arch = "x86_64")]
const X32_OWN: std::ops::RangeInclusive<i64> = 512..=547;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Refuses calls from now on, in all threads: with EPERM, and `clone3` with ENOSYS, so that `clone` is called instead, whose arguments
/// can be seen. Where no programs are run, nothing becomes another process.
pub(super) fn refuse(programs: bool) -> Result<(), Error> {
    let forbidden = compile(forbidden(programs)?, libc::EPERM)?;
    let unknown = compile([(libc::SYS_clone3, Vec::new())].into(), libc::ENOSYS)?;
    apply_filter_all_threads(&unknown)?;
    apply_filter_all_threads(&forbidden)
}

fn compile(rules: Rules, error: libc::c_int) -> Result<BpfProgram, Error> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let action = SeccompAction::Errno(error.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, architecture)?;
    Ok(filter.try_into()?)
}

fn forbidden(programs: bool) -> Result<Rules, Error> {
    let none = if programs { &[][..] } else { PROGRAMS };
    let forks = if programs { &[][..] } else { FORKS };
    let always = NEVER.iter().chain(NEVER_HERE).chain(none).chain(forks);
    let mut rules: Rules = always.map(|&call| (call, Vec::new())).collect();
    let mut clones = Vec::new();
    for &flag in NEW_NAMESPACES {
        let flag = u64::from(flag.cast_unsigned());
        clones.push(when(0, SeccompCmpOp::MaskedEq(flag), flag)?);
    }
    if !programs {
        // Threads go on being made.
        clones.push(when(0, SeccompCmpOp::MaskedEq(u64::from(libc::CLONE_THREAD.cast_unsigned())), 0)?);
    }
    rules.insert(libc::SYS_clone, clones);
    let other = FAMILIES.iter().map(|&family| {
        let family = u64::from(family.cast_unsigned());
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family)
    });
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(other.collect::<Result<_, _>>()?)?]);
    let types = TYPES.iter().map(|&call| when(1, SeccompCmpOp::Eq, call));
    rules.insert(libc::SYS_ioctl, types.collect::<Result<_, _>>()?);
    #[cfg(target_arch = "x86_64")]
    {
        let same: Vec<i64> = rules.keys().copied().chain(X32_OWN).collect();
        rules.extend(same.into_iter().map(|call| (call | X32_BIT, Vec::new())));
    }
    Ok(rules)
}

/// A rule for a call whose argument compares so.
fn when(argument: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, how, value)?])?)
}
