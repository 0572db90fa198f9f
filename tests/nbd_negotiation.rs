//! The handshake of the NBD server, option by option, and what it does with garbage.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod nbd_support;

use std::time::Duration;

use nbd_support::{IHAVEOPT, VOLUME_BYTES, go_data, meta_query, run, run_with};
use sds::export::nbd::NbdConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const UNSUP: u32 = 1;
const POLICY: u32 = 2;
const INVALID: u32 = 3;
const UNKNOWN: u32 = 6;
const SHUTDOWN: u32 = 7;
const TOO_BIG: u32 = 9;

#[test]
fn export_name_with_and_without_zeroes() {
    run(|world| async move {
        for (flags, zeroes) in [(1, 124), (3, 0), (0, 124), (2, 0)] {
            let (mut client, _) = world.connect_raw();
            client.greet(flags).await;
            client.send_option(1, b"vol0").await;
            assert_eq!(client.stream.read_u64().await.unwrap(), VOLUME_BYTES);
            // HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, CAN_MULTI_CONN, CACHE, FAST_ZERO; no DF.
            assert_eq!(client.stream.read_u16().await.unwrap(), 0b1101_0110_1101);
            let mut padding = vec![1; zeroes];
            client.stream.read_exact(&mut padding).await.unwrap();
            assert!(padding.iter().all(|&byte| byte == 0));
            assert_eq!(client.write(4096, b"hello").await, 0);
            assert_eq!(client.read(4096, 5).await, b"hello");
        }
    });
}

#[test]
fn export_name_that_cannot_be_served_closes() {
    run(|world| async move {
        let long = vec![b'a'; 70_000];
        for name in [&b"nope"[..], b"", b"\xff", &long] {
            let mut client = world.connect().await;
            client.send_option(1, name).await;
            assert_eq!(client.closed().await, b"");
        }
        assert_eq!(world.metrics().handshakes_failed.get(), 4);
    });
}

