//! Profiles: what each command needs once it has started.

use std::io;
use std::path::{Path, PathBuf};

use pageferry::Uri;
use pageferry::vmm_shim::guest_memory::Backing;
use rustix::thread::CapabilitySet;

use super::caps;

/// What may be done to a file, or to all that is in a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Read.
    Read,
    /// Read, and run as programs.
    Run,
    /// Read, written and commanded, as devices are.
    Device,
    /// Sockets are made and removed.
    Sockets,
    /// Files are made, read, written and removed.
    Files,
    /// Read and written; it is there already.
    Kept,
    /// Everything but devices.
    Folder,
}

/// What every process may look at: itself, what the kernel says of it and its host, how names are resolved, libraries.
const COMMON: &[(&str, Access)] = &[
    ("/proc", Access::Read),
    ("/sys", Access::Read),
    ("/dev/null", Access::Device),
    ("/dev/zero", Access::Read),
    ("/dev/random", Access::Read),
    ("/dev/urandom", Access::Read),
    ("/dev/userfaultfd", Access::Device),
    ("/etc/resolv.conf", Access::Read),
    ("/etc/hosts", Access::Read),
    ("/etc/host.conf", Access::Read),
    ("/etc/nsswitch.conf", Access::Read),
    ("/etc/gai.conf", Access::Read),
    ("/etc/services", Access::Read),
    ("/etc/ld.so.cache", Access::Read),
    ("/run/systemd/resolve", Access::Read),
    ("/lib", Access::Read),
    ("/lib64", Access::Read),
    ("/usr/lib", Access::Read),
    ("/usr/lib64", Access::Read),
];
/// What RDMA's libraries open.
const RDMA: &[(&str, Access)] =
    &[("/dev/infiniband", Access::Device), ("/etc/libibverbs.d", Access::Read), ("/etc/rdma", Access::Read)];
/// What programs use, besides files.
const DEVICES: &[(&str, Access)] = &[
    ("/dev/full", Access::Device),
    ("/dev/tty", Access::Device),
    ("/dev/ptmx", Access::Device),
    ("/dev/pts", Access::Device),
    ("/dev/zero", Access::Device),
    ("/dev/shm", Access::Folder),
    ("/dev/hugepages", Access::Folder),
    ("/dev/mqueue", Access::Folder),
];

/// What a command needs once it has started.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct Profile {
    files: Vec<(PathBuf, Access)>,
    /// Those of `files` that somebody named, with whether they are written.
    named: Vec<(PathBuf, bool)>,
    writes_most: bool,
    programs: bool,
    connects: bool,
    /// TCP ports that it may listen on; 0: any that is free.
    ports: Vec<u16>,
    /// It stops vCPUs where pages are missing.
    kernel_faults: bool,
    /// It pins memory.
    pins: bool,
}

impl Profile {
    /// Of a thread that uses what is open.
    pub(super) fn nothing() -> Self {
        Self::default()
    }

    fn common() -> Self {
        let mut profile = Self::default();
        profile.add(COMMON);
        profile
    }

    /// `recv`: it takes memory in from `uri` into a file or its own memory.
    pub(in super::super) fn recv(
        uri: &Uri,
        ram_file: Option<&Path>,
        base: Option<&Path>,
        strict: bool,
    ) -> Self {
        let mut profile = Self::common();
        ram_file.into_iter().for_each(|file| profile.makes(file));
        profile.takes_in(uri, base, strict);
        profile
    }

    /// `vm`: it makes a machine with this memory, answers at `api`, may wait for a guest, and sends or saves its guest later, wherever
    /// it is told to.
    pub(in super::super) fn vm(api: &Path, memory: &Backing, strict: bool) -> Self {
        let mut profile = Self { kernel_faults: true, connects: true, ..Self::common() };
        profile.add(&[("/dev/kvm", Access::Device)]);
        profile.name_folder_of(api, Access::Sockets);
        if let Backing::File { path, .. } = memory {
            profile.makes(path);
        }
        if !strict {
            profile.runs_all();
        }
        profile.takes_rdma();
        profile
    }

