//! The chunked scan against the recurrence it stands for.

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use burn_backend::ops::FloatTensorOps;
use burn_flex::{Flex, FlexTensor};

use super::*;
use crate::shape::slices_along;
use crate::testing::{ROUNDING, assert_close, check, random, random_bf16};
use crate::{concat, to_f32_vec};

type Tracked<const D: usize> = Tensor<Autodiff<Flex>, D>;

/// Token by token; the state starts anew at each of `starts`.
fn recurrence(
    inputs: [Tracked<4>; 3],
    [dt, log_decay]: [Tracked<3>; 2],
    skip: Option<Tracked<1>>,
    starts: &[usize],
) -> Tracked<4> {
    let [x, b, c] = inputs;
    let [batch, seq, heads, head_dim] = x.dims();
    let [_, _, groups, state_size] = b.dims();
    let device = x.device();
    let zeros = || Tensor::zeros([batch, heads, head_dim, state_size], &device);
    let mut state = zeros();
    let mut tokens = Vec::new();
    for t in 0..seq {
        if starts.contains(&t) {
            state = zeros();
        }
        let per_head = |x: &Tracked<3>| x.clone().narrow(1, t, 1).reshape([batch, heads, 1, 1]);
        let per_group = |x: &Tracked<4>| {
            let x = x
                .clone()
                .narrow(1, t, 1)
                .squeeze_dim::<3>(1)
                .unsqueeze_dim::<4>(2);
            x.expand([batch, groups, heads / groups, state_size])
                .reshape([batch, heads, 1, state_size])
        };
        let token = x
            .clone()
            .narrow(1, t, 1)
            .reshape([batch, heads, head_dim, 1]);
        state = state * per_head(&log_decay).exp() + token.clone() * per_head(&dt) * per_group(&b);
        let mut y = (state.clone() * per_group(&c)).sum_dim(3);
        if let Some(skip) = &skip {
            y = y + token * skip.clone().reshape([1, heads, 1, 1]);
        }
        tokens.push(y.reshape([batch, 1, heads, head_dim]));
    }
    Tensor::cat(tokens, 1)
}

struct Case {
    batch: usize,
    seq: usize,
    heads: usize,
    groups: usize,
    head_dim: usize,
    state: usize,
}

impl Case {
    /// x, dt, log_decay, b, c.
    fn inputs(&self) -> [FlexTensor; 5] {
        let Self {
            batch,
            seq,
            heads,
            groups,
            head_dim,
            state,
        } = *self;
        let positive = |seed| {
            let x = random(&[batch, seq, heads], seed);
            Flex::float_add_scalar(x, 1.05f32.into())
        };
        [
            random(&[batch, seq, heads, head_dim], 1),
            positive(2),
            Flex::float_neg(positive(3)),
            random(&[batch, seq, groups, state], 4),
            random(&[batch, seq, groups, state], 5),
        ]
    }
}

fn of<B: Ops>(x: &[Var<B>]) -> SsdInputs<Var<B>> {
    let array: [Var<B>; 5] = x.to_vec().try_into().expect("five inputs");
    SsdInputs::from_array(array)
}

#[track_caller]
fn check_case(case: &Case, spec: &ScanSpec, starts: &[usize]) {
    check(
        &format!("{} tokens, {spec:?}", case.seq),
        &case.inputs(),
        &[random(&[case.heads], 6)],
        |tape, x, p| ssd_scan(tape, &of(x), Some(&p[0]), spec),
        |x, p| {
            recurrence(
                [x[0].tensor(), x[3].tensor(), x[4].tensor()],
                [x[1].tensor(), x[2].tensor()],
                Some(p[0].tensor()),
                starts,
            )
        },
    );
}

const SMALL: Case = Case {
    batch: 2,
    seq: 11,
    heads: 6,
    groups: 2,
    head_dim: 5,
    state: 3,
};

#[test]
fn matches_autodiff_of_the_recurrence() {
    // Chunks that divide the sequence, that do not, of one token, and longer than the sequence.
    for (seq, chunk_size) in [(11, 4), (8, 4), (5, 1), (1, 16), (7, 16)] {
        check_case(&Case { seq, ..SMALL }, &ScanSpec::new(chunk_size), &[0]);
    }
    let one_group = Case {
        batch: 1,
        heads: 3,
        groups: 1,
        ..SMALL
    };
    check_case(&one_group, &ScanSpec::new(3), &[0]);
    let own_group = Case {
        heads: 2,
        groups: 2,
        ..SMALL
    };
    check_case(&own_group, &ScanSpec::new(5), &[0]);
}

