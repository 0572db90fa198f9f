//! The transmission phase of the NBD server: every command, every error, concurrency, bounds and
//! what it does with clients that break off or send garbage.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod nbd_support;

use std::time::Duration;

use nbd_support::{Reply, VOLUME_BYTES, World, pattern, request, run, run_with};
use sds::export::TargetError;
use sds::export::nbd::NbdConfig;
use sds::export::nbd::wire::{Command, Errno};
use sds::limits::CONNECTION_REQUESTS_MAX;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::yield_now;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const WRITE_ZEROES: u16 = 6;
const BLOCK_STATUS: u16 = 7;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;
const MIB: usize = 1 << 20;

#[test]
fn data_of_all_sizes_and_alignments() {
    run(|world| async move {
        let mut structured = world.attach().await;
        let mut simple = world.attach_simple().await;
        let mut seed = 0;
        for offset in [0, 1, 511, 4095, 4096, 12_345, 1 << 20] {
            for len in [1, 511, 4096, 5000, 65_536, 131_045, 300_000] {
                seed += 1;
                let data = pattern(seed, len);
                let len = u32::try_from(len).unwrap();
                let (writer, reader) = match seed % 2 {
                    0 => (&mut structured, &mut simple),
                    _ => (&mut simple, &mut structured),
                };
                assert_eq!(writer.write_flags(FUA, offset, &data).await, 0);
                assert_eq!(reader.read(offset, len).await, data, "{offset} {len}");
            }
        }
    });
}

#[test]
fn the_largest_request_is_split_unless_told_otherwise() {
    run(|world| async move {
        let mut client = world.attach().await;
        let data = pattern(1, 32 * MIB);
        let len = u32::try_from(data.len()).unwrap();
        assert_eq!(client.write(3, &data).await, 0);
        let (chunks, read) = client.read_flags(0, 3, len).await;
        assert!(chunks > 1 && read == data, "{chunks} chunks");
        let (chunks, read) = client.read_flags(DF, 3, len).await;
        assert!(chunks == 1 && read == data, "{chunks} chunks");
        assert!(world.attach_simple().await.read(3, len).await == data);
        // One byte more is refused, and the payload of the write skipped.
        assert_eq!(client.call(READ, 0, 0, len + 1).await, EOVERFLOW);
        assert_eq!(world.attach_simple().await.call(READ, 0, 0, len + 1).await, EINVAL);
        assert_eq!(client.write(0, &[data, vec![1]].concat()).await, EINVAL);
        assert_eq!(client.read(0, 3).await, [0, 0, 0]);
    });
}

#[test]
fn an_absurd_write_closes() {
    run(|world| async move {
        let mut client = world.attach().await;
        client.send(WRITE, 0, 1, 0, u32::MAX).await;
        assert_eq!(client.closed().await, b"");
        assert_eq!(world.metrics().protocol_errors.get(), 1);
    });
}

#[test]
fn zeroes_trims_and_what_block_status_says() {
    run(|world| async move {
        let mut client = world.attach().await;
        let (data, hole) = (0, 3);
        assert_eq!(client.block_status(0, 0, 1 << 20).await, [(1 << 20, hole)]);
        assert_eq!(client.write(0, &pattern(1, 65_536)).await, 0);
        assert_eq!(
            client.block_status(0, 0, 1 << 20).await,
            [(65_536, data), ((1 << 20) - 65_536, hole)]
        );
        assert_eq!(client.call(TRIM, FUA, 4096, 8192).await, 0);
        assert_eq!(client.call(WRITE_ZEROES, 0, 16_384, 4096).await, 0);
        assert_eq!(client.call(WRITE_ZEROES, NO_HOLE | FUA, 24_576, 4096).await, 0);
        assert_eq!(client.call(WRITE_ZEROES, FAST_ZERO, 32_768, 4096).await, 0);
        assert_eq!(client.call(WRITE_ZEROES, FAST_ZERO | NO_HOLE, 0, 4096).await, ENOTSUP);
        assert_eq!(
            client.block_status(0, 0, 40_960).await,
            [
                (4096, data),
                (8192, hole),
                (4096, data),
                (4096, hole),
                (12_288, data),
                (4096, hole),
                (4096, data)
            ]
        );
        assert_eq!(client.block_status(REQ_ONE, 100, 40_000).await, [(3996, data)]);
        assert_eq!(client.read(4096, 8192).await, [0; 8192]);
        assert_eq!(client.read(24_576, 4096).await, [0; 4096]);
        // A trim takes whole blocks only, zeroes are exact.
        assert_eq!(client.call(TRIM, 0, 40_961, 8190).await, 0);
        let mut expected = pattern(1, 65_536)[40_960..49_152].to_vec();
        assert_eq!(client.read(40_960, 8192).await, expected);
        assert_eq!(client.call(WRITE_ZEROES, 0, 40_961, 8190).await, 0);
        expected[1..8191].fill(0);
        assert_eq!(client.read(40_960, 8192).await, expected);
        // Zeroes may be longer than a payload.
        assert_eq!(client.call(WRITE_ZEROES, 0, 0, 64 << 20).await, 0);
        assert_eq!(client.block_status(0, 0, 64 << 20).await, [(64 << 20, hole)]);
    });
}

