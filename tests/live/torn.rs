//! Pages that are written while they are sent from where they lie.

use testkit::PATIENCE;

use crate::ends::every_page_is_torn;
use crate::vm::pageferry;

#[test]
fn no_torn_page_survives() {
    for (streams, logged) in [(1, true), (4, true), (4, false)] {
        let (torn, pages) = every_page_is_torn("tcp:127.0.0.1:0", streams, 40, logged);
        assert_eq!(torn, pages, "{streams} {logged}");
    }
}

#[test]
fn no_page_torn_by_a_running_guest_survives() {
    // Whether any is torn here is up to chance; the guest itself says whether one survived.
    for more in [&[][..], &["--no-kvm"]] {
        let args =
            ["demo", "--json", "--rate", "0", "--codec", "raw", "--working-set", "16M", "--mem", "64M"];
        let ended = pageferry(&[&args[..], more].concat(), PATIENCE);
        let report = ended.json();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert_eq!((&report["verified"], &report["mismatches"]), (&true.into(), &0.into()), "{report}");
        assert!(report["torn"].is_u64(), "{report}");
        println!("{more:?}: {} torn", report["torn"]);
    }
}