#[test]
fn go_and_info_describe_the_export() {
    run(|world| async move {
        let mut client = world.connect().await;
        client.structured_reply().await;
        let replies = client.option(6, &go_data("vol0", &[3, 1, 99])).await;
        let infos: Vec<_> = replies.iter().filter(|r| r.kind == 3).map(|r| &r.data[..]).collect();
        let mut export = vec![0, 0];
        export.extend(VOLUME_BYTES.to_be_bytes());
        export.extend(0b1101_1110_1101_u16.to_be_bytes());
        assert_eq!(infos[0], export);
        assert_eq!(infos[1], [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
        assert_eq!(infos[2], b"\x00\x01vol0");
        assert_eq!(replies.last().unwrap().kind, 1);
        world.target.set_read_only(true);
        // HAS_FLAGS, READ_ONLY, FLUSH, FUA, DF, CAN_MULTI_CONN, CACHE.
        assert_eq!(client.go("vol0").await, (VOLUME_BYTES, 0b0101_1000_1111));
    });
}

#[test]
fn go_refuses_what_is_wrong_and_goes_on() {
    run(|world| async move {
        let mut client = world.connect().await;
        let (error, text) = client.option_error(7, &go_data("pool/nope", &[])).await;
        assert_eq!(error, UNKNOWN);
        assert!(text.contains("\"pool/nope\""), "{text}");
        assert_eq!(client.option_error(7, &go_data("", &[])).await.0, UNKNOWN);
        assert_eq!(client.option_error(7, &go_data("a\0b", &[])).await.0, INVALID);
        assert_eq!(client.option_error(7, &go_data(&"a".repeat(4097), &[])).await.0, TOO_BIG);
        for malformed in [
            &b""[..],
            b"\x00",
            b"\x00\x00\x00\x05vol0\x00\x00",
            b"\xff\xff\xff\xffvol0\x00\x00",
            b"\x00\x00\x00\x04vol0\x00",
            b"\x00\x00\x00\x04vol0\x00\x02\x00\x01",
            b"\x00\x00\x00\x04vol0\x00\x00\x00",
        ] {
            assert_eq!(client.option_error(7, malformed).await.0, INVALID, "{malformed:?}");
        }
        assert_eq!(client.go("vol0").await.0, VOLUME_BYTES);
    });
}

#[test]
fn list_names_all_exports() {
    run(|world| async move {
        world.directory.add("archive/2024", 4096);
        let mut client = world.connect().await;
        let replies = client.option(3, &[]).await;
        let names: Vec<_> = replies.iter().filter(|r| r.kind == 2).map(|r| &r.data[..]).collect();
        assert_eq!(names, [&b"\0\0\0\x0carchive/2024"[..], b"\0\0\0\x04vol0"]);
        assert_eq!(client.option_error(3, b"x").await.0, INVALID);
    });
}

#[test]
fn metadata_contexts() {
    run(|world| async move {
        let mut client = world.connect().await;
        let early = client.option_error(10, &meta_query("vol0", &["base:allocation"])).await;
        assert_eq!(early.0, INVALID);
        client.structured_reply().await;
        // Listing: no query and the wildcard find it, others do not.
        for (queries, found) in [
            (&[][..], true),
            (&["base:"], true),
            (&["base:allocation"], true),
            (&["qemu:dirty", "x-nothing:"], false),
            (&["base:other"], false),
        ] {
            let replies = client.option(9, &meta_query("vol0", queries)).await;
            assert_eq!(replies.len(), if found { 2 } else { 1 }, "{queries:?}");
            assert_eq!(replies.last().unwrap().kind, 1);
        }
        // Selecting: only the full name does.
        for queries in [&[][..], &["base:"], &["x-other:a"]] {
            assert_eq!(client.set_meta_context("vol0", queries).await.len(), 1, "{queries:?}");
        }
        let replies = client.set_meta_context("vol0", &["x-a:b", "base:allocation"]).await;
        assert_eq!((replies[0].kind, &replies[0].data[..]), (4, &b"\0\0\0\x01base:allocation"[..]));
        assert_eq!(client.option_error(10, &meta_query("nope", &["base:"])).await.0, UNKNOWN);
        let cut = &meta_query("vol0", &["base:allocation"])[..20];
        assert_eq!(client.option_error(10, cut).await.0, INVALID);
        // A failed selection forgot the one before.
        client.go("vol0").await;
        assert_eq!(client.call(7, 0, 0, 4096).await, 22);
    });
}

#[test]
fn a_context_counts_only_for_its_export() {
    run(|world| async move {
        world.directory.add("other", 4096);
        let mut client = world.connect().await;
        client.structured_reply().await;
        client.set_meta_context("other", &["base:allocation"]).await;
        client.go("vol0").await;
        assert_eq!(client.call(7, 0, 0, 4096).await, 22);
    });
}

#[test]
fn abort_is_acknowledged() {
    run(|world| async move {
        let mut client = world.connect().await;
        let replies = client.option(2, b"ignored").await;
        assert_eq!(replies[0].kind, 1);
        assert_eq!(client.closed().await, b"");
        assert_eq!(world.metrics().handshakes_failed.get(), 0);
    });
}

#[test]
fn unknown_and_oversized_options_are_refused() {
    run(|world| async move {
        let mut client = world.connect().await;
        for option in [0, 4, 11, 12, u32::MAX] {
            assert_eq!(client.option_error(option, b"data").await.0, UNSUP);
        }
        assert_eq!(client.option_error(8, b"data").await.0, INVALID);
        assert_eq!(client.option_error(5, b"").await.0, POLICY, "TLS is off");
        assert_eq!(client.option_error(6, &vec![0; 100_000]).await.0, TOO_BIG);
        assert_eq!(client.go("vol0").await.0, VOLUME_BYTES);
    });
}

#[test]
fn garbage_closes() {
    run(|world| async move {
        let mut huge = IHAVEOPT.to_be_bytes().to_vec();
        huge.extend([0, 0, 0, 6, 0xff, 0xff, 0xff, 0xff]);
        for (flags, bytes) in [
            (4, &b""[..]),
            (u32::MAX, b""),
            (3, b"GET / HTTP/1.1\r\n\r\n"),
            (3, &huge),
            // Without fixed newstyle there is only EXPORT_NAME.
            (0, b"IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00"),
        ] {
            let (mut client, _) = world.connect_raw();
            client.greet(flags).await;
            client.stream.write_all(bytes).await.unwrap();
            assert_eq!(client.closed().await, b"", "{flags} {bytes:?}");
        }
        assert_eq!(world.metrics().handshakes_failed.get(), 5);
        assert_eq!(world.metrics().connections.get(), 0);
    });
}

#[test]
fn endless_options_end() {
    run(|world| async move {
        let mut client = world.connect().await;
        for _ in 0..1024 {
            client.option(3, &[]).await;
        }
        assert_eq!(client.closed().await, b"");
    });
}

#[test]
fn half_open_connections_are_reaped() {
    run(|world| async move {
        let (mut silent, _) = world.connect_raw();
        let mut slow = world.connect().await;
        slow.stream.write_all(&IHAVEOPT.to_be_bytes()).await.unwrap();
        let started = tokio::time::Instant::now();
        assert_eq!(silent.closed().await, b"NBDMAGICIHAVEOPT\x00\x03");
        assert_eq!(slow.closed().await, b"");
        assert_eq!(started.elapsed().as_secs(), 30);
        assert_eq!(world.metrics().handshakes_failed.get(), 2);
    });
}

#[test]
fn too_many_connections_are_told() {
    let config = NbdConfig { connections_max: 2, ..NbdConfig::default() };
    run_with(config, |world| async move {
        let mut first = world.attach().await;
        let second = world.attach().await;
        let mut third = world.connect().await;
        let (error, text) = third.option_error(7, &go_data("vol0", &[])).await;
        assert_eq!(error, POLICY);
        assert!(text.contains("limit of 2 connections"), "{text}");
        assert_eq!(first.write(0, b"undisturbed").await, 0);
        drop((second, third));
        tokio::time::sleep(Duration::from_secs(5)).await;
        let mut late = world.attach().await;
        assert_eq!(late.read(0, 11).await, b"undisturbed");
        assert_eq!(world.metrics().connections_refused.get(), 1);
    });
}

#[test]
fn a_stopping_server_refuses_options() {
    run(|world| async move {
        let mut client = world.connect().await;
        world.stop.send_replace(true);
        assert_eq!(client.option_error(7, &go_data("vol0", &[])).await.0, SHUTDOWN);
        let started = tokio::time::Instant::now();
        assert_eq!(client.closed().await, b"");
        assert!(started.elapsed() < Duration::from_secs(2));
    });
}
