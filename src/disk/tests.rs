//! Tests of a disk without crashes: slots, fences, tables, damage.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::conformance::{
    DISK, VOLUME, append, authority, blocks, check_device, check_disk, format_options, spec,
};
use super::*;
use crate::env::Env;
use crate::id::{BLOCK_SIZE, Epoch, HeadId, SegmentId, VolumeId};
use crate::shard::{Authority, Mirror, ShardState, SlotClass};
use crate::sim::device::{SimConfig, SimDevice};
use crate::sim::simulate;

pub(super) fn device(seed: u64) -> SimDevice {
    let config = SimConfig { size_bytes: 4 << 20, ..SimConfig::default() };
    SimDevice::new(Env::from_seed(seed), config)
}

async fn open(device: &SimDevice) -> Rc<Disk> {
    Disk::open(Rc::new(device.clone())).await.expect("opens")
}

async fn formatted(seed: u64) -> (SimDevice, Rc<Disk>) {
    let device = device(seed);
    Disk::format(&device, format_options()).await.expect("formats");
    let disk = open(&device).await;
    (device, disk)
}

fn segment_count(disk: &Disk) -> usize {
    disk.list(VOLUME).expect("lists").shards.len()
}

#[test]
fn simulated_device_conforms() {
    simulate(check_device(Rc::new(device(1))));
    let medium = device(2);
    simulate(check_disk(|| Rc::new(medium.clone())));
}

#[test]
fn opening_refuses_with_the_reason() {
    simulate(async {
        let device = device(1);
        let open = async || Disk::open(Rc::new(device.clone())).await.map(drop);
        let format =
            async |force| Disk::format(&device, FormatOptions { force, ..format_options() }).await;
        assert_eq!(open().await, Err(DiskOpenError::NotFormatted));
        device.scribble(700_000..700_010);
        assert_eq!(open().await, Err(DiskOpenError::Foreign));
        assert_eq!(format(false).await, Err(DiskFormatError::NotBlank(DiskOpenError::Foreign)));
        format(true).await.expect("forced");
        open().await.expect("formatted");
        assert_eq!(format(false).await, Err(DiskFormatError::Formatted(DISK)));
        assert_eq!(probe_superblock(&device).await.expect("ours").disk, DISK);
        device.resize(2 << 20);
        assert!(matches!(open().await, Err(DiskOpenError::TooShort { .. })));
        device.resize(4 << 20);
        device.flip_bit(100, 3);
        open().await.expect("one superblock is enough");
        device.flip_bit((32 << 10) + 100, 3);
        open().await.expect("the first one was mended");
        device.flip_bit(100, 3);
        device.flip_bit((32 << 10) + 100, 3);
        assert!(matches!(open().await, Err(DiskOpenError::SuperblockDamaged(_))));
        device.vanish();
        assert_eq!(open().await, Err(DiskOpenError::Device(DeviceError::Gone)));
    });
}

#[test]
fn formatting_that_was_cut_is_noticed() {
    for delay_ms in 0..40 {
        simulate(async {
            let device = device(delay_ms);
            let format = Disk::format(&device, format_options());
            let done = timeout(Duration::from_millis(delay_ms), format).await.is_ok();
            device.power_cut();
            let device = device.reopen();
            match Disk::open(Rc::new(device.clone())).await {
                Ok(disk) => disk.check().expect("whole"),
                Err(error) => {
                    assert!(!done, "{error}");
                    // Only a torn superblock does not look like an interrupted format.
                    let force = matches!(error, DiskOpenError::SuperblockDamaged(_));
                    let options = FormatOptions { force, ..format_options() };
                    Disk::format(&device, options).await.expect("formats again");
                    open(&device).await;
                }
            }
        });
    }
}

