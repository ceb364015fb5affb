//! The control socket of `pageferry vm`: one JSON object a line, in both directions.
//!
//! A request is `{"execute": NAME, ...arguments}`; the answer is `{"return": VALUE}` or `{"error": TEXT}`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use pageferry::engine::report::Report;
use pageferry::transport::uri::Uri;
use serde::{Deserialize, Serialize};

use super::tuning::TuningArgs;

/// Longest request or answer, in bytes.
pub(super) const LINE_MAX: u64 = 1 << 20;
/// How long an answer may take: a pause or a state change, never a migration.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "execute", rename_all = "kebab-case")]
pub(super) enum Request {
    /// How the VM and its migration stand.
    Status,
    /// Starts a migration; `Status` tells how it goes on.
    Migrate(MigrateRequest),
    /// Stops the vCPUs.
    Pause,
    /// Lets them run; with `force` also a guest that may run elsewhere.
    Resume {
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
    Recover { uri: String },
    /// Ends the process; with `force` also one whose guest misses pages.
    Quit {
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
            Self::Migrate(migrate) => migrate.tuning = TuningArgs::full(),
            _ => {}
        }
        let value = serde_json::to_value(full).unwrap_or_default();
        value.as_object().into_iter().flat_map(|fields| fields.keys().cloned()).collect()
    }
}

/// Arguments of a recording.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct RecordRequest {
    /// The trace's file; an absolute path, since the VM has a folder of its own.
    pub file: PathBuf,
    pub seconds: u64,
    pub interval_ms: u64,
}

/// How a recording stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct TraceStatus {
    pub state: TraceState,
    pub file: PathBuf,
    /// Dirty syncs.
    pub intervals: u32,
    /// Pages that they found; one that was written in two intervals counts twice.
    pub pages: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// Arguments of a migration, as strings where the command line has strings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct MigrateRequest {
    pub uri: String,
    #[serde(default = "default_streams")]
    pub streams: u16,
    #[serde(default = "default_codec")]
    pub codec: String,
    #[serde(default = "default_link_timeout")]
    pub link_timeout_s: u64,
    #[serde(default = "default_reconnect")]
    pub reconnect_timeout_s: u64,
    #[serde(default)]
    pub postcopy_after_rounds: Option<u64>,
    #[serde(default)]
    pub rdma_pin_all: bool,
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
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct PlanRequest {
    /// Bytes a second.
    pub link: u64,
    #[serde(default = "default_watch")]
    pub seconds: u64,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct VmStatus {
    pub state: RunState,
    /// Why it crashed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    pub guest: String,
    pub cpus: u8,
    pub memory_bytes: u64,
    /// `kvm` or `process`.
    pub accelerator: String,
    /// How writes are tracked.
    pub tracker: String,
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

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Answer {
    Return(serde_json::Value),
    Error(String),
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
    #[error("the VM's control socket broke")]
    Io(#[from] std::io::Error),
    #[error("the VM's answer is not understood")]
    Json(#[from] serde_json::Error),
    /// The VM says no.
    #[error("{0}")]
    Refused(String),
}

/// Asks once; every request is a connection of its own.
pub(super) fn ask(path: &Path, request: &Request) -> Result<serde_json::Value, ApiError> {
    let connect = |source| ApiError::Connect { path: path.into(), source };
    let stream = UnixStream::connect(path).map_err(connect)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    (&stream).write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(std::io::Read::take(&stream, LINE_MAX)).read_line(&mut answer)?;
    match serde_json::from_str(&answer)? {
        Answer::Return(value) => Ok(value),
        Answer::Error(text) => Err(ApiError::Refused(text)),
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
}
