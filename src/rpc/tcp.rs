//! TCP: what connects, and what is set on every socket.

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use super::client::Dial;
use crate::shard::LocalFuture;

/// Idle time before a keepalive probe, time between probes, and probes before the end.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(5), Duration::from_secs(2), 3);
/// Time after which data that is not acknowledged ends the connection.
const USER_TIMEOUT: Duration = Duration::from_secs(10);
/// Unsent bytes in the kernel beyond which a socket takes no more: what is urgent waits for those.
const UNSENT_BYTES: u32 = 256 << 10;

/// Sets the options of a connection between nodes.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    let (idle, interval, probes) = KEEPALIVE;
    let keepalive =
        TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes);
    let socket = SockRef::from(stream);
    stream.set_nodelay(true)?;
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.set_tcp_notsent_lowat(UNSENT_BYTES)
}

/// Connects to an address, which is resolved anew each time.
#[derive(Debug, Clone)]
pub struct TcpDial {
    /// `host:port`.
    pub address: String,
}

impl Dial for TcpDial {
    type Stream = TcpStream;

    fn dial(&self) -> LocalFuture<'_, io::Result<TcpStream>> {
        Box::pin(async move {
            let stream = TcpStream::connect(&self.address).await?;
            prepare(&stream)?;
            Ok(stream)
        })
    }
}
