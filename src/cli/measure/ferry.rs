//! `pageferry send` and `recv` as processes.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{ChildStderr, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::process::{MemoryWatch, Running};
use super::qemu::Pair;
use super::{Job, PATIENCE, Target, Took};
use pageferry::engine::report::{Report, Status};

/// How long a command may take to end once it has printed its report.
const END_PATIENCE: Duration = Duration::from_secs(60);

/// How pageferry moves an image.
#[derive(Clone, Copy, Debug)]
pub struct Ferry<'a> {
    /// The `pageferry` program.
    pub program: &'a Path,
    /// `tcp` or `rdma`.
    pub scheme: &'a str,
    /// Streams or queue pairs.
    pub streams: u16,
    /// As `--codec` has it.
    pub codec: &'a str,
}

impl Ferry<'_> {
    /// Moves the image; starts both commands for it.
    ///
    /// # Errors
    /// The complaint of the command that failed, or that a page was not verified.
    pub fn transfer(&self, job: &Job<'_>) -> Result<Took, String> {
        let mut recv = job.destination.command(self.program);
        recv.arg("recv");
        match job.target {
            Target::File(copy) => recv.arg("--ram-file").arg(copy),
            Target::Anonymous => recv.arg("--anon"),
        };
        let mut send = job.source.command(self.program);
        send.arg("send").arg("--ram-file").arg(job.image);
        self.run(recv, send, job)
    }

    /// Moves a paused guest of QEMU that has the image for its memory, from beside it.
    ///
    /// # Errors
    /// As of [`transfer`](Self::transfer), and those of starting two QEMUs.
    pub fn attached(&self, job: &Job<'_>) -> Result<Took, String> {
        let pair = Pair::start(job)?;
        let [source, destination] = pair.sockets().map(|socket| format!("unix:{}", socket.display()));
        let mut recv = job.destination.command(self.program);
        recv.args(["qemu", "recv", "--qmp", &destination]);
        let mut send = job.source.command(self.program);
        send.args(["qemu", "send", "--qmp", &source]);
        self.run(recv, send, job)
    }

    fn run(&self, mut recv: Command, mut send: Command, job: &Job<'_>) -> Result<Took, String> {
        let uri = format!("{}:{}:{}", self.scheme, job.host, job.port);
        // Without, whoever reaches it sees what was made for this.
        recv.args([&uri, "--json", "--insecure"]);
        under_tls(&mut recv, job);
        let mut recv = start(&mut recv)?;
        wait_until_ready(&mut recv)?;
        let received = recv.stdout().map(first_line);
        send.args([&uri, "--json", "--streams", &self.streams.to_string(), "--codec", self.codec]);
        under_tls(&mut send, job);
        let begin = Instant::now();
        let mut send = start(&mut send)?;
        let watch = |process: &Running| job.watch_memory.then(|| MemoryWatch::start(process.id()));
        let (send_memory, recv_memory) = (watch(&send), watch(&recv));
        let sent = send.stdout().map(first_line);
        let (source, sent_at) = report(sent, send)?;
        // The destination's report comes after the source's.
        let (destination, received_at) = report(received, recv)?;
        let most = |watch: Option<MemoryWatch>| watch.map_or(0, |watch| watch.most());
        Ok(Took {
            total_ms: sent_at.max(received_at).duration_since(begin).as_secs_f64() * 1e3,
            reported_ms: source.total_ms,
            setup_ms: source.setup_ms,
            source_cpu_s: source.cpu_s,
            destination_cpu_s: destination.cpu_s,
            wire_bytes: source.wire_bytes,
            source_private_bytes: most(send_memory),
            destination_private_bytes: most(recv_memory),
        })
    }
}

/// Starts one of the commands.
pub(super) fn start(command: &mut Command) -> Result<Running, String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Running::start(command).map_err(|e| format!("{}: {e}", command.get_program().display()))
}