    /// `qemu recv`: its memory is open; it commands QEMU at `qmp`, which it may have to connect to again, and may answer at `api`.
    pub(in super::super) fn qemu(uri: &Uri, qmp: &Path, api: Option<&Path>) -> Self {
        let mut profile = Self { connects: true, ..Self::common() };
        profile.name_folder_of(qmp, Access::Read);
        api.into_iter().for_each(|api| profile.name_folder_of(api, Access::Sockets));
        profile.takes_in(uri, None, true);
        profile
    }

    /// The same, with a file that is read, or all that is in a folder.
    pub(in super::super) fn reading(mut self, path: &Path) -> Self {
        self.reads(path);
        self
    }

    /// The same, with files that others may replace: all of their folders is read.
    pub(in super::super) fn reading_anew(mut self, files: &[PathBuf]) -> Self {
        for file in files {
            self.name_folder_of(file, Access::Read);
            self.name(file, false);
        }
        self
    }

    /// The same with what `vm` waits for, or loads.
    pub(in super::super) fn incoming(mut self, uri: &Uri, base: Option<&Path>, strict: bool) -> Self {
        self.takes_in(uri, base, strict);
        self
    }

    /// `bench --listen`: it runs itself for each destination, which listens at another port.
    pub(in super::super) fn bench(uri: &Uri, memory: &Backing, data_port: u16) -> Self {
        let mut profile = Self { programs: true, kernel_faults: true, ..Self::common() };
        profile.files.push(("/".into(), Access::Run));
        if let Backing::File { path, .. } = memory {
            profile.makes(path);
        }
        profile.takes_in(uri, None, true);
        profile.ports.push(data_port);
        profile
    }

    fn takes_in(&mut self, uri: &Uri, base: Option<&Path>, strict: bool) {
        match uri {
            Uri::Tcp { port, .. } => self.ports.push(*port),
            Uri::Rdma { port, .. } => {
                self.ports.push(*port);
                self.takes_rdma();
            }
            Uri::Unix(path) => self.name_folder_of(path, Access::Sockets),
            Uri::File(path) => {
                // Which archive it stands on is in the archive.
                let read = if strict { path.as_path() } else { Path::new("/") };
                self.files.push((read.into(), Access::Read));
                self.name(path, false);
            }
            Uri::Exec(_) => self.runs_all(),
            Uri::Fd(number) => {
                // A pipe that has a name is opened by it once more.
                if let Ok(path) = std::fs::read_link(format!("/proc/self/fd/{number}")) {
                    self.files.push((path, Access::Read));
                }
            }
        }
        base.into_iter().for_each(|base| self.reads(base));
    }

    fn takes_rdma(&mut self) {
        if cfg!(feature = "rdma") {
            self.add(RDMA);
            self.pins = true;
            self.connects = true;
        }
    }

    /// It saves to and runs whatever its user names; but does not write to the system's folders.
    fn runs_all(&mut self) {
        self.files.push(("/".into(), Access::Run));
        self.add(DEVICES);
        (self.writes_most, self.programs, self.connects) = (true, true, true);
    }

    fn add(&mut self, files: &[(&str, Access)]) {
        self.files.extend(files.iter().map(|&(path, access)| (path.into(), access)));
    }

    /// A file that is there, or a folder.
    fn reads(&mut self, path: &Path) {
        self.files.push((path.into(), Access::Read));
        self.name(path, false);
    }

    /// A file that is made anew.
    fn makes(&mut self, path: &Path) {
        self.name_folder_of(path, Access::Files);
        self.name(path, true);
    }

    fn name(&mut self, path: &Path, writes: bool) {
        self.named.push((path.into(), writes));
    }

