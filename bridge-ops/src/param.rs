//! Trainable tensors, which live outside the tape.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn_backend::{DType, TensorMetadata};

use crate::grad_slot::GradSlot;
use crate::ops::Ops;
use crate::primitive::{Float, dims, to_dtype};

/// A named weight with its gradient slot. Cloning gives another handle to the same weight.
///
/// Gradients are fp32 whatever the dtype of the value (unless [`set_grad_dtype`](Self::set_grad_dtype) says otherwise), and
/// are added up over micro-batches until [`clear_grad`](Self::clear_grad) or [`take_grad`](Self::take_grad). A frozen weight
/// (`requires_grad() == false`) gets none, and the products that would compute it are skipped.
pub struct Param<B: Ops> {
    inner: Arc<Inner<B>>,
}

/// Which part of a weight a rank holds, when several ranks divide a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamShard {
    /// Shape of the weight over all ranks.
    pub global_shape: Vec<usize>,
    /// The range of each dimension that this rank holds. Where the value is larger than its ranges (vocabulary rows that
    /// do not divide evenly), the rest at the end is padding: zeros, with gradients of zero.
    pub ranges: Vec<Range<usize>>,
    /// Whether this rank is the first of its pipeline stage that holds the part, and so the one to count or write it.
    pub owner: bool,
    /// How the gradient of a backward pass is completed.
    pub reduction: GradReduction,
}

/// The ranks over which a weight's gradient has to be summed before it is complete for the rank's own data. Every
/// gradient is then summed over the ranks with other data: those of data and context parallelism, or, for the weights
/// of experts, those of the experts' data parallelism.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GradReduction {
    /// None: the rank's gradient is complete.
    #[default]
    None,
    /// All ranks of the tensor-parallel group: each has seen other heads, or another part of the sequence.
    TensorParallel,
    /// Runs of so many neighbours in the tensor-parallel group, which hold the same key-value head and have seen
    /// different query heads of it.
    TensorParallelCopies(usize),
    /// None, and the weight belongs to an expert.
    Expert,
    /// All ranks of the expert-tensor-parallel group, and the weight belongs to an expert.
    ExpertTensorParallel,
}

impl GradReduction {
    /// Whether the weight belongs to an expert.
    pub fn is_expert(self) -> bool {
        matches!(self, Self::Expert | Self::ExpertTensorParallel)
    }
}

struct Inner<B: Ops> {
    name: String,
    shard: Option<ParamShard>,
    requires_grad: AtomicBool,
    state: Mutex<State<B>>,
}

struct State<B: Ops> {
    value: Value<B>,
    grad: GradSlot<B>,
    grad_dtype: DType,
}

/// Where a value is.
enum Value<B: Ops> {
    Here(Float<B>),
    /// With `update`, or with whoever called `take_value`.
    Taken,
    /// Nowhere: only its form is known.
    Released {
        shape: Vec<usize>,
        dtype: DType,
        device: B::Device,
    },
}

impl<B: Ops> Param<B> {
    /// A weight that requires a gradient and has none yet.
    pub fn new(name: impl Into<String>, value: Float<B>) -> Self {
        Self::build(name.into(), value, None)
    }

    /// A rank's part of a weight. `value` covers the ranges of `shard`, from its start.
    ///
    /// # Panics
    /// When the value has no room for the ranges.
    #[track_caller]
    pub fn sharded(name: impl Into<String>, value: Float<B>, shard: ParamShard) -> Self {
        let (name, shape) = (name.into(), dims(&value));
        let fits = shape.len() == shard.ranges.len()
            && shape
                .iter()
                .zip(&shard.ranges)
                .all(|(extent, range)| range.len() <= *extent);
        assert!(
            fits,
            "parameter `{name}` of shape {shape:?} has no room for {:?}",
            shard.ranges
        );
        Self::build(name, value, Some(shard))
    }

