//! The control socket: who may use it, and lines in and out, all of them bounded in length, number and time.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cli::words::explain;
use nix::unistd::geteuid;
use pageferry::transport::socket::{AsyncPrivateListener, Caller, PrivateListener};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use serde_json::Value;

use super::{Answer, LINE_MAX, Request};

/// A client that has not said a whole line, or not taken an answer, in this time is left.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long somebody who is refused has to hear it.
const REFUSED_TIMEOUT: Duration = Duration::from_secs(1);
/// Connections of those who may command the VM, at a time; the oldest without a request that is being done gives way.
const CLIENTS_MAX: usize = 64;
/// Connections that may be about to be closed.
const CLEARING_MAX: usize = 8;
/// How often it is seen whether they are.
const CLEARING_TICK: Duration = Duration::from_millis(1);
/// Connections that are being told why they are refused, at a time; further ones are closed.
const REFUSED_MAX: usize = 16;
/// How often at most the log has a line of refused callers.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// Who may command the VM.
#[derive(Clone, Debug)]
struct Users {
    own: u32,
    more: Vec<u32>,
}

impl Users {
    /// The mode of the socket's file. Others' users have no name in it, so it lets everybody connect, to hear whether they may.
    fn mode(&self) -> u32 {
        if self.more.is_empty() { 0o600 } else { 0o666 }
    }

    /// Why this caller may not.
    fn refusal(&self, Caller { user, .. }: Caller) -> Option<String> {
        let allowed = user == 0 || user == self.own || self.more.contains(&user);
        (!allowed).then(|| {
            format!(
                "user {user} may not command this VM, which user {} runs: be that user, or root, or have it started with \
                 --api-allow {user}",
                self.own
            )
        })
    }
}

/// What is commanded over a control socket.
pub(in super::super) trait Commanded: Clone + Send + Sync + 'static {
    /// Does what is asked; may block.
    fn execute(&self, request: Request) -> Result<Value, String>;
    /// Ends, once the answer to that request is written.
    fn quit(&self, force: bool);
}

/// The control socket, before anybody is answered on it.
pub(in super::super) struct Control {
    listener: PrivateListener,
    users: Users,
}

impl Control {
    /// Opens it, for this user, root, and those of `allowed`.
    pub(in super::super) fn open(path: &Path, allowed: &[u32]) -> Result<Self, String> {
        let users = Users { own: geteuid().as_raw(), more: allowed.to_vec() };
        let listener = PrivateListener::bind(path, users.mode());
        Ok(Self { listener: listener.map_err(|e| format!("--api: {}", explain(&e)))?, users })
    }

    /// Answers on it.
    pub(in super::super) fn serve(self, server: &impl Commanded) -> Result<Runtime, String> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|e| format!("cannot start the control plane: {e}"))?;
        let listener = {
            let _guard = runtime.enter();
            self.listener.on_tokio().map_err(|e| format!("--api: {e}"))?
        };
        runtime.spawn(accept(listener, self.users, server.clone()));
        Ok(runtime)
    }
}

async fn accept(listener: AsyncPrivateListener, users: Users, server: impl Commanded) {
    let (clients, refused) = (Arc::new(Clients::default()), Arc::new(Semaphore::new(REFUSED_MAX)));
    let mut told = Told::default();
    loop {
        let Ok((stream, caller)) = listener.accept().await else {
            // Such as too many open files: it passes.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let why = match users.refusal(caller) {
            Some(why) => {
                told.refused(caller, &why);
                why
            }
            None => match clients.enter() {
                Some(place) => {
                    let (server, number) = (server.clone(), place.number);
                    let task = tokio::spawn(async move { client(&server, stream, &place).await });
                    clients.set_task(number, task.abort_handle());
                    while clients.is_clearing() {
                        tokio::time::sleep(CLEARING_TICK).await;
                    }
                    continue;
                }
                None => format!("{CLIENTS_MAX} requests are being done already: wait for some"),
            },
        };
        if let Ok(place) = refused.clone().try_acquire_owned() {
            tokio::spawn(async move {
                // Whoever does not listen has its time, and no more.
                let _ = tokio::time::timeout(REFUSED_TIMEOUT, refuse(stream, why)).await;
                drop(place);
            });
        }
    }
}

/// The connections of those who may command the VM, by when they came.
#[derive(Default)]
struct Clients {
    inner: Mutex<(u64, BTreeMap<u64, Client>)>,
    /// Places that are not given back yet, also of those who had to give way.
    taken: AtomicUsize,
}

struct Client {
    /// Its request is being done.
    asks: Arc<AtomicBool>,
    /// What ends it; none yet.
    task: Option<AbortHandle>,
}

/// A place among the clients, given back when it is dropped.
struct ClientPlace {
    clients: Arc<Clients>,
    number: u64,
    asks: Arc<AtomicBool>,
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, Client>)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether many who had to give way have yet to close their connections: until they have, nobody else should come in.
    fn is_clearing(&self) -> bool {
        self.taken.load(Ordering::Relaxed) > self.lock().1.len() + CLEARING_MAX
    }

    /// Takes one in. Nobody keeps others out by saying nothing, or by not reading.
    fn enter(self: &Arc<Self>) -> Option<ClientPlace> {
        let mut inner = self.lock();
        let (came, there) = &mut *inner;
        if there.len() >= CLIENTS_MAX {
            let idle = there.iter().find(|(_, client)| !client.asks.load(Ordering::Relaxed));
            let number = *idle?.0;
            if let Some(Client { task: Some(task), .. }) = there.remove(&number) {
                task.abort();
            }
        }
        *came += 1;
        let (number, asks) = (*came, Arc::new(AtomicBool::new(false)));
        there.insert(number, Client { asks: asks.clone(), task: None });
        self.taken.fetch_add(1, Ordering::Relaxed);
        Some(ClientPlace { clients: self.clone(), number, asks })
    }

    fn set_task(&self, number: u64, task: AbortHandle) {
        // One that has ended is not there any more.
        if let Some(client) = self.lock().1.get_mut(&number) {
            client.task = Some(task);
        }
    }
}

