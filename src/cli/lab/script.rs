//! The small shell scripts that tell a guest what to do: its folders, its network, its command.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::needs;

/// Network devices of the lab; the first one has the address.
pub(super) const LINKS: [&str; 2] = ["pferry0", "pferry1"];
/// The RDMA device.
pub(super) const RDMA_DEVICE: &str = "rxe0";
/// Room for RDMA's 4096 bytes of payload and its headers.
pub(super) const MTU: u32 = 4200;

/// What the RDMA device of a guest sits on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Network {
    /// Nothing: there is neither network nor RDMA device.
    None,
    /// A veth pair within the guest; rxe refuses the loopback device.
    Veth,
    /// The network card that joins the guests.
    Card,
}

/// The address of a host of the lab.
pub(super) fn address(host: usize) -> String {
    format!("10.9.0.{}", host + 1)
}

/// The commands that set up the network and the RDMA device, one argument list each.
pub(super) fn network_commands(network: Network, host: usize) -> Vec<Vec<String>> {
    let (first, second) = (LINKS[0], LINKS[1]);
    let mtu = MTU;
    let mut lines = Vec::new();
    match network {
        Network::None => {
            return vec![vec!["ip".into(), "link".into(), "set".into(), "lo".into(), "up".into()]];
        }
        Network::Veth => lines.push(format!("ip link add {first} type veth peer name {second}")),
        Network::Card => lines.push(format!("ip link set eth0 name {first}")),
    }
    lines.push(format!("ip addr add {}/24 dev {first}", address(host)));
    lines.push(format!("ip link set {first} mtu {mtu} up"));
    if network == Network::Veth {
        lines.push(format!("ip link set {second} mtu {mtu} up"));
    }
    lines.push(format!("rdma link add {RDMA_DEVICE} type rxe netdev {first}"));
    lines.iter().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}

/// The script of a guest's network.
pub(super) fn network(network: Network, host: usize) -> Vec<u8> {
    let mut text = String::from("set -e\nip link set lo up\n");
    text.push_str(
        &export("PATH", &needs::path()).map(|l| String::from_utf8_lossy(&l).into_owned()).unwrap_or_default(),
    );
    if network != Network::None {
        for command in network_commands(network, host) {
            text.push_str(&command.join(" "));
            text.push('\n');
        }
        // The table of addresses is filled a little later.
        text.push_str(&format!(
            "n=0\nuntil grep -qs ffff:0a09 /sys/class/infiniband/{RDMA_DEVICE}/ports/1/gids/*; do\n    n=$((n + 1))\n    \
             [ $n -lt 100 ] || {{ echo {RDMA_DEVICE} gets no address; exit 1; }}\n    sleep 0.05\ndone\n"
        ));
    }
    text.into_bytes()
}

/// The script with which a guest's first process learns its name and its folders.
pub(super) fn setup(host: usize, shares: &[PathBuf]) -> Vec<u8> {
    let mut text = format!("hostname lab{host}\n").into_bytes();
    for (at, path) in shares.iter().enumerate() {
        text.extend(format!("share share{at} ").bytes());
        text.extend(quoted(path.as_os_str()));
        text.push(b'\n');
    }
    text
}

/// The script that runs the command in the caller's folder, with the caller's environment and what is added to it.
pub(super) fn command(command: &[OsString], folder: &OsStr, added: &[(String, String)]) -> Vec<u8> {
    let mut text = Vec::new();
    let path = ("PATH".into(), needs::path());
    let added = added.iter().map(|(name, value)| (name.into(), value.into()));
    for (name, value) in std::env::vars_os().chain([path]).chain(added) {
        text.extend(name.to_str().and_then(|name| export(name, &value)).unwrap_or_default());
    }
    text.extend(b"cd ");
    text.extend(quoted(folder));
    text.extend(b" 2>/dev/null || cd /\nexec");
    for word in command {
        text.push(b' ');
        text.extend(quoted(word));
    }
    text.push(b'\n');
    text
}

/// A line that sets a variable, if a shell can.
fn export(name: &str, value: &OsStr) -> Option<Vec<u8>> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let good = name.chars().all(fits) && !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit());
    // The shell has these for itself.
    let own = ["PWD", "OLDPWD", "SHLVL", "_", "IFS", "PPID", "UID", "EUID"].contains(&name);
    if !good || own {
        return None;
    }
    let mut line = format!("export {name}=").into_bytes();
    line.extend(quoted(value));
    line.push(b'\n');
    Some(line)
}

/// A word that a shell takes as it is.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut text = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => text.extend(b"'\\''"),
            other => text.push(*other),
        }
    }
    text.push(b'\'');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a shell makes of a script.
    fn run(script: &[u8]) -> String {
        let script = OsStr::from_bytes(script);
        let output = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn words_reach_the_command_as_they_are() {
        let words =
            ["printf", "[%s]", "a b", "it's", "$HOME", "*", "", "x\ny", "`id`", "\\"].map(OsString::from);
        let text = run(&command(&words, OsStr::new("/"), &[]));
        assert_eq!(text, "[a b][it's][$HOME][*][][x\ny][`id`][\\]");
    }

    #[test]
    fn the_folder_and_added_variables_are_there() {
        let words = ["sh", "-c", "echo $PWD $PAGEFERRY_LAB_HOST"].map(OsString::from);
        let added = [("PAGEFERRY_LAB_HOST".to_owned(), "1".to_owned())];
        assert_eq!(run(&command(&words, OsStr::new("/usr"), &added)), "/usr 1\n");
        assert_eq!(run(&command(&words, OsStr::new("/no such folder"), &added)), "/ 1\n");
    }

    #[test]
    fn only_names_that_a_shell_can_set_are_exported() {
        let line = |name| export(name, OsStr::new("v"));
        assert_eq!(line("A_1").unwrap(), b"export A_1='v'\n");
        for bad in ["", "1A", "BASH_FUNC_x%%", "a-b", "PWD"] {
            assert_eq!(line(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_network_of_two_hosts_has_two_addresses() {
        let text = |kind, host| String::from_utf8(network(kind, host)).unwrap();
        assert!(text(Network::Veth, 0).contains("ip addr add 10.9.0.1/24 dev pferry0\n"));
        assert!(text(Network::Card, 1).contains("ip addr add 10.9.0.2/24 dev pferry0\n"));
        assert!(text(Network::Card, 1).contains("rdma link add rxe0 type rxe netdev pferry0\n"));
        assert!(!text(Network::None, 0).contains("rdma"));
    }

    #[test]
    fn shares_are_named_by_number() {
        let text = setup(1, &["/a b".into(), "/c".into()]);
        assert_eq!(text, b"hostname lab1\nshare share0 '/a b'\nshare share1 '/c'\n");
    }
}