#[test]
fn fences_refuse_and_survive() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        assert_eq!(disk.probe(authority(5)), Err(ShardError::Gone));
        let mirror = Mirror { revision: (Epoch(5), 1), data: Bytes::from_static(b"root") };
        disk.fence(authority(5), Some(mirror.clone())).await.expect("fenced");
        let writes = disk.stats().table_writes.count.get();
        disk.fence(authority(5), Some(mirror.clone())).await.expect("again");
        assert_eq!(disk.stats().table_writes.count.get(), writes, "nothing to write");
        let rival = Authority { head: HeadId::from_bytes([9; 16]), ..authority(5) };
        let fenced = Err(ShardError::Fenced(Epoch(5)));
        assert_eq!(disk.probe(rival), fenced);
        assert_eq!(disk.create(rival, spec(1, 1), SlotClass::Gc).await, fenced);
        assert_eq!(disk.seal(authority(4), SegmentId(1), 0, None).await, fenced);
        assert_eq!(disk.delete(authority(4), SegmentId(1), 1).await, fenced);
        assert_eq!(disk.probe(authority(6)), Ok(()));
        let newer = Mirror { revision: (Epoch(6), 0), data: Bytes::from_static(b"newer") };
        assert!(matches!(
            disk.mirror(authority(6), newer.clone()).await,
            Err(ShardError::Invalid(_))
        ));
        disk.create(authority(6), spec(1, 1), SlotClass::Gc).await.expect("raises the fence");
        disk.mirror(authority(6), newer.clone()).await.expect("newer");
        disk.mirror(authority(6), mirror).await.expect("older is ignored");
        device.power_cut();
        let disk = open(&device.reopen()).await;
        assert_eq!(disk.probe(authority(5)), Err(ShardError::Fenced(Epoch(6))));
        assert_eq!(disk.list(VOLUME).expect("lists").mirror, Some(newer));
        assert_eq!(disk.volumes().expect("lists").len(), 1);
    });
}

#[test]
fn a_fence_waits_for_older_appends() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        disk.create(authority(1), spec(1, 1), SlotClass::Client).await.expect("created");
        disk.append(append(1, 1, 0, 1, 1)).await.expect("appended");
        device.fail_writes(0..0);
        device.set_slow(100);
        let late = disk.append(append(1, 1, 1, 2, 1));
        device.set_slow(1);
        let mut fence = disk.fence(authority(2), None);
        assert!(timeout(Duration::from_millis(20), &mut fence).await.is_err());
        assert_eq!(disk.append(append(1, 1, 2, 3, 1)).await, Err(ShardError::Fenced(Epoch(2))));
        let listed = fence.await.expect("fenced");
        assert_eq!(late.await, Ok(()));
        assert_eq!((listed.shards[0].state, listed.shards[0].blocks), (ShardState::Closed, 2));
        disk.check().expect("invariants");
    });
}

#[test]
fn a_failed_append_fails_the_later_ones() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        disk.create(authority(1), spec(1, 1), SlotClass::Client).await.expect("created");
        disk.append(append(1, 1, 0, 1, 2)).await.expect("appended");
        let bad = disk.geometry().block_offset(0, 2);
        device.fail_writes(bad..bad + 1);
        let (a, b) = (disk.append(append(1, 1, 2, 2, 1)), disk.append(append(1, 1, 3, 3, 1)));
        assert!(matches!(a.await, Err(ShardError::Io(_))));
        assert!(matches!(b.await, Err(ShardError::Io(_))));
        assert!(matches!(disk.append(append(1, 1, 4, 4, 1)).await, Err(ShardError::Io(_))));
        let seal = async |blocks| disk.seal(authority(1), SegmentId(1), blocks, None).await;
        assert_eq!(seal(3).await, Err(ShardError::WrongLength(2)));
        let beyond = disk.read(VOLUME, SegmentId(1), 1, 2).await.map(drop);
        assert_eq!(beyond, Err(ShardError::WrongLength(2)));
        seal(1).await.expect("what is durable can be sealed");
        seal(1).await.expect("again");
        assert_eq!(seal(2).await, Err(ShardError::WrongState(ShardState::Sealed)));
        assert_eq!(disk.read(VOLUME, SegmentId(1), 0, 1).await.expect("sealed").crcs, [1]);
        assert_eq!(disk.stats().appends.errors.get(), 1);
        assert_eq!(disk.offline_reason(), None, "data errors do not take the disk offline");
    });
}

