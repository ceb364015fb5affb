//! Who waits at the door: connections that are not the session's own yet, bounded by what they are, and of whom the oldest goes.
//!
//! Nobody keeps others out by coming first, or by coming often. Who has said nothing gives way to who has come since; who has opened a
//! control connection and not said HELLO gives way to the next who has; and within each kind the address with the most connections
//! gives one up first. Unix sockets, and all of a host's loopback, look like one address.
//!
//! Whoever gives way has had its time: no more come in within it than there is room for, and the others wait in the system's queue, where
//! none overtakes another. Memory is bounded likewise: of those whose first message is to be long, the longest goes.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::task::AbortHandle;

/// Connections whose preamble is awaited at a time. With the other bounds and a session's own connections far fewer than the 1024
/// descriptors that a process usually may have.
const SILENT_MAX: usize = 256;
/// Control connections whose HELLO is awaited at a time.
const CALLERS_MAX: usize = 240;
/// Bytes of first messages, and of what they are decoded to, that may be there or on their way. Another
/// [longest HELLO](crate::wire::control::FIRST_LEN_MAX) is beyond it once there are three.
const FIRST_BYTES_MAX: usize = 64 << 20;
/// What everybody has to say what for before another takes the place, if many come: some round trips.
const TENURE: Duration = Duration::from_millis(250);
/// Strangers that are let in within [`TENURE`].
const COMING_MAX: usize = CALLERS_MAX;
/// Connections of the session that nobody has dealt with: its streams all at once, and some queries.
const KNOWN_MAX: usize = 288;
/// Connections that may be about to be closed.
const CLEARING_MAX: usize = 16;
/// Above this many silent connections another has [`HURRIED`] to say something.
const CROWD: usize = SILENT_MAX / 2;
/// Who has connected says its preamble with the first packet: some retransmissions.
const HURRIED: Duration = Duration::from_secs(2);

/// What a connection has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing was read.
    Silent,
    /// It wants to open a session.
    Caller,
    /// It knows the id of the session.
    Known,
    /// It is the session's.
    Own,
}

impl Stage {
    fn most(self) -> usize {
        match self {
            Self::Silent => SILENT_MAX,
            Self::Caller => CALLERS_MAX,
            Self::Known => KNOWN_MAX,
            Self::Own => usize::MAX,
        }
    }
}

/// Where somebody comes from, as far as one can be told from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Origin {
    /// This host.
    Local,
    V4(u32),
    /// A network: one host may have all of its addresses.
    V6(u64),
}

impl Origin {
    /// Of a peer as its socket names it.
    fn of(peer: &str) -> Self {
        match peer.parse().map(|address: SocketAddr| address.ip().to_canonical()) {
            Ok(ip) if ip.is_loopback() => Self::Local,
            Ok(IpAddr::V4(ip)) => Self::V4(ip.to_bits()),
            Ok(IpAddr::V6(ip)) => Self::V6((ip.to_bits() >> 64) as u64),
            Err(_) => Self::Local,
        }
    }
}

struct Guest {
    origin: Origin,
    stage: Stage,
    /// Bytes of memory that its longest message takes, as far as it has said.
    bytes: usize,
    /// What its connection ends with; none yet.
    task: Option<AbortHandle>,
}

/// The connections, by when they came.
#[derive(Default)]
pub(super) struct Lobby {
    guests: Mutex<BTreeMap<u64, Guest>>,
    /// When the last [`COMING_MAX`] strangers came.
    times: Mutex<VecDeque<Instant>>,
    came: AtomicU64,
    /// Places that are not given back yet, also of those who had to give way.
    taken: AtomicUsize,
}

