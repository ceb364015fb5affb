//! One lab guest: a QEMU process, three ports to it (control, output, errors), and its kernel's console in a file.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pageferry::cli::measure::process::Running;
use pageferry::cli::print;

use super::error::LabError;
use super::kernel::Kernel;
use super::needs;
use super::script::Network;
use crate::cli::say;

/// How long QEMU may take until it has opened its ports.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How many seconds a boot may take until the guest's first word, unless somebody says otherwise.
pub(super) const BOOT_PATIENCE_S: u64 = 60;
/// Lines of the console that an error shows.
const CONSOLE_LINES: usize = 12;
/// Longest line on the control port, in bytes.
const LINE_MAX: u64 = 4096;
/// The ports, by name: see `init.sh`.
const PORTS: [&str; 3] = ["ctl", "out", "err"];

/// What a guest boots and has.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    /// Its kernel.
    pub kernel: &'a Kernel,
    /// Its first file system.
    pub initramfs: &'a Path,
    /// CPUs.
    pub cpus: u8,
    /// Whether each CPU has a thread of its own. That is no place for virtual machines: see `accelerator`.
    pub parallel: bool,
    /// Memory in bytes.
    pub memory: u64,
    /// The file that is its memory, instead of memory of QEMU's own.
    pub ram_file: Option<&'a Path>,
    /// Folders of the host that it may write to.
    pub shares: &'a [PathBuf],
    /// What its RDMA device sits on.
    pub network: Network,
    /// Which of the guests it is.
    pub host: usize,
    /// Keep the console here.
    pub console: Option<&'a Path>,
    /// How long it may take until it says its first word; then it is booted once more.
    pub boot_patience: Duration,
}

/// What a guest says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// It has booted as far as its first process.
    Alive,
    /// It waits for the word to start the command.
    Ready,
    /// The command ended with this code, and all its output is here.
    Exit(u8),
    /// It cannot run the command.
    Fail(String),
    /// It is gone.
    Gone,
}

impl Word {
    fn parse(line: &str) -> Option<Self> {
        match line.split_once(' ').unwrap_or((line, "")) {
            ("alive", "") => Some(Self::Alive),
            ("ready", "") => Some(Self::Ready),
            ("exit", code) => code.parse().ok().map(Self::Exit),
            ("fail", reason) => Some(Self::Fail(reason.into())),
            _ => None,
        }
    }
}

/// What happens while guests run.
#[derive(Debug)]
pub(super) enum Event {
    /// A guest, by number, says something.
    Said(usize, Word),
    /// Somebody wants an end.
    Cancelled,
    /// Nobody reads the output any more.
    ReaderGone,
}

/// Where a command's output goes.
#[derive(Clone, Debug)]
pub(super) enum Output {
    /// To our own standard output and standard error, as it is.
    Through,
    /// There too, whole lines with the guest's number before them.
    Prefixed,
    /// Standard output into memory, the errors to ours.
    Captured(Arc<Mutex<Vec<u8>>>),
}

/// What it takes to start QEMU.
#[derive(Debug)]
struct Boot {
    arguments: Vec<String>,
    folder: PathBuf,
    errors: PathBuf,
    output: Output,
    host: usize,
    events: Sender<Event>,
}

/// A running QEMU.
#[derive(Debug)]
struct Booted {
    child: Running,
    control: UnixStream,
    threads: Vec<JoinHandle<()>>,
    /// Set when nobody wants to know any more that it is gone.
    dropped: Arc<AtomicBool>,
}

