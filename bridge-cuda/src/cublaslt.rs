//! Matrix products through cuBLASLt: layouts instead of copies, cached plans, bias and accumulation.

use std::cell::Cell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use burn_backend::DType;
use cudarc::cublaslt::sys;

use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::library::Library;
use crate::tuned::TunedProducts;

/// Scratch memory for products, in bytes; NVIDIA's advice for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Candidates asked of the heuristics; the first is used unless [`Blas::tune`] has measured them.
const CANDIDATES: usize = 8;
/// Products of fewer operations are not worth measuring.
const WORTH_TUNING: f64 = 1e10;
/// Most memory for a result that is thrown away, in bytes.
const TUNING_SCRATCH: usize = 256 << 20;

/// Multiprocessors that an exchange between GPUs keeps busy: NCCL takes one for each of its channels, 24 over NVLink.
const EXCHANGE: i32 = 24;

thread_local! {
    /// How many multiprocessors this thread's products leave to others.
    static SPARED: Cell<i32> = const { Cell::new(0) };
}

/// Does `work`, whose products leave room for an exchange between GPUs. One that covered the whole device would make the
/// exchange, which has been queued before, wait for its end.
pub(crate) fn beside_exchange<T>(work: impl FnOnce() -> T) -> T {
    struct Restore(i32);
    impl Drop for Restore {
        fn drop(&mut self) {
            SPARED.set(self.0);
        }
    }
    let _restore = Restore(SPARED.replace(EXCHANGE));
    work()
}

/// An operand as it lies in memory: column-major `rows` x `columns`, `ld` elements between columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Layout {
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) ld: usize,
    /// Elements between the matrices of a batch; 0 repeats one matrix.
    pub(crate) batch_stride: i64,
}

/// A product `D = op(A) op(B) + beta * C (+ bias)`, column-major, as cuBLASLt sees it. C lies like D.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Product {
    pub(crate) a: Layout,
    pub(crate) transpose_a: bool,
    pub(crate) b: Layout,
    pub(crate) transpose_b: bool,
    pub(crate) d: Layout,
    pub(crate) batch: usize,
    /// Adds C, which may be D.
    pub(crate) accumulate: bool,
    /// Type of the bias added to every column, if there is one.
    pub(crate) bias: Option<DType>,
}

/// Addresses of a product's operands. `c` is read only by a product that accumulates; `bias` is 0 when there is none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operands {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) c: u64,
    pub(crate) d: u64,
    pub(crate) bias: u64,
}

/// What else decides which algorithms are allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    product: Product,
    /// Largest power of two, up to 256, that divides each address.
    alignment: [u32; 4],
    /// Whether C is D.
    in_place: bool,
    tf32: bool,
    /// How many multiprocessors to leave to others.
    spared: i32,
}

struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    candidates: Vec<sys::cublasLtMatmulHeuristicResult_t>,
    chosen: usize,
}

/// The library on one device. Products run one after the other on the device's stream, so they share the workspace.
pub(crate) struct Blas {
    gpu: &'static Gpu,
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: Mutex<HashMap<Key, Plan>>,
    tf32: AtomicBool,
    tuning: AtomicBool,
    tuned: Mutex<TunedProducts>,
}

// SAFETY: the handle may be used from any thread; descriptors are used only under the lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

fn check(
    call: &'static str,
    status: sys::cublasStatus_t,
    what: impl FnOnce() -> String,
) -> Result<()> {
    if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(Error::Blas {
        call,
        status: format!("{status:?}"),
        what: what(),
    })
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F64 => sys::cudaDataType_t::CUDA_R_64F,
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        other => panic!("matrix products of {other:?} are not supported on cuda"),
    }
}

impl Blas {
    pub(crate) fn new(gpu: &'static Gpu) -> Result<Self> {
        Library::CublasLt.load()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the library is open and a context is current; the call writes to a local.
        let status = unsafe { sys::cublasLtCreate(&mut handle) };
        check("cublasLtCreate", status, || gpu.name.clone())?;
        let (workspace, _) = gpu.allocate(WORKSPACE)?;
        Ok(Self {
            gpu,
            handle,
            workspace,
            plans: Mutex::default(),
            tf32: AtomicBool::new(false),
            tuning: AtomicBool::new(true),
            // SAFETY: the library is open.
            tuned: Mutex::new(TunedProducts::open(&gpu.name, unsafe {
                sys::cublasLtGetVersion()
            })),
        })
    }

