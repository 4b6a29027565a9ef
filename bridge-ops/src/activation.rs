//! Activation functions, alone and as the gate of a gated MLP.
//!
//! ```text
//! y = act(x)                dx = act'(x) dy
//! y = act(gate) * up        dgate = act'(gate) up dy,  dup = act(gate) dy
//! ```
//!
//! Computed in fp32 and rounded to the dtype of the input at the end.

use std::f64::consts::{FRAC_1_SQRT_2, PI};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use burn::tensor::{Tensor, activation as burn_activation};
use burn_backend::TensorMetadata;
use serde::{Deserialize, Serialize};

use crate::elementwise::check_alike;
use crate::ops::Ops;
use crate::primitive::{Float, dims, float, reshaped, tensor, to_dtype, to_f32};
use crate::saved::Recipe;
use crate::tape::{Tape, Var};

/// An activation function; reads and writes as the `hidden_act` of a Hugging Face config.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Activation {
    /// `x sigmoid(x)`, also called swish.
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    /// `x Phi(x)` with the normal distribution function.
    #[serde(rename = "gelu")]
    Gelu,
    /// The tanh approximation of GELU.
    #[serde(rename = "gelu_pytorch_tanh", alias = "gelu_new", alias = "gelu_fast")]
    GeluTanh,
    /// `x sigmoid(1.702 x)`.
    #[serde(rename = "quick_gelu")]
    QuickGelu,
    /// `max(x, 0)`.
    #[serde(rename = "relu")]
    Relu,
    /// `max(x, 0)^2`.
    #[serde(rename = "relu2")]
    Relu2,
    /// `1 / (1 + exp(-x))`.
    #[serde(rename = "sigmoid")]
    Sigmoid,
    /// Hyperbolic tangent.
    #[serde(rename = "tanh")]
    Tanh,
}

impl Activation {
    /// Every activation.
    pub const ALL: [Self; 8] = [
        Self::Silu,
        Self::Gelu,
        Self::GeluTanh,
        Self::QuickGelu,
        Self::Relu,
        Self::Relu2,
        Self::Sigmoid,
        Self::Tanh,
    ];

    /// The Hugging Face name; where there are several, the usual one.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_pytorch_tanh",
            Self::QuickGelu => "quick_gelu",
            Self::Relu => "relu",
            Self::Relu2 => "relu2",
            Self::Sigmoid => "sigmoid",
            Self::Tanh => "tanh",
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name of an activation function that is not known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown activation `{0}`; known are silu, gelu, gelu_pytorch_tanh, quick_gelu, relu, relu2, sigmoid, tanh"
)]
pub struct UnknownActivation(
    /// The name.
    pub String,
);

impl FromStr for Activation {
    type Err = UnknownActivation;

    fn from_str(name: &str) -> Result<Self, UnknownActivation> {
        let name = match name {
            "swish" => "silu",
            "gelu_new" | "gelu_fast" => "gelu_pytorch_tanh",
            name => name,
        };
        Self::ALL
            .into_iter()
            .find(|act| act.as_str() == name)
            .ok_or_else(|| UnknownActivation(name.to_owned()))
    }
}

/// `y = act(x)`, elementwise.
pub fn activation<B: Ops>(tape: &Tape<B>, x: &Var<B>, activation: Activation) -> Var<B> {
    let output = B::activation_forward(x.value(), activation);
    let input = x.saved();
    let y = tape.record(output, &[x], move |dy| {
        vec![Some(B::activation_backward(input.get(), dy, activation))]
    });
    let input = x.value();
    tape.cheap(y, move || B::activation_forward(input.clone(), activation))
}