    /// A weight without a value, which is to be [brought](Self::set_value) before it is read: a place in a model, of this
    /// shape (that of a rank's part, where `shard` says that it is one).
    pub fn released(
        name: impl Into<String>,
        shape: &[usize],
        dtype: DType,
        device: &B::Device,
        shard: Option<ParamShard>,
    ) -> Self {
        let value = Value::Released {
            shape: shape.to_vec(),
            dtype,
            device: device.clone(),
        };
        Self::of(name.into(), value, shard)
    }

    fn build(name: String, value: Float<B>, shard: Option<ParamShard>) -> Self {
        Self::of(name, Value::Here(value), shard)
    }

    fn of(name: String, value: Value<B>, shard: Option<ParamShard>) -> Self {
        Self {
            inner: Arc::new(Inner {
                name,
                shard,
                requires_grad: AtomicBool::new(true),
                state: Mutex::new(State {
                    value,
                    grad: GradSlot::Empty,
                    grad_dtype: DType::F32,
                }),
            }),
        }
    }

    /// The canonical name, for example `layers.3.mlp.up_proj.weight`.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Which part of the weight this is; `None` for a whole weight on its own.
    pub fn shard(&self) -> Option<&ParamShard> {
        self.inner.shard.as_ref()
    }

    /// The shape of the value.
    pub fn shape(&self) -> Vec<usize> {
        self.with_form(dims, |shape, _, _| shape.to_vec())
    }

    /// The number of elements.
    pub fn numel(&self) -> usize {
        self.shape().iter().product()
    }

    /// The dtype of the value.
    pub fn dtype(&self) -> DType {
        self.with_form(TensorMetadata::dtype, |_, dtype, _| dtype)
    }

    /// The device that holds the value.
    pub fn device(&self) -> B::Device {
        self.with_form(B::float_device, |_, _, device| device.clone())
    }

    /// The value; shares the buffer.
    pub fn value(&self) -> Float<B> {
        self.with_value(Clone::clone)
    }

    /// Replaces the value. The dtype may change.
    ///
    /// # Panics
    /// When the shape differs.
    #[track_caller]
    pub fn set_value(&self, value: Float<B>) {
        let (expected, found) = (self.shape(), dims(&value));
        assert_eq!(
            expected,
            found,
            "parameter `{}` has shape {expected:?}, the new value {found:?}",
            self.name()
        );
        self.state().value = Value::Here(value);
    }

    /// Lets go of the value, which somebody else can make again: shape, dtype and device stay known, and
    /// [`set_value`](Self::set_value) brings it back. Until then anything that reads the value panics. Without effect where
    /// it has been let go of already.
    #[track_caller]
    pub fn release(&self) {
        if self.is_released() {
            return;
        }
        let (shape, dtype, device) = (self.shape(), self.dtype(), self.device());
        self.state().value = Value::Released {
            shape,
            dtype,
            device,
        };
    }

    /// Whether the value has been let go of.
    pub fn is_released(&self) -> bool {
        matches!(self.state().value, Value::Released { .. })
    }

    /// Replaces the value by a function of it. The function gets the only handle when no other is alive, so that an
    /// optimizer can work in place. It must not touch this parameter.
    ///
    /// # Panics
    /// When the function changes the shape.
    #[track_caller]
    pub fn update(&self, f: impl FnOnce(Float<B>) -> Float<B>) {
        let mut state = self.state();
        let value = self.taken(&mut state);
        let expected = dims(&value);
        let value = f(value);
        assert_eq!(
            expected,
            dims(&value),
            "the update of parameter `{}` changed its shape",
            self.name()
        );
        state.value = Value::Here(value);
    }

    /// Takes the value out, so that whoever updates several weights at once owns their buffers. Until
    /// [`put_value`](Self::put_value) brings one back, anything that reads the value panics.
    #[track_caller]
    pub fn take_value(&self) -> Float<B> {
        self.taken(&mut self.state())
    }