#[test]
fn documents_are_kept_apart() {
    // One of them is empty.
    let case = Case { batch: 1, ..SMALL };
    let spec = ScanSpec::new(4).with_documents(Some([0, 2, 2, 8, 11].into()));
    check_case(&case, &spec, &[0, 2, 8]);
}

#[test]
fn without_a_skip_connection() {
    check(
        "no skip",
        &SMALL.inputs(),
        &[],
        |tape, x, _| ssd_scan(tape, &of(x), None, &ScanSpec::new(4)),
        |x, _| {
            recurrence(
                [x[0].tensor(), x[3].tensor(), x[4].tensor()],
                [x[1].tensor(), x[2].tensor()],
                None,
                &[0],
            )
        },
    );
}

#[test]
fn a_text_in_pieces_is_the_text() {
    let (inputs, skip) = (SMALL.inputs(), Param::<Flex>::new("d", random(&[6], 6)));
    let (spec, tape) = (ScanSpec::new(4), Tape::<Flex>::inference());
    let vars = |range: Option<std::ops::Range<usize>>| {
        let cut = |x: &FlexTensor| match &range {
            Some(range) => {
                let rank = dims(x).len();
                Flex::float_slice(x.clone(), &slices_along(rank, 1, range.clone()))
            }
            None => x.clone(),
        };
        of(&inputs
            .iter()
            .map(|x| tape.constant(cut(x)))
            .collect::<Vec<_>>())
    };
    let whole = ssd_scan(&tape, &vars(None), Some(&skip), &spec);
    let (mut state, mut parts) = (None, Vec::new());
    for range in [0..6, 6..7, 7..8, 8..11] {
        let (y, next) = ssd_scan_with_state(&tape, &vars(Some(range)), Some(&skip), state, &spec);
        state = Some(next);
        parts.push(y);
    }
    assert_close(
        "y",
        &concat(&tape, &parts, 1).value(),
        &whole.value(),
        ROUNDING,
    );
}

#[test]
fn strong_decay_makes_no_nan() {
    let mut inputs = SMALL.inputs();
    inputs[2] = Flex::float_mul_scalar(inputs[2].clone(), 200.0f32.into());
    let tape = Tape::new();
    let vars: Vec<_> = inputs.into_iter().map(|x| tape.leaf(x)).collect();
    let y = ssd_scan::<Flex>(&tape, &of(&vars), None, &ScanSpec::new(4));
    let value = y.value();
    let seed = random(&y.shape(), 9);
    let grads = tape.backward(vec![(y, seed)], &vars.iter().collect::<Vec<_>>());
    let all = grads.into_iter().flatten().chain([value]);
    assert!(all.flat_map(to_f32_vec::<Flex>).all(f32::is_finite));
}

#[test]
fn half_precision_inputs_keep_their_dtype() {
    let [x, dt, log_decay, b, _] = SMALL.inputs();
    let tape = Tape::new();
    let narrow = |seed, like: &FlexTensor| tape.leaf(random_bf16(&dims(like), seed));
    let inputs = SsdInputs {
        x: narrow(1, &x),
        dt: tape.leaf(dt),
        log_decay: tape.leaf(log_decay),
        b: narrow(4, &b),
        c: narrow(5, &b),
    };
    let y = ssd_scan::<Flex>(&tape, &inputs, None, &ScanSpec::new(4));
    assert_eq!(y.value().dtype(), crate::DType::BF16);
    let seed = random_bf16(&y.shape(), 9);
    let grads = tape.backward(vec![(y, seed)], &[&inputs.x, &inputs.dt, &inputs.b]);
    let dtypes: Vec<_> = grads.iter().flatten().map(|grad| grad.dtype()).collect();
    use crate::DType::{BF16, F32};
    assert_eq!(dtypes, [BF16, F32, BF16]);
}

#[test]
#[should_panic(expected = "do not fit together")]
fn shapes_are_checked() {
    let mut inputs = SMALL.inputs();
    inputs[4] = random(&[2, 11, 3, 3], 5);
    let tape = Tape::inference();
    let vars: Vec<_> = inputs.into_iter().map(|x| tape.constant(x)).collect();
    ssd_scan::<Flex>(&tape, &of(&vars), None, &ScanSpec::new(4));
}
