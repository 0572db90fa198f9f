//! The code against a second library, in every scheme, on every kernel that the CPU has.

use expect_test::expect;
use reed_solomon_erasure::galois_8::ReedSolomon as Oracle;

use super::*;
use crate::env::Env;

fn all_schemes() -> impl Iterator<Item = Scheme> {
    (1..=16).flat_map(|data| (0..=4).map(move |parity| Scheme { data, parity }))
}

/// Every implementation of a scheme: the one that is used, and one of each kind of kernel.
fn implementations(scheme: Scheme) -> Vec<(&'static str, Rc<dyn Codec>)> {
    let mut found: Vec<(_, Rc<dyn Codec>)> = vec![("chosen", codec(scheme).unwrap())];
    for name in ["scalar", "ssse3", "avx2", "gfni", "neon"] {
        if let Some(kernels) = rusty_erasure::kernels_named(name) {
            found.push((name, Rc::new(ReedSolomon::new(scheme, kernels).unwrap())));
        }
    }
    found
}

fn random_data(scheme: Scheme, length: usize, seed: u64) -> Vec<Vec<u8>> {
    let env = Env::from_seed(seed);
    (0..scheme.data)
        .map(|_| (0..length / 8).flat_map(|_| env.random_u64().to_le_bytes()).collect())
        .collect()
}

/// Data followed by the parity that the second library computes.
fn stripe(scheme: Scheme, length: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut shards = random_data(scheme, length, seed);
    if scheme.parity > 0 {
        shards.resize(scheme.width(), vec![0; length]);
        let oracle = Oracle::new(scheme.data.into(), scheme.parity.into()).unwrap();
        oracle.encode(&mut shards).unwrap();
    }
    shards
}

fn encode(codec: &dyn Codec, data: &[Vec<u8>]) -> Vec<Vec<u8>> {
    // Not zero, so that what is not written shows.
    let mut parity = vec![vec![0xa5; data[0].len()]; codec.scheme().parity.into()];
    let data: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
    let mut out: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
    codec.encode(&data, &mut out);
    parity
}

fn reconstruct(
    codec: &dyn Codec,
    stripe: &[Vec<u8>],
    lost: u32,
    wanted: &[usize],
) -> Result<Vec<Vec<u8>>, CodecError> {
    let shards: Vec<Option<&[u8]>> = (0u32..)
        .zip(stripe)
        .map(|(index, shard)| (lost >> index & 1 == 0).then_some(shard.as_slice()))
        .collect();
    let mut rebuilt = vec![vec![0xa5; stripe[0].len()]; wanted.len()];
    let mut out: Vec<&mut [u8]> = rebuilt.iter_mut().map(Vec::as_mut_slice).collect();
    codec.reconstruct(&shards, wanted, &mut out)?;
    Ok(rebuilt)
}

#[test]
fn every_scheme_and_kernel_gives_the_bytes_of_the_second_library() {
    for scheme in all_schemes() {
        for length in [64, 192, 4096] {
            let want = stripe(scheme, length, length as u64);
            let (data, parity) = want.split_at(scheme.data.into());
            for (name, codec) in implementations(scheme) {
                assert!(encode(&*codec, data) == parity, "{scheme:?} {length} {name}");
            }
        }
    }
}

#[test]
fn every_pattern_of_losses_is_rebuilt() {
    for scheme in all_schemes() {
        let want = stripe(scheme, 64, 7);
        let codec = codec(scheme).unwrap();
        let width = u32::try_from(scheme.width()).unwrap();
        for lost in (0u32..1 << width).filter(|lost| lost.count_ones() <= scheme.parity.into()) {
            let wanted: Vec<usize> =
                (0..scheme.width()).filter(|&index| lost >> index & 1 == 1).collect();
            let rebuilt = reconstruct(&*codec, &want, lost, &wanted).unwrap();
            assert!(rebuilt.iter().eq(wanted.iter().map(|&i| &want[i])), "{scheme:?} {lost:b}");
        }
    }
}

