//! A QEMU's memory: which of it lies in files that others can map, and what keeps a guest from being moved by them.

use std::fs::{File, Metadata, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pagecopy::backend::BackendError;
use serde_json::{Value, json};

use super::Qmp;
use crate::foreign::Process;

/// What to start a QEMU with whose memory can be moved.
const SHARED: &str = "start both QEMUs with `-object memory-backend-file,id=ID,size=SIZE,mem-path=FILE,share=on`, and \
                      `-machine memory-backend=ID` or `-numa node,memdev=ID`";

/// Devices whose back ends write guest memory where nobody sees it, by how their names in QEMU begin.
const UNSEEN: [(&str, &str); 4] = [
    ("vfio-", "the device writes memory by itself"),
    ("vhost-user-", "another process writes its memory"),
    ("vhost-vdpa-", "the device writes memory by itself"),
    ("ivshmem-", "other processes write its memory"),
];

/// One of a QEMU's memory backends that is in a shared file: one RAM block.
#[derive(Debug)]
pub struct Block {
    /// The block's name, which both QEMUs have alike.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// The file, open for reading and writing.
    pub file: File,
    /// Its path, or that of the process's descriptor.
    pub path: PathBuf,
}

/// All memory backends, as QEMU tells of them.
pub(super) fn backends(qmp: &Qmp) -> Result<Value, BackendError> {
    qmp.execute("query-memdev", &Value::Null)
}

/// A file, as the kernel knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inode {
    pub(super) device: u64,
    pub(super) number: u64,
}

impl Block {
    /// Its file.
    pub(super) fn inode(&self) -> Result<Inode, BackendError> {
        let meta = self.file.metadata();
        let meta =
            meta.map_err(|e| BackendError::new(format!("{}: ask for its inode", self.path.display()), e))?;
        Ok(Inode { device: meta.dev(), number: meta.ino() })
    }
}

/// How a QEMU leaves memory out of its own stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeftOut {
    /// What is in shared files, by the capability `x-ignore-shared`.
    SharedFiles,
    /// All blocks, by the migration mode `cpr-transfer`: memfds are no shared files to it since 8.1.
    All,
}

/// Finds a QEMU's memory in shared files, in the order of names, and how it leaves that out of its own stream.
///
/// # Errors
/// Where some of it is in no shared file, or a file cannot be opened. The text names the backend and what helps.
pub(super) fn find(qmp: &Qmp) -> Result<(Vec<Block>, LeftOut), BackendError> {
    let table = ram_blocks(qmp)?;
    let backends = backends(qmp)?;
    let (mut blocks, mut left_out) = (Vec::new(), LeftOut::SharedFiles);
    for backend in backends.as_array().into_iter().flatten() {
        let id = backend["id"].as_str().unwrap_or_default();
        let canonical = format!("/objects/{id}");
        // One that no machine uses has no block.
        let Some(RamBlock { name, .. }) = table.iter().find(|one| one.name == id || one.name == canonical)
        else {
            continue;
        };
        let bytes = backend["size"].as_u64().unwrap_or(0);
        let kind = property(qmp, &canonical, "type")?.as_str().unwrap_or_default().to_owned();
        let shared = backend["share"].as_bool().unwrap_or(false);
        if check(qmp, id, &kind, shared)? == LeftOut::All {
            left_out = LeftOut::All;
        }
        let (file, path) = open(qmp, id, &canonical, bytes)?;
        blocks.push(Block { name: name.clone(), bytes, file, path });
    }
    if blocks.is_empty() {
        return Err(BackendError::invalid(format!("this QEMU has no memory in a shared file: {SHARED}")));
    }
    if left_out == LeftOut::All {
        add_devices_memory(qmp, &table, &mut blocks)?;
    }
    blocks.sort_by(|one, other| one.name.cmp(&other.name));
    Ok((blocks, left_out))
}

/// Adds what devices have for memory, such as a display's. What the guest cannot write is the destination's own: ROMs and tables, which
/// both QEMUs make alike.
fn add_devices_memory(qmp: &Qmp, table: &[RamBlock], blocks: &mut Vec<Block>) -> Result<(), BackendError> {
    if property(qmp, "/machine", "aux-ram-share").ok().and_then(|shared| shared.as_bool()) != Some(true) {
        let what = "QEMU's memory is in a memfd, and its devices' memory is private to it: start both QEMUs with \
                    `-machine aux-ram-share=on`, or with memory-backend-file";
        return Err(BackendError::invalid(what));
    }
    for RamBlock { name, bytes, address, writable } in table {
        if *writable && !blocks.iter().any(|block| block.name == *name) {
            let (file, path) = at_address(qmp.pid(), name, *address)?;
            blocks.push(Block { name: name.clone(), bytes: *bytes, file, path });
        }
    }
    Ok(())
}

