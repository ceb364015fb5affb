//! Who may look into another process.

use std::io::{BufRead, BufReader};
use std::process::Command;

use vmm_shim::foreign::Process;

use super::other::{SAID, this_program};

/// The process to look into; set for whoever tries.
const TARGET: &str = "PAGEFERRY_TEST_LOOK_INTO";
/// A user who owns nothing.
const NOBODY: &str = "65534";

/// What comes of trying to look into this process as another user, with these capabilities and no others; why it cannot be tried.
fn tried(capabilities: &[&str]) -> Result<String, String> {
    let given: Vec<String> = capabilities.iter().map(|name| format!("+{name}")).collect();
    let given = if given.is_empty() { "-all".to_owned() } else { given.join(",") };
    let arguments = ["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--inh-caps", &given];
    let program = this_program("who::another_user_takes_a_privilege");
    let output = Command::new("setpriv")
        .args(arguments)
        .args(["--ambient-caps", &given])
        .arg(program.get_program())
        .args(program.get_args())
        .env(TARGET, std::process::id().to_string())
        .output()
        .map_err(|e| format!("setpriv: {e}"))?;
    let said = BufReader::new(&output.stdout[..]).lines().map(Result::unwrap);
    let said = said.into_iter().find_map(|line| line.strip_prefix(SAID).map(str::to_owned));
    said.ok_or_else(|| {
        format!("another user cannot run this: {}", String::from_utf8_lossy(&output.stderr).trim())
    })
}

#[test]
fn another_user_takes_a_privilege() {
    if let Ok(target) = std::env::var(TARGET) {
        let said = match Process::open(target.parse().unwrap()) {
            Ok(process) => format!("opened {}", process.pid()),
            Err(e) => format!("{e}: {}", e.source),
        };
        return println!("\n{SAID}{said}");
    }
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: only root can be another user");
    }
    let here = std::process::id();
    for (capabilities, file) in [(&[][..], "maps"), (&["sys_ptrace"], "pagemap"), (&["dac_override"], "maps")]
    {
        let said = match tried(capabilities) {
            Ok(said) => said,
            Err(reason) => return println!("skipped: {reason}"),
        };
        for part in
            [&format!("/proc/{here}/{file}"), "as root", "CAP_SYS_PTRACE and CAP_DAC_OVERRIDE", "denied"]
        {
            assert!(said.contains(part), "{capabilities:?}: {part} in {said}");
        }
    }
    assert_eq!(tried(&["sys_ptrace", "dac_override"]).unwrap(), format!("opened {here}"));
}

#[test]
fn a_process_that_is_none_is_named() {
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let text = Process::open(child.id()).unwrap_err().to_string();
    assert!(text.contains(&child.id().to_string()) && text.contains("none of this number"), "{text}");
    assert!(Process::open(0).is_err() && Process::open(u32::MAX).is_err());
}
