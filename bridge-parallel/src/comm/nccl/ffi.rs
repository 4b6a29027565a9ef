//! The functions of NCCL that are used, found when first needed.
//!
//! `cudarc` has bindings too, but looks for `libnccl.so` only, while the packages of NVIDIA install `libnccl.so.2`; and
//! its status is a closed enum, which a newer library may step outside of. So the dozen functions are bound here.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use bridge_cuda::Library;

/// `ncclComm_t`.
pub(super) type CommPtr = *mut c_void;
/// `cudaStream_t`, which is the driver's `CUstream`.
pub(super) type Stream = *mut c_void;
/// `ncclResult_t`.
pub(super) type Status = c_int;

pub(super) const SUCCESS: Status = 0;
pub(super) const IN_PROGRESS: Status = 7;

/// `ncclUniqueId`: where the ranks of a communicator meet.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// `ncclConfig_t` as of NCCL 2.17. Later versions read a structure by its size and version, and add their defaults.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls return at once, so that a communicator can be aborted at any time.
    pub(super) fn non_blocking() -> Self {
        const UNDEFINED: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21700,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

macro_rules! api {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*);)*) => {
        /// The library's functions. All but the error texts return a [`Status`].
        pub(super) struct Api {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> Status,)*
            error_string: unsafe extern "C" fn(Status) -> *const c_char,
            last_error: unsafe extern "C" fn(CommPtr) -> *const c_char,
        }

        impl Api {
            fn load() -> Result<Self, String> {
                let path = Library::Nccl.load().map_err(|error| error.to_string())?;
                // SAFETY: the loader has this library open already; its initialisers have run.
                let library = unsafe { libloading::Library::new(&path) }.map_err(|error| error.to_string())?;
                let missing = |symbol: &str, error: libloading::Error| {
                    format!("{} has no {symbol} ({error}); NCCL 2.17 or newer is needed", path.display())
                };
                // SAFETY: the types are those of nccl.h. The library is never closed, so the functions stay.
                let api = unsafe {
                    Self {
                        $($field: *library.get($symbol).map_err(|e| missing(stringify!($field), e))?,)*
                        error_string: *library.get(b"ncclGetErrorString\0").map_err(|e| missing("ncclGetErrorString", e))?,
                        last_error: *library.get(b"ncclGetLastError\0").map_err(|e| missing("ncclGetLastError", e))?,
                    }
                };
                std::mem::forget(library);
                Ok(api)
            }
        }
    };
}

api! {
    get_version = b"ncclGetVersion\0": fn(*mut c_int);
    get_unique_id = b"ncclGetUniqueId\0": fn(*mut UniqueId);
    init_rank = b"ncclCommInitRankConfig\0": fn(*mut CommPtr, c_int, UniqueId, c_int, *mut Config);
    finalize = b"ncclCommFinalize\0": fn(CommPtr);
    destroy = b"ncclCommDestroy\0": fn(CommPtr);
    abort = b"ncclCommAbort\0": fn(CommPtr);
    async_error = b"ncclCommGetAsyncError\0": fn(CommPtr, *mut Status);
    all_reduce = b"ncclAllReduce\0": fn(*const c_void, *mut c_void, usize, c_int, c_int, CommPtr, Stream);
    all_gather = b"ncclAllGather\0": fn(*const c_void, *mut c_void, usize, c_int, CommPtr, Stream);
    reduce_scatter = b"ncclReduceScatter\0": fn(*const c_void, *mut c_void, usize, c_int, c_int, CommPtr, Stream);
    broadcast = b"ncclBroadcast\0": fn(*const c_void, *mut c_void, usize, c_int, c_int, CommPtr, Stream);
    send = b"ncclSend\0": fn(*const c_void, usize, c_int, c_int, CommPtr, Stream);
    recv = b"ncclRecv\0": fn(*mut c_void, usize, c_int, c_int, CommPtr, Stream);
    group_start = b"ncclGroupStart\0": fn();
    group_end = b"ncclGroupEnd\0": fn();
}

impl Api {
    /// The library, opened on first use.
    pub(super) fn get() -> Result<&'static Api, String> {
        static API: OnceLock<Result<Api, String>> = OnceLock::new();
        API.get_or_init(Api::load).as_ref().map_err(Clone::clone)
    }

    /// The library's version, as 23007 for 2.30.7.
    pub(super) fn version(&self) -> c_int {
        let mut version = 0;
        // SAFETY: writes to a local.
        let status = unsafe { (self.get_version)(&mut version) };
        if status == SUCCESS { version } else { 0 }
    }

    /// What a status means, with the library's last words.
    pub(super) fn explain(&self, status: Status) -> String {
        // SAFETY: both return static or thread-local text that lives until the next call.
        let [text, last] = unsafe {
            [
                (self.error_string)(status),
                (self.last_error)(std::ptr::null_mut()),
            ]
        }
        .map(|text| {
            if text.is_null() {
                return String::new();
            }
            // SAFETY: not null, and ends with a zero.
            unsafe { CStr::from_ptr(text) }
                .to_string_lossy()
                .trim()
                .to_owned()
        });
        let detail = if last.is_empty() {
            String::new()
        } else {
            format!(": {last}")
        };
        format!("{text} (status {status}){detail}")
    }
}