impl Boot {
    fn start(&self) -> Result<Booted, LabError> {
        let mut listeners = Vec::new();
        for port in PORTS {
            let path = self.folder.join(port);
            // There is one already when this is not the first boot.
            let _ = fs::remove_file(&path);
            let listen = || UnixListener::bind(&path).and_then(|l| l.set_nonblocking(true).map(|()| l));
            listeners.push(listen().map_err(LabError::file("make the socket", &path))?);
        }
        let errors = &self.errors;
        let stderr = fs::File::create(errors).map_err(LabError::file("write", errors))?;
        let mut command =
            Command::new(needs::program("qemu-system-x86_64").unwrap_or("qemu-system-x86_64".into()));
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        // A Ctrl-C is for us; we end the guest.
        command.process_group(0);
        let mut child =
            Running::start(&mut command).map_err(LabError::file("start", Path::new("qemu-system-x86_64")))?;
        let mut ports = Vec::new();
        for listener in &listeners {
            ports.push(accept(listener, &mut child, errors)?);
        }
        let [control, out, err]: [UnixStream; 3] = ports.try_into().unwrap_or_else(|_| unreachable!());
        let host = self.host;
        let reader = control.try_clone().map_err(LabError::file("use the socket", &self.folder))?;
        let (events, gone) = (self.events.clone(), self.events.clone());
        let (to_out, to_err) = (self.output.clone(), self.output.clone());
        let dropped = Arc::new(AtomicBool::new(false));
        let unwanted = dropped.clone();
        let threads = vec![
            std::thread::spawn(move || listen(reader, host, &events, &unwanted)),
            std::thread::spawn(move || {
                if let Err(error) = pass_on(out, &to_out, host, false) {
                    // As a command ends that writes into a broken pipe.
                    print::not_delivered(error);
                    let _ = gone.send(Event::ReaderGone);
                }
            }),
            std::thread::spawn(move || pass_on(err, &to_err, host, true).unwrap_or_default()),
        ];
        Ok(Booted { child, control, threads, dropped })
    }
}

/// A running guest; killed when dropped.
#[derive(Debug)]
pub(super) struct Guest {
    boot: Boot,
    booted: Booted,
    console: PathBuf,
    /// When it is booted once more, unless it has said something.
    silent_until: Option<Instant>,
}

impl Guest {
    /// Starts QEMU. `folder` takes its sockets and files, and has the guest's scripts in `job`.
    pub(super) fn start(
        machine: &Machine<'_>,
        folder: &Path,
        output: &Output,
        events: &Sender<Event>,
    ) -> Result<Self, LabError> {
        let console = machine.console.map_or_else(|| folder.join("console"), Path::to_path_buf);
        let boot = Boot {
            arguments: arguments(machine, folder, &console),
            folder: folder.into(),
            errors: folder.join("qemu.err"),
            output: output.clone(),
            host: machine.host,
            events: events.clone(),
        };
        let booted = boot.start()?;
        Ok(Self { boot, booted, console, silent_until: Some(Instant::now() + machine.boot_patience) })
    }

    /// When [`Self::boot_again`] is due, if ever.
    pub(super) fn silent_until(&self) -> Option<Instant> {
        self.silent_until
    }

    /// It has said something.
    pub(super) fn heard(&mut self) {
        self.silent_until = None;
    }

    /// Boots a guest once more that hangs in its boot: kernels do so where emulated CPUs are starved.
    pub(super) fn boot_again(&mut self) -> Result<(), LabError> {
        self.silent_until = None;
        let host = self.boot.host;
        say(format_args!("lab guest {host} hangs in its boot; booting it once more{}", self.console()));
        self.booted.dropped.store(true, Ordering::Release);
        self.end();
        self.booted = self.boot.start()?;
        Ok(())
    }

    /// Lets it start the command.
    pub(super) fn go(&mut self) {
        // A guest that is gone says so itself.
        let _ = self.booted.control.write_all(b"go\n");
    }

    /// Kills it, and waits until all of its output was passed on.
    pub(super) fn end(&mut self) {
        self.booted.child.kill();
        for thread in self.booted.threads.drain(..) {
            let _ = thread.join();
        }
    }

    /// The last lines of its console, for an error.
    pub(super) fn console(&self) -> String {
        let text = fs::read(&self.console).unwrap_or_default();
        last_lines(&String::from_utf8_lossy(&text))
    }

    /// What QEMU said before it ended.
    pub(super) fn qemu_errors(&self) -> String {
        qemu_errors(&self.boot.errors)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
    }
}

fn qemu_errors(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let last: Vec<_> = text.lines().rev().take(3).collect();
    if last.is_empty() {
        String::new()
    } else {
        format!(" (QEMU: {})", last.into_iter().rev().collect::<Vec<_>>().join("; "))
    }
}

fn last_lines(text: &str) -> String {
    let visible = |line: &&str| !line.trim().is_empty();
    let lines: Vec<_> = text.lines().map(str::trim_end).filter(visible).collect();
    if lines.is_empty() {
        return "; its console shows nothing".into();
    }
    let start = lines.len().saturating_sub(CONSOLE_LINES);
    // What a panic is about comes well before the end of what it prints.
    let panic = lines[..start].iter().find(|line| line.contains("Kernel panic"));
    let last: Vec<_> = panic.into_iter().chain(&lines[start..]).copied().collect();
    format!("; its console ends with\n    {}", last.join("\n    "))
}

