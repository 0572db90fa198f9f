//! A page of the volume table: it is refused, or free, or a fence with a mirror that fits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sds::disk::format::{Page, VolumePage, VolumeRecord, decode_any, encode_page};
use sds::id::{BLOCK_SIZE, DiskId};
use sds::shard::MIRROR_BYTES_MAX;

mod checksums;

fuzz_target!(|data: &[u8]| {
    for bytes in [data.to_vec(), checksums::page(VolumePage::MAGIC, data)] {
        let Ok(page) = decode_any::<VolumePage>(&bytes) else { continue };
        let Ok(Some(record)) = VolumeRecord::decode(page) else { continue };
        assert!(record.mirror.as_ref().is_none_or(|mirror| mirror.data.len() <= MIRROR_BYTES_MAX));
        let mut again = vec![0; BLOCK_SIZE];
        let disk = DiskId::from_bytes([7; 16]);
        encode_page(&mut again, disk, 3, 1, |page: &mut VolumePage| record.encode(page));
        let page = decode_any::<VolumePage>(&again).expect("as encoded");
        assert_eq!(VolumeRecord::decode(page), Ok(Some(record)));
    }
});
