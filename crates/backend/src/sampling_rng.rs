//! The random number of a sampled token: a pure function of (seed, position), so that a draw depends on nothing else in
//! the batch and can be made again after a preemption.
//!
//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the generator
//! that GPU libraries use too: cheap in registers, no state.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32 with ten rounds.
pub const fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < 10 {
        let a = MULTIPLIERS[0] as u64 * counter[0] as u64;
        let b = MULTIPLIERS[1] as u64 * counter[2] as u64;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        round += 1;
    }
    counter
}

/// The draw for the token at absolute `position` of the sequence with `seed`: in `(0, 1)`, 32 bits of resolution.
///
/// Key = the seed's low and high words, counter = `[position, 0, 0, 0]`, `u = (x0 + 0.5) / 2^32`.
pub const fn uniform(seed: u64, position: u32) -> f64 {
    let x = philox4x32([position, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    (x[0] as f64 + 0.5) / 4_294_967_296.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the authors' Random123 library.
    #[test]
    fn matches_the_published_vectors() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn draws_are_uniform_and_distinct_by_seed_and_position() {
        let mut histogram = [0u32; 10];
        for position in 0..10_000 {
            histogram[(uniform(7, position) * 10.0) as usize] += 1;
        }
        assert!(histogram.iter().all(|&n| (850..1150).contains(&n)), "{histogram:?}");
        assert_ne!(uniform(1, 5), uniform(2, 5));
        assert_ne!(uniform(1, 5), uniform(1 << 32, 5));
        assert_ne!(uniform(1, 5), uniform(1, 6));
    }
}