/// Waits until QEMU has connected, or ended.
fn accept(listener: &UnixListener, child: &mut Running, errors: &Path) -> Result<UnixStream, LabError> {
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(LabError::file("use the socket of", errors))?;
                return Ok(stream);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(LabError::file("use the socket of", errors)(e)),
        }
        if child.has_ended() || Instant::now() > deadline {
            let reason = fs::read_to_string(errors).unwrap_or_default().trim().to_owned();
            let reason = if reason.is_empty() { "it does not open its ports".into() } else { reason };
            return Err(LabError::Tool { command: "qemu-system-x86_64".into(), reason });
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What runs the guest's CPUs: threads of their own, or one for all of them, by turns.
///
/// With threads of their own QEMU (7.2 to 10, at least) damages virtual machines in the guest, and the guest as well. `FXRSTOR`, `XRSTOR`
/// and `FLDENV` on any CPU clear a bit in a word of the first CPU, without a lock. That word also says whether that CPU is in a guest with
/// nested paging. So entries to a guest and exits from it get lost on the first CPU. `tests/lab-race.c` shows it, in seconds. Also, until
/// 8.1, a breakpoint that a kernel puts into its code for a moment, to patch it, can stay in translated code for ever.
fn accelerator(parallel: bool) -> &'static str {
    if parallel { "tcg,thread=multi" } else { "tcg,thread=single" }
}

/// QEMU's command line.
fn arguments(machine: &Machine<'_>, folder: &Path, console: &Path) -> Vec<String> {
    let path = |path: &Path| path.display().to_string().replace(',', ",,");
    let shared = |tag: &str, folder: &Path, options: &str| {
        let folder = path(folder);
        format!("local,path={folder},mount_tag={tag},security_model=none,multidevs=remap{options}")
    };
    let mut args: Vec<String> =
        ["-accel", accelerator(machine.parallel), "-cpu", "max", "-nodefaults", "-no-user-config"]
            .map(str::to_owned)
            .into();
    let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
    if let Some(file) = machine.ram_file {
        let (file, bytes) = (path(file), machine.memory);
        add("-object", format!("memory-backend-file,id=ram,size={bytes},mem-path={file},share=on"));
        add("-machine", "q35,memory-backend=ram".into());
    } else {
        add("-machine", "q35".into());
    }
    add("-smp", machine.cpus.to_string());
    add("-m", format!("{}M", machine.memory >> 20));
    add("-display", "none".into());
    add("-kernel", machine.kernel.image.display().to_string());
    add("-initrd", machine.initramfs.display().to_string());
    // A guest that panics reboots, and with -no-reboot QEMU then ends. The kernel's check of the timer interrupt gives it a time in which
    // emulated CPUs may not run at all on a busy host, and panics ("IO-APIC + timer doesn't work").
    add("-append", "console=ttyS0 panic=-1 quiet mitigations=off no_timer_check".into());
    add("-serial", format!("file:{}", console.display()));
    add("-virtfs", shared("host", Path::new("/"), ",readonly=on"));
    add("-virtfs", shared("job", &folder.join("job"), ",readonly=on"));
    for (at, share) in machine.shares.iter().enumerate() {
        add("-virtfs", shared(&format!("share{at}"), share, ""));
    }
    add("-device", "virtio-serial-pci".into());
    for port in PORTS {
        add("-chardev", format!("socket,id={port},path={}", path(&folder.join(port))));
        add("-device", format!("virtserialport,chardev={port},name={port}"));
    }
    if machine.network == Network::Card {
        let wire = |host| path(&folder.with_file_name(format!("wire{host}")));
        let (here, there) = (wire(machine.host), wire(1 - machine.host));
        add(
            "-netdev",
            format!("dgram,id=wire,local.type=unix,local.path={here},remote.type=unix,remote.path={there}"),
        );
        add("-device", format!("virtio-net-pci,netdev=wire,mac=52:54:00:09:00:{:02x}", machine.host + 1));
    }
    args.push("-no-reboot".into());
    args
}

/// Tells what a guest says on its control port.
fn listen(control: UnixStream, host: usize, events: &Sender<Event>, dropped: &AtomicBool) {
    let mut reader = BufReader::new(control);
    loop {
        let mut line = Vec::new();
        let read = Read::take(&mut reader, LINE_MAX).read_until(b'\n', &mut line);
        if !matches!(read, Ok(length) if length > 0) {
            break;
        }
        if let Some(word) = Word::parse(String::from_utf8_lossy(&line).trim_end()) {
            let _ = events.send(Event::Said(host, word));
        }
    }
    if !dropped.load(Ordering::Acquire) {
        let _ = events.send(Event::Said(host, Word::Gone));
    }
}

