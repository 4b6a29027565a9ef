//! Which bytes of a tensor have been written.

use std::collections::BTreeMap;

/// Disjoint ranges of bytes; neighbours are joined, so in-order writes keep one entry.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// Start of each range, with its end.
    ranges: BTreeMap<u64, u64>,
}

impl Coverage {
    /// Marks `start..end`; `false`, and nothing changes, when a byte of it is marked already.
    #[must_use]
    pub(super) fn claim(&mut self, start: u64, end: u64) -> bool {
        if start == end {
            return true;
        }
        let before = self
            .ranges
            .range(..=start)
            .next_back()
            .map(|(&start, &end)| (start, end));
        let after = self
            .ranges
            .range(start..)
            .next()
            .map(|(&start, &end)| (start, end));
        if before.is_some_and(|(_, before_end)| before_end > start)
            || after.is_some_and(|(next, _)| next < end)
        {
            return false;
        }
        let mut joined = (start, end);
        if let Some((before_start, before_end)) = before
            && before_end == start
        {
            joined.0 = before_start;
        }
        if let Some((next, next_end)) = after
            && next == end
        {
            self.ranges.remove(&next);
            joined.1 = next_end;
        }
        self.ranges.insert(joined.0, joined.1);
        true
    }

    /// The first range of `0..len` that is not marked.
    pub(super) fn first_gap(&self, len: u64) -> Option<(u64, u64)> {
        let mut end = 0;
        for (&start, &range_end) in &self.ranges {
            if start > end {
                return Some((end, start.min(len)));
            }
            end = range_end;
        }
        (end < len).then_some((end, len))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_join_and_overlaps_are_refused() {
        let mut coverage = Coverage::default();
        assert!(coverage.claim(10, 20));
        assert!(coverage.claim(0, 5));
        assert_eq!(coverage.first_gap(20), Some((5, 10)));
        for (start, end) in [(9, 11), (19, 21), (12, 13), (0, 20), (10, 20)] {
            assert!(!coverage.claim(start, end), "{start}..{end}");
        }
        assert!(coverage.claim(15, 15));
        assert!(coverage.claim(5, 10));
        assert_eq!(coverage.ranges, BTreeMap::from([(0, 20)]));
        assert_eq!(coverage.first_gap(20), None);
        assert_eq!(coverage.first_gap(21), Some((20, 21)));
        assert_eq!(Coverage::default().first_gap(0), None);
    }

    proptest! {
        #[test]
        fn agrees_with_a_bitmap(claims in proptest::collection::vec((0u64..40, 0u64..12), 0..40)) {
            let mut coverage = Coverage::default();
            let mut bitmap = [false; 64];
            for (start, len) in claims {
                let bits = &mut bitmap[start as usize..(start + len) as usize];
                let free = !bits.contains(&true);
                prop_assert_eq!(coverage.claim(start, start + len), free);
                if free {
                    bits.fill(true);
                }
            }
            let gap = bitmap.iter().position(|&marked| !marked).map(|p| p as u64);
            prop_assert_eq!(coverage.first_gap(64).map(|(start, _)| start), gap);
        }
    }
}
