//! temp: replaced by the codec branch
use crate::shard::Scheme;
use reed_solomon_erasure::galois_8::ReedSolomon;
/// temp
pub fn encode(s: Scheme, d: &[&[u8]], p: &mut [&mut [u8]]) {
    if s.data == 1 {
        for x in p {
            x.copy_from_slice(d[0]);
        }
        return;
    }
    let rs = ReedSolomon::new(s.data.into(), s.parity.into()).expect("valid");
    rs.encode_sep(d, p).expect("valid");
}
/// temp
pub fn rebuild(s: Scheme, have: &[(usize, &[u8])], w: usize, out: &mut [u8]) {
    if s.data == 1 {
        out.copy_from_slice(have[0].1);
        return;
    }
    let rs = ReedSolomon::new(s.data.into(), s.parity.into()).expect("valid");
    let mut shards: Vec<Option<Vec<u8>>> = vec![None; s.width()];
    for (i, d) in have {
        shards[*i] = Some(d.to_vec());
    }
    rs.reconstruct(&mut shards).expect("valid");
    out.copy_from_slice(shards[w].as_ref().expect("rebuilt"));
}
