//! The control socket of `pageferry vm`: one JSON object a line, in both directions.
//!
//! A request is `{"execute": NAME, ...arguments}`; the answer is `{"return": VALUE}` or `{"error": TEXT}`. `docs/api.md` describes it
//! for those who write clients, and the types below give its schema.

pub(super) mod control;
pub(super) mod schema;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use pageferry::engine::report::Report;
use pageferry::transport::uri::Uri;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::protection::TlsRequest;
use super::sandbox::Confinement;
use super::tuning::TuningArgs;

/// Longest request or answer, in bytes, the end of its line included.
pub(super) const LINE_MAX: u64 = 1 << 20;
/// How long an answer may take: a pause or a state change, never a migration.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "execute", rename_all = "kebab-case")]
pub(super) enum Request {
    /// How the VM and its migration stand.
    Status,
    /// Starts a migration; `Status` tells how it goes on.
    Migrate(Box<MigrateRequest>),
    /// Stops the vCPUs.
    Pause,
    /// Lets them run.
    Resume {
        /// Also a guest that may run elsewhere: only when you know that it does not.
        #[serde(default)]
        force: bool,
    },
    /// Watches the guest and says what moving it would come to.
    Plan(PlanRequest),
    /// Records which pages the guest writes; `Status` tells how it goes on.
    RecordTrace(RecordRequest),
    /// Cancels the migration, or ends the recording.
    Cancel,
    /// Changes limits of the migration that runs.
    Set(TuningArgs),
    /// Switches over after the first pass, whatever the downtime.
    Switchover,
    /// Lets a migration go on that waits before its switchover.
    Continue,
    /// Lets the guest run at the destination; its pages follow.
    Postcopy,
    /// Opens lost connections of postcopy at another address of the destination.
    Recover {
        /// `tcp:HOST:PORT` or `unix:PATH`.
        uri: String,
    },
    /// Ends the process.
    Quit {
        /// Also while pages of a running guest are on their way from here or to here: that guest is lost then.
        #[serde(default)]
        force: bool,
    },
}

impl Request {
    /// Reads a request. Fields that it does not have are refused by name: a misspelt limit is none.
    pub(super) fn parse(line: &[u8]) -> Result<Self, String> {
        let refused = |e: serde_json::Error| format!("not a request: {e}");
        let fields: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(line).map_err(refused)?;
        let request: Self = serde_json::from_slice(line).map_err(refused)?;
        let known = request.fields();
        match fields.keys().find(|field| !known.contains(field)) {
            Some(unknown) => {
                Err(format!("not a request: unknown field `{unknown}`; it has {}", known.join(", ")))
            }
            None => Ok(request),
        }
    }

    /// All fields that such a request may have.
    fn fields(&self) -> Vec<String> {
        let mut full = self.clone();
        match &mut full {
            Self::Set(tuning) => *tuning = TuningArgs::full(),
            Self::Migrate(migrate) => {
                (migrate.tuning, migrate.tls) = (TuningArgs::full(), Some(TlsRequest::default()));
            }
            _ => {}
        }
        let value = serde_json::to_value(full).unwrap_or_default();
        value.as_object().into_iter().flat_map(|fields| fields.keys().cloned()).collect()
    }
}

/// Arguments of a recording.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(super) struct RecordRequest {
    /// The trace's file; an absolute path, since the VM has a folder of its own.
    pub file: PathBuf,
    /// How long to record.
    #[schemars(range(min = 1, max = 86_400))]
    pub seconds: u64,
    /// How often to look which pages were written.
    #[schemars(range(min = 10, max = 60_000))]
    pub interval_ms: u64,
}

/// How a recording stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum TraceState {
    /// It goes on.
    #[default]
    Recording,
    /// The trace is in its file.
    Done,
    /// It is not.
    Failed,
}