    fn name_folder_of(&mut self, path: &Path, access: Access) {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        self.files.push((folder.into(), access));
        self.name(folder, access != Access::Read);
        // What is at the other end of a link is opened there.
        if let Ok(real) = path.canonicalize()
            && let Some(folder) = real.parent()
        {
            self.files.push((folder.into(), access));
        }
    }

    /// Lets a file be read and written that is there, and that nobody has named.
    pub(super) fn keep(&mut self, path: &Path) {
        self.files.push((path.into(), Access::Kept));
    }

    /// Lets a file be read and written, or all that is in a folder.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn allow(&mut self, path: &Path) -> io::Result<()> {
        path.metadata()?;
        self.files.push((path.into(), Access::Folder));
        self.name(path, true);
        Ok(())
    }

    pub(super) fn files(&self) -> &[(PathBuf, Access)] {
        &self.files
    }

    pub(super) fn ports(&self) -> &[u16] {
        &self.ports
    }

    pub(super) fn writes_most(&self) -> bool {
        self.writes_most
    }

    pub(super) fn runs_programs(&self) -> bool {
        self.programs
    }

    pub(super) fn connects(&self) -> bool {
        self.connects
    }

    /// Capabilities that it cannot do without, where it has them.
    pub(super) fn capabilities(&self) -> CapabilitySet {
        let mut needed = caps::NONE;
        if self.ports.iter().any(|port| (1..1024).contains(port)) {
            needed |= CapabilitySet::NET_BIND_SERVICE;
        }
        if self.kernel_faults && !sees_kernel_faults() {
            needed |= CapabilitySet::SYS_PTRACE;
        }
        if self.pins {
            needed |= CapabilitySet::IPC_LOCK;
        }
        if caps::needs_power_over(self.named.iter().map(|(path, writes)| (path.as_path(), *writes))) {
            needed |= CapabilitySet::DAC_OVERRIDE;
        }
        needed
    }
}

/// Whether everybody may have a userfaultfd that stops vCPUs, or this user has the device for it.
fn sees_kernel_faults() -> bool {
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    sysctl.is_ok_and(|value| value.trim() == "1") || std::fs::File::open("/dev/userfaultfd").is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(profile: &Profile, path: &str, access: Access) -> bool {
        profile.files.contains(&(path.into(), access))
    }

    #[test]
    fn a_profile_has_what_its_command_names_and_no_more() {
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        let profile = Profile::recv(&uri("tcp:0:4444"), Some(Path::new("/x/ram")), None, false);
        assert!(has(&profile, "/x", Access::Files) && !has(&profile, "/", Access::Read));
        assert_eq!(profile.ports, [4444]);
        assert!(!profile.programs && !profile.connects && !profile.writes_most);
        let profile = Profile::recv(&uri("unix:sock"), None, None, false);
        assert!(has(&profile, ".", Access::Sockets) && profile.ports.is_empty());
        let profile = Profile::recv(&uri("file:/x/a"), None, Some(Path::new("/y/b")), false);
        assert!(has(&profile, "/", Access::Read) && has(&profile, "/y/b", Access::Read));
        let profile = Profile::recv(&uri("file:/x/a"), None, None, true);
        assert!(has(&profile, "/x/a", Access::Read) && !has(&profile, "/", Access::Read));
        let profile = Profile::recv(&uri("exec:cat"), None, None, false);
        assert!(profile.programs && profile.writes_most);

        let vm = |strict| Profile::vm(Path::new("/run/a"), &Backing::Memfd, strict).reading(Path::new("/i"));
        assert!(vm(false).programs && has(&vm(false), "/", Access::Run));
        assert!(!vm(true).programs && !vm(true).writes_most && vm(true).connects);
        assert!(has(&vm(true), "/i", Access::Read) && !has(&vm(true), "/", Access::Run));
        let profile = vm(true).incoming(&uri("tcp:0:443"), None, true);
        assert_eq!(profile.ports, [443]);
        assert!(profile.capabilities().contains(CapabilitySet::NET_BIND_SERVICE));
    }
}
