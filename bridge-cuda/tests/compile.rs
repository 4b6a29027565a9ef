//! Every kernel file compiles, for the oldest chip supported and for Hopper. Needs NVRTC but no GPU.

use bridge_cuda::{Library, SOURCES, compile};

/// Definitions under which a file is compiled here: one or two of the many combinations that programs use.
fn variants(file: &str) -> Vec<Vec<(&'static str, &'static str)>> {
    let elementwise = |op, a, o| {
        vec![
            ("OP", op),
            ("ARITY", "3"),
            ("TYPE_O", o),
            ("TYPE_A", a),
            ("TYPE_B", a),
            ("TYPE_C", a),
        ]
    };
    let norm = |ty, weight| {
        vec![
            ("TYPE", ty),
            ("WEIGHT", weight),
            ("VECTOR", "4"),
            ("PACKS", "2"),
            ("OFFSET", "0.0f"),
            ("BIAS", "1"),
        ]
    };
    let attention = |d| {
        vec![
            ("TYPE", "bf16"),
            ("D", d),
            ("SOFTCAP", "0"),
            ("DOCUMENTS", "0"),
        ]
    };
    let recurrent = |ty, sizes: [(&'static str, &'static str); 2]| {
        let float = ty == "float";
        vec![
            ("TYPE", ty),
            ("LEN", if float { "32" } else { "64" }),
            ("STAGES", if float { "1" } else { "2" }),
            ("ALIGNED", if float { "0" } else { "1" }),
            ("SLICE", "32"),
            sizes[0],
            sizes[1],
        ]
    };
    let team = |ty, vector, team| {
        vec![
            ("TYPE", ty),
            ("WEIGHT", ty),
            ("GATE_FIRST", vector),
            ("VECTOR", vector),
            ("TEAM", team),
            ("PACKS", "2"),
        ]
    };
    let router = |values, sigmoid, normalize, groups, top_groups, sum_of_two| {
        vec![
            ("TYPE", "float"),
            ("INDEX", "i32"),
            ("VALUES", values),
            ("SIGMOID", sigmoid),
            ("NORMALIZE", normalize),
            ("GROUPS", groups),
            ("TOP_GROUPS", top_groups),
            ("SUM_OF_TWO", sum_of_two),
        ]
    };
    match file {
        "adamw" => vec![
            vec![("PARAM", "float"), ("GRAD", "float"), ("MEAN", "float")],
            vec![("PARAM", "bf16"), ("GRAD", "bf16"), ("MEAN", "bf16")],
        ],
        "attention" => vec![
            attention("64"),
            attention("128"),
            vec![
                ("TYPE", "f16"),
                ("D", "64"),
                ("SOFTCAP", "1"),
                ("DOCUMENTS", "1"),
            ],
        ],
        "causal_conv1d" => vec![vec![
            ("TYPE", "bf16"),
            ("WEIGHT", "float"),
            ("TAPS", "4"),
            ("SILU", "1"),
            ("VECTOR", "4"),
        ]],
        "gated_delta_rule" => vec![
            recurrent("bf16", [("KEY_DIM", "128"), ("VALUE_DIM", "128")]),
            recurrent("float", [("KEY_DIM", "8"), ("VALUE_DIM", "20")]),
        ],
        "ssd_scan" => vec![
            recurrent("bf16", [("HEAD_DIM", "64"), ("STATE", "128")]),
            recurrent("float", [("HEAD_DIM", "12"), ("STATE", "16")]),
        ],
        "gated_rms_norm" | "l2_norm" => vec![team("bf16", "1", "16"), team("float", "4", "128")],
        "time_step" => vec![vec![("TYPE", "bf16"), ("WEIGHT", "float")]],
        "cross_entropy" => vec![vec![
            ("TYPE", "bf16"),
            ("INDEX", "i32"),
            ("SOFTCAP", "1"),
            ("VECTOR", "8"),
        ]],
        "elementwise" => vec![
            elementwise("AddTensor", "bf16", "bf16"),
            elementwise("Tanh", "double", "double"),
            elementwise("PowScalar", "i64", "i64"),
            elementwise("GreaterTensor", "float", "u8"),
        ],
        "embedding" => vec![vec![
            ("TYPE", "bf16"),
            ("WEIGHT", "float"),
            ("INDEX", "i64"),
            ("VECTOR", "4"),
        ]],
        "gated_activation" => vec![
            vec![("TYPE", "bf16"), ("ACT", "Silu")],
            vec![("TYPE", "float"), ("ACT", "GeluTanh")],
        ],
        "index" => vec![vec![("TYPE", "bf16"), ("INDEX", "i32"), ("OP", "Plus")]],
        "layer_norm" | "rms_norm" => {
            let mut short = norm("bf16", "bf16");
            short.push(("GROUP", "16"));
            vec![norm("bf16", "float"), norm("f16", "f16"), short]
        }
        "expert_order" => vec![vec![("INDEX", "i32")]],
        "grouped_linear" => vec![
            vec![("TYPE", "bf16"), ("RIGHT", "0"), ("STAGES", "3")],
            vec![("TYPE", "f16"), ("RIGHT", "1"), ("STAGES", "2")],
            vec![("TYPE", "bf16"), ("OUT", "float"), ("STAGES", "3")],
        ],
        "grouped_linear_generic" => vec![
            vec![("TYPE", "float"), ("OUT", "float")],
            vec![("TYPE", "bf16")],
        ],
        "grouped_linear_hopper" => vec![
            vec![("TYPE", "bf16"), ("RIGHT", "0")],
            vec![("TYPE", "f16"), ("RIGHT", "1"), ("OUT", "float")],
        ],
        "latent_heads" => vec![
            vec![("TYPE", "bf16"), ("VECTOR", "8"), ("PAIRS", "1")],
            vec![("TYPE", "float"), ("VECTOR", "1"), ("PAIRS", "0")],
        ],
        "permute_rows" => vec![
            vec![("TYPE", "bf16"), ("VECTOR", "8")],
            vec![("TYPE", "float"), ("VECTOR", "1")],
        ],
        "router" => vec![
            router("4", "0", "1", "0", "0", "0"),
            router("8", "1", "1", "8", "4", "1"),
            router("2", "0", "0", "8", "3", "0"),
        ],
        "reduce" => vec![
            vec![("TYPE", "bf16"), ("TYPE_O", "float"), ("OP", "Sum")],
            vec![
                ("TYPE", "u8"),
                ("TYPE_O", "i32"),
                ("OP", "Minimum"),
                ("ARG", "1"),
            ],
        ],
        "rotary" => vec![
            vec![("TYPE", "bf16"), ("PAIRS", "0")],
            vec![("TYPE", "float"), ("PAIRS", "1")],
        ],
        "scan" => vec![
            vec![("TYPE", "i32"), ("OP", "Plus")],
            vec![("TYPE", "f16"), ("OP", "Larger")],
        ],
        "softmax" => vec![
            vec![("TYPE", "bf16"), ("LOG", "0")],
            vec![("TYPE", "double"), ("LOG", "1")],
        ],
        "sort" => vec![vec![("TYPE", "bf16"), ("DESCENDING", "1")]],
        "arange" | "matmul_int" => vec![vec![("TYPE", "i32")]],
        "attention_generic" | "conv" | "random" => {
            vec![vec![("TYPE", "bf16")], vec![("TYPE", "double")]]
        }
        other => panic!("{other}.cu has no variants here"),
    }
}

#[test]
fn kernels_compile() {
    if let Err(error) = Library::Nvrtc.load() {
        println!("skipped: no NVRTC: {error}");
        return;
    }
    for &(file, _) in SOURCES {
        for defines in variants(file) {
            for arch in ["sm_80", "sm_90a"] {
                let cubin = compile(file, &defines, arch).unwrap_or_else(|error| panic!("{error}"));
                assert!(
                    cubin.starts_with(b"\x7fELF"),
                    "{file} for {arch} is machine code"
                );
            }
        }
    }
}