/// `y = act(gate) * up`, elementwise: SwiGLU (Shazeer 2020, "GLU Variants Improve Transformer") with `Silu`.
///
/// # Panics
/// When shapes or dtypes of gate and up differ.
#[track_caller]
pub fn gated_activation<B: Ops>(
    tape: &Tape<B>,
    gate: &Var<B>,
    up: &Var<B>,
    activation: Activation,
) -> Var<B> {
    check_alike("gated_activation", gate, up);
    let output = B::gated_activation_forward(gate.value(), up.value(), activation);
    let parents = [gate, up];
    // The backward kernel reads all that the output is made from, so it can make the output once more on the side.
    let recipe = (tape.recomputes_cheap() && tape.needs_grad(&parents, &[])).then(|| {
        let (gate, up) = (gate.value(), up.value());
        Arc::new(Recipe::new(true, move || {
            B::gated_activation_forward(gate.clone(), up.clone(), activation)
        }))
    });
    let own = recipe.clone();
    let (gate_value, up_value) = (gate.saved(), up.saved());
    let y = tape.record(output, &parents, move |dy| {
        let waiting = own.map_or_else(Vec::new, |recipe| recipe.take_waiting());
        let (gate, up) = (gate_value.get(), up_value.get());
        if waiting.is_empty() {
            let (dgate, dup) = B::gated_activation_backward(gate, up, dy, activation);
            return vec![Some(dgate), Some(dup)];
        }
        let (dgate, dup, y) = B::gated_activation_backward_with_output(gate, up, dy, activation);
        for work in waiting {
            work(y.clone());
        }
        vec![Some(dgate), Some(dup)]
    });
    y.with_recipe(recipe)
}

pub(crate) fn portable<B: Ops>(x: Float<B>, activation: Activation) -> Float<B> {
    let (shape, dtype) = (dims(&x), x.dtype());
    finish::<B>(value(flat::<B>(x), activation), &shape, dtype)
}

pub(crate) fn portable_backward<B: Ops>(
    x: Float<B>,
    dy: Float<B>,
    activation: Activation,
) -> Float<B> {
    let (shape, dtype) = (dims(&x), x.dtype());
    finish::<B>(
        slope(flat::<B>(x), activation) * flat::<B>(dy),
        &shape,
        dtype,
    )
}

pub(crate) fn portable_gated<B: Ops>(
    gate: Float<B>,
    up: Float<B>,
    activation: Activation,
) -> Float<B> {
    let (shape, dtype) = (dims(&gate), gate.dtype());
    finish::<B>(
        value(flat::<B>(gate), activation) * flat::<B>(up),
        &shape,
        dtype,
    )
}

pub(crate) fn portable_gated_backward<B: Ops>(
    gate: Float<B>,
    up: Float<B>,
    dy: Float<B>,
    activation: Activation,
) -> (Float<B>, Float<B>) {
    let (shape, dtype) = (dims(&gate), gate.dtype());
    let (gate, up, dy) = (flat::<B>(gate), flat::<B>(up), flat::<B>(dy));
    let dup = value(gate.clone(), activation) * dy.clone();
    let dgate = slope(gate, activation) * up * dy;
    (
        finish::<B>(dgate, &shape, dtype),
        finish::<B>(dup, &shape, dtype),
    )
}

pub(crate) fn portable_gated_backward_with_output<B: Ops>(
    gate: Float<B>,
    up: Float<B>,
    dy: Float<B>,
    activation: Activation,
) -> (Float<B>, Float<B>, Float<B>) {
    let y = B::gated_activation_forward(gate.clone(), up.clone(), activation);
    let (dgate, dup) = B::gated_activation_backward(gate, up, dy, activation);
    (dgate, dup, y)
}

fn flat<B: Ops>(x: Float<B>) -> Tensor<B, 1> {
    let count = x.shape().num_elements();
    tensor(reshaped::<B>(to_f32::<B>(x), &[count]))
}

fn finish<B: Ops>(y: Tensor<B, 1>, shape: &[usize], dtype: burn_backend::DType) -> Float<B> {
    reshaped::<B>(to_dtype::<B>(float(y), dtype), shape)
}

