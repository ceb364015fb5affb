//! The lab guest's kernel: Debian's, from its package (nothing is installed) or from the host, and the modules that the lab takes of it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::LabError;
use super::needs;
use crate::cli::say;

/// Modules the guest cannot do without, in the order they are loaded; those they depend on come before them.
const REQUIRED: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9p",
    "9pnet_virtio",
    "overlay",
    "ib_uverbs",
    "rdma_rxe",
    "rdma_ucm",
    "veth",
    "virtio_net",
];
/// Modules that some kernels have built in under other names, or that only some users need. rdma_rxe asks the crypto API for crc32
/// without saying so. KVM works because QEMU emulates AMD's SVM.
const WELCOME: &[&str] =
    &["crc32_generic", "crc32-pclmul", "irqbypass", "kvm", "ccp", "kvm-amd", "sch_tbf", "sch_netem"];
/// The package that depends on the current kernel's.
const META_PACKAGE: &str = "linux-image-amd64";
/// Names the package to take instead.
const PACKAGE_PREFIX: &str = "linux-image-";

/// A kernel that a guest can boot.
#[derive(Debug)]
pub(super) struct Kernel {
    /// `uname -r` of it.
    pub version: String,
    /// The bootable image.
    pub image: PathBuf,
    /// Modules, uncompressed, in the order in which they are to be loaded.
    pub modules: Vec<PathBuf>,
}

/// Where kernels and initial file systems are kept: `PAGEFERRY_LAB_CACHE`, else the user's cache. Never a folder that others may
/// write to: the guest reads all that the caller may.
pub(super) fn cache() -> Result<PathBuf, LabError> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = || nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.dir);
    let home = || set("HOME").or_else(user).map(|home| home.join(".cache"));
    let own = || set("XDG_CACHE_HOME").or_else(home).map(|cache| cache.join("pageferry/lab"));
    set("PAGEFERRY_LAB_CACHE").or_else(own).ok_or_else(|| LabError::NoKernel {
        reason: "you have no home folder to keep one in; set PAGEFERRY_LAB_CACHE to a folder".into(),
    })
}

/// The kernel for the guest: `package`, or one that is in the cache, or the host's own, or the distribution's current one.
pub(super) fn find(cache: &Path, package: Option<&str>) -> Result<Kernel, LabError> {
    fs::create_dir_all(cache).map_err(LabError::file("make the folder", cache))?;
    match package {
        Some(package) => named(cache, package).map_or_else(|| fetch(cache, package), Ok),
        None => {
            // Someone's choice of another kernel must not become everyone's.
            let note = cache.join(format!("default.{}", list_key()));
            if let Some(kernel) = fs::read_to_string(&note).ok().and_then(|name| load(&cache.join(name))) {
                return Ok(kernel);
            }
            let kernel = default(cache)?;
            let folder = kernel.image.parent().and_then(Path::file_name).unwrap_or_default();
            fs::write(&note, folder.as_encoded_bytes()).map_err(LabError::file("write", &note))?;
            Ok(kernel)
        }
    }
}

/// A kernel that was kept before, by its package.
fn named(cache: &Path, package: &str) -> Option<Kernel> {
    let (start, end) = (format!("{package}_"), format!(".{}", list_key()));
    let entries = fs::read_dir(cache).ok()?.flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with(&start) && name.ends_with(&end));
    names.sort_by_key(|name| numbers(name));
    names.into_iter().rev().find_map(|name| load(&cache.join(name)))
}

/// The host's own kernel if it will do, else the distribution's current one.
fn default(cache: &Path) -> Result<Kernel, LabError> {
    if let Some((version, image, modules)) = installed(Path::new("/"))
        && let Ok(kernel) = keep(cache, &format!("host-{version}"), &version, &image, &modules)
    {
        return Ok(kernel);
    }
    needs::check(needs::APT)?;
    let package = current_package()?;
    named(cache, &package).map_or_else(|| fetch(cache, &package), Ok)
}

/// Downloads a package and keeps what the lab takes of it.
fn fetch(cache: &Path, package: &str) -> Result<Kernel, LabError> {
    needs::check(needs::APT)?;
    let parts = cache.join(format!(".unpack-{}", std::process::id()));
    let kernel = download(&parts, package).and_then(|file| unpack(cache, &parts, &file));
    let _ = fs::remove_dir_all(&parts);
    kernel
}

/// Tells what this version of the program keeps of a kernel from what others keep.
fn list_key() -> String {
    let names = [REQUIRED, WELCOME].concat().join(" ");
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(names.as_bytes()))
}

