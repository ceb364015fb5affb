//! A TCP proxy between a real source and a real destination that does one harm at a chosen byte.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What is done to the chosen byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// This bit of it is flipped.
    Flip(u8),
    /// The connection ends before it.
    Cut,
    /// It and all that follows is held back; the connection stays.
    Stall,
}

/// Which way the harmed bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToDestination,
    ToSource,
}

/// One harm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// The connection, in the order in which they are opened: 0 control, n + 1 stream n.
    pub(crate) connection: usize,
    pub(crate) way: Way,
    /// The byte's offset in that direction of the connection.
    pub(crate) at: usize,
    pub(crate) harm: Harm,
}

pub(crate) struct Proxy {
    port: u16,
    done: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Proxy {
    /// Listens on a port of its own and passes everything to `target`, except for what `plan` says.
    pub(crate) fn start(target: u16, plan: Plan) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (done, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (happened, stopping) = (done.clone(), stop.clone());
        std::thread::spawn(move || {
            for index in 0.. {
                let Ok((client, _)) = listener.accept() else { return };
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                // A destination that is gone: so is the connection.
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
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
            }
        });
        Self { port, done, stop }
    }

    pub(crate) fn uri(&self) -> String {
        format!("tcp:127.0.0.1:{}", self.port)
    }

    /// Whether the harm was done.
    pub(crate) fn done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Waits until the harm was done.
    #[track_caller]
    pub(crate) fn wait_done(&self) {
        let deadline = Instant::now() + super::PATIENCE;
        while !self.done() {
            assert!(Instant::now() < deadline, "the chosen byte never came by");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
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
            let sent = to.write_all(&buffer[..pass]);
            done.store(true, Ordering::Release);
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
