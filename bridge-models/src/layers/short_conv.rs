//! The short causal convolution in front of a recurrent layer.

use std::ops::Range;

use bridge_ops::{
    ConvSpec, Float, Ops, Param, Tape, Var, causal_conv1d, causal_conv1d_with_history,
};

use bridge_parallel::rows_of_params;

use crate::context::ForwardContext;
use crate::error::Result;
use crate::weights::ParamBuilder;

/// One filter per channel, followed by SiLU.
#[derive(Debug, Clone)]
pub struct ShortConv<B: Ops> {
    /// `[channels, taps]`.
    pub weight: Param<B>,
    /// `[channels]`.
    pub bias: Option<Param<B>>,
}

impl<B: Ops> ShortConv<B> {
    /// The convolution called `name`, with `name.weight` of `[channels, taps]` and, if asked for, `name.bias`.
    ///
    /// # Errors
    /// If the weights' source fails.
    pub fn build(
        params: &mut ParamBuilder<'_, B>,
        name: &str,
        [channels, taps]: [usize; 2],
        bias: bool,
    ) -> Result<Self> {
        let weight = params.param(&format!("{name}.weight"), &[channels, taps])?;
        let bias = if bias {
            Some(params.param(&format!("{name}.bias"), &[channels])?)
        } else {
            None
        };
        Ok(Self { weight, bias })
    }

    /// The filters of the channels `own`, for an `x` of these channels alone. See [`rows_of_params`].
    pub fn of_channels(&self, tape: &Tape<B>, x: &Var<B>, own: Range<usize>) -> (Var<B>, Self) {
        let params: Vec<(&Param<B>, Range<usize>)> = std::iter::once(&self.weight)
            .chain(&self.bias)
            .map(|param| (param, own.clone()))
            .collect();
        let (x, parts) = rows_of_params(tape, x, &params);
        let mut parts = parts.into_iter();
        let part = Self {
            weight: parts.next().expect("the weight comes first"),
            bias: parts.next(),
        };
        (x, part)
    }

    /// `x`: `[batch, seq, channels]` -> the same shape. In generation `history` holds the tokens before `x` and is
    /// replaced by those before the next.
    pub fn forward(
        &self,
        tape: &Tape<B>,
        x: &Var<B>,
        history: Option<&mut Option<Float<B>>>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B> {
        let bias = self.bias.as_ref();
        let spec = ConvSpec {
            silu: true,
            documents: ctx.cu_seqlens().cloned(),
        };
        match history {
            None => causal_conv1d(tape, x, &self.weight, bias, &spec),
            Some(history) => {
                let past = history.take();
                let (y, next) =
                    causal_conv1d_with_history(tape, x, &self.weight, bias, past, &spec);
                *history = Some(next);
                y
            }
        }
    }

    /// Appends the weights, in the order of their canonical names.
    pub fn collect(&self, params: &mut Vec<Param<B>>) {
        params.push(self.weight.clone());
        params.extend(self.bias.clone());
    }
}
