//! An NBD client that sends given bytes to a server on memory and reads all it gets.

use std::rc::Rc;
use std::time::Duration;

use sds::export::memory::MemoryDirectory;
use sds::export::nbd::{NbdConfig, Server};
use sds::sim::simulate;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, split};
use tokio::sync::watch;

/// Size of the volume `v`, bytes.
pub const VOLUME_BYTES: u64 = 1 << 20;
/// The server is closed well before: every wait of its own is shorter.
const HANG: Duration = Duration::from_secs(600);

/// Sends `pieces` one after the other and closes; what the server answered. Panics if the server
/// does not end, or keeps a request.
pub fn talk(pieces: &[&[u8]]) -> Vec<u8> {
    simulate(async {
        let directory = Rc::new(MemoryDirectory::default());
        let target = directory.add("v", VOLUME_BYTES);
        let (_stop, stopped) = watch::channel(false);
        let server = Server::new(directory, NbdConfig::default(), stopped);
        let (ours, theirs) = duplex(64 << 10);
        let (mut input, mut output) = split(ours);
        let mut answer = Vec::new();
        let send = async {
            for piece in pieces {
                if output.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            let _closed = output.shutdown().await;
        };
        let receive = async {
            let _ended = input.read_to_end(&mut answer).await;
        };
        let all = async { tokio::join!(server.serve_stream(theirs, "fuzz"), send, receive) };
        tokio::time::timeout(HANG, all).await.expect("the server hangs");
        assert_eq!(target.running(), 0, "a request outlived its connection");
        assert_eq!(server.metrics().connections.get(), 0);
        assert_eq!(server.metrics().requests_running.get(), 0);
        answer
    })
}