    /// Whether large products measure their candidates when they first run. On at the start.
    pub(crate) fn allow_tuning(&self, allow: bool) {
        self.tuning.store(allow, Ordering::Relaxed);
    }

    /// Whether products of f32 may round their inputs to tf32. Off at the start.
    pub(crate) fn allow_tf32(&self, allow: bool) {
        self.tf32.store(allow, Ordering::Relaxed);
    }

    fn key(&self, product: &Product, at: &Operands) -> Key {
        let alignment = |address: u64| 1 << address.trailing_zeros().min(8);
        let tf32 = product.a.dtype == DType::F32 && self.tf32.load(Ordering::Relaxed);
        Key {
            product: *product,
            alignment: [at.a, at.b, at.c, at.d].map(alignment),
            in_place: at.c == at.d,
            tf32,
            spared: SPARED.get(),
        }
    }

    /// Queues a product.
    ///
    /// # Safety
    /// The operands must be device memory that the layouts fit in; `d` must not overlap the others, unless it is `c`.
    pub(crate) unsafe fn run(&self, product: &Product, at: &Operands) -> Result<()> {
        let key = self.key(product, at);
        let mut plans = self
            .plans
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let plan = match plans.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let mut plan = self.plan(entry.key())?;
                if self.tuning.load(Ordering::Relaxed) {
                    // SAFETY: as the caller promises.
                    plan.chosen = unsafe { self.best(entry.key(), &plan, at)? };
                }
                entry.insert(plan)
            }
        };
        // SAFETY: as the caller promises.
        unsafe { self.queue(plan, plan.chosen, product, at) }
    }

    /// # Safety
    /// As [`Self::run`].
    unsafe fn queue(
        &self,
        plan: &Plan,
        candidate: usize,
        product: &Product,
        at: &Operands,
    ) -> Result<()> {
        let (one, zero) = (Scale::one(product), Scale::zero(product));
        let beta = if product.accumulate { &one } else { &zero };
        // SAFETY: descriptors belong to the plan; operands as the caller promises.
        unsafe {
            if product.bias.is_some() {
                let attribute =
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
                let status = sys::cublasLtMatmulDescSetAttribute(
                    plan.operation,
                    attribute,
                    std::ptr::from_ref(&at.bias).cast(),
                    size_of::<u64>(),
                );
                check("cublasLtMatmulDescSetAttribute", status, || {
                    format!("{product:?}")
                })?;
            }
            let status = sys::cublasLtMatmul(
                self.handle,
                plan.operation,
                one.pointer(),
                at.a as *const c_void,
                plan.a,
                at.b as *const c_void,
                plan.b,
                beta.pointer(),
                at.c as *const c_void,
                plan.d,
                at.d as *mut c_void,
                plan.d,
                &plan.candidates[candidate].algo,
                self.workspace as *mut c_void,
                WORKSPACE,
                self.gpu.stream.cast(),
            );
            check("cublasLtMatmul", status, || format!("{product:?}"))
        }
    }

    /// The fastest candidate for a product: as found before on this kind of GPU, else measured now.
    ///
    /// The first one, which the library thinks best, stays unless another is clearly faster; a GPU's clock wavers.
    ///
    /// # Safety
    /// As [`Self::run`]. `d` is overwritten, unless the product accumulates.
    unsafe fn best(&self, key: &Key, plan: &Plan, at: &Operands) -> Result<usize> {
        let Product { a, b, d, batch, .. } = key.product;
        let inner = if key.product.transpose_a {
            a.rows
        } else {
            a.columns
        };
        let operations = 2.0 * (d.rows * d.columns * batch) as f64 * inner as f64;
        // Beside an exchange a measurement would tell more of that than of the product.
        let unfit = operations < WORTH_TUNING || key.spared > 0 || a.dtype != b.dtype;
        if unfit || plan.candidates.len() < 2 {
            return Ok(0);
        }
        let mut tuned = self
            .tuned
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let name = format!("{key:?}");
        if let Some(known) = tuned
            .get(&name)
            .filter(|known| *known < plan.candidates.len())
        {
            return Ok(known);
        }
        // What is added must survive, so an accumulating product writes elsewhere.
        let bytes = d.ld * d.columns * d.dtype.size();
        let scratch = if key.product.accumulate {
            if batch > 1 || bytes > TUNING_SCRATCH {
                return Ok(0);
            }
            match self.gpu.allocate(bytes) {
                Ok(scratch) => Some(scratch),
                Err(_) => return Ok(0),
            }
        } else {
            None
        };
        let mut at = *at;
        if let Some((address, _)) = scratch {
            at.d = address;
            at.c = if key.in_place { address } else { at.c };
        }
        // SAFETY: as the caller promises; the scratch memory is as large as the result.
        let measured = unsafe { self.measure(&key.product, plan, &at) };
        if let Some((address, size)) = scratch {
            self.gpu.pool().release(address, size);
        }
        let best = measured?;
        tuned.put(name, best);
        Ok(best)
    }

    /// # Safety
    /// As [`Self::run`].
    unsafe fn measure(&self, product: &Product, plan: &Plan, at: &Operands) -> Result<usize> {
        let device = crate::device::CudaDevice {
            ordinal: self.gpu.ordinal,
        };
        let mut times = vec![f32::INFINITY; plan.candidates.len()];
        // Several rounds over all candidates, so that a change of clock meets all of them.
        for round in 0..4 {
            for (candidate, best) in times.iter_mut().enumerate() {
                // A candidate that cannot run here is out.
                let mut failed = false;
                let milliseconds = device.time(|| {
                    for _ in 0..2 {
                        // SAFETY: as the caller promises.
                        failed |= unsafe { self.queue(plan, candidate, product, at) }.is_err();
                    }
                })?;
                if round > 0 && !failed {
                    *best = best.min(milliseconds);
                }
            }
        }
        let fastest = (0..times.len())
            .min_by(|a, b| times[*a].total_cmp(&times[*b]))
            .unwrap_or(0);
        Ok(if times[fastest] < 0.985 * times[0] {
            fastest
        } else {
            0
        })
    }

    fn plan(&self, key: &Key) -> Result<Plan> {
        let product = &key.product;
        let what = || format!("{product:?}");
        let double = product.a.dtype == DType::F64;
        let compute = match (double, key.tf32) {
            (true, _) => sys::cublasComputeType_t::CUBLAS_COMPUTE_64F,
            (false, true) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            (false, false) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let scale = data_type(if double { DType::F64 } else { DType::F32 });
        // SAFETY: descriptors are made here and kept in the plan; attributes have the sizes the library documents.
        unsafe {
            let mut operation = std::ptr::null_mut();
            check(
                "cublasLtMatmulDescCreate",
                sys::cublasLtMatmulDescCreate(&mut operation, compute, scale),
                what,
            )?;
            use sys::cublasLtMatmulDescAttributes_t as Attribute;
            let set = |attribute, value: i32| {
                let pointer = std::ptr::from_ref(&value).cast();
                check(
                    "cublasLtMatmulDescSetAttribute",
                    sys::cublasLtMatmulDescSetAttribute(
                        operation,
                        attribute,
                        pointer,
                        size_of::<i32>(),
                    ),
                    what,
                )
            };
            // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
            set(
                Attribute::CUBLASLT_MATMUL_DESC_TRANSA,
                product.transpose_a.into(),
            )?;
            set(
                Attribute::CUBLASLT_MATMUL_DESC_TRANSB,
                product.transpose_b.into(),
            )?;
            if key.spared > 0 {
                let count = self.gpu.multiprocessors as i32 - key.spared;
                set(
                    Attribute::CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET,
                    count.max(1),
                )?;
            }
            if let Some(bias) = product.bias {
                set(
                    Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                    sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as i32,
                )?;
                set(
                    Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                    data_type(bias) as i32,
                )?;
            }
            let layout = |layout: &Layout| {
                let mut descriptor = std::ptr::null_mut();
                let status = sys::cublasLtMatrixLayoutCreate(
                    &mut descriptor,
                    data_type(layout.dtype),
                    layout.rows as u64,
                    layout.columns as u64,
                    layout.ld as i64,
                );
                check("cublasLtMatrixLayoutCreate", status, what)?;
                if product.batch > 1 {
                    use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
                    let count = product.batch as i32;
                    let status = sys::cublasLtMatrixLayoutSetAttribute(
                        descriptor,
                        Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                        std::ptr::from_ref(&count).cast(),
                        size_of::<i32>(),
                    );
                    check("cublasLtMatrixLayoutSetAttribute", status, what)?;
                    let status = sys::cublasLtMatrixLayoutSetAttribute(
                        descriptor,
                        Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                        std::ptr::from_ref(&layout.batch_stride).cast(),
                        size_of::<i64>(),
                    );
                    check("cublasLtMatrixLayoutSetAttribute", status, what)?;
                }
                Ok(descriptor)
            };
            let (a, b, d) = (
                layout(&product.a)?,
                layout(&product.b)?,
                layout(&product.d)?,
            );
            let mut plan = Plan {
                operation,
                a,
                b,
                d,
                candidates: Vec::new(),
                chosen: 0,
            };
            self.search(key, &mut plan)?;
            Ok(plan)
        }
    }

    /// Asks the heuristics for algorithms.
    ///
    /// # Safety
    /// The plan's descriptors must be complete.
    unsafe fn search(&self, key: &Key, plan: &mut Plan) -> Result<()> {
        let what = || format!("{:?}", key.product);
        // SAFETY: the preference is made, used and destroyed here; the result array has the length given.
        unsafe {
            let mut preference = std::ptr::null_mut();
            check(
                "cublasLtMatmulPreferenceCreate",
                sys::cublasLtMatmulPreferenceCreate(&mut preference),
                what,
            )?;
            use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
            let workspace = WORKSPACE;
            let status = sys::cublasLtMatmulPreferenceSetAttribute(
                preference,
                Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&workspace).cast(),
                size_of::<usize>(),
            );
            check("cublasLtMatmulPreferenceSetAttribute", status, what)?;
            let [a, b, c, d] = key.alignment;
            for (attribute, alignment) in [
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
                (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, d),
            ] {
                let pointer = std::ptr::from_ref(&alignment).cast();
                let status = sys::cublasLtMatmulPreferenceSetAttribute(
                    preference,
                    attribute,
                    pointer,
                    size_of::<u32>(),
                );
                check("cublasLtMatmulPreferenceSetAttribute", status, what)?;
            }
            let mut found = 0;
            let mut results: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] =
                std::mem::zeroed();
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.operation,
                plan.a,
                plan.b,
                plan.d,
                plan.d,
                preference,
                CANDIDATES as i32,
                results.as_mut_ptr(),
                &mut found,
            );
            sys::cublasLtMatmulPreferenceDestroy(preference);
            check("cublasLtMatmulAlgoGetHeuristic", status, what)?;
            plan.candidates = results[..found as usize].to_vec();
        }
        if plan.candidates.is_empty() {
            let status = "no algorithm".into();
            return Err(Error::Blas {
                call: "cublasLtMatmulAlgoGetHeuristic",
                status,
                what: what(),
            });
        }
        Ok(())
    }
}

/// alpha or beta, of the type the computation wants.
enum Scale {
    Single(f32),
    Double(f64),
}

impl Scale {
    fn of(product: &Product, value: f32) -> Self {
        if product.a.dtype == DType::F64 {
            Self::Double(value.into())
        } else {
            Self::Single(value)
        }
    }

    fn one(product: &Product) -> Self {
        Self::of(product, 1.0)
    }

    fn zero(product: &Product) -> Self {
        Self::of(product, 0.0)
    }

    fn pointer(&self) -> *const c_void {
        match self {
            Self::Single(value) => std::ptr::from_ref(value).cast(),
            Self::Double(value) => std::ptr::from_ref(value).cast(),
        }
    }
}