/// Passes a port's bytes on until the guest is gone, or the reader.
fn pass_on(mut port: UnixStream, output: &Output, host: usize, errors: bool) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let mut lines = Lines::default();
    loop {
        let bytes = match port.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(length) => &buffer[..length],
        };
        match output {
            Output::Through => write(errors, bytes)?,
            Output::Prefixed => write(errors, &lines.whole(host, bytes))?,
            Output::Captured(_) if errors => write(errors, bytes)?,
            Output::Captured(into) => {
                into.lock().unwrap_or_else(std::sync::PoisonError::into_inner).extend_from_slice(bytes);
            }
        }
    }
    write(errors, &lines.rest(host))
}

/// Writes at once.
fn write(errors: bool, bytes: &[u8]) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let written = print::pass_on(bytes, errors);
    // What cannot be said on standard error is lost; the command goes on.
    if errors { Ok(()) } else { written }
}

/// Makes whole lines, each with the guest's number before it.
#[derive(Default)]
struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    fn whole(&mut self, host: usize, bytes: &[u8]) -> Vec<u8> {
        self.begun.extend_from_slice(bytes);
        let end = self.begun.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines: Vec<u8> = self.begun.drain(..end).collect();
        let mut text = Vec::new();
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            text.extend_from_slice(format!("host{host}| ").as_bytes());
            text.extend_from_slice(line);
        }
        text
    }

    fn rest(&mut self, host: usize) -> Vec<u8> {
        if self.begun.is_empty() { vec![] } else { self.whole(host, b"\n") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_guest() {
        assert_eq!(Word::parse("alive"), Some(Word::Alive));
        assert_eq!(Word::parse("ready"), Some(Word::Ready));
        assert_eq!(Word::parse("exit 7"), Some(Word::Exit(7)));
        assert_eq!(Word::parse("fail no such device"), Some(Word::Fail("no such device".into())));
        for bad in ["", "exit", "exit x", "exit 256", "exit -1", "ready now", "hello"] {
            assert_eq!(Word::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn lines_are_prefixed_whole() {
        let mut lines = Lines::default();
        assert_eq!(lines.whole(0, b"a"), b"");
        assert_eq!(lines.whole(0, b"b\nc\n\nd"), b"host0| ab\nhost0| c\nhost0| \n");
        assert_eq!(lines.rest(0), b"host0| d\n");
        assert_eq!(lines.rest(0), b"");
    }

    #[test]
    fn errors_show_the_end_of_the_console() {
        let text: String = (0..40).map(|n| format!("line {n}\r\n\n")).collect();
        let shown = last_lines(&text);
        assert!(
            shown.contains("line 39") && shown.contains("line 28\n") && !shown.contains("line 27"),
            "{shown}"
        );
        let panicked = last_lines(&format!("a\nKernel panic - not syncing: x\n{text}"));
        assert!(panicked.contains("not syncing: x\n    line 28\n"), "{panicked}");
        assert_eq!(last_lines("\n \n"), "; its console shows nothing");
    }

    #[test]
    fn paths_with_commas_survive_qemus_syntax() {
        let kernel = Kernel { version: String::new(), image: "/k".into(), modules: vec![] };
        let machine = Machine {
            kernel: &kernel,
            initramfs: Path::new("/i"),
            cpus: 2,
            parallel: false,
            memory: 3 << 30,
            ram_file: Some(Path::new("/ram,file")),
            shares: &["/a,b".into()],
            network: Network::Card,
            host: 1,
            console: None,
            boot_patience: Duration::from_secs(60),
        };
        let args = arguments(&machine, Path::new("/run/x/1"), Path::new("/c")).join(" ");
        assert!(args.contains("path=/a,,b,mount_tag=share0"), "{args}");
        assert!(args.contains("-accel tcg,thread=single "), "{args}");
        assert!(args.contains("-m 3072M"), "{args}");
        assert!(
            args.contains("size=3221225472,mem-path=/ram,,file,share=on -machine q35,memory-backend=ram"),
            "{args}"
        );
        assert!(args.contains("local.path=/run/x/wire1,remote.type=unix,remote.path=/run/x/wire0"), "{args}");
    }
}