/// Reads what [`keep`] wrote.
fn load(folder: &Path) -> Option<Kernel> {
    let version = fs::read_to_string(folder.join("version")).ok()?;
    let mut modules: Vec<PathBuf> =
        fs::read_dir(folder.join("modules")).ok()?.flatten().map(|entry| entry.path()).collect();
    modules.sort();
    let image = folder.join("vmlinuz");
    image.is_file().then_some(Kernel { version, image, modules })
}

/// Copies the image and the modules that the lab takes, uncompressed, into a folder of the cache.
fn keep(cache: &Path, name: &str, version: &str, image: &Path, modules: &Path) -> Result<Kernel, LabError> {
    let target = cache.join(format!("{name}.{}", list_key()));
    let new = cache.join(format!(".new-{}", std::process::id()));
    let _ = fs::remove_dir_all(&new);
    let folder = new.join("modules");
    fs::create_dir_all(&folder).map_err(LabError::file("make the folder", &folder))?;
    for (at, (name, content)) in Modules::scan(version, modules)?.closure()?.into_iter().enumerate() {
        let path = folder.join(format!("{at:03}-{name}.ko"));
        fs::write(&path, content).map_err(LabError::file("write", &path))?;
    }
    fs::copy(image, new.join("vmlinuz")).map_err(LabError::file("copy the kernel", image))?;
    let path = new.join("version");
    fs::write(&path, version).map_err(LabError::file("write", &path))?;
    if fs::rename(&new, &target).is_err() {
        // Somebody else was faster, or an older try was cut off.
        if let Some(kernel) = load(&target) {
            let _ = fs::remove_dir_all(&new);
            return Ok(kernel);
        }
        let _ = fs::remove_dir_all(&target);
        fs::rename(&new, &target).map_err(LabError::file("make the folder", &target))?;
    }
    load(&target).ok_or_else(|| LabError::NoKernel { reason: format!("{} is damaged", target.display()) })
}

/// The newest kernel under `root` that has rdma_rxe: version, image, modules.
fn installed(root: &Path) -> Option<(String, PathBuf, PathBuf)> {
    // Newer packages of Debian keep modules below /usr.
    let folders = ["lib/modules", "usr/lib/modules"].map(|folder| root.join(folder));
    let mut found: Vec<(String, PathBuf)> = (folders.iter())
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten())
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .filter(|(_, modules)| modules.join("kernel/drivers/infiniband/sw/rxe").is_dir())
        .collect();
    found.sort_by_key(|(version, _)| numbers(version));
    found.into_iter().rev().find_map(|(version, modules)| {
        let image = root.join(format!("boot/vmlinuz-{version}"));
        // Some distributions let only root read kernels.
        fs::File::open(&image).is_ok().then_some((version, image, modules))
    })
}

/// The numbers in a version, to compare 6.10 with 6.9.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// The package of the distribution's current kernel.
fn current_package() -> Result<String, LabError> {
    let mut command = Command::new("apt-cache");
    command.args(["depends", META_PACKAGE]).env("LC_ALL", "C");
    let output = command.output().map_err(LabError::file("run", Path::new("apt-cache")))?;
    dependency(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| LabError::NoKernel {
        reason: format!(
            "apt knows no package {META_PACKAGE}: its lists are missing (as root: apt-get update), or this is not Debian; \
             then install a kernel with rdma_rxe under /boot and /lib/modules, or name a Debian package with --kernel"
        ),
    })
}

/// The kernel's package in the output of `apt-cache depends`.
fn dependency(text: &str) -> Option<String> {
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    names.map(str::trim).find(|name| name.starts_with(PACKAGE_PREFIX)).map(str::to_owned)
}

/// Downloads a package into a new folder; returns its file.
fn download(folder: &Path, package: &str) -> Result<PathBuf, LabError> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).map_err(LabError::file("make the folder", folder))?;
    say(format_args!("downloading {package} for the lab guest (once; nothing is installed)"));
    let mut command = Command::new("apt-get");
    command
        .args(["download", "-qq", package])
        .current_dir(folder)
        .env("LC_ALL", "C")
        .env("PATH", needs::path());
    let output = command.output().map_err(LabError::file("run", Path::new("apt-get")))?;
    let files = fs::read_dir(folder).map_err(LabError::file("read the folder", folder))?.flatten();
    let file = files.map(|entry| entry.path()).find(|path| path.extension().is_some_and(|ext| ext == "deb"));
    file.filter(|_| output.status.success()).ok_or_else(|| LabError::NoKernel {
        reason: format!(
            "{}; is there a network? Old package lists name packages that are gone (as root: apt-get update)",
            LabError::tool(&format!("apt-get download {package}"), &output)
        ),
    })
}

