//! Two network namespaces joined by a link of a given rate.
//!
//! They are taken down when the link is dropped, and also when this program is killed: a shell that holds nothing but the reading
//! end of a pipe does it when the pipe closes.

use std::fmt;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;

use pageferry::measure::Place;
use pageferry::measure::process;

/// Addresses of the source and of the destination.
const ADDRESSES: [&str; 2] = ["10.213.77.1", "10.213.77.2"];
/// As networks for migration have it.
const MTU: &str = "9000";

/// What a link carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate {
    /// 10^9 bits in a second.
    pub gbit: u32,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}gbit", self.gbit)
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let gbit = text.strip_suffix("gbit").and_then(|n| n.parse().ok()).filter(|n| (1..=400).contains(n));
        gbit.map(|gbit| Self { gbit }).ok_or_else(|| format!("{text:?} is not 1gbit to 400gbit"))
    }
}

/// The two namespaces.
#[derive(Debug)]
pub(crate) struct Link {
    names: [String; 2],
    janitor: Child,
}

impl Link {
    /// Makes them.
    ///
    /// # Errors
    /// What `ip` or `tc` complain of; root may make namespaces.
    pub(crate) fn new(rate: Rate) -> Result<Self, String> {
        let id = std::process::id();
        let names = ["source", "destination"].map(|side| format!("ferry-{side}-{id}"));
        let janitor = janitor(&names).map_err(|e| format!("the shell that removes the link: {e}"))?;
        // From here on everything that was made is taken down, whatever fails.
        let link = Self { names, janitor };
        for line in link.commands(rate) {
            run(&line)?;
        }
        Ok(link)
    }

    fn commands(&self, rate: Rate) -> Vec<String> {
        let [source, destination] = &self.names;
        let mut lines = vec![
            format!("ip netns add {source}"),
            format!("ip netns add {destination}"),
            format!("ip -n {source} link add eth0 type veth peer name eth0 netns {destination}"),
        ];
        for (name, address) in self.names.iter().zip(ADDRESSES) {
            lines.push(format!("ip -n {name} link set lo up"));
            lines.push(format!("ip -n {name} addr add {address}/24 dev eth0"));
            lines.push(format!("ip -n {name} link set eth0 mtu {MTU} up"));
            // 2 ms of the rate, and what offloads make of many packets in any case.
            let burst = (rate.gbit * 250).max(512);
            lines.push(format!(
                "tc -n {name} qdisc add dev eth0 root tbf rate {rate} burst {burst}kb latency 20ms"
            ));
        }
        lines
    }

    /// Where source and destination run.
    pub(crate) fn places(&self) -> [Place; 2] {
        self.names.clone().map(Place::namespace)
    }

    /// The destination's address.
    pub(crate) fn host(&self) -> &'static str {
        ADDRESSES[1]
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The end of its input is its word to begin.
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}

/// The shell that takes both namespaces down, and what runs in them.
fn janitor(names: &[String; 2]) -> io::Result<Child> {
    let [source, destination] = names;
    let script = format!(
        "cat >/dev/null; for name in {source} {destination}; do \
         for pid in $(ip netns pids $name); do kill -9 $pid; done; ip netns delete $name; done"
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).env("PATH", process::path());
    // A Ctrl-C is for us; its turn comes after us.
    shell.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
}

fn run(line: &str) -> Result<(), String> {
    let mut words = line.split(' ');
    let name = words.next().unwrap_or_default();
    let program =
        process::program(name).ok_or_else(|| format!("{name} is not installed (package iproute2)"))?;
    let output = Command::new(program).args(words).stdin(Stdio::null()).output();
    let output = output.map_err(|e| format!("{line}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    Err(format!("{line}: {} (shaped links take root)", complaint.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespaces() -> String {
        let output = Command::new("ip").args(["netns", "list"]).env("PATH", process::path()).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    }

    #[test]
    fn rates_are_named_and_read_alike() {
        assert_eq!("10gbit".parse::<Rate>().unwrap().to_string(), "10gbit");
        for bad in ["", "10", "0gbit", "gbit", "-1gbit", "1mbit"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_link_leaves_nothing_behind() {
        if !nix::unistd::geteuid().is_root() {
            return println!("skipped: namespaces take root");
        }
        let link = match Link::new(Rate { gbit: 1 }) {
            Ok(link) => link,
            Err(reason) => return println!("skipped: {reason}"),
        };
        let name = link.names[0].clone();
        assert!(namespaces().contains(&name));
        drop(link);
        assert!(!namespaces().contains(&name));
    }
}