/// Refuses memory that QEMU's own stream would carry, or nobody else can have.
fn check(qmp: &Qmp, id: &str, kind: &str, shared: bool) -> Result<LeftOut, BackendError> {
    // What QEMU leaves out are blocks in named files, since 8.1; before, all that are shared.
    let named_alone = qmp.version() >= (8, 1);
    let why = match kind {
        "memory-backend-file" | "memory-backend-memfd" if !shared => {
            "its memory is private to QEMU (share=off)"
        }
        "memory-backend-memfd" if qmp.version() >= (10, 0) => return Ok(LeftOut::All),
        "memory-backend-memfd" if named_alone => {
            "QEMU leaves the memory of memfds out of its own stream up to version 8.0, and from 10.0 on"
        }
        "memory-backend-file" | "memory-backend-memfd" => return Ok(LeftOut::SharedFiles),
        "memory-backend-ram" => "its memory is private to QEMU",
        _ => "its memory is of a kind that is not known here",
    };
    Err(BackendError::new(
        format!("QEMU's memory backend `{id}` ({kind}) cannot be moved from outside: {SHARED}"),
        why,
    ))
}

/// A RAM block, as QEMU tells of it.
#[derive(Debug)]
struct RamBlock {
    name: String,
    bytes: u64,
    /// Where QEMU has it.
    address: u64,
    /// Whether the guest may write it, where this QEMU tells.
    writable: bool,
}

/// All RAM blocks.
fn ram_blocks(qmp: &Qmp) -> Result<Vec<RamBlock>, BackendError> {
    let table = monitor(qmp, "info ramblock")?;
    Ok(table.lines().skip(1).filter_map(RamBlock::of_line).collect())
}

