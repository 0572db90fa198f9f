//! Questions to a node: answered, refused, too long, never answered.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::Instant;

use super::{Net, until_up};
use crate::limits::RPC_ASK_BYTES_MAX;
use crate::rpc::{AskError, RpcConfig};
use crate::sim::simulate;

const PATIENCE: Duration = Duration::from_secs(7);

#[test]
fn questions_are_answered() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        let peer = net.peer(RpcConfig::default());
        let ask = |text: &'static str| peer.ask(Bytes::from_static(text.as_bytes()), PATIENCE);
        assert_eq!(ask("live").await.unwrap(), "evil");
        assert_eq!(ask("").await.unwrap(), "");
        assert_eq!(ask("why?").await, Err(AskError::Refused("because".into())));
        assert_eq!(ask("much?").await.unwrap().len(), RPC_ASK_BYTES_MAX);
        let told = ask("too much?").await.unwrap_err().to_string();
        assert_eq!(told, "an answer of 4194305 bytes, at most 4194304");
        let long = peer.ask(vec![1; RPC_ASK_BYTES_MAX].into(), PATIENCE).await.unwrap();
        assert_eq!(long.len(), RPC_ASK_BYTES_MAX);
        let told = peer.ask(vec![1; RPC_ASK_BYTES_MAX + 1].into(), PATIENCE).await.unwrap_err();
        assert!(told.to_string().contains("more bytes than a message holds"), "{told}");
        let answers = join_all((0..100).map(|_| ask("much?"))).await;
        assert!(answers.iter().all(Result::is_ok), "however many there are");
        assert!(peer.is_idle());
        assert_eq!(net.server.metrics().violations.get(), 0);
    });
}

#[test]
fn who_asks_waits_as_long_as_he_wants() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        let peer = net.peer(RpcConfig::default());
        until_up(&peer).await;
        let began = Instant::now();
        let never = Bytes::from_static(b"for ever?");
        assert_eq!(peer.ask(never.clone(), PATIENCE).await, Err(AskError::Unreachable));
        assert!((7000..7200).contains(&began.elapsed().as_millis()));
        let lost = peer.ask(never, PATIENCE);
        tokio::time::sleep(Duration::from_millis(100)).await;
        net.pipes.borrow()[0].cut();
        assert_eq!(lost.await, Err(AskError::Unreachable));
        assert_eq!(peer.ask(Bytes::from_static(b"on"), PATIENCE).await.unwrap(), "no");
    });
}
