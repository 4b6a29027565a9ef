//! Burn's tensor operations.

use bridge_ops::{DType, Ops};
use burn::tensor::activation::{gelu, log_sigmoid, log_softmax, relu, sigmoid, softmax};
use burn::tensor::module::{conv_transpose2d, conv2d, conv3d};
use burn::tensor::ops::{ConvOptions, ConvTransposeOptions};
use burn::tensor::{ElementConversion, IndexingUpdateOp, Int, Tensor, TensorData, s};

use super::{Context, Group, group};

const FLOATS: &[DType] = &[DType::F32, DType::BF16, DType::F16];
const F32: &[DType] = &[DType::F32];

pub(crate) fn groups() -> Vec<Group> {
    vec![
        group!(movement, FLOATS),
        group!(casts, FLOATS),
        group!(unary, FLOATS),
        group!(unary_strided, FLOATS),
        group!(binary, FLOATS),
        group!(comparisons, FLOATS),
        group!(masks, FLOATS),
        group!(reductions, FLOATS),
        group!(arg_reductions, F32),
        group!(indexing, FLOATS),
        group!(assignments, FLOATS),
        group!(scans, F32),
        group!(sorting, F32),
        group!(matrix_products, FLOATS),
        group!(convolutions, F32),
        group!(activations, FLOATS),
        group!(integers, F32),
        group!(integer_types, F32),
        group!(booleans, F32),
        group!(empty, FLOATS),
        group!(doubles, &[DType::F64]),
    ]
}

fn movement<B: Ops>(c: &mut Context<B>) {
    let x = c.tensor(1, [3, 5, 7]);
    c.put("identity", x.clone());
    c.put("transpose", x.clone().transpose());
    c.put("permute", x.clone().permute([2, 0, 1]));
    c.put(
        "permuted reshape",
        x.clone().permute([2, 0, 1]).reshape([21, 5]),
    );
    c.put("slice", x.clone().slice([1..3, 2..4, 0..7]));
    c.put("slice step", x.clone().slice(s![.., 0..5;2, ..]));
    c.put("slice reversed", x.clone().slice(s![.., .., 1..6;-2]));
    c.put("flip", x.clone().flip([0, 2]));
    c.put(
        "expand",
        x.clone().slice([0..1, 0..5, 0..7]).expand([4, 5, 7]),
    );
    c.put("expand rank", x.clone().expand([2, 3, 5, 7]));
    c.put(
        "expanded reshape",
        x.clone()
            .slice([0..1, 0..5, 0..7])
            .expand([4, 5, 7])
            .reshape([20, 7]),
    );
    c.put(
        "cat 0",
        Tensor::cat(vec![x.clone(), x.clone().flip([1])], 0),
    );
    c.put(
        "cat 2",
        Tensor::cat(vec![x.clone(), x.clone().slice([0..3, 0..5, 2..4])], 2),
    );
    c.put("repeat", x.clone().repeat_dim(1, 3));
    c.put("unfold", x.clone().unfold::<4, _>(2, 3, 2));
    c.put(
        "chained",
        x.flip([0]).permute([1, 2, 0]).slice([1..4, 0..6, 0..2]) * 2.0,
    );
    let device = c.device.clone();
    c.put(
        "full",
        Tensor::<B, 2>::full([3, 33], 0.37, (&device, c.dtype)),
    );
    c.put("zeros", Tensor::<B, 2>::zeros([3, 3], (&device, c.dtype)));
    c.put_int(
        "arange",
        Tensor::<B, 1, Int>::arange_step(-3..40, 5, &device),
    );
}

fn casts<B: Ops>(c: &mut Context<B>) {
    // A factor that is a power of two scales without rounding: rounded numbers can fall on either side of an integer.
    let x = c.tensor(2, [9, 13]) * 32.0;
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        c.put("cast", x.clone().cast(dtype).cast(DType::F32));
        c.put(
            "cast view",
            x.clone().transpose().cast(dtype).cast(DType::F32),
        );
    }
    c.put_int("int", x.clone().int());
    c.put("int and back", x.clone().int().float());
    c.put_bool("bool", x.int().bool());
}