/// A place in the lobby, given back when it is dropped.
pub(super) struct Place {
    lobby: Arc<Lobby>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.lobby.guests().remove(&self.number);
        self.lobby.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lobby {
    fn guests(&self) -> MutexGuard<'_, BTreeMap<u64, Guest>> {
        self.guests.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Somebody came; says how long they have to say what for. Whoever has to give way is gone.
    pub(super) fn enter(self: &Arc<Self>, peer: &str, timeout: Duration) -> (Place, Duration) {
        let mut guests = self.guests();
        make_room(&mut guests, Stage::Silent);
        let silent = guests.values().filter(|guest| guest.stage == Stage::Silent).count();
        let number = self.came.fetch_add(1, Ordering::Relaxed);
        self.taken.fetch_add(1, Ordering::Relaxed);
        guests.insert(number, Guest { origin: Origin::of(peer), stage: Stage::Silent, bytes: 0, task: None });
        drop(guests);
        let mut times = self.times();
        times.push_back(Instant::now());
        if times.len() > COMING_MAX {
            times.pop_front();
        }
        let patience = if silent >= CROWD { timeout.min(HURRIED) } else { timeout };
        (Place { lobby: self.clone(), number }, patience)
    }

    fn times(&self) -> MutexGuard<'_, VecDeque<Instant>> {
        self.times.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// How long nobody else should come in, so that those who came have their time.
    pub(super) fn closed_for(&self) -> Duration {
        let times = self.times();
        let first = times.front().filter(|_| times.len() == COMING_MAX);
        first.map_or(Duration::ZERO, |first| TENURE.saturating_sub(first.elapsed()))
    }

    /// Whether those who had to give way have yet to close their connections: until they have, nobody else should come in.
    pub(super) fn is_clearing(&self) -> bool {
        self.taken.load(Ordering::Relaxed) > self.guests().len() + CLEARING_MAX
    }

    /// Half of those who have said nothing go: descriptors are needed.
    pub(super) fn halve(&self) {
        let mut guests = self.guests();
        let silent = guests.values().filter(|guest| guest.stage == Stage::Silent).count();
        for _ in 0..silent.div_ceil(2) {
            evict(&mut guests, Stage::Silent);
        }
    }
}

impl Place {
    /// What is to be aborted when it has to give way.
    pub(super) fn set_task(&self, task: AbortHandle) {
        match self.lobby.guests().get_mut(&self.number) {
            Some(guest) => guest.task = Some(task),
            // It had to already.
            None => task.abort(),
        }
    }

