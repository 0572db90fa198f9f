//! The erasure code: parity from data, lost shards from any `k` that are left.
//!
//! It knows bytes of equal length and a scheme; nothing of segments, disks or checksums. It
//! cannot tell a wrong shard from a right one: the caller verifies each shard before it is used.
//!
//! # The code is part of the on-disk format
//!
//! Systematic Reed-Solomon over GF(2^8) with the polynomial `x^8 + x^4 + x^3 + x^2 + 1` (0x11d).
//! Byte `b` of the data shards `0..k` defines the polynomial of degree below `k` that takes their
//! values at the points `0..k`; shard `r` holds its value at the point `r`. So the coefficient of
//! data shard `c` in parity shard `r` is the Lagrange basis polynomial, with `+` and `-` both
//! being XOR:
//!
//! ```text
//! coefficient(r, c) = product over j in 0..k, j != c, of (r ^ j) / (c ^ j)
//! ```
//!
//! Any `k` points determine the polynomial, which is why any `k` shards do. With `k = 1` it is
//! constant: parity shards are copies. A parity shard does not depend on how many there are.
//! (Equal to the matrix `V · V_top⁻¹` of Backblaze's `JavaReedSolomon` and its descendants.)
//!
//! The library that evaluates it is not part of the format. Its kernels are chosen at run time
//! from what the CPU has, down to portable code.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use rusty_erasure::kernel::Kernels;
use rusty_erasure::{Coder, DecodePlan, Matrix, gf};

use crate::limits::{DATA_SHARDS_MAX, PARITY_SHARDS_MAX};
use crate::shard::Scheme;

/// Shards are a multiple of this many bytes long.
pub const SHARD_ALIGNMENT: usize = 64;

/// Why nothing was computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// No such scheme: data shards are 1 to 16, parity shards 0 to 4.
    #[error("no such scheme: {}+{}", .0.data, .0.parity)]
    BadScheme(Scheme),
    /// Fewer shards are left than there are data shards.
    #[error("{present} shards are left, {needed} are needed")]
    TooFewShards {
        /// Shards given.
        present: usize,
        /// Data shards of the scheme.
        needed: usize,
    },
}

/// An erasure code of one scheme. Shards have indices: data first, then parity.
pub trait Codec {
    /// The scheme.
    fn scheme(&self) -> Scheme;

    /// Computes all parity shards from all data shards.
    ///
    /// # Panics
    ///
    /// When the numbers of shards are not the scheme's, or lengths differ or are no multiple of
    /// [`SHARD_ALIGNMENT`]: a defect of the caller.
    fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]);

    /// Computes the shards with the indices `wanted`, data or parity, into `out` in that order,
    /// from the first `k` of the shards that are given. `shards` has an entry for each index.
    ///
    /// # Errors
    ///
    /// [`CodecError::TooFewShards`]; `out` is then untouched.
    ///
    /// # Panics
    ///
    /// As [`Codec::encode`], and when an index is not the scheme's.
    fn reconstruct(
        &self,
        shards: &[Option<&[u8]>],
        wanted: &[usize],
        out: &mut [&mut [u8]],
    ) -> Result<(), CodecError>;
}

/// The codec of a scheme; built once per scheme and thread.
///
/// # Errors
///
/// [`CodecError::BadScheme`].
pub fn codec(scheme: Scheme) -> Result<Rc<dyn Codec>, CodecError> {
    thread_local! {
        static BUILT: RefCell<BTreeMap<Scheme, Rc<dyn Codec>>> = const { RefCell::new(BTreeMap::new()) };
    }
    BUILT.with_borrow_mut(|built| {
        if let Some(codec) = built.get(&scheme) {
            return Ok(codec.clone());
        }
        let codec: Rc<dyn Codec> = if scheme.data == 1 {
            check(scheme)?;
            Rc::new(Copies { scheme })
        } else {
            Rc::new(ReedSolomon::new(scheme, rusty_erasure::best_kernels())?)
        };
        built.insert(scheme, codec.clone());
        Ok(codec)
    })
}

fn check(scheme: Scheme) -> Result<(), CodecError> {
    let data = 1..=DATA_SHARDS_MAX;
    let parity = 0..=PARITY_SHARDS_MAX;
    if data.contains(&scheme.data.into()) && parity.contains(&scheme.parity.into()) {
        Ok(())
    } else {
        Err(CodecError::BadScheme(scheme))
    }
}

/// The coefficient of data shard `column` in shard `row`, of a scheme with `data` data shards.
/// Pinned: it is what is on disk.
pub fn coefficient(data: u8, row: u8, column: u8) -> u8 {
    (0..data)
        .filter(|&point| point != column)
        .fold(1, |product, point| gf::mul(product, gf::mul(row ^ point, gf::inv(column ^ point))))
}

/// Asserts one length for all, and returns it.
fn common_length<'a>(mut shards: impl Iterator<Item = &'a [u8]>) -> usize {
    let length = shards.next().map_or(0, <[u8]>::len);
    assert!(shards.all(|shard| shard.len() == length), "shards of different lengths");
    assert!(length.is_multiple_of(SHARD_ALIGNMENT), "a shard of {length} bytes");
    length
}

