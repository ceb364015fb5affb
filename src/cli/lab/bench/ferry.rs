//! `pageferry send` and `recv` as processes, for measuring.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{ChildStderr, Command, Output, Stdio};
use std::time::Duration;

use pageferry::engine::report::{Report, Status};

use super::super::child::Running;
use super::super::own_program;
use super::Took;

/// How long a destination may take to listen, and both to end.
const PATIENCE: Duration = Duration::from_secs(180);

/// Moves the image into a new file; returns the report's times.
pub(super) fn transfer(
    uri: &str,
    image: &Path,
    copy: &Path,
    streams: u16,
    codec: &str,
) -> Result<Took, String> {
    let program = own_program().map_err(|e| e.to_string())?;
    let start = |command: &mut Command| {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::start(command).map_err(|e| format!("{}: {e}", program.display()))
    };
    let mut recv = start(Command::new(&program).args(["recv", uri, "--json", "--ram-file"]).arg(copy))?;
    let stderr = recv.stderr();
    if let Some(Err(text)) = stderr.map(wait_until_it_listens) {
        return Err(reason(&text));
    }
    let mut send = Command::new(&program);
    send.args(["send", uri, "--json", "--streams", &streams.to_string(), "--codec", codec, "--ram-file"])
        .arg(image);
    let sent = start(&mut send)?.wait(PATIENCE)?;
    let report = report(&sent)?;
    // The destination's report comes after the source's.
    let received = recv.wait(PATIENCE)?;
    if !received.status.success() {
        return Err(format!("the destination ended with {}", received.status));
    }
    Ok(Took { total_ms: report.total_ms, setup_ms: report.setup_ms })
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

/// The last line that says something.
fn reason(text: &str) -> String {
    // clap's complaints come first, and its hints after them.
    let line = text.lines().find(|line| line.starts_with("error:")).or_else(|| text.lines().last());
    let line = line.unwrap_or("it said nothing").trim();
    let line = line.split_once("for '<URI>': ").map_or(line, |(_, complaint)| complaint);
    line.trim_start_matches("pageferry: ").to_owned()
}

fn report(output: &Output) -> Result<Report, String> {
    let errors = String::from_utf8_lossy(&output.stderr);
    let report: Report = match serde_json::from_slice(&output.stdout) {
        Ok(report) => report,
        Err(_) => return Err(reason(&errors)),
    };
    match (report.status, &report.error) {
        (Status::Completed, _) if report.verified => Ok(report),
        (Status::Completed, _) => Err("completed, but not verified".into()),
        (_, Some(error)) => Err(error.clone()),
        (status, None) => Err(format!("it ended as {status:?}: {}", reason(&errors))),
    }
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
}
