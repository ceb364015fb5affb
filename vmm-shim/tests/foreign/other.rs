//! Another process with guest memory: this very program, which writes, reads and gives away pages when it is asked to.

use std::fs::File;
use std::io::{BufRead, BufReader, Lines, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};

use pagecopy::backend::{BackendError, GuestRam};
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE, Region};
use vmm_shim::adapter::VmMemory;
use vmm_shim::conformance::Page;
use vmm_shim::foreign::Standstill;
use vmm_shim::guest_memory::{Backing, GuestMemory};
use vmm_shim::vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_shim::vmm::writer::Writer;
use vmm_shim::vmm::{GuestImage, Tracker, Vm, VmConfig};

/// What the other process's memory is; set for it alone.
const MEMORY: &str = "PAGEFERRY_TEST_OTHER_MEMORY";
/// Stands before the path of a file that has the layout of huge pages.
const HUGE_FILE: &str = "huge ";
/// Stands before the path of a file that is the memory of a guest on KVM, whose vCPU does the writing.
const GUEST_FILE: &str = "guest ";
/// Begins the lines that are not the harness's.
pub(crate) const SAID: &str = "the other process: ";

/// Two regions, neither a multiple of a chunk.
pub(crate) fn layout() -> Layout {
    let (chunk, page) = (CHUNK_SIZE as u64, PAGE_SIZE as u64);
    let low = Region::new("low", 0, 9 * chunk + 9 * page);
    Layout::new(vec![low, Region::new("high", 1 << 32, 2 * chunk + page)]).unwrap()
}

/// One region of two huge pages.
pub(crate) fn huge_layout() -> Layout {
    Layout::flat(4 << 20).unwrap()
}

/// A layout in which the writer guest can run.
pub(crate) fn guest_layout() -> Layout {
    let (mib, page) = (1 << 20, PAGE_SIZE as u64);
    let low = Region::new("low", 0, 16 * mib + 5 * page);
    Layout::new(vec![low, Region::new("high", 4 << 30, mib + 67 * page)]).unwrap()
}

/// A command that runs one test of this program.
pub(crate) fn this_program(test: &str) -> Command {
    let module = module_path!().split("::").skip(1).filter(|&part| part != "other");
    let name: Vec<&str> = module.chain([test]).collect();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "--nocapture", "--test-threads", "1", &name.join("::")]);
    command
}

/// The life of the other process, in the test that it is started as; nothing in any other process.
pub(crate) fn live() {
    let Ok(memory) = std::env::var(MEMORY) else { return };
    if let Some(path) = memory.strip_prefix(GUEST_FILE) {
        return live_as_guest(path);
    }
    let memory = match memory.as_str() {
        "anonymous" => mapped(layout(), &Backing::Anonymous { huge: false }),
        "anonymous, huge" => mapped(huge_layout(), &Backing::Anonymous { huge: true }),
        "hugetlb" => mapped(huge_layout(), &Backing::MemfdHuge),
        path => match path.strip_prefix(HUGE_FILE) {
            Some(path) => Ok(mapped_huge(Path::new(path))),
            None => mapped(layout(), &Backing::File { path: path.into(), create: false }),
        },
    };
    let memory = match memory {
        Ok(memory) => memory,
        Err(e) => return println!("\n{SAID}cannot: {e}: {}", e.source),
    };
    say_addresses(&*memory);
    for (what, numbers) in requests() {
        let page = |chunk: u64, bit: u64| {
            memory.chunk(chunk as u32).subslice(bit as usize * PAGE_SIZE, PAGE_SIZE).unwrap()
        };
        match (what.as_str(), &numbers[..]) {
            ("write", [number, pages @ ..]) => {
                for (at, pair) in pages.chunks_exact(2).enumerate() {
                    let number = number + at as u64;
                    // Somewhere else in the page each time.
                    let offset = number as usize % (PAGE_SIZE / 8) * 8;
                    page(pair[0], pair[1]).subslice(offset, 8).unwrap().copy_from(&[number]);
                }
            }
            ("read", [chunk, bit]) => drop(page(*chunk, *bit).copy_to(&mut [0u8; PAGE_SIZE])),
            ("discard", [chunk, bit]) => memory.discard(*chunk as u32, 1 << bit).unwrap(),
            ("become", []) => panic!("no other program: {}", Command::new("cat").exec()),
            other => panic!("{other:?}"),
        }
        println!("{SAID}done");
    }
}

/// The life of one that has a guest.
fn live_as_guest(path: &str) {
    let memory = GuestMemory::create(guest_layout(), &Backing::File { path: path.into(), create: false });
    let memory = Arc::new(memory.unwrap());
    let config = VmConfig { cpus: 1, guest: GuestImage::Writer, tracker: Tracker::None };
    let vm = match Vm::new(config, memory.clone(), Box::new(std::io::sink())) {
        Ok(vm) => vm,
        Err(e) => return println!("\n{SAID}cannot: {e}"),
    };
    vm.start().unwrap();
    let mut writer = Writer::new(&vm);
    say_addresses(&*memory);
    for (what, numbers) in requests() {
        assert_eq!(what, "write");
        let address = |pair: &[u64]| memory.layout().address(pair[0] as u32, pair[1] as u32).unwrap();
        let addresses: Vec<u64> = numbers[1..].chunks_exact(2).map(address).collect();
        writer.write(&addresses).unwrap();
        println!("{SAID}done");
    }
}