#[test]
fn a_hung_write_costs_a_slot_and_no_data() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        disk.create(authority(1), spec(1, 1), SlotClass::Client).await.expect("created");
        let free = disk.info().expect("online").slots_free;
        device.set_slow(10_000);
        drop(disk.append(append(1, 1, 0, 0xee, 4)));
        device.set_slow(1);
        disk.delete(authority(1), SegmentId(1), 1).await.expect("deleted");
        assert_eq!(disk.delete(authority(1), SegmentId(1), 1).await, Err(ShardError::Gone));
        assert_eq!(disk.info().expect("online").slots_free, free, "pinned by the write");
        assert_eq!(disk.slot_counts().freeing, 1);
        disk.create(authority(1), spec(1, 2), SlotClass::Client).await.expect("elsewhere");
        disk.append(append(1, 1, 0, 0x11, 4)).await.expect("appended");
        sleep(Duration::from_mins(1)).await;
        assert_eq!(disk.slot_counts().freeing, 0);
        assert_eq!(disk.info().expect("online").slots_free, free, "and free again");
        let data = disk.read(VOLUME, SegmentId(1), 0, 4).await.expect("reads").data;
        assert!(data.iter().all(|byte| *byte == 0x11));
        disk.check().expect("invariants");
    });
}

#[test]
fn slot_classes_leave_reserves() {
    simulate(async {
        let (_, disk) = formatted(1).await;
        let mut segment = 0;
        let mut fill = async |class| {
            loop {
                segment += 1;
                match disk.create(authority(1), spec(segment, 1), class).await {
                    Ok(()) => {}
                    Err(error) => return error,
                }
            }
        };
        let mut left = Vec::new();
        let (client, top) = (SlotClass::Client, SlotClass::Checkpoint);
        for class in [client, SlotClass::Repair, SlotClass::Gc, SlotClass::Trim, top] {
            assert_eq!(fill(class).await, ShardError::NoSpace);
            left.push(disk.info().expect("online").slots_free);
        }
        assert_eq!(left, [12, 11, 8, 6, 0]);
        disk.check().expect("invariants");
    });
}

#[test]
fn a_table_error_takes_the_disk_offline() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        disk.create(authority(1), spec(1, 1), SlotClass::Client).await.expect("created");
        let table = disk.geometry().slot_table;
        device.fail_writes(table..table + 1);
        let create = disk.create(authority(1), spec(2, 1), SlotClass::Client);
        assert!(matches!(create.await, Err(ShardError::Offline(_))));
        assert!(matches!(disk.probe(authority(1)), Err(ShardError::Offline(_))));
        assert!(matches!(disk.append(append(1, 1, 0, 1, 1)).await, Err(ShardError::Offline(_))));
        disk.close("reopen").await;
        device.clear_errors();
        let disk = open(&device).await;
        assert_eq!(disk.probe(authority(1)), Ok(()));
        assert!(segment_count(&disk) >= 1);
        device.vanish();
        let read = disk.read_raw(VOLUME, SegmentId(1), 0, 1).await.map(drop);
        assert!(matches!(read, Err(ShardError::Offline(_))));
    });
}

#[test]
fn an_unreadable_page_pair_is_damage_and_never_absence() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        for segment in 0..9 {
            disk.create(authority(1), spec(segment, 1), SlotClass::Client).await.expect("created");
        }
        disk.close("restart").await;
        let geometry = *disk.geometry();
        device.latent_error(geometry.slot_page_offset(0, 0)..geometry.slot_page_offset(0, 0) + 1);
        let disk = open(&device).await;
        assert_eq!(segment_count(&disk), 9, "one copy is enough");
        let inspection = inspect(&device).await.expect("readable");
        assert_eq!((inspection.slots.len(), inspection.volumes), (9, disk.volumes().expect("one")));
        assert_eq!(disk.stats().repaired_pages.get(), 1);
        disk.close("restart").await;
        device.flip_bit(geometry.slot_page_offset(0, 0) + 999, 0);
        device.flip_bit(geometry.slot_page_offset(0, 1) + 999, 0);
        let disk = open(&device).await;
        let is_damage = |error: ShardError| matches!(error, ShardError::Damaged(_));
        assert_eq!(disk.slot_counts().damaged, 8);
        assert!(disk.list(VOLUME).is_err_and(is_damage));
        assert!(disk.fence(authority(2), None).await.is_err_and(is_damage));
        assert_eq!(disk.probe(authority(1)), Err(ShardError::Fenced(Epoch(2))), "it counts");
        assert!(disk.delete(authority(2), SegmentId(0), 1).await.is_err_and(is_damage));
        assert!(disk.create(authority(2), spec(0, 1), SlotClass::Gc).await.is_err_and(is_damage));
        disk.delete(authority(2), SegmentId(8), 1).await.expect("its entry is readable");
        disk.close("restart").await;
        for copy in 0..2 {
            device.flip_bit(geometry.volume_page_offset(0, copy) + 999, 0);
        }
        let disk = open(&device).await;
        assert!(disk.probe(authority(2)).is_err_and(is_damage));
        assert!(disk.fence(authority(3), None).await.is_err_and(is_damage));
        assert!(disk.volumes().is_err_and(is_damage));
    });
}

