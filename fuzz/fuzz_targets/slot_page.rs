//! A page of the slot table: each of its entries is refused, or free, or a shard that encodes to
//! what decodes alike.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sds::disk::format::{Page, ShardRecord, SlotPage, check_spec, decode_any, free_entry};

mod checksums;

fuzz_target!(|data: &[u8]| {
    for bytes in [data.to_vec(), checksums::page(SlotPage::MAGIC, data)] {
        let Ok(page) = decode_any::<SlotPage>(&bytes) else { continue };
        for entry in &page.entries {
            let Ok(Some(record)) = ShardRecord::decode(entry) else { continue };
            assert_eq!(check_spec(&record.spec), Ok(()));
            let mut again = free_entry();
            record.encode(&mut again);
            assert_eq!(ShardRecord::decode(&again), Ok(Some(record)));
        }
    }
});
