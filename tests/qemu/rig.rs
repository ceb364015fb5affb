//! QEMUs for tests: a Linux guest under software emulation, with its memory in a file.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::wait_until;

use crate::common::folder;

/// Memory of a guest, unless `PAGEFERRY_QEMU_MIB` says otherwise.
const MEMORY_MIB: usize = 256;
/// A guest boots in ten seconds on an idle host.
const BOOT: Duration = Duration::from_secs(300);

/// What all guests of a process share: a kernel, and their program as a file system.
pub(crate) struct Rig {
    folder: TempDir,
    kernel: PathBuf,
    initrd: PathBuf,
    /// The host's KVM runs a Linux guest: in a lab guest it does, while others may be machines without hardware.
    kvm: bool,
    /// Memory of its guests.
    mib: usize,
    guests: AtomicU64,
}

impl Rig {
    /// `None`, with the reason printed, where there can be no QEMU or no kernel for its guest.
    pub(crate) fn get() -> Option<&'static Self> {
        static RIG: OnceLock<Result<Rig, String>> = OnceLock::new();
        RIG.get_or_init(Self::make).as_ref().map_err(|why| println!("skipped: {why}")).ok()
    }

    fn make() -> Result<Self, String> {
        let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
        qemu.map_err(|e| format!("no QEMU: qemu-system-x86_64: {e}"))?;
        let prepared =
            Command::new(env!("CARGO_BIN_EXE_pageferry")).args(["lab", "prepare"]).output().unwrap();
        if !prepared.status.success() {
            return Err(format!("no kernel: {}", String::from_utf8_lossy(&prepared.stderr)));
        }
        let said = String::from_utf8_lossy(&prepared.stdout).into_owned();
        let kernel = said.lines().find_map(|line| line.strip_prefix("kernel:")?.split_once("), "));
        let kernel = PathBuf::from(kernel.expect("where the kernel is").1);
        let kvm = std::env::var_os("PAGEFERRY_LAB_HOST").is_some();
        let mib = crate::number("PAGEFERRY_QEMU_MIB").map_or(MEMORY_MIB, |mib| mib as usize);
        Ok(Self { folder: folder(), kernel, initrd: initrd()?, kvm, mib, guests: AtomicU64::new(0) })
    }

    /// How a guest runs. A lab guest emulates KVM's hardware: fewer devices are found there in less time.
    fn machine(&self) -> [&'static str; 6] {
        if self.kvm {
            ["-machine", "microvm,memory-backend=ram", "-accel", "kvm", "-cpu", "qemu64"]
        } else {
            ["-machine", "q35,memory-backend=ram", "-accel", "tcg,thread=multi", "-cpu", "max"]
        }
    }

    /// A QEMU whose guest boots.
    pub(crate) fn start(&self, more: &[&str]) -> Qemu {
        self.qemu("share=on", more)
    }

    /// A QEMU that waits for a guest.
    pub(crate) fn start_waiting(&self, more: &[&str]) -> Qemu {
        self.start(&[more, &["-incoming", "defer"]].concat())
    }

    /// A QEMU whose memory backend has these options besides.
    pub(crate) fn qemu(&self, backend: &str, more: &[&str]) -> Qemu {
        self.qemu_of(self.mib, backend, more)
    }

    /// The same of another size.
    pub(crate) fn qemu_of(&self, mib: usize, backend: &str, more: &[&str]) -> Qemu {
        let number = self.guests.fetch_add(1, Ordering::Relaxed);
        let ram = self.folder.path().join(format!("ram{number}"));
        let [kernel, initrd] = [&self.kernel, &self.initrd].map(|path| path.to_str().unwrap());
        let boot =
            ["-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1 mib=32 rate=200"];
        Qemu::start(&ram, mib, backend, &[&self.machine()[..], &boot, more].concat())
    }
}

/// The guest's file system: its program, built for it. One that was built of the same source is taken: where this test runs in a lab guest
/// there is no compiler.
fn initrd() -> Result<PathBuf, String> {
    let digest = pagecopy::digest::PageHasher::new(0).checksum(include_bytes!("guest.rs"));
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let initrd = kept.join(format!("qemu-guest-{digest:016x}.cpio"));
    if initrd.exists() {
        return Ok(initrd);
    }
    let own = tempfile::tempdir_in(kept).map_err(|e| format!("{}: {e}", kept.display()))?;
    let program = own.path().join("guest");
    let built = Command::new("rustc")
        .args([
            "--edition",
            "2024",
            "-O",
            "-C",
            "strip=symbols",
            "-C",
            "target-feature=+crt-static",
            "-C",
            "panic=abort",
            "-o",
        ])
        .arg(&program)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu/guest.rs"))
        .output()
        .map_err(|e| format!("no rustc: {e}"))?;
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    const CONSOLE: [usize; 2] = [5, 1];
    let archive = [
        entry("init", 0o100_755, [0, 0], &std::fs::read(&program).unwrap()),
        entry("dev", 0o040_755, [0, 0], &[]),
        // The kernel opens it for the program.
        entry("dev/console", 0o020_600, CONSOLE, &[]),
        entry("TRAILER!!!", 0, [0, 0], &[]),
    ];
    let archive = archive.concat();
    let whole = own.path().join("initrd");
    std::fs::write(&whole, archive).unwrap();
    std::fs::rename(&whole, &initrd).unwrap();
    Ok(initrd)
}

