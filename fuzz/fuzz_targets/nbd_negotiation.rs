//! Arbitrary bytes from the first one after the greeting on: raw, and as well-formed options with
//! arbitrary content.
#![no_main]

use libfuzzer_sys::fuzz_target;

mod nbd_client;

fuzz_target!(|data: &[u8]| {
    nbd_client::talk(&[data]);
    let mut stream = vec![0, 0, 0, 3];
    let mut rest = data;
    while let Some((&[option, len], tail)) = rest.split_first_chunk() {
        let (content, tail) = tail.split_at(usize::from(len).min(tail.len()));
        stream.extend(b"IHAVEOPT\0\0\0");
        stream.push(option % 16);
        stream.extend(u32::try_from(content.len()).expect("at most 255").to_be_bytes());
        stream.extend(content);
        rest = tail;
    }
    let answer = nbd_client::talk(&[&stream]);
    assert!(answer.starts_with(b"NBDMAGICIHAVEOPT\0\x03"));
});
