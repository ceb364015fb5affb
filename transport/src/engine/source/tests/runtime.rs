//! On whose runtime a migration has its control link, and from where it may be started.

use super::*;

fn arrives(moved: &Moved) {
    let text = moved.result.as_ref().err().map(|failure| crate::engine::explain(failure));
    assert_eq!(text, None, "{:?}", moved.report);
    assert!(!moved.source.runs() && moved.destination.runs());
}

/// Tasks that the runtime had that was handed in, as the guest was handed over.
fn tasks(moved: &Moved) -> usize {
    let watched = moved.source.watched.lock().unwrap();
    watched.as_ref().map(|(_, tasks)| *tasks).expect("one was handed in")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_that_is_handed_in_has_the_link() {
    let options = Options { runtime: Some(Handle::current()), ..options() };
    let moving = move || move_with(Trouble::Nowhere, &options, Tuning::default());
    let moved = tokio::task::spawn_blocking(moving).await.unwrap();
    arrives(&moved);
    assert_ne!(tasks(&moved), 0, "the link lives elsewhere");
}

#[test]
fn a_plain_thread_needs_no_runtime() {
    arrives(&moved(Trouble::Nowhere));
}

/// It blocks the task's thread, and does no other harm: whatever it leaves behind may be dropped there.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_migration_may_run_and_end_in_a_task() {
    for trouble in [Trouble::Nowhere, Trouble::SaveState] {
        let moved = tokio::spawn(async move { moved(trouble) }).await.expect("it does not panic");
        assert_eq!(moved.result.is_ok(), trouble == Trouble::Nowhere, "{:?}", moved.report);
    }
}