impl RamBlock {
    /// `NAME  4 KiB  OFFSET  USED  TOTAL [HVA  rw|ro]`; the last two since 8.0.
    fn of_line(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number =
            |at: usize| words.get(at).and_then(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
        let name = (*words.first()?).to_owned();
        let writable = words.get(7) == Some(&"rw");
        Some(Self { name, bytes: number(4).unwrap_or(0), address: number(6).unwrap_or(0), writable })
    }
}

/// What a command of the human monitor prints.
fn monitor(qmp: &Qmp, command: &str) -> Result<String, BackendError> {
    let printed = qmp.execute("human-monitor-command", &json!({ "command-line": command }))?;
    Ok(printed.as_str().unwrap_or_default().to_owned())
}

fn property(qmp: &Qmp, object: &str, name: &str) -> Result<Value, BackendError> {
    qmp.execute("qom-get", &json!({ "path": object, "property": name }))
}

/// Refuses a guest whose memory is written by somebody whom neither QEMU's process nor its page table shows.
pub(super) fn refuse_unseen_writers(qmp: &Qmp) -> Result<(), BackendError> {
    let tree = monitor(qmp, "info qtree")?;
    let devices = tree.lines().filter_map(|line| line.trim_start().strip_prefix("dev: "));
    for device in devices {
        let unseen = UNSEEN.iter().find(|(kind, _)| device.starts_with(kind));
        if let Some((_, why)) = unseen {
            let what = format!(
                "QEMU's device `{}` keeps its guest here: unplug it (`device_del`) first",
                device.trim_end()
            );
            return Err(BackendError::new(what, *why));
        }
    }
    let network = monitor(qmp, "info network")?;
    if let Some(line) =
        network.lines().find(|line| line.contains("type=vhost-user") || line.contains("type=vhost-vdpa"))
    {
        let name = line.trim_start_matches([' ', '\\']).split(':').next().unwrap_or_default().to_owned();
        let what = format!(
            "QEMU's network back end `{name}` keeps its guest here: unplug its device (`device_del`) first"
        );
        return Err(BackendError::new(
            what,
            "another process, or a device, writes guest memory where nobody sees it",
        ));
    }
    Ok(())
}

/// Opens the file of a backend.
fn open(qmp: &Qmp, id: &str, object: &str, bytes: u64) -> Result<(File, PathBuf), BackendError> {
    // A memfd has no path.
    let path = property(qmp, object, "mem-path").ok();
    let path = path.as_ref().and_then(Value::as_str).map(PathBuf::from);
    let mapped = mapped_inodes(qmp.pid());
    if let Some(path) = path.as_ref().filter(|path| path.is_file()) {
        let file = open_shared(path).map_err(|e| {
            let what = format!(
                "{}: open the file of QEMU's memory backend `{id}`; run this as the user of QEMU, or as root",
                path.display()
            );
            BackendError::new(what, e)
        })?;
        // Where nobody may look, the path is believed: it is QEMU's own.
        if inode_of(&file).is_some_and(|inode| mapped.as_ref().is_none_or(|mapped| mapped.contains(&inode))) {
            return Ok((file, path.clone()));
        }
    }
    of_descriptor(qmp.pid(), id, path.as_deref(), bytes)
}

fn open_shared(path: &Path) -> std::io::Result<File> {
    // What is a pipe by now keeps nobody waiting.
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

fn inode_of(file: &File) -> Option<u64> {
    file.metadata().ok().map(|meta| meta.ino())
}

/// The inodes of all that a process has mapped, by `/proc/PID/maps` (proc_pid_maps(5)); `None` where that may not be read.
fn mapped_inodes(pid: u32) -> Option<Vec<u64>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    Some(
        maps.lines()
            .filter_map(|line| line.split_whitespace().nth(4)?.parse().ok())
            .filter(|&inode| inode != 0)
            .collect(),
    )
}

/// Opens the memfd that a process has mapped at an address.
fn at_address(pid: u32, name: &str, address: u64) -> Result<(File, PathBuf), BackendError> {
    let lost = || {
        BackendError::invalid(format!(
            "the memfd of QEMU's memory {name:?}, mapped at {address:#x} by its process {pid}, was not found among its descriptors"
        ))
    };
    let process = Process::open(pid)?;
    let mapped = process.mappings_in(&(address..address + 1))?;
    let mapped = mapped.first().filter(|mapping| mapping.shared && mapping.offset == 0).ok_or_else(lost)?;
    // A number alone may be that of another file system's file, a disk's image say.
    let is_it = |meta: &Metadata| meta.is_file() && (meta.dev(), meta.ino()) == (mapped.device, mapped.inode);
    let folder = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .map_err(|e| of_process(pid, name, "look through the descriptors", e))?;
    for entry in folder.flatten() {
        if std::fs::metadata(entry.path()).is_ok_and(|meta| is_it(&meta)) {
            let file =
                open_shared(&entry.path()).map_err(|e| of_process(pid, name, "open a descriptor", e))?;
            return Ok((file, entry.path()));
        }
    }
    Err(lost())
}

fn of_process(pid: u32, id: &str, what: &str, e: std::io::Error) -> BackendError {
    let hint = "run this as the user of QEMU, or as root (CAP_SYS_PTRACE and CAP_DAC_OVERRIDE)";
    BackendError::new(format!("{what} of QEMU's process {pid} for its memory backend `{id}`; {hint}"), e)
}

/// The same of a file whose path is gone, or that never had one, by QEMU's own descriptor.
fn of_descriptor(
    pid: u32,
    id: &str,
    path: Option<&Path>,
    bytes: u64,
) -> Result<(File, PathBuf), BackendError> {
    let failed = |what: &str, e: std::io::Error| of_process(pid, id, what, e);
    let folder = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .map_err(|e| failed("look through the descriptors", e))?;
    let begins =
        path.map_or_else(|| "/memfd:memory-backend-memfd".to_owned(), |path| path.display().to_string());
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    for entry in folder.flatten() {
        let (Ok(target), Ok(meta)) = (std::fs::read_link(entry.path()), std::fs::metadata(entry.path()))
        else {
            continue;
        };
        let fits = target.to_string_lossy().starts_with(&begins) && meta.is_file() && meta.len() == bytes;
        if fits && !found.iter().any(|(inode, _)| *inode == meta.ino()) {
            found.push((meta.ino(), entry.path()));
        }
    }
    match &found[..] {
        [(_, path)] => {
            let file = open_shared(path).map_err(|e| failed("open a descriptor", e))?;
            Ok((file, path.clone()))
        }
        [] => Err(BackendError::invalid(format!(
            "the file of QEMU's memory backend `{id}` was not found: neither at {begins} nor among the descriptors of process {pid}"
        ))),
        _ => Err(BackendError::invalid(format!(
            "several files of process {pid} may be QEMU's memory backend `{id}`: give each backend a mem-path of its own"
        ))),
    }
}
