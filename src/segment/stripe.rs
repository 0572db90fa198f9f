//! Stripes: the codec of each scheme, made once per core.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::codec::{Codec, codec};
use crate::shard::Scheme;

thread_local! {
    static CODECS: RefCell<BTreeMap<Scheme, Rc<dyn Codec>>> = RefCell::default();
}

fn of(scheme: Scheme) -> Rc<dyn Codec> {
    CODECS.with_borrow_mut(|codecs| {
        let made = || codec(scheme).expect("schemes are checked where they enter the system");
        codecs.entry(scheme).or_insert_with(made).clone()
    })
}

/// Computes the parity shards of a stripe; all shards have the same length, a multiple of the
/// block size.
pub fn encode(scheme: Scheme, data: &[&[u8]], parity: &mut [&mut [u8]]) {
    of(scheme).encode(data, parity);
}

/// Computes shard `wanted` of a stripe from `k` others, each with its index.
pub fn rebuild(scheme: Scheme, have: &[(usize, &[u8])], wanted: usize, out: &mut [u8]) {
    rebuild_all(scheme, have, &[wanted], &mut [out]);
}

/// Computes several shards of a stripe at once from `k` others, each with its index.
pub fn rebuild_all(
    scheme: Scheme,
    have: &[(usize, &[u8])],
    wanted: &[usize],
    out: &mut [&mut [u8]],
) {
    let mut shards: Vec<Option<&[u8]>> = vec![None; scheme.width()];
    for (index, data) in have {
        shards[*index] = Some(data);
    }
    of(scheme)
        .reconstruct(&shards, wanted, out)
        .expect("the caller brings as many shards as the scheme needs");
}