/// act(x).
fn value<B: Ops>(x: Tensor<B, 1>, activation: Activation) -> Tensor<B, 1> {
    match activation {
        Activation::Silu => burn_activation::sigmoid(x.clone()) * x,
        Activation::Gelu => {
            x.clone()
                .mul_scalar(FRAC_1_SQRT_2)
                .erf()
                .add_scalar(1.0)
                .mul_scalar(0.5)
                * x
        }
        Activation::GeluTanh => gelu_inner(x.clone()).tanh().add_scalar(1.0).mul_scalar(0.5) * x,
        Activation::QuickGelu => burn_activation::sigmoid(x.clone().mul_scalar(QUICK)) * x,
        Activation::Relu => burn_activation::relu(x),
        Activation::Relu2 => burn_activation::relu(x).square(),
        Activation::Sigmoid => burn_activation::sigmoid(x),
        Activation::Tanh => x.tanh(),
    }
}

/// act'(x).
fn slope<B: Ops>(x: Tensor<B, 1>, activation: Activation) -> Tensor<B, 1> {
    // s (1 + x (1 - s)) scale: the slope of x sigmoid(scale x), with s the sigmoid.
    let sigmoid_gate_slope = |x: Tensor<B, 1>, scale: f64| {
        let s = burn_activation::sigmoid(x.clone().mul_scalar(scale));
        let one_minus = s.clone().neg().add_scalar(1.0);
        s * (x.mul_scalar(scale) * one_minus).add_scalar(1.0)
    };
    match activation {
        Activation::Silu => sigmoid_gate_slope(x, 1.0),
        Activation::QuickGelu => sigmoid_gate_slope(x, QUICK),
        Activation::Gelu => {
            let cdf = x
                .clone()
                .mul_scalar(FRAC_1_SQRT_2)
                .erf()
                .add_scalar(1.0)
                .mul_scalar(0.5);
            let pdf = x
                .clone()
                .square()
                .mul_scalar(-0.5)
                .exp()
                .mul_scalar((2.0 * PI).sqrt().recip());
            cdf + x * pdf
        }
        Activation::GeluTanh => {
            let t = gelu_inner(x.clone()).tanh();
            let inner_slope = x
                .clone()
                .square()
                .mul_scalar(3.0 * GELU_CUBIC)
                .add_scalar(1.0)
                .mul_scalar(GELU_LINEAR);
            let sech2 = t.clone().square().neg().add_scalar(1.0);
            t.add_scalar(1.0).mul_scalar(0.5) + x.mul_scalar(0.5) * sech2 * inner_slope
        }
        Activation::Relu => x.greater_elem(0.0).float(),
        Activation::Relu2 => burn_activation::relu(x).mul_scalar(2.0),
        Activation::Sigmoid => {
            let s = burn_activation::sigmoid(x);
            s.clone() * s.neg().add_scalar(1.0)
        }
        Activation::Tanh => x.tanh().square().neg().add_scalar(1.0),
    }
}

const QUICK: f64 = 1.702;
/// sqrt(2 / pi) and the cubic coefficient of the tanh approximation (Hendrycks and Gimpel 2016).
pub(crate) const GELU_LINEAR: f64 = 0.797_884_560_802_865_4;
pub(crate) const GELU_CUBIC: f64 = 0.044_715;

