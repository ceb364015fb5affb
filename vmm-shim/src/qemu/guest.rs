//! A guest of QEMU, as the engine commands it.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pagecopy::backend::{BackendError, Guest, StateBlob, StateSink, Throttle};
use pagecopy::layout::Region;
use rustix::event::PollFlags;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use serde_json::{Value, json};

use super::blocks::{Inode, LeftOut};
use super::control::{Control, status_of};
use super::door::Door;
use super::{Block, Qmp, STATE_PATIENCE, blocks, ready};
use crate::guest_memory::GuestMemory;

/// The name by which QEMU knows the pipe for its state.
const FD_NAME: &str = "pageferry-state";
/// The name of the piece of state, and its version.
const PIECE: (&str, u32) = ("qemu", 1);
/// What `stop`, saving, loading and `cont` take together: 12 to 19 ms each to save and to load 0.3 to 0.8 MB, on an idle host.
const STATE_TIME: Duration = Duration::from_millis(35);
/// Room in a pipe for its state, which takes 0.3 to 0.8 MB: as much as anybody may have (pipe(7), `pipe-max-size`).
const PIPE_BYTES: usize = 1 << 20;
/// How often QEMU is asked whether its migration has ended.
const TICK: Duration = Duration::from_millis(1);
/// Memory in shared files is left out of QEMU's own stream.
const CAPABILITY: &str = "x-ignore-shared";
/// The migration mode that leaves all memory out, and hands it over by its descriptors.
const MODE: &str = "cpr-transfer";
/// Capabilities under which its stream would not be one of bytes from end to end.
const MUST_BE_OFF: [&str; 6] =
    ["multifd", "postcopy-ram", "x-colo", "background-snapshot", "return-path", "pause-before-switchover"];
/// Nothing of the state waits for a limit: it is part of the downtime.
const NO_LIMIT: u64 = 1 << 50;

/// On which side a QEMU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its guest is moved away.
    Source,
    /// It waits for a guest: `-incoming defer`.
    Destination,
}

/// A QEMU's machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// vCPUs, 255 where there are more.
    pub cpus: u8,
}

/// A QEMU and its guest.
///
/// What was set in QEMU is put back when this is dropped.
#[derive(Debug)]
pub struct QemuGuest {
    qmp: Arc<Qmp>,
    role: Role,
    blocks: Mutex<Vec<Block>>,
    /// How QEMU leaves them out of its own stream.
    left_out: LeftOut,
    /// Their files, in the same order.
    inodes: Vec<Inode>,
    /// All memory backends.
    backends: Value,
    ran: bool,
    machine: String,
    control: Control,
    /// A state was loaded, which QEMU does once.
    loaded: AtomicBool,
    before: Before,
}

/// What is put back in the end.
#[derive(Debug, Default)]
struct Before {
    capabilities: Vec<Value>,
    bandwidth: Option<u64>,
    mode: Option<String>,
}

impl QemuGuest {
    /// Attaches to the QEMU whose monitor is at `path`.
    ///
    /// # Errors
    /// Where its guest cannot be moved from outside, or its state is not what `role` takes. Nothing was changed then; the text names the
    /// block, device or capability, and what helps.
    pub fn attach(path: &Path, role: Role) -> Result<Self, BackendError> {
        let qmp = Qmp::connect(path)?;
        let status = status_of(&qmp)?;
        let fits = match role {
            Role::Source => !matches!(&status[..], "inmigrate" | "finish-migrate"),
            Role::Destination => status == "inmigrate",
        };
        if !fits {
            let hint = match role {
                Role::Source => "there is no guest in it to be moved",
                Role::Destination => "start it with `-incoming defer`, and anew for each guest",
            };
            return Err(BackendError::invalid(format!("QEMU at {} is `{status}`: {hint}", path.display())));
        }
        let before = Before::of(&qmp)?;
        if !before.has(CAPABILITY) {
            let what = format!(
                "QEMU at {} has not the capability {CAPABILITY}: it takes version 4.0 or later",
                path.display()
            );
            return Err(BackendError::invalid(what));
        }
        blocks::refuse_unseen_writers(&qmp)?;
        let (backends, (blocks, left_out)) = (blocks::backends(&qmp)?, blocks::find(&qmp)?);
        let inodes = blocks.iter().map(Block::inode).collect::<Result<_, _>>()?;
        let machine = qmp.execute("qom-get", &json!({ "path": "/machine", "property": "type" }))?;
        let machine = format!("qemu {}", machine.as_str().unwrap_or("?"));
        let ran = status == "running";
        let qmp = Arc::new(qmp);
        let (loaded, control) = (AtomicBool::new(false), Control::new(qmp.clone()));
        let blocks = Mutex::new(blocks);
        Ok(Self { qmp, role, blocks, left_out, inodes, backends, ran, machine, control, loaded, before })
    }

