//! AdamW with fp32 state, and fp32 master weights where the model's are narrower.

use std::collections::HashSet;

use bridge_ops::{AdamWStep, AdamWTensors, DType, Float, Ops, Param, float_zeros};
use burn::tensor::TensorMetadata;

use super::pattern::name_matches;
use crate::error::{Error, Result};

/// What stays the same over a run.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the running mean of the gradient.
    pub beta1: f64,
    /// Decay of the running mean of the squared gradient.
    pub beta2: f64,
    /// Added to the root of the squared-gradient mean.
    pub eps: f64,
    /// Patterns of the weights that are not decayed (see [`super::name_matches`]).
    pub no_weight_decay: Vec<String>,
    /// What gradients are kept in from the backward pass to the update, where one rank sums them alone.
    pub main_grads_dtype: DType,
    /// What the running mean of the gradient is kept in. (The mean of its square is always fp32: what a step changes in it
    /// may be less than a narrower number's last bit.)
    pub exp_avg_dtype: DType,
}

impl Default for AdamWOptions {
    /// The values of most Llama recipes; norms and biases are not decayed.
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            no_weight_decay: vec!["*norm.weight".into(), "*.bias".into()],
            main_grads_dtype: DType::F32,
            exp_avg_dtype: DType::F32,
        }
    }
}

impl AdamWOptions {
    /// Whether the weight called `name` is decayed.
    pub fn decays(&self, name: &str) -> bool {
        !self
            .no_weight_decay
            .iter()
            .any(|pattern| name_matches(pattern, name))
    }
}

/// A parameter with its optimizer state, which is fp32 unless [`AdamWOptions`] says otherwise.
pub struct ParamState<B: Ops> {
    /// The parameter, as the model uses it.
    pub param: Param<B>,
    /// Whether weight decay applies to it.
    pub decayed: bool,
    /// The weight in fp32, when the model's is narrower, or the lower half of it.
    master: Option<Master<B>>,
    /// Running means of the gradient and of its square. `None` only while a kernel owns them.
    moments: Option<(Float<B>, Float<B>)>,
}

/// What the optimizer keeps of an fp32 weight beside the model's narrower one.
enum Master<B: Ops> {
    /// All of it.
    Whole(Float<B>),
    /// What the model's lacks (see [`Ops::split_halves`]).
    Lower(Float<B>),
}

/// Whether only the lower half is kept of the fp32 weight behind one of `dtype`.
pub(super) fn splits<B: Ops>(dtype: DType) -> bool {
    dtype == DType::BF16 && B::SPLITS_MASTER_WEIGHTS
}

impl<B: Ops> Master<B> {
    /// What belongs to `weight` in fp32, and the model's weight in `dtype`.
    fn new(weight: Float<B>, dtype: DType) -> (Self, Float<B>) {
        if splits::<B>(dtype) {
            let (upper, lower) = B::split_halves(weight);
            (Self::Lower(lower), upper)
        } else {
            let value = B::cast(weight.clone(), dtype);
            (Self::Whole(weight), value)
        }
    }
}

/// The AdamW optimizer.
///
/// ```
/// use bridge_ops::{Param, float_from_f32, to_f32_vec};
/// use bridge_train::optimizer::{AdamW, AdamWOptions};
/// use burn::backend::Flex;
///
/// let device = Default::default();
/// let tensor = |values: &[f32]| float_from_f32::<Flex>(values, &[values.len()], &device);
/// let weight = Param::<Flex>::new("weight", tensor(&[1.0, -1.0]));
/// let mut optimizer = AdamW::new(vec![weight.clone()], &AdamWOptions::default())?;
///
/// weight.accumulate_grad(tensor(&[0.5, -2.0]));
/// optimizer.step(0.1, 0.0, 1.0);
/// // The first step moves every weight by the learning rate, against the sign of its gradient.
/// let moved = to_f32_vec::<Flex>(weight.value());
/// assert!((moved[0] - 0.9).abs() < 1e-6 && (moved[1] + 0.9).abs() < 1e-6);
/// # Ok::<(), bridge_train::Error>(())
/// ```
pub struct AdamW<B: Ops> {
    states: Vec<ParamState<B>>,
    betas: (f64, f64),
    eps: f64,
    steps: u64,
}

impl<B: Ops> AdamW<B> {
    /// An optimizer with zeroed state over those of `params` that require a gradient.
    ///
    /// # Errors
    /// If two parameters have the same name: a weight used in two places (a tied head) must be given once.
    pub fn new(params: Vec<Param<B>>, options: &AdamWOptions) -> Result<Self> {
        let mut names = HashSet::new();
        if let Some(twice) = params
            .iter()
            .find(|param| !names.insert(param.name().to_owned()))
        {
            return Err(Error::DuplicateParameter {
                name: twice.name().to_owned(),
            });
        }
        let states = params
            .into_iter()
            .filter(Param::requires_grad)
            .map(|param| {
                let zeros = |dtype| float_zeros::<B>(&param.shape(), dtype, &param.device());
                param.set_grad_dtype(options.main_grads_dtype);
                ParamState {
                    decayed: options.decays(param.name()),
                    master: (param.dtype() != DType::F32).then(|| {
                        // Exact both ways, so the model's own value stays.
                        Master::new(B::cast(param.value(), DType::F32), param.dtype()).0
                    }),
                    moments: Some((zeros(options.exp_avg_dtype), zeros(DType::F32))),
                    param,
                }
            })
            .collect();
        Ok(Self {
            states,
            betas: (options.beta1, options.beta2),
            eps: options.eps,
            steps: 0,
        })
    }