    /// It has come to something more. Says whether there is room; where callers are too many, one of them goes.
    pub(super) fn become_stage(&self, stage: Stage) -> bool {
        let mut guests = self.lobby.guests();
        if stage == Stage::Caller {
            make_room(&mut guests, stage);
        }
        if stage == Stage::Known {
            // It is no stranger.
            self.lobby.times().pop_back();
        }
        let there = guests.values().filter(|guest| guest.stage == stage).count();
        match guests.get_mut(&self.number) {
            Some(guest) if there < stage.most() => {
                guest.stage = stage;
                true
            }
            _ => false,
        }
    }
}

impl Place {
    /// A message of so many bytes is about to come. Where those of all who are not the session's own come to too much, the longest goes.
    pub(super) fn expect(&self, len: usize) {
        let mut guests = self.lobby.guests();
        if let Some(guest) = guests.get_mut(&self.number) {
            // As bytes, and decoded.
            guest.bytes = guest.bytes.max(len.saturating_mul(2));
        }
        let counts = |guest: &Guest| guest.stage != Stage::Own;
        while guests.values().filter(|guest| counts(guest)).map(|guest| guest.bytes).sum::<usize>()
            > FIRST_BYTES_MAX
        {
            let longest = guests.iter().filter(|(_, guest)| counts(guest));
            // Of the same length the oldest.
            let longest = longest.max_by_key(|&(&number, guest)| (guest.bytes, std::cmp::Reverse(number)));
            let Some(number) = longest.map(|(&number, _)| number) else { return };
            leave(&mut guests, number);
        }
    }
}

/// Somebody has to give way.
fn leave(guests: &mut BTreeMap<u64, Guest>, number: u64) {
    if let Some(Guest { task: Some(task), .. }) = guests.remove(&number) {
        task.abort();
    }
}

fn make_room(guests: &mut BTreeMap<u64, Guest>, stage: Stage) {
    while guests.values().filter(|guest| guest.stage == stage).count() >= stage.most() {
        evict(guests, stage);
    }
}

/// The oldest of the address with the most connections of this kind goes.
fn evict(guests: &mut BTreeMap<u64, Guest>, stage: Stage) {
    let mut shares = BTreeMap::<Origin, (usize, u64)>::new();
    for (&number, guest) in guests.iter().filter(|(_, guest)| guest.stage == stage) {
        shares.entry(guest.origin).or_insert((0, number)).0 += 1;
    }
    let most = shares.into_values().max_by_key(|&(count, oldest)| (count, std::cmp::Reverse(oldest)));
    if let Some((_, oldest)) = most {
        leave(guests, oldest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// Somebody who came, and whether their task still runs.
    struct Came(Place, tokio::task::JoinHandle<()>);

    fn enter(lobby: &Arc<Lobby>, peer: &str) -> Came {
        let (place, _) = lobby.enter(peer, TIMEOUT);
        let task = tokio::spawn(std::future::pending());
        place.set_task(task.abort_handle());
        Came(place, task)
    }

    async fn is_there(came: &Came) -> bool {
        // Whoever was aborted gets the chance to end, however many there are.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        !came.1.is_finished()
    }

    #[tokio::test]
    async fn the_oldest_of_the_largest_crowd_gives_way() {
        let lobby = Arc::new(Lobby::default());
        let first = enter(&lobby, "10.0.0.1:1");
        let crowd: Vec<_> = (0..SILENT_MAX + 50).map(|n| enter(&lobby, &format!("10.0.0.2:{n}"))).collect();
        assert!(is_there(&first).await, "another address gives none up");
        for (n, came) in crowd.iter().enumerate() {
            assert_eq!(is_there(came).await, n >= 51, "{n}");
        }
        assert_eq!(lobby.guests().len(), SILENT_MAX);
        lobby.halve();
        assert_eq!(lobby.guests().len(), SILENT_MAX / 2);
        assert!(is_there(&first).await);
        drop(crowd);
        assert_eq!(lobby.guests().len(), 1);
    }

    #[tokio::test]
    async fn who_has_said_something_stays() {
        let lobby = Arc::new(Lobby::default());
        let (source, stream) = (enter(&lobby, "127.0.0.1:1"), enter(&lobby, "unix"));
        assert!(source.0.become_stage(Stage::Caller));
        assert!(stream.0.become_stage(Stage::Known));
        let crowd: Vec<_> = (0..SILENT_MAX * 2).map(|_| enter(&lobby, "unix")).collect();
        assert!(is_there(&source).await && is_there(&stream).await);
        // Those who call give way to each other, but not the one whose session it has become.
        assert!(source.0.become_stage(Stage::Own));
        assert!(
            crowd[SILENT_MAX * 2 - CALLERS_MAX - 1..].iter().all(|came| came.0.become_stage(Stage::Caller))
        );
        assert!(is_there(&source).await);
        assert!(!is_there(&crowd[SILENT_MAX * 2 - CALLERS_MAX - 1]).await);
        assert!(is_there(&crowd[SILENT_MAX * 2 - CALLERS_MAX]).await);
        assert!(!crowd[0].0.become_stage(Stage::Caller), "it is gone");
    }

    #[tokio::test]
    async fn the_longest_first_message_gives_way() {
        let lobby = Arc::new(Lobby::default());
        let callers: Vec<_> = (0..40).map(|_| enter(&lobby, "unix")).collect();
        assert!(callers.iter().all(|came| came.0.become_stage(Stage::Caller)));
        let source = enter(&lobby, "unix");
        assert!(source.0.become_stage(Stage::Caller));
        source.0.expect(1 << 20);
        for caller in &callers {
            caller.0.expect(8 << 20);
        }
        assert!(is_there(&source).await, "the shortest stays");
        let mut there = Vec::new();
        for (n, caller) in callers.iter().enumerate() {
            if is_there(caller).await {
                there.push(n);
            }
        }
        assert_eq!(there, [37, 38, 39], "of the same length the latest stay");
    }

    #[tokio::test]
    async fn nobody_comes_in_before_the_others_had_their_time() {
        let lobby = Arc::new(Lobby::default());
        let crowd: Vec<_> = (0..COMING_MAX - 1).map(|_| enter(&lobby, "unix")).collect();
        assert_eq!(lobby.closed_for(), Duration::ZERO);
        let last = enter(&lobby, "unix");
        assert!(lobby.closed_for() > TENURE / 2);
        // Whoever knows the session is none of them.
        assert!(last.0.become_stage(Stage::Known));
        assert_eq!(lobby.closed_for(), Duration::ZERO);
        let _last = enter(&lobby, "unix");
        tokio::time::sleep(lobby.closed_for()).await;
        assert_eq!(lobby.closed_for(), Duration::ZERO);
        drop(crowd);
    }

    #[tokio::test]
    async fn a_crowd_is_hurried() {
        let lobby = Arc::new(Lobby::default());
        let _crowd: Vec<_> = (0..CROWD).map(|_| enter(&lobby, "unix")).collect();
        let (_place, patience) = lobby.enter("10.0.0.1:1", TIMEOUT);
        assert_eq!(patience, HURRIED);
    }

    #[test]
    fn an_address_is_a_host_or_a_network() {
        let same = |a: &str, b: &str| Origin::of(a) == Origin::of(b);
        assert!(same("127.0.0.1:1", "a local process") && same("127.0.0.2:1", "[::1]:2"));
        assert!(same("10.0.0.1:1", "[::ffff:10.0.0.1]:2") && !same("10.0.0.1:1", "10.0.0.2:1"));
        assert!(same("[fd00::1]:1", "[fd00::2]:1") && !same("[fd00::1]:1", "[fd00:0:0:1::1]:1"));
    }
}
