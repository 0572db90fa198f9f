//! The envelope of records in the metadata store, and the root of a volume in it: raw bytes, and
//! bytes behind a right header. What decodes encodes to what decodes alike.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sds::meta::VALUE_BYTES_MAX;
use sds::meta::envelope::{Encoding, HEADER_BYTES, Kind, open, seal};
use sds::volume::root::Root;

fuzz_target!(|data: &[u8]| {
    for kind in Kind::ALL {
        for encoding in [Encoding::Json, Encoding::Opaque] {
            if let Ok(opened) = open(data, kind, encoding) {
                let again = seal(kind, opened.kind_version, encoding, opened.payload);
                assert_eq!(again.expect("it fitted before").len(), data.len());
            }
        }
    }
    let _foreign = Root::decode(data);
    if data.len() > VALUE_BYTES_MAX - HEADER_BYTES {
        return;
    }
    let sealed = seal(Kind::Root, 1, Encoding::Json, data).expect("it is short enough");
    let opened = open(&sealed, Kind::Root, Encoding::Json).expect("as sealed");
    assert_eq!(opened.payload, data);
    if let Ok(root) = Root::decode(&sealed) {
        assert_eq!(Root::decode(&root.encode()).expect("as encoded"), root);
    }
});
