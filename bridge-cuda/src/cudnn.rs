//! cuDNN's graph API: the library, opened when first used, and its descriptors.
//!
//! Bound by hand: eleven functions, and the numbers of the attributes used here. They are the same in every cuDNN 9, and
//! numbers newer than the oldest version served can be passed to a library that may not know them, which answers with an
//! error. Source: `cudnn_graph.h` of cuDNN 9.

use std::ffi::{CStr, c_char, c_void};
use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::library::Library;

/// Oldest version used, as `major * 10000 + minor * 100 + patch`: the first whose attention masks with minus infinity,
/// clears its own accumulators and is free of the errors in the gradients of 9.10.0.
pub(crate) const OLDEST: usize = 91_002;

/// Kinds of descriptors.
pub(crate) mod kind {
    pub(crate) const POINTWISE: i32 = 0;
    pub(crate) const ENGINE_CONFIG: i32 = 3;
    pub(crate) const HEURISTICS: i32 = 4;
    pub(crate) const PLAN: i32 = 5;
    pub(crate) const OPERATION_POINTWISE: i32 = 13;
    pub(crate) const GRAPH: i32 = 15;
    pub(crate) const VARIANT_PACK: i32 = 16;
    pub(crate) const TENSOR: i32 = 17;
    pub(crate) const MATMUL: i32 = 18;
    pub(crate) const OPERATION_MATMUL: i32 = 19;
    pub(crate) const REDUCTION: i32 = 21;
    pub(crate) const OPERATION_REDUCTION: i32 = 22;
    pub(crate) const OPERATION_RESHAPE: i32 = 31;
    pub(crate) const KERNEL_CACHE: i32 = 34;
    #[cfg(test)]
    pub(crate) const DEVICE_PROPERTIES: i32 = 38;
}

/// Attributes of descriptors.
pub(crate) mod attribute {
    pub(crate) const POINTWISE_MODE: i32 = 0;
    pub(crate) const POINTWISE_PRECISION: i32 = 1;
    pub(crate) const POINTWISE_AXIS: i32 = 9;
    pub(crate) const HEURISTICS_MODE: i32 = 200;
    pub(crate) const HEURISTICS_GRAPH: i32 = 201;
    pub(crate) const HEURISTICS_RESULTS: i32 = 202;
    #[cfg(test)]
    pub(crate) const HEURISTICS_DEVICE: i32 = 204;
    pub(crate) const PLAN_HANDLE: i32 = 400;
    pub(crate) const PLAN_ENGINE_CONFIG: i32 = 401;
    pub(crate) const PLAN_WORKSPACE_SIZE: i32 = 402;
    pub(crate) const PLAN_KERNEL_CACHE: i32 = 406;
    #[cfg(test)]
    pub(crate) const PLAN_DEVICE: i32 = 407;
    pub(crate) const OPERATION_POINTWISE: i32 = 750;
    pub(crate) const OPERATION_POINTWISE_X: i32 = 751;
    pub(crate) const OPERATION_POINTWISE_B: i32 = 752;
    pub(crate) const OPERATION_POINTWISE_Y: i32 = 753;
    pub(crate) const OPERATION_POINTWISE_DX: i32 = 756;
    pub(crate) const OPERATION_POINTWISE_DY: i32 = 757;
    pub(crate) const OPERATION_POINTWISE_T: i32 = 758;
    pub(crate) const GRAPH_HANDLE: i32 = 800;
    pub(crate) const GRAPH_OPERATIONS: i32 = 801;
    pub(crate) const GRAPH_DYNAMIC_SHAPE: i32 = 803;
    pub(crate) const TENSOR_ALIGNMENT: i32 = 900;
    pub(crate) const TENSOR_DATA_TYPE: i32 = 901;
    pub(crate) const TENSOR_DIMENSIONS: i32 = 902;
    pub(crate) const TENSOR_STRIDES: i32 = 903;
    pub(crate) const TENSOR_ID: i32 = 906;
    pub(crate) const TENSOR_IS_VIRTUAL: i32 = 907;
    pub(crate) const TENSOR_IS_BY_VALUE: i32 = 908;
    pub(crate) const TENSOR_RAGGED_OFFSETS: i32 = 913;
    pub(crate) const VARIANT_PACK_IDS: i32 = 1000;
    pub(crate) const VARIANT_PACK_POINTERS: i32 = 1001;
    pub(crate) const VARIANT_PACK_WORKSPACE: i32 = 1003;
    pub(crate) const MATMUL_PRECISION: i32 = 1500;
    pub(crate) const MATMUL_PADDING: i32 = 1503;
    pub(crate) const OPERATION_MATMUL_A: i32 = 1520;
    pub(crate) const OPERATION_MATMUL_B: i32 = 1521;
    pub(crate) const OPERATION_MATMUL_C: i32 = 1522;
    pub(crate) const OPERATION_MATMUL: i32 = 1523;
    /// Of the rows of the left side; the next two are the columns of the right side and the depth.
    pub(crate) const OPERATION_MATMUL_LENGTHS: i32 = 1525;
    pub(crate) const REDUCTION_OPERATOR: i32 = 1600;
    pub(crate) const REDUCTION_PRECISION: i32 = 1601;
    pub(crate) const OPERATION_REDUCTION_X: i32 = 1610;
    pub(crate) const OPERATION_REDUCTION_Y: i32 = 1611;
    pub(crate) const OPERATION_REDUCTION: i32 = 1612;
    pub(crate) const OPERATION_RESHAPE_X: i32 = 2200;
    pub(crate) const OPERATION_RESHAPE_Y: i32 = 2201;
    pub(crate) const KERNEL_CACHE_GRAPH: i32 = 2400;
    #[cfg(test)]
    pub(crate) const DEVICE_PROPERTIES_JSON: i32 = 2702;
}

