//! Two hosts: one listens and starts a destination for each run, the other one asks it to and sends.
//!
//! A connection stands for one run. The source's side sends one line of JSON, [`Request`]; the other one answers with lines that
//! its destination's process says: where it listens, and what the run came to. A connection that closes ends the run.
//! What is asked for cannot name files or memory: those are the listening user's to choose.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use crate::cli::words::explain;
use pageferry::transport::socket::{Connection, Listener};
use pageferry::transport::uri::Uri;
use serde::{Deserialize, Serialize};

use super::BenchArgs;
use super::pair::{Here, LINE_MAX, Running};
use super::side::{DestinationOrder, Outcome, Place, Word};
use crate::cli::{CliError, Exit};

/// Longest request, in bytes.
const REQUEST_MAX: u64 = 4096;
/// How long a request may take to come, and an answer to go.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often somebody who waits for a connection looks whether to stop.
const TICK: Duration = Duration::from_millis(20);

/// What a source asks a listening host for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    /// The version of pageferry: both sides' figures are to mean the same.
    version: String,
    live: bool,
    digest: bool,
    link_timeout_s: u64,
}

/// The address for the run's control connection: without RDMA.
fn control(uri: &Uri) -> Uri {
    match uri {
        Uri::Rdma { host, port } => Uri::Tcp { host: host.clone(), port: *port },
        other => other.clone(),
    }
}

/// Where a destination listens for a run, of a host that listens at `uri`.
fn data(uri: &Uri, data_port: u16) -> Uri {
    match uri {
        Uri::Tcp { host, .. } => Uri::Tcp { host: host.clone(), port: data_port },
        Uri::Rdma { host, .. } => Uri::Rdma { host: host.clone(), port: data_port },
        Uri::Unix(path) => Uri::Unix(path.with_extension("data")),
        // Nobody listens there, and so no run begins.
        Uri::File(_) | Uri::Exec(_) | Uri::Fd(_) => uri.clone(),
    }
}

/// A connection that reads by value.
struct Wire(Arc<Connection>);

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(buffer)
    }
}

impl Wire {
    fn send(&self, value: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string(value)? + "\n";
        (&*self.0).write_all(text.as_bytes())
    }
}