fn unary<B: Ops>(c: &mut Context<B>) {
    // An odd number of elements, so that packs leave a rest.
    let x = c.tensor(3, [7, 33]);
    let positive = x.clone().abs() + 0.1;
    let unit = x.clone() * 0.45;
    c.put("neg", x.clone().neg());
    c.put("abs", x.clone().abs());
    c.put("exp", x.clone().exp());
    c.put("log", positive.clone().log());
    c.put("log1p", positive.clone().log1p());
    c.put("sqrt", positive.clone().sqrt());
    c.put("recip", positive.clone().recip());
    c.put("sin", x.clone().sin());
    c.put("cos", x.clone().cos());
    c.put("tan", unit.clone().tan());
    c.put("sinh", x.clone().sinh());
    c.put("cosh", x.clone().cosh());
    c.put("tanh", x.clone().tanh());
    c.put("asin", unit.clone().asin());
    c.put("acos", unit.clone().acos());
    c.put("atan", x.clone().atan());
    c.put("asinh", x.clone().asinh());
    c.put("acosh", (positive.clone() + 1.0).acosh());
    c.put("atanh", unit.clone().atanh());
    c.put("erf", x.clone().erf());
    c.put("floor", x.clone().floor());
    c.put("ceil", x.clone().ceil());
    c.put("round", (x.clone() * 2.0).round());
    c.put("sign", x.clone().sign());
    c.put("clamp", x.clone().clamp(-0.5, 1.0));
    c.put("clamp_min", x.clone().clamp_min(0.25));
    c.put("clamp_max", x.clone().clamp_max(0.25));
    c.put("powf_scalar", positive.clone().powf_scalar(1.7));
    c.put("powi_scalar", x.clone().powi_scalar(3));
    c.put("square", x.clone().square());
    c.put("add_scalar", x.clone() + 1.5);
    c.put("sub_scalar", x.clone() - 1.5);
    c.put("mul_scalar", x.clone() * 1.5);
    c.put("div_scalar", x.clone() / 1.5);
    c.put("remainder_scalar", x.clone().remainder_scalar(0.75));
    c.put_bool("is_nan", x.clone().is_nan());
    c.put_bool("is_inf", (x / 0.0).is_inf());
}

fn unary_strided<B: Ops>(c: &mut Context<B>) {
    let x = c.tensor(4, [6, 10, 5]);
    c.put("transposed", x.clone().transpose().exp());
    c.put("sliced", x.clone().slice([1..5, 3..10, 1..4]).exp());
    c.put("misaligned", x.clone().slice([1..2, 0..10, 0..5]).exp());
    c.put(
        "expanded",
        x.clone().slice([0..6, 0..1, 0..5]).expand([6, 9, 5]).exp(),
    );
    c.put("flipped", x.flip([1]).exp());
}

fn binary<B: Ops>(c: &mut Context<B>) {
    let (a, b) = (c.tensor(5, [4, 9, 33]), c.tensor(6, [4, 9, 33]));
    let positive = b.clone().abs().clamp_min(0.25);
    c.put("add", a.clone() + b.clone());
    c.put("sub", a.clone() - b.clone());
    c.put("mul", a.clone() * b.clone());
    c.put("div", a.clone() / positive.clone());
    c.put("remainder", a.clone().remainder(positive.clone()));
    c.put("powf", positive.clone().powf(a.clone()));
    c.put("atan2", a.clone().atan2(b.clone()));
    c.put("row", a.clone() + c.tensor::<3>(7, [1, 1, 33]));
    c.put("column", a.clone() * c.tensor::<3>(8, [4, 9, 1]));
    c.put("middle", a.clone() - c.tensor::<3>(9, [4, 1, 33]));
    c.put(
        "both",
        c.tensor::<3>(10, [4, 1, 33]) * c.tensor::<3>(11, [1, 9, 1]),
    );
    c.put(
        "transposed",
        a.clone().transpose() + c.tensor::<3>(12, [4, 33, 9]),
    );
    c.put("itself", a.clone() * a.clone());
    c.put(
        "cross",
        c.tensor::<2>(13, [5, 3])
            .cross(c.tensor::<2>(14, [5, 3]), 1),
    );
    c.put("max_pair", a.max_pair(b));
}