/// Unpacks a package and keeps what the lab takes of it.
fn unpack(cache: &Path, parts: &Path, file: &Path) -> Result<Kernel, LabError> {
    let tree = parts.join("tree");
    let mut command = Command::new("dpkg-deb");
    command.arg("-x").args([file, &tree]);
    let output = command.output().map_err(LabError::file("run", Path::new("dpkg-deb")))?;
    if !output.status.success() {
        return Err(LabError::tool(&format!("dpkg-deb -x {}", file.display()), &output));
    }
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let (version, image, modules) = installed(&tree).ok_or_else(|| LabError::NoKernel {
        reason: format!("{name} has no kernel with rdma_rxe; name another package with --kernel"),
    })?;
    keep(cache, &name, &version, &image, &modules)
}

/// The modules of one kernel.
struct Modules {
    version: String,
    files: HashMap<String, PathBuf>,
    builtin: Vec<String>,
}

impl Modules {
    fn scan(version: &str, root: &Path) -> Result<Self, LabError> {
        let mut files = HashMap::new();
        let mut folders = vec![root.join("kernel")];
        while let Some(folder) = folders.pop() {
            let entries = fs::read_dir(&folder).map_err(LabError::file("read the folder", &folder))?;
            for path in entries.flatten().map(|entry| entry.path()) {
                if path.is_dir() {
                    folders.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        let list = fs::read_to_string(root.join("modules.builtin")).unwrap_or_default();
        let builtin = list.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { version: version.into(), files, builtin })
    }

    /// The modules that the lab takes and all that they depend on, in the order in which they load.
    fn closure(&self) -> Result<Vec<(String, Vec<u8>)>, LabError> {
        let mut taken = Vec::new();
        for name in WELCOME {
            // What a welcome one depends on is in the same package.
            if self.files.contains_key(&underscored(name)) {
                self.take(name, &mut taken)?;
            }
        }
        for name in REQUIRED {
            self.take(name, &mut taken)?;
        }
        Ok(taken)
    }

    fn take(&self, name: &str, taken: &mut Vec<(String, Vec<u8>)>) -> Result<(), LabError> {
        let name = underscored(name);
        if self.builtin.contains(&name) || taken.iter().any(|(known, _)| *known == name) {
            return Ok(());
        }
        let missing = || LabError::NoModule { kernel: self.version.clone(), module: name.clone() };
        let content = module_content(self.files.get(&name).ok_or_else(missing)?)?;
        for dependency in dependencies(&content) {
            self.take(&dependency, taken)?;
        }
        taken.push((name, content));
        Ok(())
    }
}

/// The kernel does not tell `-` from `_` in names of modules.
fn underscored(name: &str) -> String {
    name.replace('-', "_")
}

/// `kvm_amd` of `kernel/arch/x86/kvm/kvm-amd.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file.strip_suffix(".ko").or_else(|| Some(file.rsplit_once(".ko.")?.0))?;
    Some(underscored(stem))
}

/// A module, uncompressed.
fn module_content(path: &Path) -> Result<Vec<u8>, LabError> {
    let (tool, args) = match path.extension().and_then(|ext| ext.to_str()) {
        Some("xz") => ("xz", ["-dc"]),
        Some("zst") => ("zstd", ["-dcq"]),
        Some("gz") => ("gzip", ["-dc"]),
        _ => return fs::read(path).map_err(LabError::file("read the module", path)),
    };
    if tool == "xz" {
        needs::check(&[needs::XZ])?;
    }
    let output = Command::new(tool).args(args).arg(path).output();
    let output = output.map_err(LabError::file("run", Path::new(tool)))?;
    if output.status.success() { Ok(output.stdout) } else { Err(LabError::tool(tool, &output)) }
}

/// The names that a module says it depends on, in its section `.modinfo`: strings `KEY=VALUE`, each ended by a zero.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else { return vec![] };
    let value = module[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_is_the_first_image_that_the_meta_package_depends_on() {
        let text = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n  Breaks: linux-image-9\n";
        assert_eq!(dependency(text).as_deref(), Some("linux-image-6.1.0-56-amd64"));
        assert_eq!(dependency("N: Unable to locate package\n"), None);
        assert_eq!(dependency("linux-image-amd64\n  Depends: debconf\n"), None);
    }

    #[test]
    fn names_and_dependencies_of_modules() {
        assert_eq!(module_name(Path::new("a/kvm-amd.ko.xz")).as_deref(), Some("kvm_amd"));
        assert_eq!(module_name(Path::new("a/9p.ko")).as_deref(), Some("9p"));
        assert_eq!(module_name(Path::new("modules.order")), None);
        let module = b"\x7fELF\0license=GPL\0depends=kvm,ccp\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["kvm", "ccp"]);
        assert_eq!(dependencies(b"\0depends=\0name=x\0"), Vec::<String>::new());
        assert_eq!(dependencies(b"\x7fELF"), Vec::<String>::new());
    }

    #[test]
    fn versions_compare_by_number() {
        assert!(numbers("6.10.0-1-amd64") > numbers("6.9.12-3-amd64"));
    }

    /// A tree of modules: each with what it depends on.
    fn tree(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        for (name, depends) in modules {
            fs::write(kernel.join(format!("{name}.ko")), format!("\0depends={depends}\0")).unwrap();
        }
        folder
    }

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let mut all: Vec<(&str, &str)> = REQUIRED.iter().map(|name| (*name, "")).collect();
        all.retain(|(name, _)| !["rdma_rxe", "overlay"].contains(name));
        all.extend([("rdma_rxe", "ib_uverbs,ib-core"), ("ib_core", ""), ("kvm-amd", "kvm"), ("kvm", "")]);
        let folder = tree(&all);
        fs::write(folder.path().join("modules.builtin"), "kernel/fs/overlay.ko\n").unwrap();
        let modules = Modules::scan("6.1", folder.path()).unwrap();
        let taken: Vec<String> = modules.closure().unwrap().into_iter().map(|(name, _)| name).collect();
        let at = |name| taken.iter().position(|taken| taken == name).unwrap();
        assert!(at("ib_core") < at("rdma_rxe") && at("kvm") < at("kvm_amd"));
        assert_eq!(taken.len(), all.len(), "each once, what is built in not at all: {taken:?}");
    }