/// Types of attribute values.
pub(crate) mod value {
    pub(crate) const HANDLE: i32 = 0;
    pub(crate) const DATA_TYPE: i32 = 1;
    pub(crate) const BOOLEAN: i32 = 2;
    pub(crate) const INT64: i32 = 3;
    pub(crate) const DOUBLE: i32 = 5;
    pub(crate) const POINTER: i32 = 6;
    pub(crate) const HEURISTICS_MODE: i32 = 8;
    pub(crate) const POINTWISE_MODE: i32 = 14;
    pub(crate) const DESCRIPTOR: i32 = 15;
    pub(crate) const REDUCTION_OPERATOR: i32 = 18;
    #[cfg(test)]
    pub(crate) const CHAR: i32 = 24;
}

/// A pointer the library gave out: a handle or a descriptor.
pub(crate) type Raw = *mut c_void;
type Status = i32;

/// The library's functions.
pub(crate) struct Api {
    /// As [`OLDEST`].
    pub(crate) version: usize,
    create: unsafe extern "C" fn(*mut Raw) -> Status,
    set_stream: unsafe extern "C" fn(Raw, Raw) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(*mut c_char, usize),
    new_descriptor: unsafe extern "C" fn(i32, *mut Raw) -> Status,
    drop_descriptor: unsafe extern "C" fn(Raw) -> Status,
    set: unsafe extern "C" fn(Raw, i32, i32, i64, *const c_void) -> Status,
    get: unsafe extern "C" fn(Raw, i32, i32, i64, *mut i64, *mut c_void) -> Status,
    finalize: unsafe extern "C" fn(Raw) -> Status,
    execute: unsafe extern "C" fn(Raw, Raw, Raw) -> Status,
}

