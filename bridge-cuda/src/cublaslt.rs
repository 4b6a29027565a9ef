//! Matrix products through cuBLASLt: layouts instead of copies, cached plans, bias and accumulation.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use burn_backend::DType;
use cudarc::cublaslt::sys;

use crate::device::Gpu;
use crate::error::{Error, OrPanic, Result};
use crate::library::Library;

/// Scratch memory for products, in bytes; NVIDIA's advice for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Candidates asked of the heuristics; the first is used unless [`Blas::tune`] has measured them.
const CANDIDATES: usize = 8;

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
        })
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
                let plan = self.plan(entry.key())?;
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

    /// Times every candidate for a product on the given operands and keeps the fastest. Returns its position and its
    /// milliseconds. `d` is overwritten.
    ///
    /// # Safety
    /// As [`Self::run`].
    pub(crate) unsafe fn tune(&self, product: &Product, at: &Operands) -> Result<(usize, f32)> {
        let key = self.key(product, at);
        // SAFETY: as the caller promises.
        unsafe { self.run(product, at)? };
        let mut plans = self
            .plans
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let plan = plans.get_mut(&key).expect("the run above made the plan");
        let mut best = (0, f32::INFINITY);
        let device = crate::device::CudaDevice {
            ordinal: self.gpu.ordinal,
        };
        for candidate in 0..plan.candidates.len() {
            // SAFETY: as the caller promises.
            let queue = || unsafe { self.queue(plan, candidate, product, at).or_panic() };
            queue();
            let milliseconds = device.time(|| (0..5).for_each(|_| queue()))? / 5.0;
            if milliseconds < best.1 {
                best = (candidate, milliseconds);
            }
        }
        plan.chosen = best.0;
        Ok(best)
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