    #[test]
    fn a_chosen_kernel_does_not_become_the_default() {
        let cache = tempfile::tempdir().unwrap();
        let all: Vec<(&str, &str)> = REQUIRED.iter().map(|name| (*name, "")).collect();
        let modules = tree(&all);
        let image = modules.path().join("vmlinuz");
        fs::write(&image, "kernel").unwrap();
        for (name, version) in
            [("linux-image-b_2", "6.2"), ("linux-image-b_10", "6.10"), ("linux-image-a_1", "6.1")]
        {
            keep(cache.path(), name, version, &image, modules.path()).unwrap();
        }
        assert_eq!(
            find(cache.path(), Some("linux-image-b")).unwrap().version,
            "6.10",
            "the newest of its name"
        );
        fs::write(
            cache.path().join(format!("default.{}", list_key())),
            format!("linux-image-a_1.{}", list_key()),
        )
        .unwrap();
        let kernel = find(cache.path(), None).unwrap();
        assert_eq!(kernel.version, "6.1");
        let names: Vec<_> = kernel.modules.iter().filter_map(|path| module_name(path)).collect();
        assert_eq!(names.len(), REQUIRED.len());
        assert!(names.is_sorted(), "in the order in which they are to be loaded: {names:?}");
    }

    #[test]
    fn a_kernel_without_a_required_module_is_refused_by_name() {
        let folder = tree(&[("virtio_pci", "")]);
        let modules = Modules::scan("6.1.0-x", folder.path()).unwrap();
        let error = modules.closure().unwrap_err().to_string();
        assert!(error.contains("6.1.0-x has no module virtio_console"), "{error}");
    }

    #[test]
    fn the_hosts_newest_kernel_with_rxe_is_taken() {
        let root = tempfile::tempdir().unwrap();
        for (version, rxe, image) in
            [("6.9.1", true, true), ("6.10.1", true, true), ("6.11.0", true, false), ("6.12.0", false, true)]
        {
            let modules = root.path().join("lib/modules").join(version).join("kernel/drivers/infiniband/sw");
            fs::create_dir_all(modules.join(if rxe { "rxe" } else { "siw" })).unwrap();
            fs::create_dir_all(root.path().join("boot")).unwrap();
            if image {
                fs::write(root.path().join(format!("boot/vmlinuz-{version}")), "").unwrap();
            }
        }
        assert_eq!(installed(root.path()).unwrap().0, "6.10.1");
        assert!(installed(Path::new("/nowhere")).is_none());
    }
}