/// The last recording.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(super) struct TraceStatus {
    /// How it stands.
    pub state: TraceState,
    /// The trace's file.
    pub file: PathBuf,
    /// Dirty syncs.
    pub intervals: u32,
    /// Pages that they found; one that was written in two intervals counts twice.
    pub pages: u64,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// Arguments of a migration, as strings where the command line has strings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(super) struct MigrateRequest {
    /// `tcp:HOST:PORT`, `unix:PATH` or `rdma:HOST:PORT`; to save the guest, `file:PATH` (absolute), `exec:COMMAND` or `fd:N`.
    pub uri: String,
    /// Data streams.
    #[serde(default = "default_streams")]
    #[schemars(range(min = 1, max = 256))]
    pub streams: u16,
    /// `auto`, `raw`, `zstd`, `zstd:LEVEL` or `delta`.
    #[serde(default = "default_codec")]
    pub codec: String,
    /// Seconds until a silent peer is given up.
    #[serde(default = "default_link_timeout")]
    #[schemars(range(min = 1, max = 3600))]
    pub link_timeout_s: u64,
    /// Seconds for which lost connections are made anew; 0: none.
    #[serde(default = "default_reconnect")]
    #[schemars(range(max = 86_400))]
    pub reconnect_timeout_s: u64,
    /// Let the guest run at the destination after so many rounds; its pages follow.
    #[serde(default)]
    pub postcopy_after_rounds: Option<u64>,
    /// The archive of which one that is saved is the difference; an absolute path, since the VM has a folder of its own.
    #[serde(default)]
    pub base: Option<PathBuf>,
    /// Saves the guest as of one instant, while it runs on.
    #[serde(default)]
    pub snapshot: bool,
    /// Lets a guest that was saved run on.
    #[serde(default)]
    pub resume_after_save: bool,
    /// What protects its connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsRequest>,
    /// Over RDMA: pin all memory that holds data before the first page is sent.
    #[serde(default)]
    pub rdma_pin_all: bool,
    /// Over RDMA: pin at most so many bytes at a time.
    #[serde(default)]
    pub rdma_max_pinned: Option<u64>,
    /// Its limits, beside the other arguments.
    #[serde(flatten)]
    pub tuning: TuningArgs,
}

fn default_streams() -> u16 {
    4
}
fn default_codec() -> String {
    "auto".into()
}
fn default_link_timeout() -> u64 {
    10
}

fn default_reconnect() -> u64 {
    300
}

/// Arguments of a dry run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(super) struct PlanRequest {
    /// What the link carries, in bytes a second.
    #[schemars(range(min = 1))]
    pub link: u64,
    /// How long to watch the guest.
    #[serde(default = "default_watch")]
    #[schemars(range(min = 1, max = 20))]
    pub seconds: u64,
    /// The downtime to aim for.
    #[serde(default = "default_downtime")]
    pub downtime_limit_ms: u64,
}

fn default_watch() -> u64 {
    3
}
fn default_downtime() -> u64 {
    300
}

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RunState {
    /// Waits for a guest to come in.
    Incoming,
    /// The guest runs.
    Running,
    /// It is paused here.
    Paused,
    /// It runs at the destination of a migration, which still takes pages from here.
    Postcopy,
    /// It is at the destination of a migration.
    Migrated,
    /// The handover was not confirmed; it is paused here, and may run there.
    Unknown,
    /// It stopped for good.
    Crashed,
}

/// Answer to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(super) struct VmStatus {
    /// Where it is in its life.
    pub state: RunState,
    /// Why it crashed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// What runs in it: `counter`, `mem-test`, or an image's file; `qemu`, where it is QEMU's.
    pub guest: String,
    /// Its vCPUs.
    pub cpus: u8,
    /// Its memory.
    pub memory_bytes: u64,
    /// `kvm`, `process`, or QEMU's `tcg`.
    pub accelerator: String,
    /// How writes are tracked.
    pub tracker: String,
    /// How its process is confined; a VM of an older version does not say.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sandbox: Option<Confinement>,
    /// Longest time that a vCPU stood still by the guest's own clock since its last migration was begun, in milliseconds; of the
    /// counter guest on KVM only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub longest_gap_ms: Option<f64>,
    /// Where a destination listens.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub listening: Option<String>,
    /// The last migration out of here could not be started: nothing listens there, for instance.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub not_started: bool,
    /// The last recording of a trace.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub trace: Option<TraceStatus>,
    /// The last migration, out or in.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub migration: Option<Report>,
}

/// What a request is answered with.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Answer {
    /// It was done: what was asked for, or null.
    Return(serde_json::Value),
    /// It was not: why.
    Error(String),
}

impl Answer {
    /// Its line. One that would be too long says so instead.
    pub(super) fn line(&self) -> String {
        let line = serde_json::to_string(self).unwrap_or_default() + "\n";
        if line.len() as u64 <= LINE_MAX {
            return line;
        }
        let text = format!("the answer has {} bytes, and a line {LINE_MAX} at most", line.len());
        serde_json::json!({ "error": text }).to_string() + "\n"
    }
}

/// Address of a control socket: `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiAddress(pub PathBuf);

impl FromStr for ApiAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<Uri>() {
            Ok(Uri::Unix(path)) => Ok(Self(path)),
            Ok(_) => Err("the control socket is a Unix socket: unix:PATH".into()),
            Err(e) => Err(format!("{e}; the control socket is unix:PATH")),
        }
    }
}