/// What both codecs demand of their arguments.
fn check_reconstruct(
    scheme: Scheme,
    shards: &[Option<&[u8]>],
    wanted: &[usize],
    out: &[&mut [u8]],
) -> Result<(), CodecError> {
    assert_eq!(shards.len(), scheme.width(), "an entry for each shard");
    assert_eq!(wanted.len(), out.len(), "a buffer for each shard that is wanted");
    assert!(wanted.iter().all(|&index| index < scheme.width()), "an index beyond the scheme");
    common_length(shards.iter().copied().flatten().chain(out.iter().map(|shard| &**shard)));
    let (present, needed) = (shards.iter().flatten().count(), usize::from(scheme.data));
    if present < needed { Err(CodecError::TooFewShards { present, needed }) } else { Ok(()) }
}

fn check_encode(scheme: Scheme, data: &[&[u8]], parity: &[&mut [u8]]) {
    assert_eq!(data.len(), usize::from(scheme.data), "all data shards");
    assert_eq!(parity.len(), usize::from(scheme.parity), "all parity shards");
    common_length(data.iter().copied().chain(parity.iter().map(|shard| &**shard)));
}

/// One data shard and its copies.
struct Copies {
    scheme: Scheme,
}

impl Codec for Copies {
    fn scheme(&self) -> Scheme {
        self.scheme
    }

    fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) {
        check_encode(self.scheme, data, parity);
        for copy in parity {
            copy.copy_from_slice(data[0]);
        }
    }

    fn reconstruct(
        &self,
        shards: &[Option<&[u8]>],
        wanted: &[usize],
        out: &mut [&mut [u8]],
    ) -> Result<(), CodecError> {
        check_reconstruct(self.scheme, shards, wanted, out)?;
        if let Some(shard) = shards.iter().flatten().next() {
            for copy in out {
                copy.copy_from_slice(shard);
            }
        }
        Ok(())
    }
}

/// Data and parity shards by `rusty_erasure`.
struct ReedSolomon {
    scheme: Scheme,
    /// None without parity.
    coder: Option<Coder>,
    /// How to rebuild what was wanted last: one loss meets many stripes in a row.
    last: RefCell<Option<(Loss, Rc<DecodePlan>)>>,
}

#[derive(PartialEq, Eq)]
struct Loss {
    present: Vec<bool>,
    wanted: Vec<usize>,
}

impl ReedSolomon {
    fn new(scheme: Scheme, kernels: Kernels) -> Result<Self, CodecError> {
        check(scheme)?;
        let (rows, columns) = (scheme.data + scheme.parity, scheme.data);
        let coefficients = (0..rows)
            .flat_map(|row| (0..columns).map(move |column| coefficient(columns, row, column)))
            .collect();
        let coder = (scheme.parity > 0).then(|| {
            let matrix = Matrix::from_bytes(rows.into(), columns.into(), coefficients);
            let coder = matrix.and_then(|matrix| Coder::with_kernels(matrix, kernels));
            coder.expect("a matrix of a checked scheme")
        });
        Ok(Self { scheme, coder, last: RefCell::new(None) })
    }

    fn plan(&self, coder: &Coder, shards: &[Option<&[u8]>], wanted: &[usize]) -> Rc<DecodePlan> {
        let mut last = self.last.borrow_mut();
        if let Some((loss, plan)) = &*last
            && loss.wanted == wanted
            && loss.present.iter().copied().eq(shards.iter().map(Option::is_some))
        {
            return plan.clone();
        }
        let loss =
            Loss { present: shards.iter().map(Option::is_some).collect(), wanted: wanted.into() };
        let plan = coder.decode_plan(&loss.present, wanted);
        let plan = Rc::new(plan.expect("any k rows of the matrix are independent"));
        *last = Some((loss, plan.clone()));
        plan
    }
}

impl Codec for ReedSolomon {
    fn scheme(&self) -> Scheme {
        self.scheme
    }

    fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) {
        check_encode(self.scheme, data, parity);
        if let Some(coder) = &self.coder {
            coder.encode(data, parity).expect("checked above");
        }
    }

    fn reconstruct(
        &self,
        shards: &[Option<&[u8]>],
        wanted: &[usize],
        out: &mut [&mut [u8]],
    ) -> Result<(), CodecError> {
        check_reconstruct(self.scheme, shards, wanted, out)?;
        if wanted.is_empty() {
            return Ok(());
        }
        let Some(coder) = &self.coder else {
            for (index, out) in wanted.iter().zip(out) {
                out.copy_from_slice(shards[*index].expect("without parity all were needed"));
            }
            return Ok(());
        };
        let plan = self.plan(coder, shards, wanted);
        coder.recover_with(&plan, shards, out).expect("checked above");
        Ok(())
    }
}

#[cfg(test)]
mod tests;