#[test]
fn flush_and_cache() {
    run(|world| async move {
        let mut client = world.attach().await;
        assert_eq!(client.call(FLUSH, 0, 0, 0).await, 0);
        assert_eq!(client.call(FLUSH, FUA, 0, 0).await, 0);
        assert_eq!(client.call(FLUSH, 0, 0, 1).await, EINVAL);
        assert_eq!(world.target.flushes(), 2);
        assert_eq!(client.call(CACHE, 0, 0, 4096).await, 0);
        assert_eq!(client.call(CACHE, 0, VOLUME_BYTES, 1).await, EINVAL);
    });
}

#[test]
fn beyond_the_end() {
    run(|world| async move {
        for mut client in [world.attach().await, world.attach_simple().await] {
            for (offset, len) in
                [(VOLUME_BYTES, 1), (VOLUME_BYTES - 1, 2), (u64::MAX, 2), (u64::MAX - 4095, 4096)]
            {
                for command in [READ, TRIM, CACHE] {
                    assert_eq!(client.call(command, 0, offset, len).await, EINVAL);
                }
                assert_eq!(client.call(WRITE_ZEROES, 0, offset, len).await, ENOSPC);
                let data = vec![1; usize::try_from(len).unwrap()];
                assert_eq!(client.write(offset, &data).await, ENOSPC);
            }
            for command in [READ, WRITE, TRIM, CACHE, WRITE_ZEROES] {
                assert_eq!(client.call(command, 0, 0, 0).await, EINVAL, "empty range");
            }
            assert_eq!(client.write(VOLUME_BYTES - 1, b"x").await, 0);
        }
        let mut client = world.attach().await;
        assert_eq!(client.call(BLOCK_STATUS, 0, VOLUME_BYTES, 1).await, EINVAL);
        // A volume may grow while it is attached.
        world.target.set_size(VOLUME_BYTES + 4096);
        assert_eq!(client.write(VOLUME_BYTES, b"grown").await, 0);
    });
}

#[test]
fn flags_are_checked_by_command() {
    run(|world| async move {
        let mut structured = world.attach().await;
        for command in [READ, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS] {
            for flag in (0..16).map(|bit| 1_u16 << bit) {
                let valid = flag == FUA
                    || matches!((command, flag), (READ, DF) | (BLOCK_STATUS, REQ_ONE))
                    || (command == WRITE_ZEROES && matches!(flag, NO_HOLE | FAST_ZERO));
                if !valid {
                    let error = structured.call(command, flag, 0, 4096).await;
                    assert_eq!(error, EINVAL, "{command} {flag}");
                }
            }
        }
        assert_eq!(structured.write_flags(NO_HOLE, 0, b"skipped").await, EINVAL);
        assert_eq!(structured.read(0, 7).await, [0; 7]);
        let mut simple = world.attach_simple().await;
        assert_eq!(simple.call(READ, DF, 0, 4096).await, EINVAL, "not negotiated");
        assert_eq!(simple.call(BLOCK_STATUS, 0, 0, 4096).await, EINVAL, "not negotiated");
        for command in [8, 9, u16::MAX] {
            assert_eq!(simple.call(command, 0, 0, 0).await, EINVAL);
        }
    });
}