#[test]
fn stale_or_rotten_checksums_are_damage() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        let make = async |segment, creation| {
            let created = disk.create(authority(1), spec(segment, creation), SlotClass::Client);
            created.await.expect("created");
            disk.append(append(1, segment, 0, 1, 2)).await.expect("appended");
        };
        make(1, 1).await;
        disk.seal(authority(1), SegmentId(1), 2, None).await.expect("sealed");
        disk.delete(authority(1), SegmentId(1), 1).await.expect("deleted");
        make(1, 2).await;
        device.lose_next_writes(1);
        disk.seal(authority(1), SegmentId(1), 2, None).await.expect("the device lies");
        make(2, 3).await;
        disk.seal(authority(1), SegmentId(2), 2, None).await.expect("sealed");
        disk.close("restart").await;
        let page = disk.geometry().checksum_page(1);
        let disk = open(&device).await;
        let damaged = |result: ShardResult<crate::shard::ReadReply>| {
            matches!(result, Err(ShardError::Damaged(_)))
        };
        assert!(damaged(disk.read(VOLUME, SegmentId(1), 0, 1).await), "of the earlier creation");
        device.flip_bit(disk.geometry().checksum_page_offset(page) + 2000, 1);
        assert!(damaged(disk.read(VOLUME, SegmentId(2), 0, 1).await), "rotten");
        assert!(disk.read_raw(VOLUME, SegmentId(2), 0, 2).await.is_ok());
    });
}

#[test]
fn dropped_volumes_leave_a_tombstone_until_forgotten() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        for segment in 0..20 {
            disk.create(authority(1), spec(segment, 1), SlotClass::Client).await.expect("created");
        }
        assert!(matches!(disk.forget_volume(VOLUME).await, Err(ShardError::Invalid(_))));
        disk.drop_volume(VOLUME).await.expect("dropped");
        assert_eq!(segment_count(&disk), 0);
        assert_eq!(disk.slot_counts().free, disk.geometry().slots);
        device.power_cut();
        let device = device.reopen();
        let disk = open(&device).await;
        let fenced = Err(ShardError::Fenced(Epoch::TOMBSTONE));
        assert_eq!(disk.fence(authority(9), None).await.map(drop), fenced);
        disk.drop_volume(VOLUME).await.expect("again");
        disk.forget_volume(VOLUME).await.expect("forgotten");
        disk.forget_volume(VOLUME).await.expect("again");
        assert_eq!(disk.volumes(), Ok(Vec::new()));
        device.power_cut();
        let disk = open(&device.reopen()).await;
        assert_eq!(disk.volumes(), Ok(Vec::new()));
        for number in 1..=16 {
            let volume = VolumeId::from_bytes([number; 16]);
            disk.drop_volume(volume).await.expect("room for 16 volumes");
        }
        assert_eq!(disk.fence(authority(1), None).await.map(drop), Err(ShardError::NoSpace));
        disk.check().expect("invariants");
    });
}

#[test]
fn the_newest_catalog_survives() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        assert_eq!(disk.get_catalog(), Ok(Catalog::default()));
        let catalog =
            |revision, bytes| Catalog { incarnation: 1, revision, data: vec![7; bytes].into() };
        disk.put_catalog(catalog(2, 5000)).await.expect("stored");
        disk.put_catalog(catalog(1, 10)).await.expect("ignored");
        assert_eq!(disk.get_catalog(), Ok(catalog(2, 5000)));
        let cut = disk.put_catalog(catalog(3, crate::shard::CATALOG_BYTES_MAX));
        assert!(timeout(Duration::from_millis(1), cut).await.is_err());
        device.power_cut();
        let device = device.reopen();
        let disk = open(&device).await;
        let found = disk.get_catalog().expect("one of them");
        assert!(found.revision == 2 || found.revision == 3, "{}", found.revision);
        for copy in 0..2 {
            device.flip_bit(disk.geometry().catalog_offset(copy) + 50, 0);
        }
        let disk = open(&device).await;
        assert!(matches!(disk.get_catalog(), Err(ShardError::Damaged(_))));
        disk.put_catalog(catalog(1, 3)).await.expect("replaces the damaged one");
        assert_eq!(disk.get_catalog(), Ok(catalog(1, 3)));
        let long = catalog(9, crate::shard::CATALOG_BYTES_MAX + 1);
        assert!(matches!(disk.put_catalog(long).await, Err(ShardError::Invalid(_))));
    });
}