    /// Its memory, mapped here as well: once.
    ///
    /// # Errors
    /// Of mapping it; and, at a destination, where it holds something, for it is to be fresh.
    pub fn memory(&self) -> Result<GuestMemory, BackendError> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let regions =
            blocks.drain(..).map(|block| (Region::unplaced(block.name, block.bytes), block.file, block.path));
        let memory = GuestMemory::of_files(regions.collect())?;
        if self.role == Role::Destination {
            memory.require_zeros()?;
        }
        Ok(memory)
    }

    /// Whether the guest ran when this was attached.
    pub fn ran(&self) -> bool {
        self.ran
    }

    /// QEMU's machine, which both sides have alike.
    pub fn machine(&self) -> &str {
        &self.machine
    }

    /// Whether it still waits for its first state: then another guest may come, once its memory is as new.
    pub fn still_waits(&self) -> bool {
        !self.loaded.load(Ordering::SeqCst) && status_of(&self.qmp).is_ok_and(|status| status == "inmigrate")
    }

    /// What it is, for people.
    ///
    /// # Errors
    /// When QEMU does not say.
    pub fn describe(&self) -> Result<Machine, BackendError> {
        let kvm = self.qmp.execute("query-kvm", &Value::Null)?;
        let accelerator = if kvm["enabled"] == true { "kvm" } else { "tcg" }.to_owned();
        let cpus = self.qmp.execute("query-cpus-fast", &Value::Null)?;
        let cpus = cpus.as_array().map_or(0, Vec::len).try_into().unwrap_or(u8::MAX);
        Ok(Machine { accelerator, cpus })
    }

    /// What of its memory will not be as at the source once it has arrived, and why, for people.
    pub fn own_memory(&self) -> Vec<String> {
        // QEMU refuses the question where there is no such device.
        let vmgenid = self.qmp.execute("query-vm-generation-id", &Value::Null).is_ok();
        let text = "the page of vmgenid holds the destination's own value: QEMU writes it anew, so that the guest knows that it was moved";
        vmgenid.then(|| text.to_owned()).into_iter().collect()
    }

    /// Its monitor.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Sets what its own migration takes.
    fn prepare(&self) -> Result<(), BackendError> {
        let set = |name: &&str| self.before.has(name);
        let off = MUST_BE_OFF.iter().filter(|name| set(name)).map(|name| capability(name, false));
        let shared_files = self.left_out == LeftOut::SharedFiles;
        let all: Vec<Value> = off.chain([capability(CAPABILITY, shared_files)]).collect();
        self.qmp.execute("migrate-set-capabilities", &json!({ "capabilities": all }))?;
        if self.role == Role::Source {
            let mut parameters = json!({ "max-bandwidth": NO_LIMIT });
            if !shared_files {
                parameters["mode"] = MODE.into();
            }
            self.qmp.execute("migrate-set-parameters", &parameters)?;
        }
        Ok(())
    }

    /// How its own migration stands; why it failed, where it has.
    fn migration(&self) -> Result<String, BackendError> {
        let answer = self.qmp.execute("query-migrate", &Value::Null)?;
        let status = answer["status"].as_str().unwrap_or_default().to_owned();
        let why = match &status[..] {
            "failed" => answer["error-desc"].as_str().unwrap_or("its standard error says why"),
            "cancelled" => "somebody cancelled it",
            _ => return Ok(status),
        };
        Err(BackendError::new("QEMU's own migration of the devices' state failed", why.to_owned()))
    }

    /// Waits for the end of QEMU's own migration.
    fn await_migration(&self) -> Result<(), BackendError> {
        let deadline = Instant::now() + STATE_PATIENCE;
        while self.migration()? != "completed" {
            if Instant::now() > deadline {
                return Err(BackendError::new(
                    "wait for the end of QEMU's own migration",
                    io::Error::from(ErrorKind::TimedOut),
                ));
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    /// Has QEMU begin to write its state: to a pipe, or, where it hands its memory over besides, to a socket.
    fn begin_state(&self) -> Result<File, BackendError> {
        if self.left_out == LeftOut::SharedFiles {
            let (reader, writer) = pipe()?;
            self.qmp.give(FD_NAME, writer.as_fd())?;
            drop(writer);
            self.qmp.execute("migrate", &json!({ "uri": format!("fd:{FD_NAME}") }))?;
            return Ok(File::from(reader));
        }
        let failed = |e| BackendError::new("have QEMU connect, to say its state", e);
        let (main, memory) = (Door::open().map_err(failed)?, Door::open().map_err(failed)?);
        let channels = json!({ "channels": [main.channel("main"), memory.channel("cpr")] });
        self.qmp.execute("migrate", &channels)?;
        // It brings descriptors of its memory, which is mapped already, and goes on once nobody holds this.
        drop(memory.accept(self.qmp.pid(), STATE_PATIENCE).map_err(failed)?);
        let state = main.accept(self.qmp.pid(), STATE_PATIENCE).map_err(failed)?;
        Ok(File::from(OwnedFd::from(state)))
    }

    /// Reads QEMU's state.
    fn read_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError> {
        let mut reader = self.begin_state()?;
        out.begin(PIECE.0, PIECE.1)?;
        let mut bytes = vec![0; 256 << 10];
        loop {
            ready(&reader, PollFlags::IN, STATE_PATIENCE)
                .map_err(|e| BackendError::new("read the devices' state from QEMU", e))?;
            match reader.read(&mut bytes) {
                Ok(0) => break,
                Ok(count) => out.write(&bytes[..count])?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(BackendError::new("read the devices' state from QEMU", e)),
            }
        }
        self.await_migration()
    }

    /// Has QEMU read its state from a pipe, and writes it there.
    fn write_state(&self, state: &[u8]) -> Result<(), BackendError> {
        let (reader, writer) = pipe()?;
        self.qmp.give(FD_NAME, reader.as_fd())?;
        drop(reader);
        self.qmp.execute("migrate-incoming", &json!({ "uri": format!("fd:{FD_NAME}") }))?;
        let written = feed(writer, state);
        // QEMU's own word, where it has one, says more than a pipe that broke.
        self.await_migration()?;
        written.map_err(|e| BackendError::new("write the devices' state to QEMU", e))
    }

    pub(super) fn inodes(&self) -> &[Inode] {
        &self.inodes
    }

    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    fn announce(&self) {
        // Whoever sent to the guest learns where it is a little later, where this fails.
        let rounds = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
        let _ = self.qmp.execute("announce-self", &rounds);
    }
}

impl Guest for QemuGuest {
    fn pause(&self) -> Result<(), BackendError> {
        self.control.pause()?;
        let status = status_of(&self.qmp)?;
        if status == "running" {
            return Err(BackendError::invalid(
                "QEMU's guest runs although it was stopped: somebody else commands it",
            ));
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), BackendError> {
        self.control.run()?;
        let status = status_of(&self.qmp)?;
        if status != "running" {
            return Err(BackendError::invalid(format!(
                "QEMU's guest is `{status}` although it was let go on"
            )));
        }
        self.announce();
        Ok(())
    }

    fn throttle(&self) -> Option<&dyn Throttle> {
        Some(self)
    }

    fn state_time(&self) -> Duration {
        STATE_TIME
    }

    fn save_state(&self, out: &mut dyn StateSink) -> Result<(), BackendError> {
        if blocks::backends(&self.qmp)? != self.backends {
            return Err(BackendError::invalid(
                "memory was plugged in or out of QEMU meanwhile: migrate it once more",
            ));
        }
        self.prepare()?;
        self.read_state(out).inspect_err(|_| {
            // It may be in the midst of it.
            let _ = self.qmp.execute("migrate_cancel", &Value::Null);
        })
    }

    fn load_state(&self, state: &[StateBlob]) -> Result<(), BackendError> {
        let [StateBlob { name, version, bytes }] = state else {
            return Err(BackendError::invalid("the state is not one piece: it is not QEMU's"));
        };
        if (name.as_str(), *version) != PIECE {
            return Err(BackendError::invalid(format!(
                "the state is {name:?} of version {version}, not QEMU's"
            )));
        }
        if self.loaded.swap(true, Ordering::SeqCst) {
            return Err(BackendError::invalid(
                "this QEMU has taken a state before, and takes one alone: start it anew for another attempt",
            ));
        }
        self.prepare()?;
        // Else it would run as soon as it has its state.
        self.control.pause()?;
        self.write_state(bytes)?;
        match &status_of(&self.qmp)?[..] {
            "running" => Err(BackendError::invalid("QEMU's guest runs before it was let")),
            _ => Ok(()),
        }
    }
}

/// By stops of some milliseconds: QEMU takes no throttling from outside.
impl Throttle for QemuGuest {
    fn set(&self, percent: u8) -> Result<(), BackendError> {
        self.control.throttle(percent)
    }
}

impl Drop for QemuGuest {
    fn drop(&mut self) {
        // A QEMU that is gone needs nothing put back.
        let _ = self.before.put_back(&self.qmp, self.role);
    }
}

impl Before {
    fn of(qmp: &Qmp) -> Result<Self, BackendError> {
        let capabilities = qmp.execute("query-migrate-capabilities", &Value::Null)?;
        let parameters = qmp.execute("query-migrate-parameters", &Value::Null)?;
        let capabilities = capabilities.as_array().cloned().unwrap_or_default();
        let mode = parameters["mode"].as_str().map(str::to_owned);
        Ok(Self { capabilities, bandwidth: parameters["max-bandwidth"].as_u64(), mode })
    }

    /// Whether QEMU knows a capability.
    fn has(&self, name: &str) -> bool {
        self.capabilities.iter().any(|one| one["capability"] == name)
    }

    fn put_back(&self, qmp: &Qmp, role: Role) -> Result<(), BackendError> {
        let touched = |one: &&Value| {
            one["capability"].as_str().is_some_and(|name| name == CAPABILITY || MUST_BE_OFF.contains(&name))
        };
        let capabilities: Vec<&Value> = self.capabilities.iter().filter(touched).collect();
        qmp.execute("migrate-set-capabilities", &json!({ "capabilities": capabilities }))?;
        if let (Role::Source, Some(bandwidth)) = (role, self.bandwidth) {
            let mut parameters = json!({ "max-bandwidth": bandwidth });
            if let Some(mode) = &self.mode {
                parameters["mode"] = mode[..].into();
            }
            qmp.execute("migrate-set-parameters", &parameters)?;
        }
        Ok(())
    }
}

fn capability(name: &str, state: bool) -> Value {
    json!({ "capability": name, "state": state })
}

/// A pipe with room for a whole state: QEMU answers nobody while it writes, so it must not wait for this process, which may be stopped.
fn pipe() -> Result<(OwnedFd, OwnedFd), BackendError> {
    let ends = pipe_with(PipeFlags::CLOEXEC)
        .map_err(|e| BackendError::new("make a pipe for the devices' state", io::Error::from(e)))?;
    // Without room it is slower, and no more than that as long as this process runs.
    let _ = fcntl_setpipe_size(&ends.0, PIPE_BYTES);
    Ok(ends)
}

/// Writes all of the state, and then closes the pipe.
fn feed(writer: OwnedFd, mut state: &[u8]) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&writer, true)?;
    let mut writer = File::from(writer);
    while !state.is_empty() {
        ready(&writer, PollFlags::OUT, STATE_PATIENCE)?;
        match writer.write(state) {
            Ok(count) => state = &state[count..],
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