#[test]
fn errors_of_the_volume() {
    run(|world| async move {
        let mut client = world.attach().await;
        assert_eq!(client.write(0, &[1; 4096]).await, 0);
        world.target.set_blocks_max(1);
        assert_eq!(client.write(8192, b"full").await, ENOSPC);
        assert_eq!(client.write(0, b"overwritten").await, 0);
        world.target.set_read_only(true);
        assert_eq!(client.write(0, b"read-only").await, EPERM);
        assert_eq!(client.call(TRIM, 0, 0, 4096).await, EPERM);
        assert_eq!(client.call(WRITE_ZEROES, 0, 0, 4096).await, EPERM);
        assert_eq!(client.read(0, 11).await, b"overwritten");
        world.target.set_read_only(false);
        for (failure, errno) in [
            (TargetError::Io("disk 3 is gone".to_owned()), EIO),
            (TargetError::Stopped, ESHUTDOWN),
            (TargetError::OutOfRange, EINVAL),
        ] {
            world.target.set_failure(Some(failure));
            assert_eq!(client.call(READ, 0, 0, 4096).await, errno);
        }
        world.target.set_failure(Some(TargetError::Io("disk 3 is gone".to_owned())));
        assert_eq!(client.write(0, b"x").await, EIO);
        assert_eq!(client.call(FLUSH, 0, 0, 0).await, EIO);
        client.send(READ, 0, 5, 0, 4096).await;
        let Reply::Chunk(5, 1, 0x8001, data) = client.reply().await else { panic!("no error") };
        assert_eq!(&data[6..], b"I/O error: disk 3 is gone", "the text reaches the client");
        world.target.set_failure(None);
        assert_eq!(client.read(0, 11).await, b"overwritten");
        assert_eq!(world.metrics().errors(Errno::Io), 4);
        assert_eq!(world.metrics().command(Command::Flush).requests.get(), 1);
    });
}

/// Requests run at the same time, and a reply does not wait for an earlier request.
#[test]
fn replies_overtake_each_other() {
    run(|world| async move {
        let mut client = world.attach().await;
        world.target.hold(true);
        for cookie in 0..32 {
            client.send(WRITE, 0, cookie, cookie * 4096, 4096).await;
            client.stream.write_all(&[9; 4096]).await.unwrap();
        }
        client.send(CACHE, 0, 100, 0, 4096).await;
        assert_eq!(client.errno(100).await, 0);
        assert_eq!(world.target.running(), 32);
        assert_eq!(world.metrics().requests_running.get(), 32);
        world.target.hold(false);
        let mut cookies = Vec::new();
        for _ in 0..32 {
            let Reply::Simple(cookie, 0) = client.reply().await else { panic!("no success") };
            cookies.push(cookie);
        }
        cookies.sort_unstable();
        assert_eq!(cookies, (0..32).collect::<Vec<_>>());
        assert_eq!(world.metrics().command(Command::Write).bytes.get(), 32 * 4096);
    });
}

/// A connection that sends without end is not read beyond its permits.
#[test]
fn requests_are_bounded() {
    run(|world| async move {
        let mut client = world.attach().await;
        world.target.hold(true);
        let all = 4 * CONNECTION_REQUESTS_MAX;
        for cookie in 0..all as u64 {
            client.send(READ, 0, cookie, 0, 512).await;
        }
        for _ in 0..100 {
            yield_now().await;
        }
        assert_eq!(world.target.running(), CONNECTION_REQUESTS_MAX);
        world.target.hold(false);
        for _ in 0..all {
            assert!(matches!(client.reply().await, Reply::Chunk(_, 1, 1, _)));
        }
        assert_eq!(world.target.running_max(), CONNECTION_REQUESTS_MAX);
    });
}

/// A client that asks for data and does not take it holds a bounded amount of memory, and its
/// next requests are not read.
#[test]
fn a_client_that_does_not_read_is_bounded() {
    run(|world| async move {
        let mut client = world.attach().await;
        for cookie in 0..12 {
            client.send(READ, 0, cookie, 0, 16 << 20).await;
        }
        for _ in 0..1000 {
            yield_now().await;
        }
        let read = world.metrics().command(Command::Read).requests.get();
        assert!(read <= 4, "64 MiB are under way at most, not {read} times 16");
        let mut other = world.attach().await;
        assert_eq!(other.write(0, b"undisturbed").await, 0);
        let mut total = 0;
        while total < 12 * (16 << 20) {
            let Reply::Chunk(_, _, 1, data) = client.reply().await else { panic!("no data") };
            total += data.len() - 8;
        }
    });
}