impl Api {
    /// The library, opened on first use.
    ///
    /// # Errors
    /// cuDNN, or a library it needs, is missing or too old.
    pub(crate) fn get() -> Result<&'static Api> {
        static API: OnceLock<Result<Api>> = OnceLock::new();
        API.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Api> {
        // cuDNN looks for these by name, ends the process when cuBLASLt is missing, and finds them once they are open.
        Library::CublasLt.load()?;
        Library::Nvrtc.load()?;
        let path = Library::Cudnn.load()?;
        let missing = |reason: libloading::Error| Error::Dnn {
            call: "opening the library".into(),
            status: format!("{} lacks a function of cuDNN 9", path.display()),
            detail: reason.to_string(),
        };
        // SAFETY: the same file as above, so that this only counts another user; it is never closed.
        let library = unsafe { libloading::Library::new(&path) }.map_err(missing)?;
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the signature is the header's.
                *unsafe { library.get($name) }.map_err(missing)?
            };
        }
        let version: unsafe extern "C" fn() -> usize = function!(b"cudnnGetVersion\0");
        // SAFETY: takes nothing and returns a number.
        let version = unsafe { version() };
        if version < OLDEST {
            return Err(Error::Dnn {
                call: "opening the library".into(),
                status: format!("version {version} at {}", path.display()),
                detail: format!(
                    "expected {OLDEST} (9.10.2) or newer; {}",
                    Library::Cudnn.advice()
                ),
            });
        }
        Ok(Api {
            version,
            create: function!(b"cudnnCreate\0"),
            set_stream: function!(b"cudnnSetStream\0"),
            error_string: function!(b"cudnnGetErrorString\0"),
            last_error: function!(b"cudnnGetLastErrorString\0"),
            new_descriptor: function!(b"cudnnBackendCreateDescriptor\0"),
            drop_descriptor: function!(b"cudnnBackendDestroyDescriptor\0"),
            set: function!(b"cudnnBackendSetAttribute\0"),
            get: function!(b"cudnnBackendGetAttribute\0"),
            finalize: function!(b"cudnnBackendFinalize\0"),
            execute: function!(b"cudnnBackendExecute\0"),
        })
    }

    fn check(&self, status: Status, call: impl FnOnce() -> String) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        let mut text = [0u8; 4096];
        // SAFETY: the buffer has the length given; the names of statuses are static strings.
        let (status, detail) = unsafe {
            (self.last_error)(text.as_mut_ptr().cast(), text.len());
            let name = (self.error_string)(status);
            (
                CStr::from_ptr(name).to_string_lossy().into_owned(),
                CStr::from_bytes_until_nul(&text)
                    .map(|text| text.to_string_lossy().into_owned())
                    .unwrap_or_default(),
            )
        };
        Err(Error::Dnn {
            call: call(),
            status,
            detail,
        })
    }

    /// A handle for the device that is current, whose work goes to `stream`. Lives as long as the program.
    pub(crate) fn handle(&self, stream: Raw) -> Result<Raw> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes to a local; the stream belongs to the context that is current.
        unsafe {
            self.check((self.create)(&mut handle), || "cudnnCreate".into())?;
            self.check((self.set_stream)(handle, stream), || {
                "cudnnSetStream".into()
            })?;
        }
        Ok(handle)
    }

    /// Queues a plan.
    ///
    /// # Safety
    /// The pack must give every tensor of the plan memory of its size, or a value if it is passed by value.
    pub(crate) unsafe fn execute(
        &self,
        handle: Raw,
        plan: &Descriptor,
        pack: &Descriptor,
    ) -> Result<()> {
        // SAFETY: as the caller promises.
        let status = unsafe { (self.execute)(handle, plan.raw, pack.raw) };
        self.check(status, || "cudnnBackendExecute".into())
    }
}

/// A descriptor of the library, destroyed when dropped.
pub(crate) struct Descriptor {
    api: &'static Api,
    raw: Raw,
}

// SAFETY: descriptors may be used from any thread, by one at a time.
unsafe impl Send for Descriptor {}
// SAFETY: a finalized descriptor is only read.
unsafe impl Sync for Descriptor {}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by the library and destroyed once.
        unsafe { (self.api.drop_descriptor)(self.raw) };
    }
}

