//! The other guests: one that walks memory, and a boot sector in real mode. They go on printing dots where they arrive.

use std::time::Duration;

use pageferry::vmm_shim::guests::boot_sector;
use testkit::{PATIENCE, wait_for};

use crate::vm::{Spec, Vm, World, have_kvm};

/// Dots that a guest must show on each side.
const DOTS: usize = 3;

fn wait_dots(vm: &Vm) {
    let enough = |text: &[u8]| text.iter().filter(|&&b| b == b'.').count() >= DOTS;
    wait_for("dots", PATIENCE, || enough(&vm.serial()).then_some(()));
}

fn moves(spec: &Spec) {
    let world = World::new();
    let source = world.source("a", spec);
    wait_dots(&source);
    let (destination, uri) = world.destination("b", spec);
    let ended = source.ctl(&["migrate", &uri, "--json"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let before = source.serial();
    wait_dots(&destination);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(source.serial(), before, "the source runs on");
    for text in [before, destination.serial()] {
        assert!(text.iter().all(|b| b".\r\n".contains(b)), "{:?}", String::from_utf8_lossy(&text));
    }
    assert_eq!(destination.state(), "running");
}

#[test]
fn mem_test_goes_on() {
    if have_kvm() {
        moves(&Spec { guest: "mem-test".into(), working_set: 8 << 20, ..Spec::counter() });
        moves(&Spec { guest: "mem-test".into(), ..Spec::counter() }.with(&["--tracker", "ring"]));
    }
}

#[test]
fn a_boot_sector_goes_on_in_real_mode() {
    if have_kvm() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("boot.img");
        std::fs::write(&image, boot_sector()).unwrap();
        let guest: String = image.to_str().unwrap().into();
        moves(&Spec { guest: guest.clone(), ..Spec::counter() });
        moves(&Spec { guest, ..Spec::counter() }.with(&["--tracker", "uffd"]));
    }
}
