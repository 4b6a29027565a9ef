//! The chunked gated delta rule against the recurrence it stands for.

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use burn_backend::ops::FloatTensorOps;
use burn_flex::{Flex, FlexTensor};

use super::*;
use crate::shape::slices_along;
use crate::testing::{ROUNDING, assert_close, check, random};
use crate::{concat, float_from_f32, to_f32_vec};

type Tracked<const D: usize> = Tensor<Autodiff<Flex>, D>;

const SCALE: f64 = 0.4;

/// Token by token; the state starts anew at each of `starts`.
fn recurrence(
    [q, k, v]: [Tracked<4>; 3],
    [log_decay, beta]: [Tracked<3>; 2],
    starts: &[usize],
) -> Tracked<4> {
    let [batch, seq, heads, value_dim] = v.dims();
    let [_, _, key_heads, key_dim] = k.dims();
    let device = v.device();
    let zeros = || Tensor::zeros([batch, heads, key_dim, value_dim], &device);
    let mut state = zeros();
    let mut tokens = Vec::new();
    for t in 0..seq {
        if starts.contains(&t) {
            state = zeros();
        }
        let per_head = |x: &Tracked<3>| x.clone().narrow(1, t, 1).reshape([batch, heads, 1, 1]);
        let key = |x: &Tracked<4>| {
            let x = x
                .clone()
                .narrow(1, t, 1)
                .squeeze_dim::<3>(1)
                .unsqueeze_dim::<4>(2);
            x.expand([batch, key_heads, heads / key_heads, key_dim])
                .reshape([batch, heads, key_dim, 1])
        };
        state = state * per_head(&log_decay).exp();
        let held = (state.clone() * key(&k)).sum_dim(2);
        let value = v
            .clone()
            .narrow(1, t, 1)
            .reshape([batch, heads, 1, value_dim]);
        state = state + key(&k) * ((value - held) * per_head(&beta));
        let o = (state.clone() * key(&q)).sum_dim(2).mul_scalar(SCALE);
        tokens.push(o.reshape([batch, 1, heads, value_dim]));
    }
    Tensor::cat(tokens, 1)
}

struct Case {
    batch: usize,
    seq: usize,
    key_heads: usize,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
}

impl Case {
    /// q, k, v, log_decay, beta.
    fn inputs(&self) -> [FlexTensor; 5] {
        let Self {
            batch,
            seq,
            key_heads,
            heads,
            key_dim,
            value_dim,
        } = *self;
        let unit = |seed| {
            let x = random(&[batch, seq, key_heads, key_dim], seed);
            Flex::l2_norm_forward(x, 1e-6)
        };
        let between = |seed, low: f32, high: f32| {
            let x = random(&[batch, seq, heads], seed);
            let x = Flex::float_mul_scalar(x, ((high - low) / 2.0).into());
            Flex::float_add_scalar(x, ((high + low) / 2.0).into())
        };
        [
            unit(1),
            unit(2),
            random(&[batch, seq, heads, value_dim], 3),
            between(4, -0.8, -0.01),
            between(5, 0.05, 0.95),
        ]
    }
}

fn of<B: Ops>(x: &[Var<B>]) -> DeltaRuleInputs<Var<B>> {
    let array: [Var<B>; 5] = x.to_vec().try_into().expect("five inputs");
    DeltaRuleInputs::from_array(array)
}

#[track_caller]
fn check_case(case: &Case, spec: &ScanSpec, starts: &[usize]) {
    check(
        &format!("{} tokens, {spec:?}", case.seq),
        &case.inputs(),
        &[],
        |tape, x, _| gated_delta_rule(tape, &of(x), SCALE, spec),
        |x, _| {
            recurrence(
                [x[0].tensor(), x[1].tensor(), x[2].tensor()],
                [x[3].tensor(), x[4].tensor()],
                starts,
            )
        },
    );
}

const SMALL: Case = Case {
    batch: 2,
    seq: 11,
    key_heads: 2,
    heads: 6,
    key_dim: 5,
    value_dim: 3,
};

#[test]
fn matches_autodiff_of_the_recurrence() {
    // Chunks that divide the sequence, that do not, of one token, no power of two, and longer than the sequence.
    for (seq, chunk_size) in [(11, 4), (8, 4), (5, 1), (1, 64), (7, 64), (13, 6)] {
        check_case(&Case { seq, ..SMALL }, &ScanSpec::new(chunk_size), &[0]);
    }
    let own_keys = Case {
        key_heads: 3,
        heads: 3,
        ..SMALL
    };
    check_case(&own_keys, &ScanSpec::new(5), &[0]);
}

#[test]
fn documents_are_kept_apart() {
    // One of them is empty.
    let case = Case { batch: 1, ..SMALL };
    let spec = ScanSpec::new(4).with_documents(Some([0, 2, 2, 8, 11].into()));
    check_case(&case, &spec, &[0, 2, 8]);
}

#[test]
fn a_text_in_pieces_is_the_text() {
    let (inputs, spec) = (SMALL.inputs(), ScanSpec::new(4));
    let tape = Tape::<Flex>::inference();
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
    let whole = gated_delta_rule(&tape, &vars(None), SCALE, &spec);
    let (mut state, mut parts) = (None, Vec::new());
    for range in [0..6, 6..7, 7..8, 8..11] {
        let (o, next) = gated_delta_rule_with_state(&tape, &vars(Some(range)), state, SCALE, &spec);
        state = Some(next);
        parts.push(o);
    }
    assert_close(
        "o",
        &concat(&tape, &parts, 1).value(),
        &whole.value(),
        ROUNDING,
    );
}

/// Equal keys, full writing strength and no decay are the worst case of the triangular inverse: powers of N reach
/// binomial coefficients of the chunk size, while the inverse is a difference of neighbours.
#[test]
fn the_inverse_is_exact_where_a_series_is_not() {
    let len = 64;
    let ones: Vec<f32> = (0..len * len)
        .map(|at| if at % len < at / len { 1.0 } else { 0.0 })
        .collect();
    let n = float_from_f32::<Flex>(&ones, &[1, 1, len, len], &Default::default());
    let inverse = to_f32_vec::<Flex>(float(unit_lower_inverse::<Flex>(&tensor(n))));
    for (at, value) in inverse.iter().enumerate() {
        let expected = match (at / len).checked_sub(at % len) {
            Some(0) => 1.0,
            Some(1) => -1.0,
            _ => 0.0,
        };
        assert!((value - expected).abs() < 1e-5, "element {at} is {value}");
    }
}

#[test]
#[should_panic(expected = "do not fit together")]
fn shapes_are_checked() {
    let mut inputs = SMALL.inputs();
    inputs[2] = random(&[2, 11, 5, 3], 5);
    let tape = Tape::inference();
    let vars: Vec<_> = inputs.into_iter().map(|x| tape.constant(x)).collect();
    gated_delta_rule::<Flex>(&tape, &of(&vars), SCALE, &ScanSpec::new(4));
}
