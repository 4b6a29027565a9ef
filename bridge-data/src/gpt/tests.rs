use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::batch::Batch;
use crate::sampler::GlobalBatchSampler;
use crate::token_source::MemoryTokens;

/// Documents whose tokens are all different: the k-th token of the data is k.
fn numbered(lens: &[usize]) -> MemoryTokens {
    let mut next = 0..;
    MemoryTokens::new(
        "numbered",
        lens.iter().map(|&len| next.by_ref().take(len).collect()),
    )
}

fn dataset(lens: &[usize], options: GptOptions) -> Result<GptDataset> {
    GptDataset::new(Arc::new(numbered(lens)), 0..lens.len() as u64, options)
}

/// What an epoch predicts: label -> (how often, the input before it).
fn predictions(data: &GptDataset, epoch: u64) -> HashMap<i64, (usize, i64)> {
    let mut seen = HashMap::new();
    for index in 0..data.samples_per_epoch() {
        let sample = data
            .sample(epoch * data.samples_per_epoch() + index)
            .unwrap();
        for (&token, &label) in sample
            .tokens
            .iter()
            .zip(&sample.labels)
            .filter(|(_, label)| **label != IGNORE_INDEX)
        {
            seen.entry(label).or_insert((0, token)).0 += 1;
        }
    }
    seen
}

proptest! {
    #[test]
    fn an_epoch_predicts_every_token_but_the_first_exactly_once(
        lens in prop::collection::vec(0usize..40, 1..60), seq in 1usize..20, seed: u64, epoch in 0u64..3, shuffle: bool
    ) {
        let total: usize = lens.iter().sum();
        prop_assume!(total >= 2);
        let data = dataset(&lens, GptOptions { shuffle, ..GptOptions::new(seq, seed) }).unwrap();
        prop_assert_eq!(data.samples_per_epoch() as usize, (total - 1).div_ceil(seq));
        let seen = predictions(&data, epoch);
        prop_assert_eq!(seen.len(), total - 1);
        let mut starts: Vec<usize> = lens.iter().scan(0, |sum, len| { let start = *sum; *sum += len; Some(start) }).collect();
        starts.sort_unstable();
        for (label, (count, before)) in seen {
            prop_assert_eq!(count, 1);
            // Within a document each token follows its predecessor.
            if !starts.contains(&(label as usize)) {
                prop_assert_eq!(before, label - 1);
            }
        }
    }

    /// Samples are the same whatever the micro-batch size, the number of ranks, and the order of asking.
    #[test]
    fn any_cut_gives_the_same_samples(
        lens in prop::collection::vec(1usize..30, 2..30), seed: u64, consumed in 0u64..100, pick in 0usize..6
    ) {
        let options = GptOptions { eod: Some(3), reset_attention_mask: true, reset_position_ids: true, ..GptOptions::new(7, seed) };
        prop_assume!(lens.iter().sum::<usize>() >= 2);
        let data = dataset(&lens, options).unwrap();
        let whole: Vec<Sample> = (consumed..consumed + 12).map(|index| data.sample(index).unwrap()).collect();
        let (micro, ranks) = [(1, 1), (12, 1), (1, 12), (2, 3), (3, 2), (6, 1)][pick];
        let mut rows = vec![None; 12];
        for rank in (0..ranks).rev() {
            let sampler = GlobalBatchSampler::new(micro, ranks, rank).unwrap();
            for indices in sampler.micro_batches(consumed, 12).unwrap() {
                let batch = Batch::load(&data, &indices).unwrap();
                for (row, index) in indices.iter().enumerate() {
                    let part = row * 7..(row + 1) * 7;
                    rows[(index - consumed) as usize] =
                        Some((batch.tokens[part.clone()].to_vec(), batch.labels[part.clone()].to_vec(), batch.position_ids[part].to_vec()));
                }
            }
        }
        for (row, sample) in rows.into_iter().zip(whole) {
            prop_assert_eq!(row.unwrap(), (sample.tokens, sample.labels, sample.position_ids));
        }
    }
}

#[test]
fn a_dataset_larger_than_one_chunk_is_found_everywhere() {
    let lens: Vec<usize> = (0..2000).map(|i| i % 7).collect();
    let data = dataset(&lens, GptOptions::new(5, 11)).unwrap();
    assert!(data.epochs.lock().unwrap()[0].chunk_starts.len() > 5);
    assert_eq!(predictions(&data, 1).len(), lens.iter().sum::<usize>() - 1);
}

#[test]
fn epochs_differ_and_seeds_differ_and_nothing_else_does() {
    let lens = [9; 40];
    let order = |seed, epoch: u64| {
        let data = dataset(&lens, GptOptions::new(6, seed)).unwrap();
        let first = epoch * data.samples_per_epoch();
        (first..first + data.samples_per_epoch())
            .map(|index| data.sample(index).unwrap().tokens)
            .collect::<Vec<_>>()
    };
    assert_eq!(order(1, 0), order(1, 0));
    assert_eq!(order(1, 3), order(1, 3));
    assert_ne!(order(1, 0), order(1, 1));
    assert_ne!(order(1, 0), order(2, 0));
}

#[test]
fn without_shuffle_samples_follow_the_file_in_every_epoch() {
    let data = dataset(
        &[3, 4, 5],
        GptOptions {
            shuffle: false,
            ..GptOptions::new(4, 1)
        },
    )
    .unwrap();
    let tokens: Vec<_> = (0..6)
        .map(|index| data.sample(index).unwrap().tokens)
        .collect();
    assert_eq!(tokens[..3], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]]);
    assert_eq!(tokens[3..], tokens[..3]);
    assert_eq!(data.sample(2).unwrap().labels, [9, 10, 11, IGNORE_INDEX]);
}