/// Splitting the stream of requests at any place changes nothing.
#[test]
fn requests_arrive_in_pieces() {
    run(|world| async move {
        let mut stream = Vec::new();
        for (cookie, len) in [(1_u64, 1_usize), (2, 100), (3, 40_000), (4, 4096)] {
            let offset = cookie << 20;
            stream.extend(request(WRITE, 0, cookie, offset, u32::try_from(len).unwrap()));
            stream.extend(pattern(cookie, len));
        }
        stream.extend(request(WRITE, 0, 5, VOLUME_BYTES, 5000));
        stream.extend(pattern(5, 5000));
        stream.extend(request(FLUSH, 0, 6, 0, 0));
        for piece in [1, 7, 28, 29, 1000, 39_999, 100_000] {
            let mut client = world.attach_simple().await;
            for bytes in stream.chunks(piece) {
                client.stream.write_all(bytes).await.unwrap();
                yield_now().await;
            }
            let mut errors = Vec::new();
            for _ in 0..6 {
                let Reply::Simple(cookie, error) = client.reply().await else { unreachable!() };
                errors.push((cookie, error));
            }
            errors.sort_unstable();
            assert_eq!(errors, [(1, 0), (2, 0), (3, 0), (4, 0), (5, ENOSPC), (6, 0)]);
            assert_eq!(client.read(3 << 20, 40_000).await, pattern(3, 40_000));
        }
    });
}

#[test]
fn goodbye_waits_for_running_requests() {
    run(|world| async move {
        let mut client = world.attach_simple().await;
        world.target.hold(true);
        client.send(WRITE, 0, 7, 0, 4).await;
        client.stream.write_all(b"last").await.unwrap();
        client.send(DISC, 0, 8, 0, 0).await;
        client.send(READ, 0, 9, 0, 4096).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        world.target.hold(false);
        assert_eq!(client.errno(7).await, 0);
        assert_eq!(client.closed().await, b"", "what comes after goodbye is not answered");
        assert_eq!(world.attach().await.read(0, 4).await, b"last");
    });
}

#[test]
fn a_half_closed_client_gets_its_replies() {
    run(|world| async move {
        let mut client = world.attach_simple().await;
        client.send(READ, 0, 7, 0, 4096).await;
        client.stream.shutdown().await.unwrap();
        assert_eq!(client.errno(7).await, 0);
        assert_eq!(client.closed().await.len(), 4096);
        assert_eq!(world.metrics().protocol_errors.get(), 0);
    });
}

#[test]
fn a_client_that_breaks_off_leaves_nothing() {
    run(|world| async move {
        for sent in [1, 27, 28, 29, 4000, 200_000] {
            let mut client = world.attach().await;
            world.target.hold(true);
            client.send(WRITE, 0, 1, 8192, 4).await;
            client.stream.write_all(b"done").await.unwrap();
            let mut bytes = request(WRITE, 0, 2, 0, 1 << 20).to_vec();
            bytes.resize(28 + (1 << 20), 7);
            client.stream.write_all(&bytes[..sent]).await.unwrap();
            drop(client);
            world.target.hold(false);
            tokio::time::sleep(Duration::from_secs(3)).await;
            assert_eq!(world.metrics().connections.get(), 0, "{sent}");
            assert_eq!(world.target.running(), 0);
        }
        let mut client = world.attach().await;
        assert_eq!(client.read(0, 4096).await, [0; 4096], "half a write is no write");
        assert_eq!(client.read(8192, 4).await, b"done");
    });
}