fn comparisons<B: Ops>(c: &mut Context<B>) {
    let a = (c.tensor(15, [5, 37]) * 2.0).round();
    let b = (c.tensor(16, [5, 37]) * 2.0).round();
    c.put_bool("equal", a.clone().equal(b.clone()));
    c.put_bool("not_equal", a.clone().not_equal(b.clone()));
    c.put_bool("greater", a.clone().greater(b.clone()));
    c.put_bool("greater_equal", a.clone().greater_equal(b.clone()));
    c.put_bool("lower", a.clone().lower(b.clone()));
    c.put_bool("lower_equal", a.clone().lower_equal(b.clone()));
    c.put_bool("equal_elem", a.clone().equal_elem(1.0));
    c.put_bool("not_equal_elem", a.clone().not_equal_elem(1.0));
    c.put_bool("greater_elem", a.clone().greater_elem(1.0));
    c.put_bool("lower_equal_elem", a.clone().lower_equal_elem(1.0));
    c.put_bool(
        "broadcast",
        a.clone().greater(b.clone().slice([0..1, 0..37])),
    );
    c.put_bool("view", a.transpose().lower(b.transpose()));
}

fn masks<B: Ops>(c: &mut Context<B>) {
    let (a, b) = (c.tensor(17, [4, 21]), c.tensor(18, [4, 21]));
    let mask = a.clone().greater_elem(0.3);
    c.put("mask_where", a.clone().mask_where(mask.clone(), b));
    c.put("mask_fill", a.clone().mask_fill(mask.clone(), -7.0));
    c.put(
        "mask_fill infinity",
        a.clone().mask_fill(mask.clone(), f32::NEG_INFINITY),
    );
    c.put("mask row", a.mask_fill(mask.slice([0..1, 0..21]), 2.0));
}

fn reductions<B: Ops>(c: &mut Context<B>) {
    for (seed, shape) in [
        (19, [3, 7, 11]),
        (20, [2, 300, 5]),
        (21, [1, 2, 4000]),
        (22, [70, 3, 65]),
    ] {
        let x = c.tensor(seed, shape) + 0.5;
        c.put("sum", x.clone().sum());
        c.put("mean", x.clone().mean());
        c.put("max", x.clone().max());
        c.put("min", x.clone().min());
        c.put("max_abs", x.clone().max_abs());
        for d in 0..3 {
            c.put("sum_dim", x.clone().sum_dim(d));
            c.put("mean_dim", x.clone().mean_dim(d));
            c.put("max_dim", x.clone().max_dim(d));
            c.put("min_dim", x.clone().min_dim(d));
            c.put("transposed sum_dim", x.clone().transpose().sum_dim(d));
            c.put(
                "sliced sum_dim",
                x.clone().slice(s![.., 1.., 1..]).sum_dim(d),
            );
        }
    }
    c.put("prod", (c.tensor::<2>(23, [3, 5]) + 3.0).prod_dim(1));
    c.put("var", c.tensor::<2>(24, [3, 50]).var(1));
    c.put("long column", c.tensor::<2>(25, [20000, 3]).sum_dim(0));
    // The mean square, since the sum of this many is beyond f16.
    c.put(
        "long row",
        (c.tensor::<1>(26, [100_003]) / 512.0).square().sum(),
    );
}

fn arg_reductions<B: Ops>(c: &mut Context<B>) {
    let x = c.tensor(27, [5, 40, 7]);
    for d in 0..3 {
        c.put_int("argmax", x.clone().argmax(d));
        c.put_int("argmin", x.clone().argmin(d));
        let (values, places) = x.clone().max_dim_with_indices(d);
        c.put("max values", values);
        c.put_int("max places", places);
    }
    c.put_int("first of equals", (x * 0.0).argmax(1));
}

fn indexing<B: Ops>(c: &mut Context<B>) {
    let x = c.tensor(28, [6, 9, 5]);
    c.put("select 0", x.clone().select(0, c.ints(29, [11], 6)));
    c.put("select 1", x.clone().select(1, c.ints(30, [4], 9)));
    c.put("select 2", x.clone().select(2, c.ints(31, [7], 5)));
    c.put(
        "select view",
        x.clone().transpose().select(1, c.ints(32, [7], 5)),
    );
    c.put("gather 0", x.clone().gather(0, c.ints(33, [3, 9, 5], 6)));
    c.put("gather 1", x.clone().gather(1, c.ints(34, [6, 2, 5], 9)));
    c.put("gather 2", x.clone().gather(2, c.ints(35, [6, 9, 8], 5)));
    let update = IndexingUpdateOp::Add;
    c.put(
        "scatter",
        x.clone()
            .scatter(1, c.ints(36, [6, 3, 5], 9), c.tensor(37, [6, 3, 5]), update),
    );
    c.put(
        "select_assign",
        x.clone().select_assign(
            0,
            c.ints(38, [4], 6),
            c.tensor(39, [4, 9, 5]),
            IndexingUpdateOp::Add,
        ),
    );
    c.put(
        "select_assign 2",
        x.select_assign(
            2,
            c.ints(40, [3], 5),
            c.tensor(41, [6, 9, 3]),
            IndexingUpdateOp::Add,
        ),
    );
}