fn gelu_inner<B: Ops>(x: Tensor<B, 1>) -> Tensor<B, 1> {
    let cubic = x.clone().square().mul_scalar(GELU_CUBIC).add_scalar(1.0);
    (x * cubic).mul_scalar(GELU_LINEAR)
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{ROUNDING, assert_close, assert_fast, check, random};

    /// Values from -6 to 6, so that the tails are seen, and an odd number of them.
    fn wide(seed: u64) -> Float<Flex> {
        Flex::scale(random(&[5, 7, 13], seed), 6.0)
    }

    #[test]
    fn values_and_slopes_match_autodiff() {
        for act in Activation::ALL {
            check(
                act.as_str(),
                &[wide(1)],
                &[],
                |tape, x, _| activation(tape, &x[0], act),
                |x, _| formula(x[0].tensor::<3>(), act),
            );
            check(
                &format!("gated {act}"),
                &[wide(1), random(&[5, 7, 13], 2)],
                &[],
                |tape, x, _| gated_activation(tape, &x[0], &x[1], act),
                |x, _| formula(x[0].tensor::<3>(), act) * x[1].tensor::<3>(),
            );
            assert_fast(&[
                "activation_forward",
                "activation_backward",
                "gated_activation_forward",
                "gated_activation_backward",
            ]);
        }
    }

    /// As Burn or the definition has them.
    fn formula<B: burn_backend::Backend>(x: Tensor<B, 3>, act: Activation) -> Tensor<B, 3> {
        match act {
            Activation::Silu => burn_activation::silu(x),
            Activation::Gelu => burn_activation::gelu(x),
            Activation::GeluTanh => {
                let inner = (x.clone() + x.clone().powi_scalar(3).mul_scalar(0.044715))
                    .mul_scalar((2.0 / PI).sqrt());
                x.mul_scalar(0.5) * inner.tanh().add_scalar(1.0)
            }
            Activation::QuickGelu => x.clone() * burn_activation::sigmoid(x.mul_scalar(1.702)),
            Activation::Relu => burn_activation::relu(x),
            Activation::Relu2 => burn_activation::relu(x).powi_scalar(2),
            Activation::Sigmoid => burn_activation::sigmoid(x),
            Activation::Tanh => x.tanh(),
        }
    }

    #[test]
    fn kernels_agree_with_portable_bodies() {
        for act in Activation::ALL {
            let (x, up, dy) = (wide(1), random(&[5, 7, 13], 2), random(&[5, 7, 13], 3));
            let found = Flex::activation_forward(x.clone(), act);
            assert_close("y", &found, &portable::<Flex>(x.clone(), act), ROUNDING);
            let found = Flex::activation_backward(x.clone(), dy.clone(), act);
            assert_close(
                "dx",
                &found,
                &portable_backward::<Flex>(x.clone(), dy.clone(), act),
                ROUNDING,
            );
            let found = Flex::gated_activation_backward(x.clone(), up.clone(), dy.clone(), act);
            let expected = portable_gated_backward::<Flex>(x, up, dy, act);
            assert_close("dgate", &found.0, &expected.0, ROUNDING);
            assert_close("dup", &found.1, &expected.1, ROUNDING);
        }
    }

    #[test]
    fn names_are_those_of_hugging_face() {
        for act in Activation::ALL {
            assert_eq!(act.as_str().parse(), Ok(act));
            assert_eq!(serde_json::to_string(&act).unwrap(), format!("\"{act}\""));
            assert_eq!(
                serde_json::from_str::<Activation>(&format!("\"{act}\"")).unwrap(),
                act
            );
        }
        assert_eq!("swish".parse(), Ok(Activation::Silu));
        assert_eq!("gelu_new".parse(), Ok(Activation::GeluTanh));
        let error = "mish".parse::<Activation>().unwrap_err().to_string();
        assert!(
            error.contains("`mish`") && error.contains("silu"),
            "{error}"
        );
    }

    #[test]
    fn made_again_on_the_side_gradients_are_the_same() {
        use crate::{Param, linear};
        let gradients = |recompute: bool| {
            let weight = Param::<Flex>::new("w", random(&[5, 7], 3));
            let tape = Tape::<Flex>::new();
            let tape = if recompute {
                tape.recompute_cheap()
            } else {
                tape
            };
            let (gate, up) = (tape.leaf(random(&[4, 7], 1)), tape.leaf(random(&[4, 7], 2)));
            let inner = gated_activation(&tape, &gate, &up, Activation::Silu);
            let y = linear(&tape, &inner, &weight, None);
            drop(inner);
            let grads = tape.backward(vec![(y, random(&[4, 5], 4))], &[&gate, &up]);
            let mut all: Vec<_> = grads.into_iter().map(Option::unwrap).collect();
            all.push(
                weight
                    .grad()
                    .expect("the weight's gradient waited for the activation"),
            );
            all.into_iter()
                .map(crate::to_f32_vec::<Flex>)
                .collect::<Vec<_>>()
        };
        assert_eq!(gradients(true), gradients(false));
    }
}