/// Serves runs until somebody asks for the end.
pub(super) fn listen(uri: &Uri, args: &BenchArgs, running: &Running) -> Result<(), CliError> {
    let cannot = |e: io::Error| CliError::cannot_start(&e);
    let listener = Listener::bind(&control(uri)).map_err(|e| CliError::cannot_start(&e))?;
    if listener.is_reachable() && !args.insecure {
        let text = format!("others can reach {uri} and have memory filled here: allow it by --insecure");
        return Err(CliError { exit: Exit::CannotStart, text });
    }
    listener.set_nonblocking(true).map_err(cannot)?;
    tracing::info!("listening on {}", listener.uri());
    while !running.is_cancelled() {
        match listener.accept() {
            Ok(connection) => {
                let peer = connection.peer();
                match serve(connection, &data(uri, args.data_port), args, running) {
                    Ok(()) => tracing::info!("a run with {peer} is done"),
                    Err(why) => tracing::info!("a run with {peer} failed: {why}"),
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(TICK),
            // Such as too many open files: it passes.
            Err(_) => std::thread::sleep(TICK),
        }
    }
    Err(CliError { exit: Exit::Cancelled, text: "cancelled".into() })
}

/// One run of a source that has connected.
fn serve(connection: Connection, data: &Uri, args: &BenchArgs, running: &Running) -> Result<(), String> {
    let broken = |e: io::Error| format!("the connection broke: {e}");
    connection.set_nonblocking(false).map_err(broken)?;
    connection.set_timeouts(Some(TIMEOUT), Some(TIMEOUT)).map_err(broken)?;
    let connection = Arc::new(connection);
    let wire = Wire(connection.clone());
    let result = request(&wire).and_then(|request| {
        let order = DestinationOrder {
            uri: data.to_string(),
            memory: args.memory.clone(),
            tls_dir: args.tls_dir.clone(),
            live: request.live,
            digest: request.digest,
            timeout_s: request.link_timeout_s,
        };
        let mut here = Here::start(order, running)?;
        wire.send(&Word::Listening(here.place.clone())).map_err(broken)?;
        connection.set_timeouts(None, Some(TIMEOUT)).map_err(broken)?;
        // A source that goes away takes the run along.
        let (watched, running) = (Wire(connection.clone()), running.clone());
        let watch = std::thread::spawn(move || {
            let mut watched = watched;
            if !watched.read(&mut [0]).is_ok_and(|n| n != 0) {
                running.end_all();
            }
        });
        let outcome = here.outcome();
        if let Ok(outcome) = &outcome {
            wire.send(&Word::Done(Box::new(outcome.clone()))).map_err(broken)?;
        }
        drop(here);
        connection.shutdown_write();
        if outcome.is_err() {
            connection.shutdown();
        }
        // The source closes its end once it has the answer.
        let _ = connection.set_timeouts(Some(TIMEOUT), Some(TIMEOUT));
        let _ = watch.join();
        outcome.map(drop)
    });
    if let Err(why) = &result {
        // It may be gone, or said to be.
        let _ = wire.send(&Word::Failed(why.clone()));
    }
    connection.shutdown();
    result
}

/// Reads what a source asks for.
fn request(wire: &Wire) -> Result<Request, String> {
    let mut line = String::new();
    let mut input = BufReader::new(Wire(wire.0.clone()).take(REQUEST_MAX));
    input.read_line(&mut line).map_err(|e| format!("no request came: {e}"))?;
    let request: Request =
        serde_json::from_str(&line).map_err(|e| format!("not a request of a bench: {e}"))?;
    let version = env!("CARGO_PKG_VERSION");
    if request.version != version {
        return Err(format!(
            "the source is pageferry {}, this host's {version}: use the same",
            request.version
        ));
    }
    if !(1..=3600).contains(&request.link_timeout_s) {
        return Err("link_timeout_s is 1 to 3600".into());
    }
    Ok(request)
}

/// A destination on another host.
pub(super) struct There {
    wire: Wire,
    input: BufReader<Wire>,
    /// Where it listens.
    pub place: Place,
}

impl There {
    /// Asks the host that listens at `uri` for a destination.
    pub(super) fn start(uri: &Uri, order: &DestinationOrder) -> Result<Self, String> {
        let timeout = Duration::from_secs(order.timeout_s);
        let connection = Connection::connect(&control(uri), timeout, &|| false).map_err(|e| explain(&e))?;
        let broken = |e: io::Error| format!("the connection to the listening host broke: {e}");
        connection.set_timeouts(None, Some(timeout)).map_err(broken)?;
        let connection = Arc::new(connection);
        let wire = Wire(connection.clone());
        let request = Request {
            version: env!("CARGO_PKG_VERSION").into(),
            live: order.live,
            digest: order.digest,
            link_timeout_s: order.timeout_s,
        };
        wire.send(&request).map_err(broken)?;
        let nowhere = Place { uri: String::new(), memory: String::new() };
        let mut there = Self { wire, input: BufReader::new(Wire(connection)), place: nowhere };
        there.place = match there.word()? {
            Word::Listening(place) => place,
            _ => {
                return Err(
                    "the listening host did not say where; is `pageferry bench --listen` there?".into()
                );
            }
        };
        there.place.uri = seen_from_here(uri, &there.place.uri)?;
        Ok(there)
    }

    fn word(&mut self) -> Result<Word, String> {
        let mut line = String::new();
        let read = self.input.by_ref().take(LINE_MAX).read_line(&mut line);
        if !read.is_ok_and(|n| n != 0) {
            return Err("the listening host closed the connection without a word".into());
        }
        match serde_json::from_str(&line) {
            Ok(Word::Failed(text)) => Err(format!("the listening host: {text}")),
            Ok(word) => Ok(word),
            Err(e) => Err(format!("the listening host's word is not understood: {e}")),
        }
    }

    /// What its run came to.
    pub(super) fn outcome(&mut self) -> Result<Outcome, String> {
        match self.word()? {
            Word::Done(outcome) => Ok(*outcome),
            word => Err(format!("the listening host said {word:?} out of turn")),
        }
    }
}

impl Drop for There {
    fn drop(&mut self) {
        self.wire.0.shutdown();
    }
}

/// The address of a destination that listens at `theirs`, by the name that its host has here.
fn seen_from_here(host: &Uri, theirs: &str) -> Result<String, String> {
    let theirs: Uri = theirs.parse().map_err(|e| explain(&e))?;
    let host = match host {
        Uri::Tcp { host, .. } | Uri::Rdma { host, .. } => host.clone(),
        Uri::Unix(_) | Uri::File(_) | Uri::Exec(_) | Uri::Fd(_) => return Ok(theirs.to_string()),
    };
    Ok(match theirs {
        Uri::Tcp { port, .. } => Uri::Tcp { host, port }.to_string(),
        Uri::Rdma { port, .. } => Uri::Rdma { host, port }.to_string(),
        Uri::Unix(_) => return Err("the listening host offers a Unix socket".into()),
        Uri::File(_) | Uri::Exec(_) | Uri::Fd(_) => {
            return Err(format!("the listening host offers {theirs}, where nobody answers"));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_has_the_name_that_its_host_has_here() {
        let seen = |host: &str, theirs: &str| seen_from_here(&host.parse().unwrap(), theirs);
        assert_eq!(seen("tcp:node7:4444", "tcp:0.0.0.0:5555"), Ok("tcp:node7:5555".into()));
        assert_eq!(seen("tcp:[fe80::1]:4444", "tcp:[::]:5555"), Ok("tcp:[fe80::1]:5555".into()));
        assert_eq!(seen("unix:/tmp/a", "unix:/tmp/a.data"), Ok("unix:/tmp/a.data".into()));
        assert!(seen("tcp:node7:4444", "unix:/etc/x").is_err());
        assert!(seen("tcp:node7:4444", "nonsense").is_err());
        assert_eq!(data(&"tcp:0:4444".parse().unwrap(), 7).to_string(), "tcp:0:7");
    }
}
