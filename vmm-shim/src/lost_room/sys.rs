//! The handler of SIGBUS.

use std::mem::MaybeUninit;
use std::ptr;

/// Installs it; whether that worked.
pub(super) fn install() -> bool {
    // SAFETY: a C struct of integers, pointers and a set of bits, for which all zeros is a valid value.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = on_bus_error as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO wants and calls async-signal-safe functions only.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) == 0 }
}

extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo that lives for the call, with an address for this signal.
    let address = unsafe { (*info).si_addr() } as u64;
    match super::text_at(address) {
        Some(text) if !text.is_null() => {
            // SAFETY: texts are leaked before their pointer is stored, so they live on and never change. write(2) and _exit(2)
            // are async-signal-safe; what does not get out is lost.
            unsafe {
                let text = (*text).as_bytes();
                libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
                libc::_exit(super::EXIT_CODE);
            }
        }
        _ => {
            // SAFETY: as without a handler: when this returns, the access is made again and ends the process.
            unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        }
    }
}
