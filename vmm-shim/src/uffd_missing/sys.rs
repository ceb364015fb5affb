//! Missing pages at addresses that a caller vouches for.

use std::os::fd::OwnedFd;

use pagecopy::backend::BackendError;
use pagecopy::layout::{CHUNK_SIZE, Layout, PAGE_SIZE, Region};

use super::UffdMissing;
use crate::watched::Watched;

impl UffdMissing {
    /// Fills the memory of whoever has made this userfaultfd, and registered all regions with it for missing pages: another process, as
    /// Firecracker does when it is restored, or another part of this one. `addresses` are those of the regions in that process, in the
    /// order of the layout; `unit` is the size in bytes of huge pages that come in whole, or 0. The other side has taken away what is to
    /// be missing.
    ///
    /// # Safety
    /// Where the regions lie in this process, they are memory that others may write at any time, and nobody's references go there.
    ///
    /// # Errors
    /// Another number of addresses than regions, and addresses, or a unit, of no whole pages.
    pub unsafe fn foreign(
        fd: OwnedFd,
        layout: Layout,
        addresses: &[u64],
        unit: u64,
    ) -> Result<Self, BackendError> {
        let regions = layout.regions();
        let aligned = |n: &u64| n.is_multiple_of(PAGE_SIZE as u64);
        let whole = |r: &Region| unit == 0 || r.len.is_multiple_of(unit);
        if addresses.len() != regions.len()
            || !addresses.iter().chain([&unit]).all(aligned)
            || (unit != 0 && !unit.is_multiple_of(CHUNK_SIZE as u64))
            || !regions.iter().all(whole)
        {
            return Err(BackendError::invalid(format!(
                "missing pages of {} regions in units of {unit} bytes at addresses {addresses:#x?}: each region has an address, and all \
                 are whole pages and units",
                regions.len()
            )));
        }
        let ends = addresses.iter().zip(regions).map(|(&start, r)| (start, start.checked_add(r.len)));
        let ranges = ends.map(|(start, end)| end.map(|end| start..end)).collect::<Option<Vec<_>>>();
        let ranges = ranges.ok_or_else(|| BackendError::invalid("a region ends beyond all addresses"))?;
        // SAFETY: the caller has promised what is asked for.
        let watched = unsafe { Watched::foreign(fd.into(), ranges) };
        Ok(Self::new(watched, layout, unit))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::fd::{AsFd, AsRawFd};
    use std::process::{Command, Stdio};
    use std::time::Duration;

    use pagecopy::backend::{GuestRam, MissingPages};
    use vm_memory::Bytes;

    use super::*;
    use crate::guest_memory::{Backing, GuestMemory};
    use crate::uffd_missing::{check, open};

    /// Set for the other process of the next test.
    const OTHER: &str = "PAGEFERRY_TEST_FOREIGN";

    /// The other process: makes memory and a userfaultfd, tells both, touches its pages in turn and tells what it finds.
    fn other_process() {
        let memory = GuestMemory::create(
            Layout::flat(2 * CHUNK_SIZE as u64).unwrap(),
            &Backing::Anonymous { huge: false },
        );
        let memory = memory.unwrap();
        let fd = open().unwrap();
        fd.register_missing(memory.host_range(0)).unwrap();
        println!("{OTHER} {} {}", fd.as_fd().as_raw_fd(), memory.host_range(0).start);
        for (chunk, page) in [(0, 3), (1, 0), (1, 63)] {
            println!("{OTHER} {}", memory.chunk(chunk).read_obj::<u8>(page * PAGE_SIZE).unwrap());
        }
    }

    #[test]
    fn memory_of_another_process_is_filled_by_its_userfaultfd() {
        if std::env::var_os(OTHER).is_some() {
            return other_process();
        }
        if let Err(error) = check() {
            return println!("skipped: {error}");
        }
        let mut other = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("uffd_missing::sys::tests::memory_of_another_process_is_filled_by_its_userfaultfd")
            .env(OTHER, "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut told =
            BufReader::new(other.stdout.take().unwrap()).lines().map(Result::unwrap).filter_map(|line| {
                let (_, numbers) = line.split_once(OTHER)?;
                Some(numbers.split_whitespace().map(|n| n.parse::<u64>().unwrap()).collect::<Vec<_>>())
            });
        let first = told.next().unwrap();
        let pid = rustix::process::Pid::from_child(&other);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let flags = rustix::process::PidfdGetfdFlags::empty();
        let fd = match rustix::process::pidfd_getfd(&pidfd, first[0] as i32, flags) {
            Ok(fd) => fd,
            Err(e) => {
                other.kill().unwrap();
                other.wait().unwrap();
                return println!("skipped: this process may not take a descriptor of its child: {e}");
            }
        };
        let layout = Layout::flat(2 * CHUNK_SIZE as u64).unwrap();
        // SAFETY: the addresses are the other process's.
        let missing = unsafe { UffdMissing::foreign(fd, layout, &first[1..], 0) }.unwrap();
        for (chunk, page) in [(0, 3), (1, 0), (1, 63)] {
            let mut faults = Vec::new();
            while faults.is_empty() {
                missing.wait(&mut faults, Duration::from_secs(5)).unwrap();
            }
            assert_eq!((faults[0].chunk, faults[0].page), (chunk, page));
            match page {
                63 => missing.settle(faults[0]).unwrap(),
                _ => missing.place(chunk, page, &[page as u8 + 1; PAGE_SIZE]).unwrap(),
            }
            assert_eq!(told.next().unwrap(), [if page == 63 { 0 } else { u64::from(page) + 1 }]);
        }
        assert!(other.wait().unwrap().success());
    }

    #[test]
    fn foreign_addresses_must_fit_the_layout() {
        let Ok(fd) = open() else { return println!("skipped: this process may not") };
        let layout = Layout::flat(2 * CHUNK_SIZE as u64).unwrap();
        let refused = |addresses: &[u64], unit| {
            let fd = fd.as_fd().try_clone_to_owned().unwrap();
            // SAFETY: nothing is ever placed.
            unsafe { UffdMissing::foreign(fd, layout.clone(), addresses, unit) }.is_err()
        };
        assert!(!refused(&[1 << 20], 0));
        assert!(refused(&[], 0) && refused(&[4097], 0) && refused(&[1 << 20], 4096));
        assert!(refused(&[u64::MAX - 4095], 0), "beyond the end");
        assert!(refused(&[1 << 20], 4 * CHUNK_SIZE as u64), "no whole huge pages");
    }
}