fn assignments<B: Ops>(c: &mut Context<B>) {
    let x = c.tensor(42, [6, 8]);
    let kept = x.clone();
    c.put(
        "slice_assign",
        x.clone().slice_assign([1..3, 2..7], c.tensor(43, [2, 5])),
    );
    c.put(
        "slice_assign view",
        x.clone()
            .transpose()
            .slice_assign([0..8, 1..3], c.tensor(44, [8, 2])),
    );
    c.put(
        "slice_assign step",
        x.clone().slice_assign(s![0..6;2, ..], c.tensor(45, [3, 8])),
    );
    c.put("slice_fill", x.clone().slice_fill([2..4, 0..8], 3.0));
    c.put(
        "slice_assign of a view",
        x.slice_assign([0..2, 0..8], c.tensor(46, [8, 2]).transpose()),
    );
    c.put("the source is unchanged", kept);
}

fn scans<B: Ops>(c: &mut Context<B>) {
    let x = c.tensor(47, [3, 70, 4]);
    for d in 0..3 {
        c.put("cumsum", x.clone().cumsum(d));
        c.put("cummax", x.clone().cummax(d));
        c.put("cummin", x.clone().cummin(d));
    }
    c.put(
        "cumprod",
        (c.tensor::<2>(48, [3, 40]) * 0.2 + 1.0).cumprod(1),
    );
    c.put("cumsum view", x.transpose().cumsum(2));
}

fn sorting<B: Ops>(c: &mut Context<B>) {
    for (seed, shape) in [(49, [3, 17, 4]), (50, [2, 1500, 1]), (51, [1, 5000, 2])] {
        let x = c.tensor(seed, shape);
        for d in 0..3 {
            c.put("sort", x.clone().sort(d));
            c.put("sort descending", x.clone().sort_descending(d));
            let (values, places) = x.clone().sort_with_indices(d);
            c.put("sorted", values);
            c.put("sorted by place", x.clone().gather(d, places));
        }
        let (values, places) = x.clone().topk_with_indices(5, 1);
        c.put("topk", values);
        c.put("topk by place", x.gather(1, places));
    }
}

fn matrix_products<B: Ops>(c: &mut Context<B>) {
    for (seed, m, k, n) in [
        (52, 5, 7, 3),
        (53, 64, 128, 32),
        (54, 33, 65, 17),
        (55, 1, 100, 1),
        (56, 1, 64, 48),
    ] {
        let (a, b) = (c.tensor(seed, [m, k]), c.tensor(seed + 100, [k, n]));
        c.put("plain", a.clone().matmul(b.clone()));
        c.put(
            "left transposed",
            c.tensor::<2>(seed, [k, m]).transpose().matmul(b.clone()),
        );
        c.put(
            "right transposed",
            a.clone().matmul(c.tensor::<2>(seed, [n, k]).transpose()),
        );
        c.put(
            "both transposed",
            c.tensor::<2>(seed, [k, m])
                .transpose()
                .matmul(c.tensor::<2>(seed, [n, k]).transpose()),
        );
        c.put(
            "sliced",
            c.tensor::<2>(seed, [m + 3, k + 5])
                .slice([2..m + 2, 3..k + 3])
                .matmul(b),
        );
    }
    let (a, b) = (c.tensor(60, [3, 2, 9, 16]), c.tensor(61, [3, 2, 16, 8]));
    c.put("batched", a.clone().matmul(b.clone()));
    c.put(
        "batched transposed",
        a.clone()
            .transpose()
            .matmul(c.tensor::<4>(62, [3, 2, 9, 8])),
    );
    c.put(
        "broadcast",
        a.clone().matmul(c.tensor::<4>(63, [1, 1, 16, 8])),
    );
    c.put(
        "broadcast one",
        a.clone().matmul(c.tensor::<4>(64, [3, 1, 16, 8])),
    );
    c.put(
        "heads",
        c.tensor::<4>(65, [3, 9, 2, 16])
            .swap_dims(1, 2)
            .matmul(b.clone()),
    );
    c.put(
        "strided rows",
        a.clone()
            .slice(s![.., .., .., 0..16;2])
            .matmul(c.tensor::<4>(66, [3, 2, 8, 4])),
    );
    c.put("flipped", a.flip([3]).matmul(b));
}