    /// One update from the gradients in the parameters' slots, which are then cleared. A parameter without a gradient
    /// stays as it is.
    ///
    /// `grad_scale` multiplies every gradient (see [`super::clip_coefficient`]).
    pub fn step(&mut self, lr: f64, weight_decay: f64, grad_scale: f64) {
        self.steps += 1;
        let step = AdamWStep {
            grad_scale,
            ..AdamWStep::new(self.steps, lr, self.betas, self.eps, weight_decay)
        };
        let not_decayed = AdamWStep {
            weight_decay: 0.0,
            ..step
        };
        for (decayed, step) in [(true, step), (false, not_decayed)] {
            // Everything is moved out and back, so that the kernel owns its buffers and can work in place.
            let mut states: Vec<&mut ParamState<B>> = (self.states.iter_mut())
                .filter(|state| state.decayed == decayed && state.param.grad().is_some())
                .collect();
            let tensors = states.iter_mut().map(|state| state.take()).collect();
            let updated = B::adamw_step_many(tensors, &step);
            for (state, tensors) in states.iter_mut().zip(updated) {
                state.put(tensors);
                state.param.clear_grad();
            }
        }
    }

    /// Forgets the gradients.
    pub fn clear_grads(&self) {
        self.states
            .iter()
            .for_each(|state| state.param.clear_grad());
    }

    /// The parameters it updates.
    pub fn params(&self) -> Vec<Param<B>> {
        self.states
            .iter()
            .map(|state| state.param.clone())
            .collect()
    }

    /// Updates done, which the bias correction depends on.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the number of updates done, when state is restored.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// The parameters with their state, in the order they were given.
    pub fn states(&self) -> &[ParamState<B>] {
        &self.states
    }

    /// The parameters with their state, to restore it.
    pub fn states_mut(&mut self) -> &mut [ParamState<B>] {
        &mut self.states
    }
}

impl<B: Ops> ParamState<B> {
    /// Running mean of the gradient; shares the buffer.
    pub fn exp_avg(&self) -> Float<B> {
        self.moments().0.clone()
    }

    /// Running mean of the squared gradient; shares the buffer.
    pub fn exp_avg_sq(&self) -> Float<B> {
        self.moments().1.clone()
    }

    /// The weight in fp32, if the model's is narrower.
    pub fn master(&self) -> Option<Float<B>> {
        Some(match self.master.as_ref()? {
            Master::Whole(weight) => weight.clone(),
            Master::Lower(lower) => B::join_halves(self.param.value(), lower.clone()),
        })
    }

    /// Restores the running means, shaped like the parameter, in the dtypes they are kept in.
    pub fn set_moments(&mut self, exp_avg: Float<B>, exp_avg_sq: Float<B>) {
        let (m, v) = self.moments();
        let (m, v) = (m.dtype(), v.dtype());
        self.moments = Some((B::cast(exp_avg, m), B::cast(exp_avg_sq, v)));
    }

    /// Sets the weight from fp32, in the model's precision as well.
    pub fn set_weight(&mut self, weight: Float<B>) {
        match &mut self.master {
            None => self.param.set_value(weight),
            Some(master) => {
                let (own, value) = Master::new(weight, self.param.dtype());
                self.param.set_value(value);
                *master = own;
            }
        }
    }

    fn moments(&self) -> &(Float<B>, Float<B>) {
        self.moments
            .as_ref()
            .expect("the moments are back after every update")
    }

    /// Moves out everything that an update works on. The gradient is shared with the parameter's slot, which keeps its
    /// buffer.
    fn take(&mut self) -> AdamWTensors<B> {
        let (m, v) = self
            .moments
            .take()
            .expect("the moments are back after every update");
        let value = self.param.take_value();
        let (master, copy) = match self.master.take() {
            Some(Master::Whole(master) | Master::Lower(master)) => (master, Some(value)),
            None => (value, None),
        };
        AdamWTensors {
            master,
            grad: self.param.grad(),
            m,
            v,
            copy,
        }
    }

    /// Moves it back in after the update.
    fn put(&mut self, tensors: AdamWTensors<B>) {
        let AdamWTensors {
            master, m, v, copy, ..
        } = tensors;
        self.moments = Some((m, v));
        match copy {
            Some(copy) => {
                self.param.put_value(copy);
                self.master = Some(if splits::<B>(self.param.dtype()) {
                    Master::Lower(master)
                } else {
                    Master::Whole(master)
                });
            }
            None => self.param.put_value(master),
        }
    }
}
