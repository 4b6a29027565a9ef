//! Moving numbers between host slices and backend tensors.

use burn_backend::{Backend, Bytes, DType, Element, Shape, TensorData, read_sync};

use crate::primitive::{Float, Int, dims};

/// A float32 tensor of shape `dims` with the given values in row-major order.
///
/// # Panics
/// When `values.len()` is not the product of `dims`.
#[track_caller]
pub fn float_from_f32<B: Backend>(values: &[f32], dims: &[usize], device: &B::Device) -> Float<B> {
    float_from_vec::<B>(values.to_vec(), dims, device)
}

/// [`float_from_f32`] that takes the buffer over, for large tensors.
///
/// # Panics
/// When `values.len()` is not the product of `dims`.
#[track_caller]
pub fn float_from_vec<B: Backend>(
    values: Vec<f32>,
    dims: &[usize],
    device: &B::Device,
) -> Float<B> {
    check_len(values.len(), dims);
    B::float_from_data(TensorData::new(values, Shape::from(dims.to_vec())), device)
}

/// A float tensor of the given dtype from its little-endian bytes in row-major order; takes the buffer over.
///
/// # Panics
/// When the number of bytes is not `dtype.size()` times the product of `dims`.
#[track_caller]
pub fn float_from_bytes<B: Backend>(
    dtype: DType,
    bytes: Vec<u8>,
    dims: &[usize],
    device: &B::Device,
) -> Float<B> {
    assert!(dtype.is_float(), "expected a float dtype, found {dtype:?}");
    let expected = dims.iter().product::<usize>() * dtype.size();
    assert_eq!(
        bytes.len(),
        expected,
        "{dtype:?} tensor of shape {dims:?} needs {expected} bytes, found {}",
        bytes.len()
    );
    // A byte buffer from a file need not be aligned for its element type; CPU kernels borrow typed slices of it.
    let bytes = match dtype {
        DType::F32 => aligned::<f32>(bytes),
        DType::F64 => aligned::<f64>(bytes),
        DType::F16 => aligned::<half::f16>(bytes),
        DType::BF16 => aligned::<half::bf16>(bytes),
        _ => Bytes::from_bytes_vec(bytes),
    };
    B::float_from_data(
        TensorData {
            bytes,
            shape: Shape::from(dims.to_vec()),
            dtype,
        },
        device,
    )
}

/// A float tensor of zeros.
pub fn float_zeros<B: Backend>(dims: &[usize], dtype: DType, device: &B::Device) -> Float<B> {
    B::float_zeros(Shape::from(dims.to_vec()), device, dtype.into())
}

/// An integer tensor (in the backend's default integer dtype) of shape `dims`.
///
/// # Panics
/// When `values.len()` is not the product of `dims`.
#[track_caller]
pub fn int_from_i64<B: Backend>(values: &[i64], dims: &[usize], device: &B::Device) -> Int<B> {
    check_len(values.len(), dims);
    let data = TensorData::new(values.to_vec(), Shape::from(dims.to_vec()));
    B::int_from_data(data.convert_dtype(<B::IntElem as Element>::dtype()), device)
}

/// Reads a float tensor back as float32, in row-major order. Waits for the device.
///
/// # Panics
/// When the device fails to deliver the data.
pub fn to_f32_vec<B: Backend>(x: Float<B>) -> Vec<f32> {
    let data = read_sync(B::float_into_data(x)).expect("reading a tensor back from the device");
    data.convert_dtype(DType::F32)
        .into_vec()
        .expect("float data converted to f32")
}

/// Reads an integer tensor back, in row-major order. Waits for the device.
///
/// # Panics
/// When the device fails to deliver the data.
pub fn to_i64_vec<B: Backend>(x: Int<B>) -> Vec<i64> {
    let data = read_sync(B::int_into_data(x)).expect("reading a tensor back from the device");
    data.convert_dtype(DType::I64)
        .into_vec()
        .expect("integer data converted to i64")
}

/// Reads a tensor of one element back. Waits for the device.
///
/// # Panics
/// When the tensor has more or less than one element.
#[track_caller]
pub fn to_scalar<B: Backend>(x: Float<B>) -> f32 {
    let shape = dims(&x);
    let values = to_f32_vec::<B>(x);
    assert_eq!(
        values.len(),
        1,
        "expected one element, found shape {shape:?}"
    );
    values[0]
}

fn aligned<E: Element + bytemuck::Pod>(bytes: Vec<u8>) -> Bytes {
    if bytemuck::try_cast_slice::<u8, E>(&bytes).is_ok() {
        Bytes::from_bytes_vec(bytes)
    } else {
        Bytes::from_elems(bytemuck::pod_collect_to_vec::<u8, E>(&bytes))
    }
}

#[track_caller]
fn check_len(len: usize, dims: &[usize]) {
    let expected: usize = dims.iter().product();
    assert_eq!(
        len, expected,
        "shape {dims:?} needs {expected} values, found {len}"
    );
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;
    use half::{bf16, f16};

    use super::*;
    use crate::testing::DEVICE;

    #[test]
    fn bytes_of_every_float_dtype_are_read_at_any_alignment() {
        let values = [1.0_f32, -2.5, 0.15625, 3.0, 7.0, -0.5];
        let cases: [(DType, Vec<u8>); 4] = [
            (
                DType::F32,
                values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            ),
            (
                DType::F64,
                values
                    .iter()
                    .flat_map(|&x| f64::from(x).to_le_bytes())
                    .collect(),
            ),
            (
                DType::BF16,
                values
                    .iter()
                    .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
                    .collect(),
            ),
            (
                DType::F16,
                values
                    .iter()
                    .flat_map(|&x| f16::from_f32(x).to_le_bytes())
                    .collect(),
            ),
        ];
        for (dtype, bytes) in cases {
            let x = float_from_bytes::<Flex>(dtype, bytes, &[2, 3], &DEVICE);
            assert_eq!((x.dtype(), dims(&x)), (dtype, vec![2, 3]));
            assert_eq!(to_f32_vec::<Flex>(x), values);
        }
    }

    #[test]
    #[should_panic(expected = "BF16 tensor of shape [2, 3] needs 12 bytes, found 10")]
    fn too_few_bytes_are_named() {
        float_from_bytes::<Flex>(DType::BF16, vec![0; 10], &[2, 3], &DEVICE);
    }

    #[test]
    fn integers_round_trip() {
        let x = int_from_i64::<Flex>(&[3, -100, 128_255], &[3], &DEVICE);
        assert_eq!(to_i64_vec::<Flex>(x), [3, -100, 128_255]);
    }

    #[test]
    fn scalars() {
        assert_eq!(
            to_scalar::<Flex>(float_from_f32::<Flex>(&[2.5], &[1, 1], &DEVICE)),
            2.5
        );
        let zeros = float_zeros::<Flex>(&[2], DType::F32, &DEVICE);
        assert_eq!(to_f32_vec::<Flex>(zeros), [0.0, 0.0]);
    }
}
