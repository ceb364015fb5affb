//! A long path between two processes of one host: a forwarder on loopback that passes every byte on after a while, and no faster than a
//! rate. What `benches/long-path.sh` moves a guest over.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use pageferry::print;

/// Bytes that are read at a time.
const PIECE: usize = 64 << 10;
/// Pieces that a direction of a connection holds at most, 64 MiB: more than a path of a second at 10 Gbit/s would, less than swaps.
const PIECES_MAX: usize = 1024;

/// Passes connections on over a long path, until it is ended; prints where it listens
#[derive(Debug, Args)]
pub(crate) struct ForwardArgs {
    /// Whom to pass them on to
    to: SocketAddr,
    /// How long each byte is under way, in milliseconds
    #[arg(long, default_value_t = 0)]
    delay: u64,
    /// Bytes a second, each way, of all connections together
    #[arg(long, default_value_t = 125_000_000)]
    rate: u64,
}

/// One direction of the path: when what is sent next may begin.
struct Way {
    free_at: Mutex<Instant>,
    bytes_per_s: u64,
    delay: Duration,
}

impl Way {
    /// When the last of these bytes arrives that are sent now.
    fn arrival(&self, bytes: usize) -> Instant {
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        let mut free_at = self.free_at.lock().unwrap_or_else(|e| e.into_inner());
        *free_at = (*free_at).max(Instant::now()) + takes;
        *free_at + self.delay
    }
}

pub(crate) fn run(args: &ForwardArgs) -> Result<(), String> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| format!("cannot listen: {e}"))?;
    let address = listener.local_addr().map_err(|e| format!("cannot listen: {e}"))?;
    print::line(format_args!("tcp:{address}"));
    let way = || {
        let (free_at, delay) = (Mutex::new(Instant::now()), Duration::from_millis(args.delay));
        Arc::new(Way { free_at, bytes_per_s: args.rate.max(1), delay })
    };
    let ways = [way(), way()];
    for client in listener.incoming().flatten() {
        let (to, ways) = (args.to, ways.clone());
        thread::spawn(move || {
            // Whoever is not there closes the connection, as far as the client is concerned.
            let Ok(server) = TcpStream::connect(to) else { return };
            let _ = forward(&client, &server, ways);
        });
    }
    Ok(())
}

/// Passes one connection on, both ways.
fn forward(client: &TcpStream, server: &TcpStream, [there, back]: [Arc<Way>; 2]) -> io::Result<()> {
    for (from, to, way) in [(client, server, there), (server, client, back)] {
        from.set_nodelay(true)?;
        let (mut from, to) = (from.try_clone()?, to.try_clone()?);
        let (sender, receiver) = sync_channel::<(Instant, Vec<u8>)>(PIECES_MAX);
        thread::spawn(move || deliver(&receiver, to));
        thread::spawn(move || {
            let mut piece = vec![0; PIECE];
            while let Ok(len @ 1..) = from.read(&mut piece) {
                if sender.send((way.arrival(len), piece[..len].to_vec())).is_err() {
                    return;
                }
            }
            // The end takes as long as the rest.
            let _ = sender.send((way.arrival(0), Vec::new()));
        });
    }
    Ok(())
}

/// Writes pieces when they are due.
fn deliver(pieces: &Receiver<(Instant, Vec<u8>)>, mut to: TcpStream) {
    for (due, piece) in pieces {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if piece.is_empty() || to.write_all(&piece).is_err() {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
    }
}