/// Why a request had no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("no VM answers at unix:{}: is `pageferry vm --api` running there?", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "this user may not connect to unix:{}: be the user who runs that VM, or root, or have it started with --api-allow UID, in a \
         folder that this user may enter", path.display()
    )]
    Closed {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the VM's control socket broke")]
    Io(#[from] std::io::Error),
    #[error("the VM's answer is not understood")]
    Json(#[from] serde_json::Error),
    #[error("the request has {bytes} bytes, and a line {LINE_MAX} at most")]
    TooLong { bytes: usize },
    #[error("the VM's answer is longer than {LINE_MAX} bytes, which no VM of this version sends")]
    AnswerTooLong,
    #[error("the VM's answer ends after {bytes} bytes, before its line does: its process may have ended")]
    AnswerCut { bytes: usize },
    /// The VM says no.
    #[error("{0}")]
    Refused(String),
}

/// Asks once; every request is a connection of its own.
pub(super) fn ask(path: &Path, request: &Request) -> Result<serde_json::Value, ApiError> {
    let line = serde_json::to_string(request)? + "\n";
    if line.len() as u64 > LINE_MAX {
        return Err(ApiError::TooLong { bytes: line.len() });
    }
    let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::PermissionDenied => ApiError::Closed { path: path.into(), source },
        _ => ApiError::Connect { path: path.into(), source },
    })?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    let written = (&stream).write_all(line.as_bytes());
    // Whoever is refused may be told before all of the request has gone.
    let answer = read_answer(&stream);
    if let (Err(error), Err(_)) = (written, &answer) {
        return Err(error.into());
    }
    match serde_json::from_slice(&answer?)? {
        Answer::Return(value) => Ok(value),
        Answer::Error(text) => Err(ApiError::Refused(text)),
    }
}

/// Reads the line of an answer.
fn read_answer(from: impl std::io::Read) -> Result<Vec<u8>, ApiError> {
    let mut line = Vec::new();
    BufReader::new(from.take(LINE_MAX)).read_until(b'\n', &mut line)?;
    match line.len() {
        _ if line.ends_with(b"\n") => Ok(line),
        bytes if bytes as u64 == LINE_MAX => Err(ApiError::AnswerTooLong),
        bytes => Err(ApiError::AnswerCut { bytes }),
    }
}

/// Asks how the VM stands.
pub(super) fn status(path: &Path) -> Result<VmStatus, ApiError> {
    Ok(serde_json::from_value(ask(path, &Request::Status)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_and_fields_that_they_lack_are_named() {
        for good in [
            r#"{"execute":"status"}"#,
            r#"{"execute":"quit"}"#,
            r#"{"execute":"quit","force":true}"#,
            r#"{"execute":"resume","force":true}"#,
            r#"{"execute":"set","bandwidth":null,"timeout_s":3,"on_timeout":"postcopy","throttle_max":5}"#,
            r#"{"execute":"migrate","uri":"unix:/x","rdma_max_pinned":null,"postcopy_after_rounds":1,"max_rounds":2}"#,
            r#"{"execute":"plan","link":1,"downtime_limit_ms":5}"#,
        ] {
            assert!(Request::parse(good.as_bytes()).is_ok(), "{good}: {:?}", Request::parse(good.as_bytes()));
        }
        for (bad, word) in [
            (r#"{"execute":"status","x":1}"#, "`x`"),
            (r#"{"execute":"set","bandwith":1}"#, "`bandwith`; it has auto_converge, bandwidth"),
            (r#"{"execute":"migrate","uri":"unix:/x","downtime_limit":1}"#, "`downtime_limit`"),
            (r#"{"execute":"pause","force":true}"#, "`force`"),
            (r#"{"execute":"recover","uri":"unix:/x","streams":1}"#, "`streams`"),
            (r#"{"execute":"dance"}"#, "dance"),
            (r#"[]"#, "not a request"),
            ("", "not a request"),
        ] {
            let error = Request::parse(bad.as_bytes()).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
    }

    #[test]
    fn lines_are_bounded_in_both_directions() {
        let max = LINE_MAX as usize;
        let line = |bytes: usize| [vec![b' '; bytes - 1], vec![b'\n']].concat();
        assert_eq!(read_answer(&line(max)[..]).unwrap().len(), max);
        assert!(matches!(read_answer(&line(max + 1)[..]), Err(ApiError::AnswerTooLong)));
        assert!(matches!(read_answer(std::io::repeat(b'x')), Err(ApiError::AnswerTooLong)));
        assert!(matches!(read_answer(&b"{\"return\""[..]), Err(ApiError::AnswerCut { bytes: 9 })));
        let nowhere = Path::new("/nowhere");
        let request = |bytes| Request::Recover { uri: "x".repeat(bytes) };
        let around = serde_json::to_string(&request(0)).unwrap().len() + 1;
        assert!(matches!(ask(nowhere, &request(max - around)), Err(ApiError::Connect { .. })));
        match ask(nowhere, &request(max - around + 1)) {
            Err(ApiError::TooLong { bytes }) => assert_eq!(bytes, max + 1),
            other => panic!("{other:?}"),
        }
        let around = Answer::Return("".into()).line().len();
        assert_eq!(Answer::Return("x".repeat(max - around).into()).line().len(), max);
        let long = Answer::Return("x".repeat(max - around + 1).into()).line();
        assert!(long.contains("\"error\":\"the answer has 1048577 bytes"), "{long}");
    }
}
