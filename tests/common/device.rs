//! RDMA devices for tests.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// An address of an RDMA device, or why these tests cannot run.
pub(crate) fn device() -> Result<Ipv4Addr, String> {
    if !cfg!(feature = "rdma") {
        return Err("the feature rdma is not built in".into());
    }
    let files = |path: &Path| -> Vec<PathBuf> {
        fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    // RoCE's table of addresses holds IPv4 ones as ::ffff:a.b.c.d.
    let gids = files(Path::new("/sys/class/infiniband"))
        .into_iter()
        .flat_map(|device| files(&device.join("ports")))
        .flat_map(|port| files(&port.join("gids")));
    let address = gids.filter_map(|gid| fs::read_to_string(gid).ok()).find_map(|gid| {
        let words: Vec<u16> =
            gid.trim().split(':').filter_map(|word| u16::from_str_radix(word, 16).ok()).collect();
        let [0, 0, 0, 0, 0, 0xffff, high, low] = words[..] else { return None };
        Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)))
    });
    address.ok_or_else(|| "there is no RDMA device with an IPv4 address; `pageferry lab` has one".into())
}
