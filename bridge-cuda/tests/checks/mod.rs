//! The same computation on the CPU backend and on the GPU, compared. Shared by the tests and by `examples/gpu_check`.
//!
//! A group is a function generic over the backend that makes its inputs from a seed and records results. It runs on Flex
//! in f32, on inputs rounded to the dtype under test, and on CUDA in that dtype.

pub(crate) mod attention;
pub(crate) mod kernels;
pub(crate) mod moe;
pub(crate) mod recurrent;
pub(crate) mod tensors;

use std::panic::{AssertUnwindSafe, catch_unwind};

use bridge_cuda::{Cuda, CudaDevice};
use bridge_ops::{DType, Float, Int, Ops, float_from_f32, int_from_i64, to_f32_vec, to_i64_vec};
use burn::tensor::{Bool, Int as IntKind, Tensor, TensorPrimitive};
use burn_backend::{FloatDType, TensorMetadata};
use burn_flex::Flex;

/// What a group works with on one backend.
pub(crate) struct Context<B: Ops> {
    pub(crate) device: B::Device,
    /// Dtype of the inputs on this backend.
    pub(crate) dtype: DType,
    /// Dtype whose precision the inputs have on every backend.
    precision: DType,
    results: Vec<(String, Vec<f32>)>,
}

/// Numbers in -2 .. 2 that depend on the seed alone.
pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 4.0
        })
        .collect()
}

fn rounded(x: f32, precision: DType) -> f32 {
    match precision {
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
        DType::F16 => half::f16::from_f32(x).to_f32(),
        _ => x,
    }
}

impl<B: Ops> Context<B> {
    fn new(device: B::Device, dtype: DType, precision: DType) -> Self {
        Self {
            device,
            dtype,
            precision,
            results: Vec::new(),
        }
    }

    /// The dtype whose precision the inputs have on every backend.
    pub(crate) fn precision(&self) -> DType {
        self.precision
    }

    /// A float input with the given values.
    pub(crate) fn with_values(&self, values: &[f32], shape: &[usize]) -> Float<B> {
        let values: Vec<f32> = values.iter().map(|&x| rounded(x, self.precision)).collect();
        B::float_cast(
            float_from_f32::<B>(&values, shape, &self.device),
            FloatDType::from(self.dtype),
        )
    }

    /// A float input.
    pub(crate) fn float(&self, seed: u64, shape: &[usize]) -> Float<B> {
        self.with_values(&numbers(seed, shape.iter().product()), shape)
    }

    /// A float input that stays in f32.
    pub(crate) fn float32(&self, seed: u64, shape: &[usize]) -> Float<B> {
        float_from_f32::<B>(&numbers(seed, shape.iter().product()), shape, &self.device)
    }

    /// A float input as a Burn tensor.
    pub(crate) fn tensor<const D: usize>(&self, seed: u64, shape: [usize; D]) -> Tensor<B, D> {
        Tensor::from_primitive(TensorPrimitive::Float(self.float(seed, &shape)))
    }

    /// Integers in `0..limit`.
    pub(crate) fn indices(&self, seed: u64, shape: &[usize], limit: usize) -> Int<B> {
        let values: Vec<i64> = numbers(seed, shape.iter().product())
            .iter()
            .map(|x| ((x + 2.0) * 1e6) as i64 % limit as i64)
            .collect();
        int_from_i64::<B>(&values, shape, &self.device)
    }

    /// Integers in `0..limit` as a Burn tensor.
    pub(crate) fn ints<const D: usize>(
        &self,
        seed: u64,
        shape: [usize; D],
        limit: usize,
    ) -> Tensor<B, D, IntKind> {
        Tensor::from_primitive(self.indices(seed, &shape, limit))
    }

    /// Records a result.
    pub(crate) fn push(&mut self, name: &str, x: Float<B>) {
        let name = format!("{name} {:?}", x.shape().as_slice());
        self.results.push((name, to_f32_vec::<B>(x)));
    }

    /// Records a result.
    pub(crate) fn put<const D: usize>(&mut self, name: &str, x: Tensor<B, D>) {
        self.push(name, x.into_primitive().tensor());
    }

    /// Records a result.
    pub(crate) fn put_int<const D: usize>(&mut self, name: &str, x: Tensor<B, D, IntKind>) {
        let name = format!("{name} {:?}", x.dims());
        self.results.push((
            name,
            to_i64_vec::<B>(x.into_primitive())
                .into_iter()
                .map(|x| x as f32)
                .collect(),
        ));
    }

