//! A program without a VM moves its shared memory segment to another process while it computes in it.
//!
//! The program is a simulation that goes over a segment of shared memory, block by block, for as many steps as it takes. It is moved as a
//! guest is: the segment's pages while it computes, then those that it wrote meanwhile, and at last, while it stands still for a moment,
//! the number of the step that comes next. The other process goes on from there and checks what comes out against a run without a move.
//!
//! ```text
//! cargo run --release --example shared_memory     starts the other process by itself
//! ```
//!
//! Writes to the segment are tracked by userfaultfd, which takes Linux 6.7, no privilege, and no KVM.

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use pageferry::backend::{BackendError, Guest, GuestRam, StateBlob, StateSink};
use pageferry::layout::{Layout, PAGE_SIZE, Region};
use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
use pageferry::vmm_shim::uffd_log::UffdLog;
use pageferry::vmm_shim::vm_memory::Bytes;
use pageferry::{Destination, Landing, Source};

type Failed = Box<dyn Error + Send + Sync>;

/// Bytes of the segment, and of a block, on which one step works.
const SEGMENT: usize = 16 << 20;
const BLOCK: usize = PAGE_SIZE;
/// What both processes take for the same program.
const PROGRAM: &str = "shared_memory example 1";

/// One step of the computation on one block: each word becomes a function of what it was and of the step.
fn compute(block: &mut [u64], step: u64) {
    for (i, word) in block.iter_mut().enumerate() {
        *word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(step ^ i as u64);
    }
}

/// The program: its segment, the next step, and whether it computes.
struct Program {
    segment: Arc<GuestMemory>,
    progress: Mutex<(u64, bool)>,
}

impl Program {
    fn new() -> Result<Arc<Self>, Failed> {
        // No guest sees it at an address: it is known by its name.
        let layout = Layout::new(vec![Region::unplaced("segment", SEGMENT as u64)])?;
        let segment = Arc::new(GuestMemory::create(layout, &Backing::Memfd)?);
        Ok(Arc::new(Self { segment, progress: Mutex::new((0, false)) }))
    }

    fn progress(&self) -> std::sync::MutexGuard<'_, (u64, bool)> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Computes, whenever it is to, until step `end`.
    fn run(&self, end: u64) -> Result<(), Failed> {
        let segment = self.segment.region(0);
        let mut block = [0u64; BLOCK / 8];
        loop {
            let mut progress = self.progress();
            let (step, runs) = *progress;
            if step == end {
                return Ok(());
            }
            if runs {
                let at = step as usize % (SEGMENT / BLOCK) * BLOCK;
                for (i, word) in block.iter_mut().enumerate() {
                    *word = segment.read_obj(at + 8 * i)?;
                }
                compute(&mut block, step);
                for (i, word) in block.iter().enumerate() {
                    segment.write_obj(*word, at + 8 * i)?;
                }
                progress.0 += 1;
            }
            drop(progress);
            thread::sleep(Duration::from_micros(if runs { 10 } else { 200 }));
        }
    }

    /// Waits until it has come to a step.
    fn wait(&self, step: u64) {
        while self.progress().0 < step {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether the segment holds what the same steps come to without a move.
    fn is_right(&self) -> Result<bool, Failed> {
        let (steps, _) = *self.progress();
        let mut expected = vec![0u64; SEGMENT / 8];
        for step in 0..steps {
            let at = step as usize % (SEGMENT / BLOCK) * (BLOCK / 8);
            compute(&mut expected[at..at + BLOCK / 8], step);
        }
        let segment = self.segment.region(0);
        for (i, word) in expected.iter().enumerate() {
            if segment.read_obj::<u64>(8 * i)? != *word {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Guest for Program {
    fn pause(&self) -> Result<(), BackendError> {
        // Whoever has the lock is in no step.
        self.progress().1 = false;
        Ok(())
    }
    fn resume(&self) -> Result<(), BackendError> {
        self.progress().1 = true;
        Ok(())
    }
    fn save_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError> {
        out.piece("next step", 1, &self.progress().0.to_le_bytes())
    }
    fn load_state(&self, state: &[StateBlob]) -> Result<(), BackendError> {
        let [StateBlob { name, version: 1, bytes }] = state else {
            return Err(BackendError::invalid("the state is one piece, of version 1"));
        };
        let step = bytes[..].try_into().map_err(|e| BackendError::new(format!("read {name:?}"), e))?;
        self.progress().0 = u64::from_le_bytes(step);
        Ok(())
    }
}

/// The process that the program moves to: says where it listens, takes it in, and goes on with it.
fn receive() -> Result<(), Failed> {
    let program = Program::new()?;
    let listening = Destination::builder().bind(&"tcp:127.0.0.1:0".parse()?)?;
    println!("listening {}", listening.uri());
    let computing = program.clone();
    let run = thread::spawn(move || {
        // It stands still until it has arrived; from there on it goes once more through all of the segment.
        while !computing.progress().1 {
            thread::sleep(Duration::from_millis(1));
        }
        let end = computing.progress().0 + (SEGMENT / BLOCK) as u64;
        computing.run(end)
    });
    let arriving = program.clone();
    let arriving = listening.receive(move |offer| {
        let fits = offer.machine == PROGRAM && offer.layout == *arriving.segment.layout();
        if fits {
            Ok(Landing::guest(arriving.segment.clone(), arriving.clone()))
        } else {
            Err("another program".into())
        }
    })?;
    arriving.wait()?;
    run.join().map_err(|_| "the computation panicked")??;
    let steps = program.progress().0;
    if !program.is_right()? {
        return Err(format!("after {steps} steps the segment is not what it would be without a move").into());
    }
    println!("right after {steps} steps");
    Ok(())
}

fn main() -> Result<(), Failed> {
    if std::env::args().any(|arg| arg == "receive") {
        return receive();
    }
    let mut other = Command::new(std::env::current_exe()?).arg("receive").stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(other.stdout.take().ok_or("no output")?).lines();
    let uri = loop {
        let line = lines.next().ok_or("the other process ended")??;
        match line.strip_prefix("listening ") {
            Some(uri) => break uri.parse()?,
            None => println!("{line}"),
        }
    };

    let program = Program::new()?;
    program.resume()?;
    let computing = program.clone();
    thread::spawn(move || computing.run(u64::MAX));
    // All of the segment holds something.
    program.wait((SEGMENT / BLOCK) as u64);
    let began = program.progress().0;
    let log = Arc::new(UffdLog::new(program.segment.clone())?);
    let source =
        Source::builder(program.segment.clone(), log).guest(program.clone()).machine(PROGRAM).build()?;
    let report = source.start(&uri)?.wait()?;
    let steps = program.progress().0 - began;
    println!("moved while it computed {steps} steps; it stood still for {:.1} ms", report.downtime_ms);
    for line in lines {
        println!("the other process: {}", line?);
    }
    if other.wait()?.success() { Ok(()) } else { Err("the other process failed".into()) }
}