    #[track_caller]
    fn taken(&self, state: &mut State<B>) -> Float<B> {
        match std::mem::replace(&mut state.value, Value::Taken) {
            Value::Here(value) => value,
            elsewhere => {
                state.value = elsewhere;
                panic!("{}", self.absence(&state.value))
            }
        }
    }

    /// Why there is no value.
    fn absence(&self, value: &Value<B>) -> String {
        let name = self.name();
        match value {
            Value::Released { .. } => format!(
                "the value of parameter `{name}` has been let go of; whoever released it has to bring it back before it is \
                 read (with sharded parameters, `Optimizer::gather_weights`)"
            ),
            _ => {
                format!("the value of parameter `{name}` is being updated, or its update panicked")
            }
        }
    }

    /// Puts a value in the place of the one that [`take_value`](Self::take_value) took, of the same shape.
    ///
    /// # Panics
    /// When there is a value.
    #[track_caller]
    pub fn put_value(&self, value: Float<B>) {
        let there = std::mem::replace(&mut self.state().value, Value::Here(value));
        assert!(
            !matches!(there, Value::Here(_)),
            "parameter `{}` has a value already",
            self.name()
        );
    }

    /// Whether gradients are computed for this weight.
    pub fn requires_grad(&self) -> bool {
        self.inner.requires_grad.load(Ordering::Relaxed)
    }

    /// Freezes or unfreezes the weight. A gradient already in the slot stays.
    pub fn set_requires_grad(&self, requires_grad: bool) {
        self.inner
            .requires_grad
            .store(requires_grad, Ordering::Relaxed);
    }

    /// The dtype that the gradient is kept in between micro-batches: fp32 unless set otherwise.
    pub fn grad_dtype(&self) -> DType {
        self.state().grad_dtype
    }

    /// Keeps the gradient in `dtype` from now on, fp32 or narrower. Each micro-batch's part is summed in fp32 and the new
    /// sum rounded once, so that a step of one micro-batch rounds once in all; only the fused
    /// [head and loss](crate::linear_cross_entropy) may round for each piece of its tokens. A gradient already in the slot
    /// is converted.
    pub fn set_grad_dtype(&self, dtype: DType) {
        let mut state = self.state();
        state.grad_dtype = dtype;
        state.grad = match std::mem::replace(&mut state.grad, GradSlot::Empty) {
            GradSlot::Sum(grad) => GradSlot::Sum(to_dtype::<B>(grad, dtype)),
            GradSlot::Empty | GradSlot::Stale(_) => GradSlot::Empty,
        };
    }

    /// The gradient accumulated so far, of dtype [`grad_dtype`](Self::grad_dtype) or as it was [set](Self::set_grad);
    /// shares the buffer.
    pub fn grad(&self) -> Option<Float<B>> {
        match &self.state().grad {
            GradSlot::Sum(grad) => Some(grad.clone()),
            GradSlot::Empty | GradSlot::Stale(_) => None,
        }
    }

    /// Takes the gradient and its buffer out of the slot.
    pub fn take_grad(&self) -> Option<Float<B>> {
        match std::mem::replace(&mut self.state().grad, GradSlot::Empty) {
            GradSlot::Sum(grad) => Some(grad),
            GradSlot::Empty | GradSlot::Stale(_) => None,
        }
    }

    /// Replaces the gradient, for example by its all-reduced sum.
    ///
    /// # Panics
    /// When the gradient is neither fp32 nor of the dtype it is kept in, or has another shape than the value.
    #[track_caller]
    pub fn set_grad(&self, grad: Option<Float<B>>) {
        if let Some(grad) = &grad {
            self.check_grad(grad);
        }
        self.state().grad = grad.map_or(GradSlot::Empty, GradSlot::Sum);
    }