/// Waits until a destination listens. The error is why it does not.
pub(super) fn wait_until_ready(recv: &mut Running) -> Result<(), String> {
    match recv.stderr().map(wait_until_it_listens) {
        Some(Err(text)) => Err(reason(&text)),
        _ => Ok(()),
    }
}

fn under_tls(command: &mut Command, job: &Job<'_>) {
    if let Some(folder) = job.tls {
        command.arg("--tls-dir").arg(folder);
    }
}

/// Reads until the destination says that it listens; what else it says is read in the background, so that it never waits for a
/// reader. The error is all that it said before it ended.
fn wait_until_it_listens(stderr: ChildStderr) -> Result<(), String> {
    let mut reader = BufReader::new(stderr);
    let mut said = String::new();
    loop {
        let start = said.len();
        match reader.read_line(&mut said) {
            Ok(length) if length > 0 => {}
            _ => return Err(said),
        }
        if said[start..].contains("listening on") {
            std::thread::spawn(move || drop(reader.read_to_end(&mut Vec::new())));
            return Ok(());
        }
    }
}

/// The first line that a command prints, and when it came: giving memory back afterwards is no part of the transfer.
fn first_line(stdout: ChildStdout) -> Receiver<(String, Instant)> {
    let (to, line) = channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        // Without a line there is nothing to report, and the receiver says so.
        let _ = BufReader::new(stdout).read_line(&mut text);
        let _ = to.send((text, Instant::now()));
    });
    line
}

/// Waits for a command's report, and for its end.
fn report(line: Option<Receiver<(String, Instant)>>, process: Running) -> Result<(Report, Instant), String> {
    let line = line.ok_or("its output is not a pipe")?;
    let (text, at) = line
        .recv_timeout(PATIENCE)
        .map_err(|_| format!("it had not ended after {} s", PATIENCE.as_secs()))?;
    let output = process.wait(END_PATIENCE)?;
    let report = understood(&text, &String::from_utf8_lossy(&output.stderr))?;
    if output.status.success() { Ok((report, at)) } else { Err(format!("it ended with {}", output.status)) }
}

fn understood(text: &str, errors: &str) -> Result<Report, String> {
    let Ok(report) = serde_json::from_str::<Report>(text) else { return Err(reason(errors)) };
    match (report.status, &report.error) {
        (Status::Completed, _) if report.verified => Ok(report),
        (Status::Completed, _) => Err("completed, but not verified".into()),
        (_, Some(error)) => Err(error.clone()),
        (status, None) => Err(format!("it ended as {status:?}: {}", reason(errors))),
    }
}

/// The last line that says something.
fn reason(text: &str) -> String {
    // clap's complaints come first, and its hints after them.
    let line = text.lines().find(|line| line.starts_with("error:")).or_else(|| text.lines().last());
    let line = line.unwrap_or("it said nothing").trim();
    let line = line.split_once("for '<URI>': ").map_or(line, |(_, complaint)| complaint);
    line.trim_start_matches("pageferry: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_complaint() {
        assert_eq!(reason("pageferry: listening\npageferry: it broke\n"), "it broke");
        assert_eq!(
            reason("error: invalid value\n\nFor more information, try '--help'.\n"),
            "error: invalid value"
        );
        assert_eq!(reason("error: invalid value 'x:' for '<URI>': no URI\n"), "no URI");
        assert_eq!(reason(""), "it said nothing");
    }

    #[test]
    fn only_a_verified_transfer_counts() {
        let text = |status, verified| {
            let mut report = Report::default();
            (report.status, report.verified) = (status, verified);
            serde_json::to_string(&report).unwrap()
        };
        assert!(understood(&text(Status::Completed, true), "").is_ok());
        assert!(understood(&text(Status::Completed, false), "").unwrap_err().contains("not verified"));
        assert!(understood(&text(Status::Failed, true), "pageferry: no").unwrap_err().ends_with("no"));
        assert_eq!(understood("", "pageferry: no such file\n").unwrap_err(), "no such file");
    }
}
