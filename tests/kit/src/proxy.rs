//! Between a source and a destination: a port whose callers are served, and a proxy on it that does one harm at a chosen byte.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::wait::{PATIENCE, wait_until};

/// A port of the loopback, of the system's choice. Nobody is let in any more when it is dropped.
pub struct Port {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
}

impl Port {
    /// Listens, and gives each connection with its number, from 0 on, to `serve` on a thread of its own.
    pub fn open(serve: impl Fn(usize, TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
        let (stopping, serve) = (stop.clone(), Arc::new(serve));
        std::thread::spawn(move || {
            let mut number = 0;
            for client in listener.incoming() {
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(client), serve) = (client, serve.clone()) else { continue };
                std::thread::spawn(move || serve(number, client));
                number += 1;
            }
        });
        Self { address, stop }
    }

    /// `tcp:HOST:PORT`.
    pub fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// Lets nobody in any more.
    pub fn close(&self) {
        if !self.stop.swap(true, Ordering::Relaxed) {
            // It looks when somebody comes.
            let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.close();
    }
}

/// What is done to the chosen byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// This bit of it is flipped.
    Flip(u8),
    /// The connection ends before it.
    Cut,
    /// It and all that follows is held back; the connection stays.
    Stall,
}

/// Which way the harmed bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To whom the proxy connects.
    ToDestination,
    /// To who connects to the proxy.
    ToSource,
}

/// One harm.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The connection, in the order in which they are opened: 0 control, n + 1 stream n.
    pub connection: usize,
    /// Of its two ways.
    pub way: Way,
    /// The byte's offset in that direction of the connection.
    pub at: usize,
    /// What is done to it.
    pub harm: Harm,
}

/// A TCP proxy that does one harm at a chosen byte.
pub struct Proxy {
    port: Port,
    done: Arc<AtomicBool>,
}

impl Proxy {
    /// Listens on a port of its own and passes everything to the port `target`, except for what `plan` says.
    pub fn start(target: u16, plan: Plan) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let happened = done.clone();
        let port = Port::open(move |index, client| {
            // A destination that is gone: so is the connection.
            let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { return };
            for way in [Way::ToDestination, Way::ToSource] {
                let (client, server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let (from, to) = match way {
                    Way::ToDestination => (client, server),
                    Way::ToSource => (server, client),
                };
                let plan = (plan.connection == index && plan.way == way).then_some(plan);
                let happened = happened.clone();
                std::thread::spawn(move || pump(from, to, plan, &happened));
            }
        });
        Self { port, done }
    }

    /// Where the source connects.
    pub fn uri(&self) -> String {
        self.port.uri()
    }

    /// Whether the harm was done.
    pub fn done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Waits until the harm was done.
    #[track_caller]
    pub fn wait_done(&self) {
        wait_until("the chosen byte comes by", PATIENCE, || self.done());
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, plan: Option<Plan>, done: &AtomicBool) {
    let mut buffer = vec![0; 64 << 10];
    let mut offset = 0;
    while let Ok(got @ 1..) = from.read(&mut buffer) {
        let mut pass = got;
        if let Some(plan) = plan.filter(|plan| (offset..offset + got).contains(&plan.at)) {
            let place = plan.at - offset;
            match plan.harm {
                Harm::Flip(bit) => buffer[place] ^= 1 << bit,
                Harm::Cut | Harm::Stall => pass = place,
            }
            // Before anybody sees it: who has seen it may ask at once.
            done.store(true, Ordering::Release);
            let sent = to.write_all(&buffer[..pass]);
            match plan.harm {
                Harm::Flip(_) if sent.is_ok() => {}
                Harm::Stall => {
                    // Until the sender closes: what it still sends is read and dropped.
                    while let Ok(1..) = from.read(&mut buffer) {}
                    break;
                }
                _ => {
                    let _ = from.shutdown(Shutdown::Both);
                    break;
                }
            }
        } else if to.write_all(&buffer[..pass]).is_err() {
            break;
        }
        offset += got;
    }
    let cut = plan.is_some_and(|plan| plan.harm == Harm::Cut) && done.load(Ordering::Acquire);
    let _ = to.shutdown(if cut { Shutdown::Both } else { Shutdown::Write });
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::RecvTimeoutError;

    use super::*;

    /// A source and a destination with this proxy between them.
    fn pair(connection: usize, way: Way, at: usize, harm: Harm) -> (TcpStream, Proxy, TcpStream) {
        let target = TcpListener::bind("127.0.0.1:0").unwrap();
        let plan = Plan { connection, way, at, harm };
        let proxy = Proxy::start(target.local_addr().unwrap().port(), plan);
        let source = TcpStream::connect(proxy.port.address).unwrap();
        (source, proxy, target.accept().unwrap().0)
    }

    /// What comes of `ping` and of `pong` back, each read to its end.
    fn passed(connection: usize, way: Way, at: usize, harm: Harm) -> [Vec<u8>; 2] {
        let (source, proxy, destination) = pair(connection, way, at, harm);
        for (mut writer, text) in [(&source, b"ping"), (&destination, b"pong")] {
            // A connection that was cut takes nothing.
            let _ = writer.write_all(text);
            let _ = writer.shutdown(Shutdown::Write);
        }
        let read = [&destination, &source].map(|mut reader| {
            let mut read = Vec::new();
            let _ = reader.read_to_end(&mut read);
            read
        });
        assert_eq!(proxy.done(), connection == 0);
        read
    }

    #[test]
    fn one_byte_of_one_way_is_harmed() {
        let both = |ping: &[u8], pong: &[u8]| [ping.to_vec(), pong.to_vec()];
        assert_eq!(passed(1, Way::ToSource, 1, Harm::Cut), both(b"ping", b"pong"), "of another connection");
        assert_eq!(passed(0, Way::ToDestination, 1, Harm::Flip(0)), both(b"phng", b"pong"));
        assert_eq!(passed(0, Way::ToSource, 3, Harm::Flip(0)), both(b"ping", b"ponf"));
        let [cut, _] = passed(0, Way::ToDestination, 2, Harm::Cut);
        assert!(b"pi".starts_with(&cut), "{cut:?}");
    }

    #[test]
    fn what_is_held_back_leaves_the_connection_open() {
        let (mut source, proxy, mut destination) = pair(0, Way::ToSource, 2, Harm::Stall);
        destination.write_all(b"pong").unwrap();
        proxy.wait_done();
        let mut read = [0; 2];
        source.read_exact(&mut read).unwrap();
        assert_eq!(read, *b"po");
        source.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert_eq!(source.read(&mut read).map_err(|e| e.kind()), Err(std::io::ErrorKind::WouldBlock));
    }

    #[test]
    fn a_port_counts_its_callers_and_lets_nobody_in_once_closed() {
        let (said, heard) = std::sync::mpsc::channel();
        let port = Port::open(move |number, _| said.send(number).unwrap());
        for number in 0..3 {
            let _caller = TcpStream::connect(port.address).unwrap();
            assert_eq!(heard.recv_timeout(PATIENCE), Ok(number));
        }
        port.close();
        // The thread that listens is over, and with it what it had of the channel.
        assert_eq!(heard.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected));
        wait_until("nobody listens", PATIENCE, || TcpStream::connect(port.address).is_err());
    }
}
