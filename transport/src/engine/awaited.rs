//! A value that threads and tasks wait for, on whatever runtime the tasks are, or on none.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::reserve;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Awaited<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State<T> {
    value: T,
    /// Of tasks that wait.
    wakers: Vec<Waker>,
}

impl<T> Awaited<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Changes the value, and lets all who wait look at it.
    pub(super) fn change(&self, change: impl FnOnce(&mut T)) {
        let mut state = self.lock();
        change(&mut state.value);
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Looks at it now.
    pub(super) fn look<R>(&self, take: impl FnOnce(&mut T) -> R) -> R {
        take(&mut self.lock().value)
    }

    /// Blocks this thread until `take` finds what it wants.
    pub(super) fn wait<R>(&self, mut take: impl FnMut(&mut T) -> Option<R>) -> R {
        let mut state = self.lock();
        loop {
            if let Some(found) = take(&mut state.value) {
                return found;
            }
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// The same for at most this long.
    pub(super) fn wait_for<R>(
        &self,
        limit: Duration,
        mut take: impl FnMut(&mut T) -> Option<R>,
    ) -> Option<R> {
        let began = Instant::now();
        let mut state = self.lock();
        loop {
            if let Some(found) = take(&mut state.value) {
                return Some(found);
            }
            let left = limit.checked_sub(began.elapsed()).filter(|left| !left.is_zero())?;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// The same for a task.
    pub(super) fn poll<R>(&self, context: &Context<'_>, take: impl FnOnce(&mut T) -> Option<R>) -> Poll<R> {
        let mut state = self.lock();
        if let Some(found) = take(&mut state.value) {
            return Poll::Ready(found);
        }
        if !state.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            state.wakers.push(context.waker().clone());
        }
        Poll::Pending
    }
}

/// How something ends that a thread of its own does.
#[derive(Debug)]
pub(super) struct Ending<T>(Arc<Awaited<Option<T>>>);

impl<T: Send + 'static> Ending<T> {
    /// Does `work` on a thread of its own.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub(super) fn of(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<Self> {
        let ending = Arc::new(Awaited::default());
        let tell = ending.clone();
        let work = move || {
            let end = work();
            tell.change(|ended| *ended = Some(end));
            // All that it took is free by now.
            reserve::give_back();
        };
        std::thread::Builder::new().name(name.into()).spawn(work)?;
        Ok(Self(ending))
    }

    /// Whether it has ended.
    pub(super) fn is_over(&self) -> bool {
        self.0.look(|ended| ended.is_some())
    }

    /// Blocks until it has ended.
    pub(super) fn wait(self) -> T {
        self.0.wait(Option::take)
    }

    /// The same for a task.
    pub(super) fn future(self) -> Pin<Box<dyn Future<Output = T> + Send>> {
        Box::pin(poll_fn(move |context| self.0.poll(context, Option::take)))
    }
}
