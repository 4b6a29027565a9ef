use burn_backend::{bf16, f16};
use proptest::prelude::*;

use super::{Element, Matrix, Output, gemm, panel_depth};
use crate::testing::numbers;

/// `c = a b` or `c += a b` by the definition, in f64.
fn reference<T: Element>(
    a: Matrix<'_, f32>,
    b: Matrix<'_, T>,
    c: &mut [f32],
    ldc: usize,
    output: Output,
) {
    for row in 0..a.rows {
        for col in 0..b.cols {
            let products =
                (0..a.cols).map(|k| f64::from(a.get(row, k)) * f64::from(b.get(k, col).widen()));
            let before = if output == Output::Add {
                f64::from(c[row * ldc + col])
            } else {
                0.0
            };
            c[row * ldc + col] = (before + products.sum::<f64>()) as f32;
        }
    }
}

/// A matrix in the given data: with contiguous rows, contiguous columns, or neither.
fn matrix<T: Copy>(data: &[T], rows: usize, cols: usize, layout: usize) -> Matrix<'_, T> {
    match layout {
        0 => Matrix::with_row_stride(data, rows, cols, cols + 3),
        1 => Matrix::with_row_stride(data, cols, rows, rows + 1).t(),
        _ => Matrix::new(data, 5, (rows, cols), (2 * cols + 1, 2)),
    }
}

#[track_caller]
fn check<T: Element>(
    (m, k, n): (usize, usize, usize),
    layouts: (usize, usize),
    output: Output,
    narrow: fn(f32) -> T,
) {
    let room = |rows: usize, cols: usize| (2 * rows + 4) * (2 * cols + 4);
    let a = numbers(room(m, k), 1);
    let b: Vec<T> = numbers(room(k, n), 2).into_iter().map(narrow).collect();
    let (a, b) = (matrix(&a, m, k, layouts.0), matrix(&b, k, n, layouts.1));
    let ldc = n + 2;
    let mut expected = numbers(m * ldc, 3);
    let mut found = expected.clone();
    reference(a, b, &mut expected, ldc, output);
    gemm(a, b, &mut found, ldc, output);
    let tolerance = 1e-6 * (k as f32).sqrt().max(1.0) * 2.0;
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(
            (found - expected).abs() <= tolerance,
            "element {i} is {found}, expected {expected}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn products_match_the_definition(
        m in 1..70_usize,
        k in 0..90_usize,
        n in 1..70_usize,
        layouts in (0..3_usize, 0..3_usize),
        add in any::<bool>(),
    ) {
        let output = if add { Output::Add } else { Output::Overwrite };
        check((m, k, n), layouts, output, |x| x);
        check((m, k, n), layouts, output, bf16::from_f32);
        check((m, k, n), layouts, output, f16::from_f32);
    }
}

#[test]
fn sizes_beyond_one_block() {
    // Depth beyond a panel; rows beyond a block; columns and depth beyond the shared block.
    check((13, 1100, 35), (0, 1), Output::Add, |x| x);
    check((301, 77, 18), (1, 0), Output::Overwrite, |x| x);
    check((7, 40, 60_000), (0, 0), Output::Add, |x| x);
    check((7, 60_000, 40), (0, 0), Output::Overwrite, |x| x);
    check((7, 3000, 1500), (0, 1), Output::Overwrite, bf16::from_f32);
}

#[test]
fn panels_are_equal_and_not_too_deep() {
    for k in [1, 7, 8, 511, 512, 513, 576, 1536, 4096, 49152] {
        let depth = panel_depth(k);
        assert!(
            depth <= 512 && k.div_ceil(depth) == k.div_ceil(512),
            "{k}: {depth}"
        );
    }
}

#[test]
fn result_does_not_depend_on_threads_or_on_other_rows() {
    let (m, k, n) = (97, 700, 211);
    let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
    let (a, b) = (Matrix::row_major(&a, m, k), Matrix::row_major(&b, n, k).t());
    let on = |threads: usize, a: Matrix<'_, f32>| {
        let mut c = vec![0.0; a.rows * n];
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| gemm(a, b, &mut c, n, Output::Overwrite));
        c
    };
    let one = on(1, a);
    assert_eq!(one, on(2, a));
    assert_eq!(one, on(7, a));
    let some_rows = Matrix {
        rows: 20,
        offset: 30 * k,
        ..a
    };
    assert_eq!(one[30 * n..50 * n], on(2, some_rows));
}

#[test]
fn portable_tile_agrees_with_the_fast_one() {
    use super::kernel::{Isa, MR, NR, tile};
    let depth = 33;
    let (a, b, start) = (
        numbers(depth * MR, 1),
        numbers(depth * NR, 2),
        numbers(MR * NR, 3),
    );
    let run = |isa, size, output| {
        let mut c = start.clone();
        // SAFETY: whole panels and a whole tile; the processor was asked.
        unsafe {
            tile(
                isa,
                depth,
                a.as_ptr(),
                b.as_ptr(),
                c.as_mut_ptr(),
                NR,
                size,
                output,
            )
        };
        c
    };
    for size in [(MR, NR), (2, 5)] {
        for output in [Output::Add, Output::Overwrite] {
            let (fast, portable) = (
                run(Isa::detect(), size, output),
                run(Isa::Portable, size, output),
            );
            assert!(
                fast.iter()
                    .zip(&portable)
                    .all(|(a, b)| (a - b).abs() < 1e-5),
                "{size:?} {output:?}"
            );
        }
    }
}
