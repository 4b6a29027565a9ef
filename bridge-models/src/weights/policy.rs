//! In which dtype weights are held.

use bridge_core::dtype::{DType, cast_bytes};
use bridge_ops::{Float, Ops, float_from_bytes};

use super::ParamRole;
use crate::error::{Error, Result};

/// In which dtype a model's weights are held after loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DtypePolicy {
    /// Everything in f32, as training on a CPU needs.
    #[default]
    Float32,
    /// Matrices as the checkpoint has them (f64 becomes f32), vectors in f32. Arithmetic is f32 all the same: this
    /// halves the memory that generation from a bf16 checkpoint must read per token.
    Source,
}

impl DtypePolicy {
    /// The dtype that a weight of `role` stored as `stored` is held in; `None` if `stored` is no plain float.
    pub fn held(self, role: ParamRole, stored: DType) -> Option<DType> {
        match (stored, self) {
            (DType::F16 | DType::BF16, DtypePolicy::Source) if role.is_matrix() => Some(stored),
            (DType::F16 | DType::BF16 | DType::F32 | DType::F64, _) => Some(DType::F32),
            _ => None,
        }
    }
}

/// A tensor in the dtype that `policy` holds it in, from its bytes as stored.
pub(crate) fn held_tensor<B: Ops>(
    policy: DtypePolicy,
    name: &str,
    shape: &[usize],
    stored: DType,
    bytes: Vec<u8>,
    device: &B::Device,
    origin: impl Fn() -> String,
) -> Result<Float<B>> {
    let refused = || Error::WeightDtype {
        origin: origin(),
        name: name.to_owned(),
        found: stored.as_str().to_owned(),
    };
    let held = policy
        .held(ParamRole::of(name, shape), stored)
        .ok_or_else(refused)?;
    let bytes = if held == stored {
        bytes
    } else {
        let size = held
            .byte_len(shape)
            .and_then(|size| usize::try_from(size).ok())
            .ok_or_else(refused)?;
        let mut cast = vec![0; size];
        cast_bytes(&bytes, stored, held, &mut cast).map_err(|_| refused())?;
        cast
    };
    let dtype = match held {
        DType::F16 => bridge_ops::DType::F16,
        DType::BF16 => bridge_ops::DType::BF16,
        _ => bridge_ops::DType::F32,
    };
    Ok(float_from_bytes::<B>(dtype, bytes, shape, device))
}