#[test]
fn every_kernel_rebuilds_only_what_is_wanted_in_any_order() {
    for (data, parity) in [(2, 1), (4, 2), (8, 3), (16, 4), (5, 4), (1, 2)] {
        let scheme = Scheme { data, parity };
        let want = stripe(scheme, 4096, 9);
        let env = Env::from_seed(3);
        for (name, codec) in implementations(scheme) {
            for _ in 0..20 {
                let mut lost = 0u32;
                for _ in 0..parity {
                    lost |= 1 << env.random_below(scheme.width() as u64);
                }
                // One that is lost or is not, twice, and the last: order and repeats are free.
                let one = usize::try_from(env.random_below(scheme.width() as u64)).unwrap();
                for wanted in [vec![], vec![one], vec![scheme.width() - 1, one, one]] {
                    let rebuilt = reconstruct(&*codec, &want, lost, &wanted).unwrap();
                    assert!(rebuilt.iter().eq(wanted.iter().map(|&i| &want[i])), "{name}");
                }
            }
        }
    }
}

#[test]
fn too_few_shards_are_an_error_and_nothing_is_written() {
    for scheme in all_schemes() {
        let want = stripe(scheme, 64, 1);
        let lost = (1 << (scheme.parity + 1)) - 1;
        let codec = codec(scheme).unwrap();
        let needed = usize::from(scheme.data);
        assert_eq!(
            reconstruct(&*codec, &want, lost, &[0]),
            Err(CodecError::TooFewShards { present: needed - 1, needed })
        );
    }
}

#[test]
fn other_schemes_are_refused() {
    for (data, parity) in [(0, 0), (0, 2), (17, 1), (1, 5), (255, 255)] {
        let scheme = Scheme { data, parity };
        assert_eq!(codec(scheme).err(), Some(CodecError::BadScheme(scheme)));
    }
}

#[test]
#[should_panic(expected = "shards of different lengths")]
fn unequal_shards_are_a_defect_of_the_caller() {
    let codec = codec(Scheme { data: 2, parity: 1 }).unwrap();
    codec.encode(&[&[0; 64], &[0; 128]], &mut [&mut [0; 64]]);
}

/// A change here is a change of the on-disk format: every dense segment becomes unreadable.
#[test]
fn the_matrix_is_pinned() {
    let rows = |data: u8, parity: u8| -> Vec<String> {
        (data..data + parity)
            .map(|row| {
                (0..data).map(move |column| format!("{:02x}", coefficient(data, row, column)))
            })
            .map(|row| row.collect::<Vec<_>>().join(" "))
            .collect()
    };
    let all: Vec<u8> = (1..=16u8)
        .flat_map(|data| {
            (0..data + 4)
                .flat_map(move |row| (0..data).map(move |column| coefficient(data, row, column)))
        })
        .collect();
    let text = format!(
        "2+1 {:#?}\n4+2 {:#?}\n16+4 {:#?}\nCRC-32 of all {:08x}\n",
        rows(2, 1),
        rows(4, 2),
        rows(16, 4),
        crc32fast::hash(&all)
    );
    expect![[r#"
        2+1 [
            "03 02",
        ]
        4+2 [
            "1b 1c 12 14",
            "1c 1b 14 12",
        ]
        16+4 [
            "21 b5 f6 85 df 02 b7 87 3e dd 4a a4 8d da 61 30",
            "b5 21 85 f6 02 df 87 b7 dd 3e a4 4a da 8d 30 61",
            "f6 85 21 b5 b7 87 df 02 4a a4 3e dd 61 30 8d da",
            "85 f6 b5 21 87 b7 02 df a4 4a dd 3e 30 61 da 8d",
        ]
        CRC-32 of all 821fb421
    "#]]
    .assert_eq(&text);
}

#[test]
fn the_bytes_of_a_stripe_are_pinned() {
    let data: Vec<Vec<u8>> = (0..4u8)
        .map(|shard| (0..64u8).map(|byte| byte.wrapping_mul(7).wrapping_add(shard * 61)).collect())
        .collect();
    let parity = encode(&*codec(Scheme { data: 4, parity: 2 }).unwrap(), &data);
    let hex =
        |shard: &[u8]| shard.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    let want = [
        "a8688f3c15f2db252cdeef70495e3db4f0bf8b0485826bd2064e6af456ceea04\
         07951ba881bafb050cfe40645d4aa794d09fabf81116ffc94f6e4ad40ddafe10",
        "8f3efa6350a9a63201b500af8c8550534d347e7cc0d91625eb257fabb41567e3\
         5adeee7744c686122195953b181197736d145e27d4cd02c43f055f8b4881f377",
    ];
    assert_eq!(parity.iter().map(|shard| hex(shard)).collect::<Vec<_>>(), want);
}