fn convolutions<B: Ops>(c: &mut Context<B>) {
    let x = c.tensor(67, [2, 3, 12, 15]);
    let w = c.tensor(68, [8, 3, 4, 3]);
    let bias = Some(c.tensor(69, [8]));
    c.put(
        "patches",
        conv2d(
            x.clone(),
            c.tensor(70, [8, 3, 4, 5]),
            bias.clone(),
            ConvOptions::new([4, 5], [0, 0], [1, 1], 1),
        ),
    );
    c.put(
        "padded",
        conv2d(
            x.clone(),
            w.clone(),
            bias.clone(),
            ConvOptions::new([2, 1], [1, 2], [1, 1], 1),
        ),
    );
    c.put(
        "dilated",
        conv2d(x, w, None, ConvOptions::new([1, 1], [3, 2], [2, 3], 1)),
    );
    let x = c.tensor(71, [2, 4, 7, 9]);
    c.put(
        "grouped",
        conv2d(
            x.clone(),
            c.tensor(72, [6, 2, 3, 3]),
            None,
            ConvOptions::new([1, 1], [1, 1], [1, 1], 2),
        ),
    );
    let options = ConvTransposeOptions::new([2, 3], [1, 0], [1, 0], [1, 1], 1);
    c.put(
        "transposed",
        conv_transpose2d(
            x.clone(),
            c.tensor(73, [4, 5, 3, 2]),
            Some(c.tensor(74, [5])),
            options,
        ),
    );
    let options = ConvTransposeOptions::new([1, 2], [1, 1], [0, 0], [2, 1], 2);
    c.put(
        "transposed, grouped",
        conv_transpose2d(x, c.tensor(75, [4, 3, 3, 3]), None, options),
    );
    let volume = c.tensor(76, [2, 3, 4, 6, 5]);
    c.put(
        "3d",
        conv3d(
            volume,
            c.tensor(77, [5, 3, 2, 3, 2]),
            Some(c.tensor(78, [5])),
            ConvOptions::new([2, 3, 1], [0, 1, 0], [1, 1, 1], 1),
        ),
    );
}

fn activations<B: Ops>(c: &mut Context<B>) {
    let x = c.tensor(79, [4, 5, 37]);
    c.put("relu", relu(x.clone()));
    c.put("gelu", gelu(x.clone()));
    c.put("sigmoid", sigmoid(x.clone()));
    c.put("log_sigmoid", log_sigmoid(x.clone()));
    for d in 0..3 {
        c.put("softmax", softmax(x.clone(), d));
        c.put("log_softmax", log_softmax(x.clone(), d));
    }
    c.put("softmax long", softmax(c.tensor::<2>(80, [2, 3001]), 1));
}

fn integers<B: Ops>(c: &mut Context<B>) {
    let (a, b) = (c.ints(81, [4, 19], 100), c.ints(82, [4, 19], 9) + 1);
    c.put_int("add", a.clone() + b.clone());
    c.put_int("sub", a.clone() - b.clone() * 20);
    c.put_int("div", a.clone() / b.clone());
    c.put_int("remainder", (a.clone() - 50).remainder(b.clone()));
    c.put_int("remainder_scalar", (a.clone() - 50).remainder_scalar(7));
    c.put_int("neg", -a.clone());
    c.put_int("abs", (a.clone() - 50).abs());
    c.put_int("sign", (a.clone() - 50).sign());
    c.put_int("sum", a.clone().sum());
    c.put_int("sum_dim", a.clone().sum_dim(0));
    c.put_int("mean_dim", a.clone().mean_dim(1));
    c.put_int("max_dim", a.clone().max_dim(1));
    c.put_int("argmax", a.clone().argmax(1));
    c.put_int("cumsum", a.clone().cumsum(1));
    c.put_int("sort", a.clone().sort(1));
    c.put_int("and", a.clone().bitwise_and(b.clone()));
    c.put_int("or", a.clone().bitwise_or(b.clone()));
    c.put_int("xor", a.clone().bitwise_xor(b.clone()));
    c.put_int("not", a.clone().bitwise_not());
    c.put_int("shift left", a.clone().bitwise_left_shift(b.clone()));
    c.put_int(
        "shift right",
        a.clone().bitwise_right_shift_scalar(2.elem()),
    );
    c.put_int("clamp", a.clone().clamp(20, 60));
    c.put_int("powi", b.clone().powi_scalar(3));
    c.put_int("matmul", a.clone().matmul(b.clone().transpose()));
    c.put_int("select", a.clone().select(1, c.ints(83, [5], 19)));
    c.put_int("cat", Tensor::cat(vec![a.clone(), b.clone()], 0));
    c.put_bool("greater", a.clone().greater(b.clone() * 10));
    c.put_int(
        "mask_fill",
        a.clone().mask_fill(a.clone().lower_elem(50), -1),
    );
    c.put_int(
        "slice_assign",
        a.clone()
            .slice_assign([1..3, 0..19], b.clone().slice([0..2, 0..19])),
    );
    c.put_bool("any", a.clone().equal_elem(3).any_dim(1));
    c.put("float", a.float());
}

