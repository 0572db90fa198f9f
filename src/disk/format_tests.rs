//! Tests of the on-disk format: layouts pinned, decoders that trust nothing.

use std::mem::offset_of;

use expect_test::expect;
use proptest::prelude::*;

use super::*;

fn spec() -> ShardSpec {
    ShardSpec {
        volume: VolumeId::from_bytes([1; 16]),
        segment: SegmentId(77),
        creation: 5,
        kind: SegmentKind::Data,
        scheme: Scheme { data: 4, parity: 2 },
        index: 3,
        members: (0..6).map(|n| DiskId::from_bytes([n; 16])).collect(),
    }
}

#[test]
fn layout_is_what_was_shipped() {
    macro_rules! offsets {
        ($out:ident, $name:ident: $($field:ident)*) => {
            $out.push_str(concat!(stringify!($name), ":"));
            $($out.push_str(&format!(" {} {}", stringify!($field), offset_of!($name, $field)));)*
            $out.push_str(&format!(" = {}\n", size_of::<$name>()));
        };
    }
    let mut out = String::new();
    offsets!(out, PageHeader: magic version crc disk index sequence);
    offsets!(out, SuperblockPage: cluster state slots volumes_max size_bytes slot_bytes slot_table volume_table catalog checksums data);
    offsets!(out, SlotEntry: volume segment creation epoch blocks state kind data parity index members);
    offsets!(out, SlotPage: header entries);
    offsets!(out, VolumePage: volume epoch head mirror_epoch mirror_sequence mirror_bytes mirror_present mirror);
    offsets!(out, ChecksumPage: volume segment creation blocks crcs);
    offsets!(out, CatalogPage: revision incarnation bytes data_crc);
    expect![[r"
        PageHeader: magic 0 version 8 crc 12 disk 16 index 32 sequence 40 = 64
        SuperblockPage: cluster 64 state 80 slots 84 volumes_max 88 size_bytes 96 slot_bytes 104 slot_table 112 volume_table 120 catalog 128 checksums 136 data 144 = 4096
        SlotEntry: volume 0 segment 16 creation 24 epoch 32 blocks 40 state 44 kind 45 data 46 parity 47 index 48 members 56 = 504
        SlotPage: header 0 entries 64 = 4096
        VolumePage: volume 64 epoch 80 head 88 mirror_epoch 104 mirror_sequence 112 mirror_bytes 120 mirror_present 124 mirror 128 = 4096
        ChecksumPage: volume 64 segment 80 creation 88 blocks 96 crcs 128 = 4096
        CatalogPage: revision 64 incarnation 72 bytes 76 data_crc 80 = 4096
    "]].assert_eq(&out);
}

#[test]
fn bytes_of_a_slot_entry_are_what_was_shipped() {
    let record =
        ShardRecord { spec: spec(), epoch: Epoch(9), state: ShardState::Sealed, blocks: 512 };
    let mut buf = vec![0; BLOCK_SIZE];
    encode_page(&mut buf, DiskId::from_bytes([7; 16]), 2, 3, |page: &mut SlotPage| {
        record.encode(&mut page.entries[1]);
    });
    expect!["59ad1de6"].assert_eq(&format!("{:08x}", crc32fast::hash(&buf)));
    let page: &SlotPage = decode_page(&buf, DiskId::from_bytes([7; 16]), 2).expect("valid");
    assert_eq!(ShardRecord::decode(&page.entries[0]), Ok(None));
    assert_eq!(ShardRecord::decode(&page.entries[1]), Ok(Some(record)));
}

#[test]
fn a_page_counts_only_in_its_place() {
    let disk = DiskId::from_bytes([7; 16]);
    let mut buf = vec![0; BLOCK_SIZE];
    encode_page(&mut buf, disk, 2, 3, |_: &mut VolumePage| {});
    assert!(decode_page::<VolumePage>(&buf, disk, 2).is_ok());
    let fault = |result: Result<&VolumePage, PageFault>| result.err();
    assert_eq!(fault(decode_page(&buf, disk, 1)), Some(PageFault::Misplaced));
    assert_eq!(fault(decode_page(&buf, DiskId::default(), 2)), Some(PageFault::Misplaced));
    assert_eq!(decode_page::<SlotPage>(&buf, disk, 2).err(), Some(PageFault::Magic));
    buf[8] = 2;
    assert_eq!(fault(decode_any(&buf)), Some(PageFault::Checksum));
    let crc = page_crc(&buf);
    buf[12..16].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(fault(decode_any(&buf)), Some(PageFault::Newer(2)));
    assert_eq!(fault(decode_any(&buf[1..])), Some(PageFault::Content("not one page")));
}

#[test]
fn superblock_round_trip_and_contradictions() {
    let geometry = Geometry::plan(64 << 20).expect("fits");
    let superblock = Superblock {
        disk: DiskId::from_bytes([1; 16]),
        cluster: ClusterId::from_bytes([2; 16]),
        complete: true,
        sequence: 4,
        geometry,
    };
    assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock.clone()));
    let absurd = Geometry { slots: geometry.slots + 1, ..geometry };
    let page = Superblock { geometry: absurd, ..superblock }.encode();
    assert!(matches!(Superblock::decode(&page), Err(PageFault::Content(_))));
}

proptest! {
    #[test]
    fn a_flipped_bit_is_always_noticed(bit in 0..BLOCK_SIZE * 8) {
        let disk = DiskId::from_bytes([7; 16]);
        let mut buf = vec![0; BLOCK_SIZE];
        encode_page(&mut buf, disk, 2, 3, |page: &mut SlotPage| {
            ShardRecord { spec: spec(), epoch: Epoch(9), state: ShardState::Open, blocks: 0 }
                .encode(&mut page.entries[0]);
        });
        buf[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode_page::<SlotPage>(&buf, disk, 2).is_err());
    }

    #[test]
    fn decoders_survive_anything(bytes in proptest::collection::vec(any::<u8>(), BLOCK_SIZE)) {
        prop_assert!(Superblock::decode(&bytes).is_err());
        let page = SlotPage::ref_from_bytes(&bytes).expect("one page");
        for entry in &page.entries {
            if let Ok(Some(record)) = ShardRecord::decode(entry) {
                prop_assert!(check_spec(&record.spec).is_ok());
            }
        }
        let page = VolumePage::ref_from_bytes(&bytes).expect("one page");
        drop(VolumeRecord::decode(page));
    }
}