#[test]
fn a_segment_created_again_waits_for_its_deletion() {
    for delay_ms in 0..25 {
        simulate(async {
            let (device, disk) = formatted(delay_ms).await;
            disk.create(authority(1), spec(1, 1), SlotClass::Client).await.expect("created");
            drop(disk.delete(authority(1), SegmentId(1), 1));
            tokio::task::yield_now().await;
            assert_eq!(segment_count(&disk), 0, "gone for everybody at once");
            let again = disk.create(authority(1), spec(1, 2), SlotClass::Client);
            let done = timeout(Duration::from_millis(delay_ms), again).await.is_ok();
            device.power_cut();
            let disk = open(&device.reopen()).await;
            let creations: Vec<_> = disk.list(VOLUME).expect("one at most").shards;
            let creations: Vec<_> = creations.iter().map(|info| info.spec.creation).collect();
            assert!(if done { creations == [2] } else { creations.len() <= 1 }, "{creations:?}");
        });
    }
}

#[test]
fn a_client_follows_its_disk_through_a_restart() {
    simulate(async {
        let (device, disk) = formatted(1).await;
        let client = crate::shard::local::LocalClient::new(disk);
        let as_trait: &dyn crate::shard::ShardClient = &client;
        let created = as_trait.create(authority(1), spec(1, 1), SlotClass::Client).await;
        created.expect("created");
        as_trait.append(append(1, 1, 0, 5, 2)).await.expect("appended");
        client.current().close("disk offline").await;
        let read = as_trait.read(VOLUME, SegmentId(1), 0, 1).await.map(drop);
        assert_eq!(read, Err(ShardError::Offline("disk offline".into())));
        client.replace(open(&device).await).expect("the same disk");
        let raw = as_trait.read_raw(VOLUME, SegmentId(1), 1, 1).await.expect("reads");
        assert!(raw.data.iter().all(|byte| *byte == 5));
        assert_eq!(as_trait.info().await.expect("online").id, as_trait.disk());
    });
}

#[test]
fn senseless_requests_are_refused() {
    simulate(async {
        let (_, disk) = formatted(1).await;
        let invalid = |result: ShardResult<()>| matches!(result, Err(ShardError::Invalid(_)));
        let create = async |spec| disk.create(authority(1), spec, SlotClass::Client).await;
        let mut other = spec(1, 1);
        other.members[0] = DiskId::default();
        assert!(invalid(create(other).await));
        let mut wide = spec(1, 1);
        wide.scheme.parity = 200;
        assert!(invalid(create(wide).await));
        let tombstone = Authority { epoch: Epoch::TOMBSTONE, ..authority(1) };
        assert!(invalid(disk.fence(tombstone, None).await.map(drop)));
        create(spec(1, 1)).await.expect("created");
        assert_eq!(create(spec(1, 2)).await, Err(ShardError::Exists));
        let mut short = append(1, 1, 0, 1, 1);
        short.crcs = Rc::from([]);
        assert!(invalid(disk.append(short).await));
        let mut crooked = append(1, 1, 0, 1, 1);
        crooked.data = Rc::from([blocks(1, 2).slice(1..=BLOCK_SIZE)]);
        assert!(invalid(disk.append(crooked).await));
        let long = append(1, 1, 0, 1, 17);
        assert_eq!(disk.append(long).await, Err(ShardError::WrongLength(0)));
        let read = disk.read_raw(VOLUME, SegmentId(1), u32::MAX, 2).await.map(drop);
        assert_eq!(read, Err(ShardError::WrongLength(16)));
        let read = disk.read(VOLUME, SegmentId(1), 0, 0).await.map(drop);
        assert!(invalid(read));
    });
}