/// `eod = 0` ends documents; the window is `5 6 0 7 0 8 9 | 9`, cut at seq 6 with one token to spare.
#[track_caller]
fn check_borders(options: GptOptions, labels: [i64; 6], positions: [i64; 6], boundaries: &[usize]) {
    let source = MemoryTokens::new("borders", [vec![5, 6, 0], vec![7, 0], vec![8, 9]]);
    let data = GptDataset::new(Arc::new(source), 0..3, options).unwrap();
    let sample = data.sample(0).unwrap();
    assert_eq!(sample.tokens, [5, 6, 0, 7, 0, 8]);
    assert_eq!(sample.labels, labels);
    assert_eq!(sample.position_ids, positions);
    assert_eq!(sample.boundaries, boundaries);
}

#[test]
fn borders_of_documents_act_as_the_options_say() {
    let plain = GptOptions {
        shuffle: false,
        eod: Some(0),
        ..GptOptions::new(6, 1)
    };
    let labels = [6, 0, 7, 0, 8, 9];
    let onward = [0, 1, 2, 3, 4, 5];
    check_borders(plain.clone(), labels, onward, &[0, 6]);
    check_borders(
        GptOptions {
            reset_position_ids: true,
            ..plain.clone()
        },
        labels,
        [0, 1, 2, 0, 1, 0],
        &[0, 6],
    );
    check_borders(
        GptOptions {
            reset_attention_mask: true,
            ..plain.clone()
        },
        labels,
        onward,
        &[0, 3, 5, 6],
    );
    check_borders(
        GptOptions {
            eod_mask_loss: true,
            ..plain.clone()
        },
        [6, 0, IGNORE_INDEX, 0, IGNORE_INDEX, 9],
        onward,
        &[0, 6],
    );
    // The borders are known from the source too.
    check_borders(
        GptOptions {
            eod: None,
            reset_attention_mask: true,
            ..plain
        },
        labels,
        onward,
        &[0, 3, 5, 6],
    );
}

#[test]
fn what_fills_up_the_last_window_has_no_loss_and_attends_apart() {
    let options = GptOptions {
        shuffle: false,
        eod: Some(99),
        reset_attention_mask: true,
        reset_position_ids: true,
        ..GptOptions::new(8, 1)
    };
    let sample = dataset(&[3, 3], options).unwrap().sample(0).unwrap();
    assert_eq!(sample.tokens, [0, 1, 2, 3, 4, 99, 99, 99]);
    assert_eq!(
        sample.labels,
        [1, 2, 3, 4, 5, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    );
    assert_eq!(sample.boundaries, [0, 3, 5, 8]);
    assert_eq!(sample.position_ids, [0, 1, 2, 0, 1, 0, 1, 2]);
}

#[test]
fn batches_join_boundaries_row_by_row() {
    let options = GptOptions {
        shuffle: false,
        reset_attention_mask: true,
        ..GptOptions::new(4, 1)
    };
    let batch = Batch::load(&dataset(&[3, 4, 5], options).unwrap(), &[0, 1]).unwrap();
    assert_eq!(batch.cu_seqlens.as_deref(), Some(&[0, 3, 4, 7, 8][..]));
    assert_eq!(batch.loss_tokens(), 8);
    let plain = dataset(&[3, 4, 5], GptOptions::new(4, 1)).unwrap();
    assert_eq!(Batch::load(&plain, &[0, 1]).unwrap().cu_seqlens, None);
    assert!(Batch::load(&plain, &[]).is_err());
}

#[test]
fn too_little_data_and_wrong_tokens_are_errors() {
    assert!(matches!(
        dataset(&[1, 0], GptOptions::new(4, 1)),
        Err(DataError::TooFewTokens {
            documents: 2,
            tokens: 1,
            ..
        })
    ));
    assert!(dataset(&[4], GptOptions::new(0, 1)).is_err());
    let data = dataset(
        &[4, 5],
        GptOptions {
            vocab_size: Some(7),
            shuffle: false,
            ..GptOptions::new(4, 1)
        },
    )
    .unwrap();
    assert!(data.sample(0).is_ok());
    let error = data.sample(1).err().unwrap().to_string();
    assert!(
        error.contains("sequence 1 of numbered holds 7 at token 3") && error.contains("below 7"),
        "{error}"
    );
}

#[test]
fn the_fingerprint_follows_what_samples_depend_on() {
    let base = GptOptions::new(4, 1);
    let print = |lens: &[usize], options: &GptOptions| {
        dataset(lens, options.clone()).unwrap().fingerprint()
    };
    assert_eq!(print(&[4, 5], &base), print(&[5, 4], &base));
    for other in [
        GptOptions {
            seq_length: 5,
            ..base.clone()
        },
        GptOptions {
            seed: 2,
            ..base.clone()
        },
        GptOptions {
            shuffle: false,
            ..base.clone()
        },
        GptOptions {
            eod: Some(0),
            ..base.clone()
        },
        GptOptions {
            reset_attention_mask: true,
            ..base.clone()
        },
    ] {
        assert_ne!(print(&[4, 5], &base), print(&[4, 5], &other));
    }
    assert_ne!(print(&[4, 5], &base), print(&[4, 6], &base));
}