/// One file of a cpio archive, with its mode, and the device that it is.
/// (newc, as Documentation/driver-api/early-userspace/buffer-format.rst of Linux has it.)
fn entry(name: &str, mode: usize, device: [usize; 2], data: &[u8]) -> Vec<u8> {
    let fields = [0, mode, 0, 0, 1, 0, data.len(), 0, 0, device[0], device[1], name.len() + 1, 0];
    let mut out = b"070701".to_vec();
    fields.iter().for_each(|field| out.extend_from_slice(format!("{field:08x}").as_bytes()));
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// A running QEMU; killed when it is dropped.
pub(crate) struct Qemu {
    child: Child,
    ram: PathBuf,
    socket: PathBuf,
    /// A second monitor: each has one client at a time.
    beside: PathBuf,
    console: PathBuf,
}

impl Qemu {
    /// Starts one with its memory in the file `ram`, and waits until it answers.
    pub(crate) fn start(ram: &Path, mib: usize, backend: &str, more: &[&str]) -> Self {
        let path = |what: &str| ram.with_extension(what);
        let (socket, beside, console) = (path("qmp"), path("beside"), path("console"));
        let object = format!("memory-backend-file,id=ram,size={mib}M,mem-path={},{backend}", ram.display());
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-m", &format!("{mib}M"), "-object", &object, "-nodefaults", "-display", "none"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", beside.display())])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(more)
            .stdin(Stdio::null());
        let child = command.spawn().unwrap();
        let qemu = Self { child, ram: ram.into(), socket, beside, console };
        wait_until("QEMU's monitor", BOOT, || UnixStream::connect(&qemu.beside).is_ok());
        // It listens before it has all else.
        qemu.status();
        qemu
    }

    /// The address of its monitor, as pageferry takes it.
    pub(crate) fn qmp(&self) -> String {
        format!("unix:{}", self.socket.display())
    }

    /// The socket of its second monitor.
    pub(crate) fn beside(&self) -> &Path {
        &self.beside
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Has a command done over its second monitor.
    pub(crate) fn ask(&self, command: &str) -> Value {
        self.ask_with(command, &json!({}))
    }

    /// The same with arguments.
    pub(crate) fn ask_with(&self, command: &str, arguments: &Value) -> Value {
        let mut stream = UnixStream::connect(&self.beside).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(|line| line.unwrap());
        lines.next().expect("a greeting");
        for (command, arguments) in [("qmp_capabilities", &json!({})), (command, arguments)] {
            let request = json!({ "execute": command, "arguments": arguments, "id": command });
            writeln!(stream, "{request}").unwrap();
        }
        let answers = lines.map(|line| serde_json::from_str::<Value>(&line).unwrap());
        let answer = answers.into_iter().find(|answer| answer["id"] == command).expect("an answer");
        assert!(answer.get("error").is_none(), "{command}: {answer}");
        answer["return"].clone()
    }

    /// What its guest does.
    pub(crate) fn status(&self) -> String {
        self.ask("query-status")["status"].as_str().unwrap().to_owned()
    }

    /// Whether its own migration has this capability set.
    pub(crate) fn capability(&self, name: &str) -> bool {
        let all = self.ask("query-migrate-capabilities");
        all.as_array().unwrap().iter().any(|one| one["capability"] == name && one["state"] == true)
    }

    /// What the guest wrote to its console here.
    pub(crate) fn console(&self) -> String {
        // QEMU makes the file after its monitor answers.
        String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    /// Waits until the guest has told its count so often here.
    pub(crate) fn wait_beats(&self, count: usize) {
        wait_until("the guest counts", BOOT, || beats(&self.console()) >= count);
    }

    /// The content of its memory.
    pub(crate) fn ram(&self) -> Vec<u8> {
        std::fs::read(&self.ram).unwrap()
    }

    /// Writes into its memory's file.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.ram).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }

    /// Bytes of its memory's file that are no holes.
    pub(crate) fn populated_bytes(&self) -> u64 {
        std::fs::metadata(&self.ram).unwrap().blocks() * 512
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.ram);
    }
}

/// How often a guest has told its count.
pub(crate) fn beats(console: &str) -> usize {
    console.matches("beat ").count()
}

/// Checks that a guest counted on without a gap and found nothing wrong in its memory.
pub(crate) fn check_console(console: &str) {
    let mut next = 0;
    for line in console.lines().filter(|line| line.starts_with("beat ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        // The last line may be under way.
        let [_, beat, _, _, _, errors] = words[..] else { continue };
        assert_eq!(beat.parse(), Ok(next), "{console}");
        assert_eq!(errors, "0", "{console}");
        next += 1;
    }
    assert!(next > 0, "{console}");
}
