use proptest::prelude::*;

use super::{Element, Matrix, Output, gemm, gemm_serial};

#[test]
fn scratch_bench() {}
