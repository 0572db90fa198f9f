//! Tests of the simulated device: its faults are what they claim to be.

use proptest::prelude::*;

use super::*;
use crate::disk::conformance::blocks;
use crate::sim::simulate;

fn device(seed: u64) -> SimDevice {
    SimDevice::new(Env::from_seed(seed), SimConfig { size_bytes: 1 << 20, ..Default::default() })
}

async fn write(device: &SimDevice, block: u64, byte: u8, durable: bool) -> Result<(), DeviceError> {
    device.write(block * BLOCK_BYTES, Rc::from([blocks(byte, 1)]), durable).await
}

async fn read(device: &SimDevice, block: u64) -> Result<Vec<u8>, DeviceError> {
    let buf = device.read(block * BLOCK_BYTES, AlignedBuf::new(BLOCK_SIZE)).await?;
    Ok(buf.to_vec())
}

fn full(byte: u8) -> Vec<u8> {
    vec![byte; BLOCK_SIZE]
}

#[test]
fn durable_or_flushed_writes_survive_a_power_cut_and_others_are_torn() {
    let mut torn = 0;
    for seed in 0..20 {
        simulate(async {
            let device = device(seed);
            write(&device, 0, 1, true).await.expect("written");
            write(&device, 1, 1, false).await.expect("written");
            device.flush().await.expect("flushed");
            write(&device, 1, 2, false).await.expect("written");
            write(&device, 2, 2, false).await.expect("written");
            write(&device, 3, 1, false).await.expect("written");
            write(&device, 3, 3, true).await.expect("written");
            let lost = device.write(4 * BLOCK_BYTES, Rc::from([blocks(5, 1)]), true);
            device.power_cut();
            assert_eq!(write(&device, 0, 9, true).await, Err(DeviceError::Gone));
            let late = tokio::time::timeout(Duration::from_secs(9), lost).await;
            assert!(late.is_err(), "what was in flight never completes");
            let device = device.reopen();
            assert_eq!(read(&device, 0).await, Ok(full(1)));
            assert_eq!(read(&device, 3).await, Ok(full(3)));
            for (block, old, new) in [(1, 1, 2), (2, 0, 2), (4, 0, 5)] {
                let data = read(&device, block).await.expect("reads");
                assert!(data.chunks(512).all(|s| s == &full(old)[..512] || s == &full(new)[..512]));
                torn += usize::from(data != full(old) && data != full(new));
            }
        });
    }
    assert!(torn > 10, "{torn} torn");
}

#[test]
fn a_flush_covers_only_what_completed_before_it() {
    let mut lost = 0;
    for seed in 0..20 {
        simulate(async {
            let device = device(seed);
            write(&device, 1, 1, false).await.expect("written");
            let flush = device.flush();
            write(&device, 1, 2, false).await.expect("written");
            flush.await.expect("flushed");
            device.power_cut();
            let data = device.peek(BLOCK_BYTES, BLOCK_SIZE);
            assert!(data.iter().all(|byte| *byte == 1 || *byte == 2), "the first write is durable");
            lost += usize::from(data.contains(&1));
        });
    }
    assert!(lost > 10, "the second one is not: {lost}");
}

#[test]
fn a_crash_keeps_what_had_completed() {
    simulate(async {
        let device = device(1);
        write(&device, 1, 1, false).await.expect("written");
        let dropped = device.write(2 * BLOCK_BYTES, Rc::from([blocks(5, 1)]), true);
        drop(dropped);
        let device = device.reopen();
        assert_eq!(read(&device, 1).await, Ok(full(1)));
        assert_eq!(device.fault_counts().crashes, 1);
    });
}

#[test]
fn every_fault_strikes_and_is_counted() {
    simulate(async {
        let device = device(1);
        for block in 0..8 {
            write(&device, block, 1, true).await.expect("written");
        }
        device.fail_reads(0..1);
        device.fail_writes(BLOCK_BYTES..BLOCK_BYTES + 1);
        device.latent_error(2 * BLOCK_BYTES..3 * BLOCK_BYTES);
        assert!(read(&device, 0).await.is_err());
        assert!(write(&device, 1, 2, true).await.is_err());
        assert!(device.flush().await.is_err());
        assert!(read(&device, 2).await.is_err());
        write(&device, 2, 2, true).await.expect("written");
        assert_eq!(read(&device, 2).await, Ok(full(2)), "writing heals a latent error");
        device.clear_errors();
        device.flip_bit(3 * BLOCK_BYTES, 1);
        assert_eq!(read(&device, 3).await.expect("reads")[0], 3);
        device.misdirect_next_write(5 * BLOCK_BYTES);
        write(&device, 4, 4, true).await.expect("it says so");
        assert_eq!((read(&device, 4).await, read(&device, 5).await), (Ok(full(1)), Ok(full(4))));
        device.lose_next_writes(1);
        write(&device, 6, 6, true).await.expect("it says so");
        assert_eq!(read(&device, 6).await, Ok(full(1)));
        device.vanish();
        assert_eq!(read(&device, 6).await, Err(DeviceError::Gone));
        device.bring_back();
        assert_eq!(read(&device, 6).await, Ok(full(1)));
        device.set_drop_durability(true);
        write(&device, 7, 7, true).await.expect("it says so");
        device.flush().await.expect("it says so");
        let counts = device.fault_counts();
        let expected = FaultCounts {
            read_errors: 2,
            write_errors: 2,
            bits_flipped: 1,
            misdirected_writes: 1,
            lost_writes: 1,
            durability_dropped: 2,
            vanished: 1,
            torn_writes: counts.torn_writes,
            ..FaultCounts::default()
        };
        assert_eq!(counts, expected);
    });
}

#[test]
fn a_hung_device_goes_on_when_healed() {
    simulate(async {
        let device = device(1);
        let before = device.write(0, Rc::from([blocks(1, 1)]), true);
        device.hang();
        let during = device.write(BLOCK_BYTES, Rc::from([blocks(2, 1)]), true);
        let both = futures_util::future::join(before, during);
        tokio::pin!(both);
        assert!(tokio::time::timeout(Duration::from_mins(1), &mut both).await.is_err());
        device.heal();
        assert_eq!(both.await, (Ok(()), Ok(())));
        assert_eq!(device.fault_counts().hung_operations, 2);
        assert_eq!(device.operations_in_flight(), 0);
    });
}

proptest! {
    /// Whatever is written durably and not cut short reads back, like a plain array.
    #[test]
    fn behaves_like_an_array(seed: u64, writes in proptest::collection::vec((0u64..250, 1usize..6, any::<u8>(), any::<bool>()), 1..40)) {
        simulate(async {
            let device = device(seed);
            let mut array = vec![0u8; 1 << 20];
            for (block, count, byte, durable) in writes {
                let at = block * BLOCK_BYTES;
                device.write(at, Rc::from([blocks(byte, count)]), durable).await.expect("written");
                let start = usize::try_from(at).expect("small");
                array[start..start + count * BLOCK_SIZE].fill(byte);
            }
            device.flush().await.expect("flushed");
            device.power_cut();
            assert!(device.reopen().peek(0, 1 << 20) == array);
        });
    }
}