fn integer_types<B: Ops>(c: &mut Context<B>) {
    for dtype in [
        DType::I64,
        DType::I16,
        DType::I8,
        DType::U64,
        DType::U32,
        DType::U16,
        DType::U8,
    ] {
        let a = c.ints(84, [3, 21], 100).cast(dtype);
        c.put_int("cast", a.clone());
        c.put_int("add", a.clone() + 5);
        c.put_int("mul view", a.clone().transpose() * 2);
        c.put_int("sum_dim", a.clone().slice([0..3, 0..1]).sum_dim(1));
        c.put_int("max", a.clone().max());
        c.put_bool("lower", a.clone().lower_elem(30));
        c.put_int("select", a.clone().select(1, c.ints(85, [4], 21)));
        c.put("float", a.float().cast(DType::F32));
    }
}

fn booleans<B: Ops>(c: &mut Context<B>) {
    let device = c.device.clone();
    let a = c.tensor::<2>(86, [5, 23]).greater_elem(0.0);
    let b = c.tensor::<2>(87, [5, 23]).greater_elem(0.5);
    c.put_bool("not", a.clone().bool_not());
    c.put_bool("and", a.clone().bool_and(b.clone()));
    c.put_bool("or", a.clone().bool_or(b.clone()));
    c.put_bool("xor", a.clone().bool_xor(b.clone()));
    c.put_bool("equal", a.clone().equal(b.clone()));
    c.put_bool("any", a.clone().any());
    c.put_bool("all", a.clone().all());
    c.put_bool("any_dim", b.clone().any_dim(0));
    c.put_bool("all_dim", b.clone().all_dim(1));
    c.put_bool("view", a.clone().transpose().bool_not());
    c.put_bool("cat", Tensor::cat(vec![a.clone(), b], 1));
    c.put("float", a.clone().float());
    c.put_int("int", a.int());
    let data = TensorData::from([[true, false, true], [false, false, true]]);
    c.put_bool(
        "from data",
        Tensor::<B, 2, burn::tensor::Bool>::from_data(data, &device),
    );
    c.put_bool(
        "triangle",
        Tensor::<B, 2, burn::tensor::Bool>::tril_mask([5, 7], 0, &device),
    );
}

fn empty<B: Ops>(c: &mut Context<B>) {
    let x = c.tensor(88, [0, 5]);
    c.put("exp", x.clone().exp());
    c.put("add", x.clone() + x.clone());
    c.put("sum", x.clone().sum());
    c.put("sum_dim 0", x.clone().sum_dim(0));
    c.put("sum_dim 1", x.clone().sum_dim(1));
    c.put("cat", Tensor::cat(vec![x.clone(), c.tensor(89, [2, 5])], 0));
    c.put("matmul", x.clone().matmul(c.tensor(90, [5, 3])));
    c.put("inner", x.clone().transpose().matmul(x.clone()));
    c.put("slice", c.tensor::<2>(91, [3, 4]).slice([1..1, 0..4]));
    c.put("cast", x.cast(DType::F32));
}

fn doubles<B: Ops>(c: &mut Context<B>) {
    let (a, b) = (c.tensor(92, [6, 35]), c.tensor(93, [6, 35]));
    c.put("add", a.clone() + b.clone());
    c.put("exp", a.clone().exp());
    c.put("matmul", a.clone().matmul(b.transpose()));
    c.put("sum", a.clone().sum_dim(1));
    c.put("softmax", softmax(a, 1));
}
