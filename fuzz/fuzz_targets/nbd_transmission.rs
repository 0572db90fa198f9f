//! Arbitrary bytes as requests: raw after a good handshake, and as well-formed headers with
//! arbitrary fields, in pieces. Each reply must be well-formed and belong to a request.
#![no_main]

use libfuzzer_sys::fuzz_target;

mod nbd_client;

/// Fixed newstyle; structured replies if wanted; `base:allocation`; GO to the export `v`.
fn handshake(structured: bool) -> Vec<u8> {
    let mut bytes = b"\0\0\0\x03".to_vec();
    if structured {
        bytes.extend(b"IHAVEOPT\0\0\0\x08\0\0\0\0");
        bytes.extend(b"IHAVEOPT\0\0\0\x0a\0\0\0\x1c\0\0\0\x01v\0\0\0\x01\0\0\0\x0fbase:allocation");
    }
    bytes.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x07\0\0\0\x01v\0\0");
    bytes
}

fn skip_handshake(mut answer: &[u8]) -> &[u8] {
    answer = &answer[18..];
    loop {
        let number = |at: usize| u32::from_be_bytes(answer[at..at + 4].try_into().expect("four"));
        let (option, kind, len) = (number(8), number(12), number(16));
        answer = &answer[20 + len as usize..];
        if option == 7 && kind == 1 {
            return answer;
        }
    }
}

/// Requests made of `data`: (stream, read lengths by cookie).
fn requests(mut data: &[u8]) -> (Vec<u8>, Vec<usize>) {
    let mut stream = Vec::new();
    let mut lengths = Vec::new();
    while let Some((head, tail)) = data.split_first_chunk::<8>() {
        data = tail;
        let command = u16::from(head[0] % 10);
        if command == 2 {
            continue;
        }
        let flags = if head[1] < 200 { u16::from(head[1] & 1) } else { u16::from(head[1] & 31) };
        let offset = u64::from(u16::from_le_bytes([head[2], head[3]])) * 17;
        // Mostly short, so that runs are fast; a few cross the sizes where the server changes its ways.
        let short = u32::from(u16::from_le_bytes([head[4], head[5]]) >> 4);
        let len = if head[6] < 248 { short } else { short << (head[6] % 6) };
        let (offset, len) = match (command, head[7]) {
            (3, 0..250) => (0, 0),
            (_, 250) => (u64::MAX - 3, len),
            _ => (offset, len),
        };
        stream.extend(0x2560_9513_u32.to_be_bytes());
        stream.extend(flags.to_be_bytes());
        stream.extend(command.to_be_bytes());
        stream.extend((lengths.len() as u64).to_be_bytes());
        stream.extend(offset.to_be_bytes());
        stream.extend(len.to_be_bytes());
        if command == 1 {
            stream.resize(stream.len() + len as usize, head[7]);
        }
        lengths.push(if command == 0 { len as usize } else { 0 });
        if lengths.len() == 300 {
            break;
        }
    }
    (stream, lengths)
}

/// Every request has exactly one complete reply.
fn check(mut answer: &[u8], lengths: &[usize]) {
    let mut done = vec![false; lengths.len()];
    while !answer.is_empty() {
        let magic = u32::from_be_bytes(answer[..4].try_into().expect("four bytes"));
        let cookie = u64::from_be_bytes(answer[8..16].try_into().expect("eight bytes")) as usize;
        let last;
        if magic == 0x6744_6698 {
            let failed = answer[4..8] != [0; 4];
            answer = &answer[16 + if failed { 0 } else { lengths[cookie] }..];
            last = true;
        } else {
            assert_eq!(magic, 0x668E_33EF);
            let len = u32::from_be_bytes(answer[16..20].try_into().expect("four bytes"));
            last = answer[5] & 1 != 0;
            answer = &answer[20 + len as usize..];
        }
        assert!(!done[cookie], "a reply after the last");
        done[cookie] = last;
    }
    assert!(done.iter().all(|&done| done), "a request without reply");
}

fuzz_target!(|data: &[u8]| {
    let Some((&mode, data)) = data.split_first() else { return };
    let structured = mode & 1 != 0;
    let hello = handshake(structured);
    if mode & 2 != 0 {
        nbd_client::talk(&[&hello, data]);
        return;
    }
    let (stream, mut lengths) = requests(data);
    let answer = if mode & 4 != 0 {
        let pieces: Vec<&[u8]> =
            std::iter::once(&hello[..]).chain(stream.chunks(usize::from(mode) * 16 + 1)).collect();
        nbd_client::talk(&pieces)
    } else {
        nbd_client::talk(&[&hello, &stream])
    };
    if structured {
        lengths.iter_mut().for_each(|len| *len = 0);
    }
    check(skip_handshake(&answer), &lengths);
});
