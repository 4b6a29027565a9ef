use proptest::prelude::*;

use super::*;
use crate::mock::MockGptDataset;

fn mock(seed: u64) -> Arc<dyn Dataset> {
    Arc::new(MockGptDataset::new(4, 50, seed).unwrap())
}

fn blend(weights: &[f64]) -> BlendedDataset {
    BlendedDataset::new(
        weights
            .iter()
            .zip(0..)
            .map(|(weight, seed)| (Some(*weight), mock(seed)))
            .collect(),
    )
    .unwrap()
}

proptest! {
    /// Each dataset is used from its beginning without a gap, and is never more than a few samples off its share.
    #[test]
    fn shares_hold_at_every_moment(weights in prop::collection::vec(0.01f64..10.0, 1..8), samples in 1u64..3000) {
        let mix = blend(&weights);
        let sum: f64 = weights.iter().sum();
        let mut counts = vec![0u64; weights.len()];
        for index in 0..samples {
            let (part, place) = mix.locate(index);
            prop_assert_eq!(place, counts[part]);
            counts[part] += 1;
            for (count, weight) in counts.iter().zip(&weights) {
                let off = *count as f64 - weight / sum * (index + 1) as f64;
                prop_assert!(off.abs() <= weights.len() as f64 / 2.0 + 1.0, "off by {off} at {index}");
            }
        }
    }

    #[test]
    fn random_access_agrees_with_reading_in_order(weights in prop::collection::vec(0.1f64..3.0, 2..5), asks in prop::collection::vec(0u64..20_000, 1..20)) {
        let (mix, fresh) = (blend(&weights), blend(&weights));
        let in_order: Vec<_> = (0..20_000).map(|index| fresh.locate(index)).collect();
        for index in asks {
            prop_assert_eq!(mix.locate(index), in_order[index as usize]);
        }
    }
}

/// Made with `build_blending_indices` of megatron-core 0.16.1.
#[test]
fn the_order_is_that_of_megatron_core() {
    let order = |weights: &[f64]| {
        let mix = blend(weights);
        (0..24)
            .map(|index| char::from(b'a' + mix.locate(index).0 as u8))
            .collect::<String>()
    };
    assert_eq!(order(&[0.5, 0.3, 0.2]), "abcabacabaabcabacabaabca");
    assert_eq!(order(&[1.0, 1.0, 1.0, 1.0]), "abcdabcdabcdabcdabcdabcd");
    assert_eq!(order(&[0.9, 0.06, 0.04]), "abaaaaaacaaaaaaaaaabaaaa");
}

#[test]
fn samples_come_from_the_dataset_located() {
    let mix = blend(&[1.0, 3.0]);
    for index in 0..20 {
        let (part, place) = mix.locate(index);
        assert_eq!(
            mix.sample(index).unwrap(),
            mock(part as u64).sample(place).unwrap()
        );
    }
}

#[test]
fn specs_are_paths_or_weights_and_paths() {
    #[track_caller]
    fn check(words: &[&str], expected: &[(Option<f64>, &str)]) {
        let entries: Vec<_> = expected
            .iter()
            .map(|(weight, path)| (*weight, path.to_string()))
            .collect();
        assert_eq!(BlendSpec::parse(words).unwrap().entries, entries);
    }
    check(&["a"], &[(None, "a")]);
    check(&["a", "b"], &[(None, "a"), (None, "b")]);
    check(
        &["0.3", "a", "0.7", "b"],
        &[(Some(0.3), "a"), (Some(0.7), "b")],
    );
    check(&["30 a 70 b"], &[(Some(30.0), "a"), (Some(70.0), "b")]);
    check(&["1"], &[(None, "1")]);
    for words in [&[][..], &["0 a"], &["-1", "a"], &["nan", "a"]] {
        assert!(BlendSpec::parse(words).is_err(), "{words:?}");
    }
}

#[test]
fn impossible_mixtures_are_errors() {
    let longer: Arc<dyn Dataset> = Arc::new(MockGptDataset::new(5, 50, 0).unwrap());
    for parts in [
        vec![],
        vec![(None, mock(0)), (Some(1.0), mock(1))],
        vec![(Some(1.0), mock(0)), (Some(0.0), mock(1))],
        vec![(None, mock(0)), (None, longer)],
    ] {
        assert!(BlendedDataset::new(parts).is_err());
    }
}