    /// Records a result.
    pub(crate) fn put_bool<const D: usize>(&mut self, name: &str, x: Tensor<B, D, Bool>) {
        let name = format!("{name} {:?}", x.dims());
        let values = x
            .into_data()
            .iter::<bool>()
            .map(|x| f32::from(u8::from(x)))
            .collect();
        self.results.push((name, values));
    }
}

/// A group on both backends.
pub(crate) struct Group {
    pub(crate) name: &'static str,
    pub(crate) dtypes: &'static [DType],
    pub(crate) on_cpu: fn(&mut Context<Flex>),
    pub(crate) on_gpu: fn(&mut Context<Cuda>),
}

/// Relative error allowed, in the norm over a result. A result is rounded once or a few times: f32 has 24 bits, and sums
/// are in another order; bf16 has 8 bits, f16 has 11.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => 8e-3,
        DType::F16 => 1e-3,
        _ => 1e-5,
    }
}

/// Runs the CPU side of a group alone; returns the number of results.
#[allow(dead_code, reason = "the example includes this file too")]
pub(crate) fn run_on_cpu(group: &Group, dtype: DType) -> usize {
    let mut cpu = cpu_context(dtype);
    (group.on_cpu)(&mut cpu);
    cpu.results.len()
}

fn cpu_context(dtype: DType) -> Context<Flex> {
    let wide = if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    };
    Context::new(Default::default(), wide, dtype)
}

/// Differences found in a group; empty if there are none.
pub(crate) fn run(group: &Group, dtype: DType, device: CudaDevice) -> (usize, Vec<String>) {
    let mut cpu = cpu_context(dtype);
    let mut gpu = Context::<Cuda>::new(device, dtype, dtype);
    (group.on_cpu)(&mut cpu);
    let outcome = catch_unwind(AssertUnwindSafe(|| (group.on_gpu)(&mut gpu)));
    let mut failures = Vec::new();
    for ((name, expected), (gpu_name, found)) in cpu.results.iter().zip(&gpu.results) {
        assert_eq!(
            name, gpu_name,
            "a group records the same results on every backend, shapes included"
        );
        if let Some(problem) = difference(expected, found, tolerance(dtype)) {
            failures.push(format!("{name}: {problem}"));
        }
    }
    if let Err(panic) = outcome {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or(panic.downcast_ref::<&str>().copied());
        let after = gpu.results.last().map_or("the start", |(name, _)| name);
        failures.push(format!(
            "panicked after {after}: {}",
            text.unwrap_or("unknown")
        ));
    }
    (cpu.results.len(), failures)
}

fn difference(expected: &[f32], found: &[f32], tolerance: f32) -> Option<String> {
    if expected.len() != found.len() {
        return Some(format!(
            "{} values, expected {}",
            found.len(),
            expected.len()
        ));
    }
    let (mut error, mut norm, mut worst) = (0.0f64, 0.0f64, (0, 0.0f64));
    for (i, (&e, &f)) in expected.iter().zip(found).enumerate() {
        if e.is_nan() && f.is_nan() || e == f {
            norm += if e.is_finite() {
                f64::from(e).powi(2)
            } else {
                0.0
            };
            continue;
        }
        let d = f64::from(e) - f64::from(f);
        if !d.is_finite() {
            return Some(format!("[{i}] is {f}, expected {e}"));
        }
        error += d * d;
        norm += f64::from(e).powi(2);
        if d.abs() > worst.1 {
            worst = (i, d.abs());
        }
    }
    let relative = (error / norm.max(1e-12)).sqrt();
    let i = worst.0;
    (relative > f64::from(tolerance)).then(|| {
        format!(
            "relative error {relative:.2e} over {tolerance:.0e}; worst [{i}] is {}, expected {}",
            found[i], expected[i]
        )
    })
}

/// Every group.
pub(crate) fn groups() -> Vec<Group> {
    let mut groups = tensors::groups();
    groups.extend(kernels::groups());
    groups.extend(moe::groups());
    groups.extend(attention::groups());
    groups.extend(recurrent::groups());
    groups
}

/// A group from a generic function.
macro_rules! group {
    ($function:ident, $dtypes:expr) => {
        $crate::checks::Group {
            name: stringify!($function),
            dtypes: $dtypes,
            on_cpu: $function::<burn_flex::Flex>,
            on_gpu: $function::<bridge_cuda::Cuda>,
        }
    };
}
pub(crate) use group;