impl Drop for ClientPlace {
    fn drop(&mut self) {
        self.clients.lock().1.remove(&self.number);
        self.clients.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the log has heard of refused callers.
#[derive(Default)]
struct Told {
    last: Option<Instant>,
    /// Callers since then.
    more: u64,
}

impl Told {
    fn refused(&mut self, caller: Caller, why: &str) {
        if self.last.is_some_and(|last| last.elapsed() < LOG_EVERY) {
            self.more += 1;
            return;
        }
        self.last = Some(Instant::now());
        let more = match std::mem::take(&mut self.more) {
            0 => String::new(),
            more => format!("; {more} others were refused since the last time"),
        };
        let process = caller.process.map_or_else(|| "unknown".into(), |process| process.to_string());
        tracing::warn!("refused a caller on the control socket (process {process}): {why}{more}");
    }
}

/// Says why, and takes what still comes: whoever is writing a request reads the answer only then.
async fn refuse(mut stream: UnixStream, why: String) {
    if stream.write_all(Answer::Error(why).line().as_bytes()).await.is_ok() && stream.shutdown().await.is_ok()
    {
        let _ = tokio::io::copy(&mut stream.take(LINE_MAX), &mut tokio::io::sink()).await;
    }
}

async fn client(server: &impl Commanded, stream: UnixStream, place: &ClientPlace) {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = BufReader::new(reader.take(LINE_MAX));
    let mut line = Vec::new();
    while let Ok(Ok(1..)) = tokio::time::timeout(CLIENT_TIMEOUT, reader.read_until(b'\n', &mut line)).await {
        if !line.ends_with(b"\n") && line.len() as u64 >= LINE_MAX {
            let why = format!("a request is longer than {LINE_MAX} bytes, the end of its line included");
            // What follows in a line that is too long is no request either.
            let refused = refuse(reader.into_inner().into_inner().unsplit(writer), why);
            let _ = tokio::time::timeout(REFUSED_TIMEOUT, refused).await;
            return;
        }
        let request = Request::parse(&line);
        let mut quits = match request {
            Ok(Request::Quit { force }) => Some(force),
            _ => None,
        };
        let answer = match request {
            Ok(request) => {
                let server = server.clone();
                place.asks.store(true, Ordering::Relaxed);
                // Pausing and resuming block.
                let done = tokio::task::spawn_blocking(move || server.execute(request)).await;
                done.unwrap_or_else(|e| Err(format!("the request failed: {e}")))
            }
            Err(e) => Err(e),
        };
        quits = quits.filter(|_| answer.is_ok());
        let answer = answer.map_or_else(Answer::Error, Answer::Return).line();
        place.asks.store(false, Ordering::Relaxed);
        let written = tokio::time::timeout(CLIENT_TIMEOUT, writer.write_all(answer.as_bytes())).await;
        if let Some(force) = quits {
            // Only now: the process may be gone a moment later, and its answer with it.
            server.quit(force);
        }
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
        line.clear();
        reader.get_mut().set_limit(LINE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_let_in_by_number() {
        let caller = |user| Caller { user, process: Some(1) };
        let alone = Users { own: 7, more: vec![] };
        assert_eq!(alone.mode(), 0o600);
        assert!(alone.refusal(caller(7)).is_none() && alone.refusal(caller(0)).is_none());
        let why = alone.refusal(caller(8)).unwrap();
        assert!(why.contains("user 8 may not") && why.contains("--api-allow 8"), "{why}");
        let more = Users { own: 7, more: vec![8, 9] };
        assert_eq!(more.mode(), 0o666);
        assert!(more.refusal(caller(9)).is_none() && more.refusal(caller(10)).is_some());
    }

    #[tokio::test]
    async fn the_oldest_that_asks_nothing_gives_way() {
        let clients = Arc::new(Clients::default());
        let enter = || {
            let place = clients.enter()?;
            let (number, task) = (place.number, tokio::spawn(std::future::pending::<()>()));
            clients.set_task(number, task.abort_handle());
            Some((place, task))
        };
        let all: Vec<_> = (0..CLIENTS_MAX).map(|_| enter().unwrap()).collect();
        all[0].0.asks.store(true, Ordering::Relaxed);
        let next = enter().unwrap();
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        let ended: Vec<bool> = all.iter().map(|(_, task)| task.is_finished()).collect();
        assert_eq!((ended[0], ended[1], ended[2]), (false, true, false));
        all.iter().chain([&next]).for_each(|(place, _)| place.asks.store(true, Ordering::Relaxed));
        assert!(enter().is_none(), "all of them ask");
        drop(all);
        assert_eq!(clients.lock().1.len(), 1);
        assert!(enter().is_some());
    }
}