    /// Forgets the gradient; whether its buffer is kept for the next step is the backend's choice
    /// ([`Ops::KEEPS_GRADIENT_BUFFERS`]).
    pub fn clear_grad(&self) {
        let mut state = self.state();
        state.grad = match std::mem::replace(&mut state.grad, GradSlot::Empty) {
            GradSlot::Stale(buffer) | GradSlot::Sum(buffer) if B::KEEPS_GRADIENT_BUFFERS => {
                GradSlot::Stale(buffer)
            }
            _ => GradSlot::Empty,
        };
    }

    /// Adds a gradient to the slot; the sum is made in fp32.
    #[track_caller]
    pub fn accumulate_grad(&self, grad: Float<B>) {
        self.accumulate_with(|slot| slot.accumulate(grad));
    }

    /// Lets a kernel that knows fp32 gradients only add to the slot directly; it returns the sum. Must not touch this
    /// parameter.
    ///
    /// # Panics
    /// When the result is not fp32 or has another shape than the value.
    #[track_caller]
    pub fn accumulate_with(&self, kernel: impl FnOnce(GradSlot<B>) -> Float<B>) {
        self.accumulate_in_dtype_with(|slot| slot.rounded_once(kernel));
    }

    /// The same for a kernel that takes a slot of any dtype and returns a gradient of that dtype.
    ///
    /// # Panics
    /// When the result has another dtype or shape.
    #[track_caller]
    pub fn accumulate_in_dtype_with(&self, kernel: impl FnOnce(GradSlot<B>) -> Float<B>) {
        // The lock is not held while the kernel runs, so that a panic in it can't poison other users' view; the slot
        // is simply empty meanwhile. Two threads never run the backward pass of one parameter at once.
        let (slot, dtype) = {
            let mut state = self.state();
            let slot = std::mem::replace(&mut state.grad, GradSlot::Empty);
            (slot, state.grad_dtype)
        };
        let slot = match slot {
            // The dtype of a buffer without content says which gradient is wanted.
            GradSlot::Empty if dtype != DType::F32 => {
                let device = self.device();
                GradSlot::Stale(B::float_empty(self.shape().into(), &device, dtype.into()))
            }
            slot => slot,
        };
        let grad = kernel(slot);
        self.check_grad(&grad);
        self.state().grad = GradSlot::Sum(grad);
    }

    #[track_caller]
    fn check_grad(&self, grad: &Float<B>) {
        let (expected, found) = (self.shape(), dims(grad));
        assert_eq!(
            expected,
            found,
            "parameter `{}` has shape {expected:?}, its gradient {found:?}",
            self.name()
        );
        let kept = self.grad_dtype();
        assert!(
            grad.dtype() == DType::F32 || grad.dtype() == kept,
            "the gradient of parameter `{}` must be fp32 or {kept:?}, not {:?}",
            self.name(),
            grad.dtype()
        );
    }

    #[track_caller]
    fn with_value<R>(&self, f: impl FnOnce(&Float<B>) -> R) -> R {
        match &self.state().value {
            Value::Here(value) => f(value),
            elsewhere => panic!("{}", self.absence(elsewhere)),
        }
    }

