//! `ib_write_bw` of perftest: what soft-RoCE carries at best, by message size.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pageferry::cli::measure::process::Running;

use super::super::needs;
use super::super::script::RDMA_DEVICE;

/// Message sizes that are tried, in bytes.
pub(super) const SIZES: [u64; 9] =
    [4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20];
/// Bytes that a run moves.
const RUN_BYTES: u64 = 32 << 20;
/// perftest wants some messages in any case.
const MESSAGES_MIN: u64 = 64;
/// How long a run may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often is looked.
const TICK: Duration = Duration::from_millis(20);
/// perftest's MB are 2^20 bytes.
const PERFTEST_MB: f64 = 1.048_576;

/// Runs server and client with messages of `size` bytes; returns 10^6 bytes a second.
pub(super) fn run(size: u64, host: &str, port: u16) -> Result<f64, String> {
    let mut server = start(size, port, None)?;
    // The server does not say when it listens, so the client tries again.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let client = start(size, port, Some(host))?;
        match finish(client, deadline.saturating_duration_since(Instant::now())) {
            Ok(text) => {
                return average(&text, size).ok_or_else(|| format!("ib_write_bw shows no rate: {text}"));
            }
            Err(reason) if Instant::now() > deadline || server.has_ended() => return Err(reason),
            Err(_) => std::thread::sleep(TICK * 10),
        }
    }
}

fn start(size: u64, port: u16, host: Option<&str>) -> Result<Running, String> {
    let program = needs::program("ib_write_bw").ok_or("ib_write_bw is not installed (package perftest)")?;
    let messages = (RUN_BYTES / size).max(MESSAGES_MIN).to_string();
    let mut command = Command::new(program);
    command.args([
        "-F",
        "-d",
        RDMA_DEVICE,
        "-p",
        &port.to_string(),
        "-s",
        &size.to_string(),
        "-n",
        &messages,
    ]);
    command.args(host).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Running::start(&mut command).map_err(|e| format!("ib_write_bw: {e}"))
}

fn finish(client: Running, patience: Duration) -> Result<String, String> {
    let output = client.wait(patience).map_err(|e| format!("ib_write_bw: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("ib_write_bw: {}", errors.lines().last().unwrap_or("it failed")))
}

/// The average rate in the line of this message size: size, messages, peak, average, messages a second.
fn average(text: &str, size: u64) -> Option<f64> {
    let wanted = size.to_string();
    let line = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let fields = line.into_iter().find(|fields| fields.len() == 5 && fields[0] == wanted)?;
    fields[3].parse::<f64>().ok().map(|rate| rate * PERFTEST_MB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_is_the_fourth_column() {
        let text = " #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n \
                    65536      500              71.54              61.00  \t\t   0.000275\n-----\n";
        assert_eq!(average(text, 65536), Some(61.0 * PERFTEST_MB));
        assert_eq!(average(text, 4096), None);
        assert_eq!(average("", 4096), None);
    }
}
