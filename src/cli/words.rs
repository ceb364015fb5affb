//! What the library says, with what a user of this command can do about it. The library names no commands.

use std::error::Error;
use std::fmt::Write;

use pageferry::pagecopy::layout::PAGE_SIZE;
use pageferry::{Plan, Progress, Remedy, Report, Stalled};

use super::sandbox;

/// What the library says of something, and what this command says in its place.
const HINTS: &[(&str, &str)] = &[
    (
        ": no destination listens there",
        ": no destination listens there; start `pageferry recv` or `vm --incoming` first",
    ),
    ("and the destination does not support it", "and the destination does not support it; use --codec auto"),
    ("; allow more time", "; allow more time (--timeout)"),
    ("; postcopy after so many rounds needs it", "; --postcopy-after-rounds needs it"),
    ("; postcopy when its time is up needs it", "; --on-timeout postcopy needs it"),
    ("bound what is pinned", "bound it with --rdma-max-pinned"),
    (
        ": give it certificates, or allow it to be insecure",
        ": make some with `pageferry keys init DIR` and give --tls-dir DIR, or --insecure where nobody else is on that network",
    ),
    (
        ": TLS would protect the control connection alone, which must be allowed",
        ": TLS would protect the control connection alone, which --insecure-data-path allows",
    ),
    (
        ", where nobody answers: encrypt what is written there",
        ", where nobody answers: encrypt by exec:, as with gpg",
    ),
    ("the certificate's name must be said for", "the certificate's name must be said (--tls-hostname) for"),
    (
        "it does not speak TLS, and this destination speaks nothing else",
        "it does not speak TLS, and this destination speaks nothing else: give --tls-dir at the source, too",
    ),
    (
        "the other side does not speak TLS",
        "the other side does not speak TLS: give --tls-dir there, too, or nowhere",
    ),
    ("; use a tcp: address", "; use a tcp: address, or try RDMA without hardware in `pageferry lab`"),
];

/// The text of an error with all its causes, and what to do.
pub(super) fn explain(error: &dyn Error) -> String {
    with_hints(&pageferry::explain(error))
}

fn with_hints(text: &str) -> String {
    // What comes from another process may have its hints already.
    let text =
        HINTS.iter().filter(|(_, hint)| !text.contains(hint)).fold(text.to_owned(), |text, (said, hint)| {
            // The first is this side's; another's words may follow.
            text.replacen(said, hint, 1)
        });
    match sandbox::hint(&text) {
        Some(hint) if !text.contains(hint) => text + hint,
        _ => text,
    }
}

/// A migration's report.
pub(super) fn report(progress: &Progress) -> Report {
    let mut report = progress.report();
    report.error = report.error.map(|error| with_hints(&error));
    if report.stalled.is_some() {
        report.stalled = progress.stalled().map(|stalled| advice(&stalled)).or(report.stalled);
    }
    report
}

fn advice(stalled: &Stalled) -> String {
    stalled.text(|remedy| match remedy {
        Remedy::Bandwidth => "a higher --bandwidth".into(),
        Remedy::AutoConverge => "--auto-converge".into(),
        Remedy::ThrottleMax => "a higher --throttle-max".into(),
        Remedy::Postcopy => "`ctl postcopy`".into(),
        Remedy::DowntimeLimit(ms) => format!("--downtime-limit {ms} (ms)"),
        Remedy::Switchover => "`ctl switchover` to accept the downtime".into(),
        other => other.to_string(),
    })
}

/// A plan.
pub(super) fn plan(plan: &Plan) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<18}{value}");
    };
    let mib = |pages: u64| (pages * PAGE_SIZE as u64) >> 20;
    line("watched:", format!("{:.1} s", plan.watched_ms / 1e3));
    line("memory with data:", format!("{} MiB", mib(plan.present_pages)));
    line(
        "dirtied:",
        format!(
            "{:.0} MB/s at first, {} MiB in all",
            plan.dirty_pages_per_s * PAGE_SIZE as f64 / 1e6,
            mib(plan.dirtied_pages)
        ),
    );
    line("link:", format!("{:.1} MB/s", plan.link_bytes_per_s as f64 / 1e6));
    let verdict = if plan.converges { "yes" } else { "no" };
    line("converges:", format!("{verdict}, with a downtime limit of {} ms", plan.downtime_limit_ms));
    line("rounds:", plan.rounds.to_string());
    line("total time:", format!("{:.1} s", plan.total_ms / 1e3));
    line("downtime:", format!("{:.0} ms", plan.downtime_ms));
    line("on the wire:", format!("{} MiB, less what deltas and compression save", plan.wire_bytes >> 20));
    if let Some(helps) = &plan.helps {
        line("would help:", format!("--downtime-limit {}", helps.downtime_limit_ms));
        if let Some(rate) = helps.link_bytes_per_s {
            line("  or:", format!("a link of {:.1} MB/s", rate as f64 / 1e6));
        }
        if let Some(percent) = helps.throttle_percent {
            line("  or:", format!("--auto-converge, which would come to about {percent} %"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pageferry::backend::StaticLog;
    use pageferry::layout::Layout;
    use pageferry::vmm_shim::guest_memory::{Backing, GuestMemory};
    use pageferry::{Cause, Source, Uri};

    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        let ram = GuestMemory::create(Layout::flat(1 << 20).unwrap(), &Backing::Memfd).unwrap();
        let source = Source::builder(Arc::new(ram), Arc::new(StaticLog)).build().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let uri: Uri = format!("tcp:{address}").parse().unwrap();
        let migration = source.start(&uri).unwrap();
        let progress = migration.progress();
        let failure = migration.wait().unwrap_err();
        let hint = format!(
            "cannot connect to {uri}: no destination listens there; start `pageferry recv` or `vm --incoming` first: "
        );
        for text in [explain(&failure), report(&progress).error.unwrap()] {
            assert!(text.contains(&hint), "{text}");
        }
        assert!(!pageferry::explain(&failure).contains("pageferry recv"));
        let codec = pageferry::CodecMode::Delta;
        for (cause, end) in [
            (Cause::Codec { codec }, "and the destination does not support it; use --codec auto"),
            (
                Cause::OutOfTime { doing: "connecting", elapsed_s: 3.0, limit_s: 2.0 },
                "is still connecting; allow more time (--timeout)",
            ),
        ] {
            assert!(explain(&cause).ends_with(end), "{}", explain(&cause));
        }
    }

    #[test]
    fn hints_are_given_once() {
        for (said, hint) in HINTS {
            let text = format!("x{said}: y");
            assert_eq!(with_hints(&text), format!("x{hint}: y"));
            assert_eq!(with_hints(&with_hints(&text)), with_hints(&text));
        }
    }

    #[test]
    fn advice_names_options() {
        use Remedy::{Bandwidth, DowntimeLimit, Postcopy, QuieterGuest, Switchover};
        let progress = Progress::default();
        assert_eq!(report(&progress), progress.report());
        let json = serde_json::json!({
            "why": "it is busy",
            "what_helps": [Bandwidth, Postcopy, DowntimeLimit(603), QuieterGuest, Switchover],
        });
        let stalled: Stalled = serde_json::from_value(json).unwrap();
        assert_eq!(
            advice(&stalled),
            "it is busy; what may help: a higher --bandwidth, `ctl postcopy`, --downtime-limit 603 (ms), a quieter guest, \
             or `ctl switchover` to accept the downtime"
        );
    }
}
