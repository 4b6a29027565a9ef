//! Random orders that need no memory.
//!
//! A list of shuffled indices costs bytes for every document and sample, on every rank. A keyed permutation computes each
//! place on demand instead: a Feistel network (Luby and Rackoff, 1988) on the smallest power of two that holds the
//! numbers, repeated until the result falls below `n` ("cycle walking", Black and Rogaway, 2002).

/// Rounds of the network. Four are provably enough against a distinguisher that sees few values; eight leave a margin
/// and cost some 20 ns.
const ROUNDS: u64 = 8;

/// Least width of the network in bits. Narrow networks reach few of the possible orders, so small sets walk through a
/// larger domain.
const MIN_BITS: u32 = 8;

/// A random order of the numbers below `n`, fixed by a key.
///
/// Part of the format of a run: a change here changes the order of the samples of every run that is resumed.
#[derive(Clone, Debug)]
pub struct Permutation {
    n: u64,
    /// Widths of the two halves, in bits.
    high: u32,
    low: u32,
    keys: [u64; ROUNDS as usize],
}

impl Permutation {
    /// The order of `0..n` for a key.
    pub fn new(n: u64, key: u64) -> Self {
        let bits = (u64::BITS - n.saturating_sub(1).leading_zeros()).max(MIN_BITS);
        let keys = std::array::from_fn(|round| mix(key.wrapping_add(mix(round as u64 + 1))));
        Self {
            n,
            high: bits / 2,
            low: bits - bits / 2,
            keys,
        }
    }

    /// How many numbers there are.
    pub fn len(&self) -> u64 {
        self.n
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// The number at place `index`.
    ///
    /// # Panics
    /// If `index` is not below [`len`](Self::len).
    pub fn get(&self, index: u64) -> u64 {
        assert!(
            index < self.n,
            "place {index} in an order of {} numbers",
            self.n
        );
        let mut value = index;
        // Ends: the network is a permutation, so the walk from `index` comes back to `index` at the latest.
        loop {
            value = self.network(value);
            if value < self.n {
                return value;
            }
        }
    }

    /// One pass of the network. The halves keep their widths: even rounds change the high one, odd rounds the low one.
    fn network(&self, value: u64) -> u64 {
        let (high_mask, low_mask) = (mask(self.high), mask(self.low));
        let (mut high, mut low) = (value >> self.low, value & low_mask);
        for (round, key) in self.keys.iter().enumerate() {
            if round % 2 == 0 {
                high ^= mix(low ^ key) & high_mask;
            } else {
                low ^= mix(high ^ key) & low_mask;
            }
        }
        high << self.low | low
    }
}

fn mask(bits: u32) -> u64 {
    u64::MAX.checked_shr(u64::BITS - bits).unwrap_or(0)
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the input reaches every bit of the result.
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A key for one purpose, derived from a seed.
pub(crate) fn derive_key(seed: u64, purpose: Purpose, epoch: u64) -> u64 {
    mix(mix(mix(seed) ^ purpose as u64) ^ epoch)
}

/// What a random order is for; orders for different purposes are independent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    Documents = 1,
    Samples = 2,
    Mock = 3,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_number_comes_exactly_once(n in 1u64..3000, key: u64) {
            let order = Permutation::new(n, key);
            let mut seen = (0..n).map(|index| order.get(index)).collect::<Vec<_>>();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn large_ranges_stay_in_range(n in 1u64.., key: u64, index: u64) {
            let order = Permutation::new(n, key);
            prop_assert!(order.get(index % n) < n);
        }
    }

    /// Each number is about as often at each place, over many keys (chi-squared, 99.99 % quantile).
    #[test]
    fn small_orders_are_fair() {
        for (n, quantile) in [(2u64, 15.1), (3, 18.4), (7, 27.9), (16, 44.3)] {
            let keys = 4000;
            let mut counts = vec![vec![0u32; n as usize]; n as usize];
            for key in 0..keys {
                let order = Permutation::new(n, mix(key));
                for place in 0..n {
                    counts[place as usize][order.get(place) as usize] += 1;
                }
            }
            let expected = keys as f64 / n as f64;
            for row in counts {
                let chi: f64 = row
                    .iter()
                    .map(|&count| (f64::from(count) - expected).powi(2) / expected)
                    .sum();
                assert!(chi < quantile, "n = {n}: {chi} in {row:?}");
            }
        }
    }

    /// The order is part of a run's format, so its values are pinned.
    #[test]
    fn the_order_does_not_change_between_versions() {
        let order = Permutation::new(10, 42);
        let values: Vec<u64> = (0..10).map(|index| order.get(index)).collect();
        assert_eq!(values, PINNED);
    }
    const PINNED: [u64; 10] = [6, 1, 0, 2, 4, 5, 8, 9, 7, 3];
}