    /// Something that the value's form tells, wherever the value is.
    #[track_caller]
    fn with_form<R>(
        &self,
        of_value: impl FnOnce(&Float<B>) -> R,
        of_form: impl FnOnce(&[usize], DType, &B::Device) -> R,
    ) -> R {
        match &self.state().value {
            Value::Here(value) => of_value(value),
            Value::Released {
                shape,
                dtype,
                device,
            } => of_form(shape, *dtype, device),
            Value::Taken => panic!("{}", self.absence(&Value::Taken)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        self.inner
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Ops> Clone for Param<B> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<B: Ops> fmt::Debug for Param<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Param")
            .field("name", &self.name())
            .field("shape", &self.shape())
            .field("dtype", &self.dtype())
            .field("requires_grad", &self.requires_grad())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{random, random_bf16};
    use crate::to_f32_vec;

    #[test]
    fn a_value_that_was_let_go_of_leaves_its_form() {
        let param = Param::<Flex>::new("w", random_bf16(&[2, 3], 1));
        param.release();
        param.release();
        assert!(param.is_released());
        assert_eq!(
            (param.shape(), param.dtype(), param.numel()),
            (vec![2, 3], DType::BF16, 6)
        );
        // A gradient can come without it.
        param.accumulate_grad(random(&[2, 3], 2));
        param.set_value(random_bf16(&[2, 3], 3));
        assert!(!param.is_released() && param.value().dtype() == DType::BF16);
    }

    #[test]
    #[should_panic(expected = "parameter `w` has been let go of")]
    fn a_value_that_was_let_go_of_cannot_be_read() {
        let param = Param::<Flex>::new("w", random(&[2, 3], 1));
        param.release();
        param.value();
    }

    #[test]
    fn handles_share_value_and_gradient() {
        let param = Param::<Flex>::new("w", random(&[2, 3], 1));
        let other = param.clone();
        other.accumulate_grad(random(&[2, 3], 2));
        other.accumulate_grad(random(&[2, 3], 2));
        let twice: Vec<f32> = to_f32_vec::<Flex>(random(&[2, 3], 2))
            .iter()
            .map(|x| 2.0 * x)
            .collect();
        assert_eq!(to_f32_vec::<Flex>(param.grad().unwrap()), twice);
        assert!(param.take_grad().is_some() && other.grad().is_none());
        other.set_requires_grad(false);
        assert!(!param.requires_grad());
        assert_eq!(
            (param.name(), param.shape(), param.numel()),
            ("w", vec![2, 3], 6)
        );
    }

    #[test]
    fn gradients_are_fp32_whatever_the_value_is() {
        let param = Param::<Flex>::new("w", random_bf16(&[4], 1));
        param.accumulate_grad(random_bf16(&[4], 2));
        assert_eq!(param.grad().unwrap().dtype(), DType::F32);
        assert_eq!(param.dtype(), DType::BF16);
    }

    #[test]
    fn narrow_gradients_are_summed_in_fp32_and_rounded_once() {
        let param = Param::<Flex>::new("w", random(&[40], 1));
        param.set_grad_dtype(DType::BF16);
        let parts = [random(&[40], 2), random(&[40], 3)];
        let mut expected = vec![0.0; 40];
        for part in &parts {
            param.accumulate_grad(part.clone());
            let sum = (expected.iter().zip(to_f32_vec::<Flex>(part.clone()))).map(|(a, b)| a + b);
            let sum = crate::float_from_f32::<Flex>(
                &sum.collect::<Vec<f32>>(),
                &[40],
                &Default::default(),
            );
            expected = to_f32_vec::<Flex>(to_dtype::<Flex>(sum, DType::BF16));
            let grad = param.grad().unwrap();
            assert_eq!(grad.dtype(), DType::BF16);
            assert_eq!(to_f32_vec::<Flex>(grad), expected);
        }
        // A reduced sum may come back in fp32.
        param.set_grad(Some(random(&[40], 4)));
        param.set_grad_dtype(DType::F32);
        assert_eq!(param.grad().unwrap().dtype(), DType::F32);
    }

    #[test]
    fn update_gets_the_only_handle() {
        let param = Param::<Flex>::new("w", random(&[4], 1));
        param.update(|value| {
            assert!(value.is_unique());
            value
        });
        let held = param.value();
        param.update(|value| {
            assert!(!value.is_unique());
            value
        });
        drop(held);
    }

    #[test]
    #[should_panic(expected = "parameter `w` has shape [4], the new value [5]")]
    fn values_of_another_shape_are_refused() {
        Param::<Flex>::new("w", random(&[4], 1)).set_value(random(&[5], 1));
    }

    #[test]
    #[should_panic(expected = "must be fp32")]
    fn gradients_of_another_dtype_are_refused() {
        Param::<Flex>::new("w", random(&[4], 1)).set_grad(Some(random_bf16(&[4], 2)));
    }
}