fn say_addresses(memory: &dyn GuestRam) {
    let at = |region| memory.region(region).ptr_guard_mut().as_ptr() as u64;
    let addresses: Vec<String> = (0..memory.layout().regions().len()).map(|r| at(r).to_string()).collect();
    println!("\n{SAID}{}", addresses.join(" "));
}

/// What is asked for: a word and numbers.
fn requests() -> impl Iterator<Item = (String, Vec<u64>)> {
    std::io::stdin().lines().map(|line| {
        let line = line.unwrap();
        let (what, numbers) = line.split_once(' ').unwrap_or((&line, ""));
        (what.to_owned(), numbers.split_whitespace().map(|word| word.parse().unwrap()).collect())
    })
}

fn mapped(layout: Layout, backing: &Backing) -> Result<Box<dyn GuestRam>, BackendError> {
    GuestMemory::create(layout, backing).map(|memory| Box::new(memory) as _)
}

/// A file whose mapping may have huge pages, which [`GuestMemory`] has none of.
fn mapped_huge(path: &Path) -> Box<dyn GuestRam> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let len = huge_layout().bytes() as usize;
    let range = (GuestAddress(0), len, Some(FileOffset::new(file, 0)));
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap();
    Box::new(VmMemory::new(memory).unwrap())
}

/// The other process; it ends when this is dropped.
pub(crate) struct Other {
    pub(crate) child: Child,
    pub(crate) addresses: Vec<Vec<Range<u64>>>,
    pipes: Mutex<(ChildStdin, Lines<BufReader<ChildStdout>>)>,
}

impl Other {
    /// One with memory of a kind, or why there cannot be.
    fn start(memory: &str, layout: &Layout) -> Result<Self, String> {
        let mut child = this_program("the_other_process")
            .env(MEMORY, memory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut other = Self { child, addresses: Vec::new(), pipes: Mutex::new((stdin, lines)) };
        let said = other.said();
        if said.starts_with("cannot") {
            return Err(said);
        }
        let starts = said.split(' ').map(|word| word.parse::<u64>().unwrap());
        other.addresses = starts
            .zip(layout.regions())
            .map(|(at, region)| Vec::from_iter(Some(at..at + region.len)))
            .collect();
        Ok(other)
    }

    /// One with private memory.
    pub(crate) fn private() -> Self {
        Self::start("anonymous", &layout()).unwrap()
    }

    /// One with private huge pages.
    pub(crate) fn huge() -> Self {
        Self::start("anonymous, huge", &huge_layout()).unwrap()
    }

    /// One with huge pages of hugetlbfs, or why the host has none.
    pub(crate) fn hugetlb() -> Result<Self, String> {
        Self::start("hugetlb", &huge_layout())
    }

    /// One that has mapped the same file as this process; what it is depends on the layout.
    pub(crate) fn sharing(memory: &GuestMemory) -> Result<Self, String> {
        let (fd, _) = memory.fd_of(0).unwrap();
        let kind = match memory.layout() {
            layout if *layout == huge_layout() => HUGE_FILE,
            layout if *layout == guest_layout() => GUEST_FILE,
            _ => "",
        };
        let path = format!("{kind}/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        Self::start(&path, memory.layout())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn said(&self) -> String {
        let lines = &mut self.pipes.lock().unwrap().1;
        lines.map(Result::unwrap).find_map(|line| line.strip_prefix(SAID).map(str::to_owned)).unwrap()
    }

    /// Says something to it, and does not wait.
    pub(crate) fn tell(&self, line: &str) {
        writeln!(self.pipes.lock().unwrap().0, "{line}").unwrap();
    }

    /// Has it do something, and waits until it is done.
    pub(crate) fn ask(&self, line: &str) {
        self.tell(line);
        assert_eq!(self.said(), "done");
    }

    /// Has it write pages; the numbers it writes begin with `number`.
    pub(crate) fn write(&self, number: u64, pages: &[Page]) {
        let list: String = pages.iter().map(|(chunk, bit)| format!(" {chunk} {bit}")).collect();
        self.ask(&format!("write {number}{list}"));
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lets either the other process write, or a log look.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    taken: Mutex<bool>,
    left: Condvar,
}

impl Gate {
    pub(crate) fn enter(&self) {
        let mut taken = self.left.wait_while(self.taken.lock().unwrap(), |taken| *taken).unwrap();
        *taken = true;
    }

    pub(crate) fn leave(&self) {
        assert!(std::mem::replace(&mut *self.taken.lock().unwrap(), false), "nobody was in");
        self.left.notify_all();
    }

    pub(crate) fn is_taken(&self) -> bool {
        *self.taken.lock().unwrap()
    }
}

impl Standstill for Gate {
    fn stop(&self) -> Result<(), BackendError> {
        self.enter();
        Ok(())
    }
    fn go_on(&self) -> Result<(), BackendError> {
        self.leave();
        Ok(())
    }
}

/// A gate that nobody else goes through.
pub(crate) fn gate() -> Arc<Gate> {
    Arc::default()
}