/// A type that attributes are made of.
///
/// # Safety
/// The type must have the layout of the value type of this number.
pub(crate) unsafe trait AttributeValue: Copy {}
// SAFETY: enumerations.
unsafe impl AttributeValue for i32 {}
// SAFETY: 64-bit integers.
unsafe impl AttributeValue for i64 {}
// SAFETY: booleans are one byte in both.
unsafe impl AttributeValue for bool {}
// SAFETY: pointers, handles and descriptors.
unsafe impl AttributeValue for Raw {}
// SAFETY: characters.
unsafe impl AttributeValue for u8 {}
// SAFETY: the same number in both.
unsafe impl AttributeValue for f64 {}

impl Descriptor {
    pub(crate) fn new(api: &'static Api, kind: i32) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes to a local.
        let status = unsafe { (api.new_descriptor)(kind, &mut raw) };
        api.check(status, || format!("creating a descriptor of kind {kind}"))?;
        Ok(Self { api, raw })
    }

    pub(crate) fn raw(&self) -> Raw {
        self.raw
    }

    /// Sets an attribute to an array of values of type number `value`.
    pub(crate) fn set<T: AttributeValue>(
        &self,
        attribute: i32,
        value: i32,
        values: &[T],
    ) -> Result<()> {
        // SAFETY: the library copies `len` values of the type's size.
        let status = unsafe {
            (self.api.set)(
                self.raw,
                attribute,
                value,
                values.len() as i64,
                values.as_ptr().cast(),
            )
        };
        self.api
            .check(status, || format!("setting attribute {attribute}"))
    }

    /// Sets an attribute to a descriptor.
    pub(crate) fn link(&self, attribute: i32, other: Raw) -> Result<()> {
        self.set(attribute, value::DESCRIPTOR, &[other])
    }

    /// Completes the descriptor. `what` names it in errors.
    pub(crate) fn finalize(self, what: &str) -> Result<Self> {
        // SAFETY: a descriptor that is not finalized yet.
        let status = unsafe { (self.api.finalize)(self.raw) };
        self.api.check(status, || format!("finalizing {what}"))?;
        Ok(self)
    }

    /// An integer attribute.
    pub(crate) fn integer(&self, attribute: i32) -> Result<i64> {
        let (mut number, mut count) = (0i64, 0i64);
        // SAFETY: one integer is asked for and there is room for one.
        let status = unsafe {
            (self.api.get)(
                self.raw,
                attribute,
                value::INT64,
                1,
                &mut count,
                std::ptr::from_mut(&mut number).cast(),
            )
        };
        self.api
            .check(status, || format!("reading attribute {attribute}"))?;
        Ok(number)
    }

    /// An attribute that holds descriptors of one kind.
    pub(crate) fn descriptors(&self, attribute: i32, kind: i32) -> Result<Vec<Descriptor>> {
        let read = |room: i64, into: *mut c_void| {
            let mut count = 0;
            // SAFETY: `into` has room for that many descriptors.
            let status = unsafe {
                (self.api.get)(
                    self.raw,
                    attribute,
                    value::DESCRIPTOR,
                    room,
                    &mut count,
                    into,
                )
            };
            self.api
                .check(status, || format!("reading attribute {attribute}"))?;
            Ok(count)
        };
        let count = read(0, std::ptr::null_mut())?;
        let mut found = (0..count)
            .map(|_| Descriptor::new(self.api, kind))
            .collect::<Result<Vec<_>>>()?;
        if count > 0 {
            let mut raws: Vec<Raw> = found.iter().map(|descriptor| descriptor.raw).collect();
            let filled = read(count, raws.as_mut_ptr().cast())?;
            found.truncate(usize::try_from(filled).unwrap_or(0));
        }
        Ok(found)
    }
}