#[test]
fn garbage_closes_and_disturbs_nobody() {
    run(|world| async move {
        let mut good = world.attach().await;
        assert_eq!(good.write(0, b"good").await, 0);
        for garbage in [&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], &[0; 64], &[0xff; 4096]]
        {
            let mut bad = world.attach().await;
            bad.send(READ, 0, 1, 0, 4).await;
            bad.stream.write_all(garbage).await.unwrap();
            let Reply::Chunk(1, 1, 1, _) = bad.reply().await else { panic!("no data") };
            assert_eq!(bad.closed().await, b"");
            assert_eq!(good.read(0, 4).await, b"good");
        }
        assert_eq!(world.metrics().protocol_errors.get(), 3);
    });
}

#[test]
fn a_stalled_request_ends_the_connection_and_an_idle_one_does_not() {
    run(|world| async move {
        let mut idle = world.attach().await;
        let mut stalled = world.attach().await;
        let mut slow = world.attach().await;
        let started = tokio::time::Instant::now();
        stalled.send(WRITE, 0, 1, 0, 4096).await;
        slow.send(WRITE, 0, 2, 0, 10).await;
        for _ in 0..10 {
            slow.stream.write_all(b"x").await.unwrap();
            tokio::time::sleep(Duration::from_mins(1)).await;
        }
        assert_eq!(slow.errno(2).await, 0);
        assert_eq!(stalled.closed().await, b"");
        tokio::time::sleep(Duration::from_secs(1000)).await;
        assert_eq!(idle.read(0, 2).await, b"xx");
        assert!(started.elapsed().as_secs() >= 1600);
        assert_eq!(world.metrics().protocol_errors.get(), 1);
    });
}

/// A client that never takes its replies keeps its connection (it may be a paused guest) until
/// others wait for the memory.
#[test]
fn memory_is_taken_back_from_who_does_not_read() {
    let config = NbdConfig { memory_bytes_max: 32 << 20, ..NbdConfig::default() };
    run_with(config, |world| async move {
        let mut paused = world.attach().await;
        paused.send(READ, 0, 1, 0, 32 << 20).await;
        tokio::time::sleep(Duration::from_secs(1000)).await;
        assert_eq!(world.metrics().connections.get(), 1);
        let mut small = world.attach().await;
        assert_eq!(small.write(0, &pattern(1, 65_536)).await, 0);
        let mut large = world.attach().await;
        let started = tokio::time::Instant::now();
        assert_eq!(large.write(0, &pattern(2, MIB)).await, 0);
        assert!(started.elapsed() <= Duration::from_mins(4));
        assert_eq!(world.metrics().protocol_errors.get(), 1);
        assert_eq!(small.read(0, 1000).await, pattern(2, 1000));
    });
}

#[test]
fn stopping_finishes_what_runs() {
    run(|world| async move {
        let mut busy = world.attach_simple().await;
        let mut idle = world.attach_simple().await;
        world.target.hold(true);
        busy.send(WRITE, 0, 1, 0, 4).await;
        busy.stream.write_all(b"last").await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
        world.stop.send_replace(true);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(idle.closed().await, b"");
        busy.send(READ, 0, 2, 0, 4096).await;
        assert_eq!(busy.errno(2).await, ESHUTDOWN);
        world.target.hold(false);
        assert_eq!(busy.errno(1).await, 0);
        assert_eq!(busy.closed().await, b"");
    });
}

#[test]
fn stopping_does_not_wait_for_ever() {
    run(|world| async move {
        let mut busy = world.attach_simple().await;
        world.target.hold(true);
        busy.send(READ, 0, 1, 0, 4096).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
        let started = tokio::time::Instant::now();
        world.stop.send_replace(true);
        assert_eq!(busy.closed().await, b"");
        assert_eq!(started.elapsed().as_secs(), 10);
        assert_eq!(world.target.running(), 0);
    });
}

/// What one connection was told is durable and visible, every other sees.
#[test]
fn connections_share_the_volume() {
    run(|world: World| async move {
        let mut clients = Vec::new();
        for _ in 0..8 {
            clients.push(world.attach().await);
        }
        for writer in 0..8_usize {
            let data = pattern(writer as u64, 10_000);
            assert_eq!(clients[writer].write(5000, &data).await, 0);
            for reader in &mut clients {
                assert_eq!(reader.read(5000, 10_000).await, data);
            }
        }
        let mut unread = [0; 1];
        let more = clients[0].stream.read(&mut unread);
        assert!(tokio::time::timeout(Duration::from_secs(1), more).await.is_err());
    });
}
