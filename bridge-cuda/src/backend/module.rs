//! Neural-network operations. Language and vision models reach the convolutions; pooling, resampling and Fourier
//! transforms are not there.

use burn_backend::ops::attention::attention_fallback;
use burn_backend::ops::{
    AttentionModuleOptions, ConvOptions, ConvTransposeOptions, DeformConv2dBackward,
    DeformConvOptions, InterpolateOptions, MaxPool2dBackward, MaxPool2dWithIndices, ModuleOps,
};

use super::Cuda;
use crate::conv::{conv, conv_transpose};
use crate::tensor::CudaTensor;

/// Stops with the name of an operation that this backend does not have.
#[track_caller]
pub(super) fn unsupported(op: &str) -> ! {
    panic!("not supported on cuda: {op}; use the CPU backend (flex) for it")
}

impl ModuleOps<Cuda> for Cuda {
    fn conv2d(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
        options: ConvOptions<2>,
    ) -> CudaTensor {
        conv(x, weight, bias, &options)
    }

    fn conv3d(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
        options: ConvOptions<3>,
    ) -> CudaTensor {
        conv(x, weight, bias, &options)
    }

    fn conv_transpose2d(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
        options: ConvTransposeOptions<2>,
    ) -> CudaTensor {
        conv_transpose(x, weight, bias, &options)
    }

    fn conv_transpose3d(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
        options: ConvTransposeOptions<3>,
    ) -> CudaTensor {
        conv_transpose(x, weight, bias, &options)
    }

    fn attention(
        query: CudaTensor,
        key: CudaTensor,
        value: CudaTensor,
        mask: Option<CudaTensor>,
        attn_bias: Option<CudaTensor>,
        options: AttentionModuleOptions,
    ) -> CudaTensor {
        attention_fallback::<Cuda>(query, key, value, mask, attn_bias, options)
    }

    fn deform_conv2d(
        _x: CudaTensor,
        _offset: CudaTensor,
        _weight: CudaTensor,
        _mask: Option<CudaTensor>,
        _bias: Option<CudaTensor>,
        _options: DeformConvOptions<2>,
    ) -> CudaTensor {
        unsupported("deform_conv2d")
    }

    fn deform_conv2d_backward(
        _x: CudaTensor,
        _offset: CudaTensor,
        _weight: CudaTensor,
        _mask: Option<CudaTensor>,
        _bias: Option<CudaTensor>,
        _output_grad: CudaTensor,
        _options: DeformConvOptions<2>,
    ) -> DeformConv2dBackward<Cuda> {
        unsupported("deform_conv2d_backward")
    }

    fn avg_pool2d(
        _x: CudaTensor,
        _kernel_size: [usize; 2],
        _stride: [usize; 2],
        _padding: [usize; 2],
        _count_include_pad: bool,
        _ceil_mode: bool,
    ) -> CudaTensor {
        unsupported("avg_pool2d")
    }

    fn avg_pool2d_backward(
        _x: CudaTensor,
        _grad: CudaTensor,
        _kernel_size: [usize; 2],
        _stride: [usize; 2],
        _padding: [usize; 2],
        _count_include_pad: bool,
        _ceil_mode: bool,
    ) -> CudaTensor {
        unsupported("avg_pool2d_backward")
    }

    fn adaptive_avg_pool2d(_x: CudaTensor, _output_size: [usize; 2]) -> CudaTensor {
        unsupported("adaptive_avg_pool2d")
    }

    fn adaptive_avg_pool2d_backward(_x: CudaTensor, _grad: CudaTensor) -> CudaTensor {
        unsupported("adaptive_avg_pool2d_backward")
    }

    fn max_pool2d(
        _x: CudaTensor,
        _kernel_size: [usize; 2],
        _stride: [usize; 2],
        _padding: [usize; 2],
        _dilation: [usize; 2],
        _ceil_mode: bool,
    ) -> CudaTensor {
        unsupported("max_pool2d")
    }

    fn max_pool2d_with_indices(
        _x: CudaTensor,
        _kernel_size: [usize; 2],
        _stride: [usize; 2],
        _padding: [usize; 2],
        _dilation: [usize; 2],
        _ceil_mode: bool,
    ) -> MaxPool2dWithIndices<Cuda> {
        unsupported("max_pool2d_with_indices")
    }

    fn max_pool2d_with_indices_backward(
        _x: CudaTensor,
        _kernel_size: [usize; 2],
        _stride: [usize; 2],
        _padding: [usize; 2],
        _dilation: [usize; 2],
        _ceil_mode: bool,
        _output_grad: CudaTensor,
        _indices: CudaTensor,
    ) -> MaxPool2dBackward<Cuda> {
        unsupported("max_pool2d_with_indices_backward")
    }

    fn interpolate(
        _x: CudaTensor,
        _output_size: [usize; 2],
        _options: InterpolateOptions,
    ) -> CudaTensor {
        unsupported("interpolate")
    }

    fn interpolate_backward(
        _x: CudaTensor,
        _grad: CudaTensor,
        _output_size: [usize; 2],
        _options: InterpolateOptions,
    ) -> CudaTensor {
        unsupported("interpolate_backward")
    }

    fn rfft(_signal: CudaTensor, _dim: usize, _n: Option<usize>) -> (CudaTensor, CudaTensor) {
        unsupported("rfft")
    }

    fn irfft(
        _spectrum_re: CudaTensor,
        _spectrum_im: CudaTensor,
        _dim: usize,
        _n: Option<usize>,
    ) -> CudaTensor {
        unsupported("irfft")
    }
}
