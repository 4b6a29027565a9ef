//! Bad input through the real binary: a clear error, exit code 2 or 3, no panic, and nothing left behind.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use support::{
    BRIDGE, Outcome, Workbench, arg, edit_json, finish, read_safetensors, surroundings,
    write_safetensors, xtask,
};

/// The verbs that read a Hugging Face folder, run on `hf`; each writing verb targets `out`.
fn readers(bench: &Workbench) -> Vec<Outcome> {
    let (hf, out) = (bench.hf(), bench.path("out"));
    let (hf, out) = (arg(&hf), arg(&out));
    vec![
        xtask(&format!("plan --hf {hf}")),
        xtask(&format!("import --hf {hf} --out {out}")),
        xtask(&format!("roundtrip --hf {hf}")),
        xtask(&format!("verify --hf {hf} --reference {hf}")),
        xtask(&format!(
            "generate --hf {hf} --prompt-ids 1,2,3 --max-new-tokens 2"
        )),
    ]
}

/// Every reading verb refuses the folder with exit code 2 and these words, and leaves nothing behind.
#[track_caller]
fn refused(bench: &Workbench, words: &[&str]) {
    for outcome in readers(bench) {
        outcome.fails(2, words);
    }
    assert_eq!(bench.entries(), ["hf"], "something was left behind");
}

fn single() -> Workbench {
    Workbench::new("llama3_2")
}

fn sharded() -> Workbench {
    Workbench::new("llama3_1")
}

#[test]
fn truncated_files_are_refused() {
    for keep in [0, 5, 8, 100] {
        let bench = single();
        let path = bench.hf().join("model.safetensors");
        let bytes = fs::read(&path).expect("weights");
        fs::write(&path, &bytes[..keep]).expect("truncated");
        refused(&bench, &["model.safetensors"]);
    }
    let bench = single();
    let path = bench.hf().join("model.safetensors");
    let bytes = fs::read(&path).expect("weights");
    fs::write(&path, &bytes[..bytes.len() - 100]).expect("truncated");
    refused(&bench, &["model.safetensors"]);
}

#[test]
fn oversized_headers_are_refused_before_anything_is_allocated() {
    for length in [u64::MAX, 1 << 62, 1 << 40, 200 << 20, 500_000] {
        let bench = single();
        let path = bench.hf().join("model.safetensors");
        let mut bytes = fs::read(&path).expect("weights");
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(&path, &bytes).expect("written");
        refused(&bench, &["model.safetensors", "header"]);
    }
    // A sparse file that does hold so many bytes gets no further.
    let bench = single();
    let path = bench.hf().join("model.safetensors");
    let file = fs::File::options()
        .write(true)
        .open(&path)
        .expect("weights");
    file.set_len(3 << 30).expect("a sparse file");
    let mut bytes = fs::read(fixture_weights()).expect("weights");
    bytes.truncate(8);
    bytes.copy_from_slice(&(2u64 << 30).to_le_bytes());
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).expect("written");
    refused(&bench, &["model.safetensors", "header"]);
}

fn fixture_weights() -> std::path::PathBuf {
    support::fixture("llama3_2").join("model.safetensors")
}

#[test]
fn headers_that_are_not_what_they_should_be_are_refused() {
    for header in [
        "not json at all",
        "[]",
        "{\"a\": 3}",
        "{\"a\": {\"dtype\": \"F32\"}}",
        "{",
        "",
        "\u{0}\u{0}",
    ] {
        let bench = single();
        write_safetensors(&bench.hf().join("model.safetensors"), header, &[0; 64]);
        refused(&bench, &["model.safetensors"]);
    }
    let deep = "[".repeat(200_000);
    let bench = single();
    write_safetensors(&bench.hf().join("model.safetensors"), &deep, &[]);
    refused(&bench, &["model.safetensors"]);
}

const TENSOR: &str = "model.layers.1.mlp.up_proj.weight";

#[test]
fn offsets_that_overlap_leave_the_file_or_run_backwards_are_refused() {
    let cases: [fn(u64, u64) -> [u64; 2]; 5] = [
        |begin, end| [begin - 4, end - 4],
        |begin, end| [begin + 4, end + 4],
        |_, _| [0, 1 << 50],
        |begin, end| [end, begin],
        |begin, _| [begin, u64::MAX],
    ];
    for case in cases {
        let bench = single();
        bench.edit_header(|h| {
            let offsets = h[TENSOR]["data_offsets"].clone();
            h[TENSOR]["data_offsets"] = json!(case(
                offsets[0].as_u64().expect("begin"),
                offsets[1].as_u64().expect("end")
            ));
        });
        refused(&bench, &["model.safetensors", TENSOR]);
    }
}

#[test]
fn impossible_dtypes_and_shapes_are_refused() {
    let bench = single();
    bench.edit_header(|h| h[TENSOR]["dtype"] = json!("F31"));
    refused(&bench, &[TENSOR, "F31"]);
    for shape in [
        json!([u64::MAX, 2]),
        json!([1u64 << 40, 1u64 << 40]),
        json!([-1, 64]),
        json!("64"),
    ] {
        let bench = single();
        bench.edit_header(|h| h[TENSOR]["shape"] = shape);
        refused(&bench, &["model.safetensors"]);
    }
}

#[test]
fn tensors_of_the_wrong_shape_are_named_with_both_shapes() {
    let bench = single();
    bench.edit_header(|h| {
        let shape = h[TENSOR]["shape"].clone();
        h[TENSOR]["shape"] = json!([shape[1], shape[0]]);
    });
    refused(&bench, &[TENSOR, "[64, 112]", "[112, 64]"]);
}

#[test]
fn unknown_and_missing_tensors_are_all_named() {
    let bench = single();
    bench.edit_header(|h| {
        for name in [TENSOR, "model.norm.weight"] {
            let info = h.remove(name).expect("a tensor");
            h.insert(format!("strange.{name}"), info);
        }
    });
    refused(
        &bench,
        &[
            "strange.model.layers.1.mlp.up_proj.weight",
            "strange.model.norm.weight",
            "layers.1.mlp.up_proj.weight",
        ],
    );
}

#[test]
fn duplicate_tensors_are_refused() {
    // The same key twice in one header: a JSON map would keep one of them silently.
    let bench = single();
    let path = bench.hf().join("model.safetensors");
    let (header, data) = read_safetensors(&path);
    let text = Value::Object(header).to_string();
    let other = "\"model.layers.0.mlp.up_proj.weight\"";
    assert!(text.contains(other));
    write_safetensors(&path, &text.replace(other, &format!("\"{TENSOR}\"")), &data);
    refused(&bench, &[TENSOR]);

    // One tensor in two shards.
    let bench = sharded();
    let index: Value = serde_json::from_slice(
        &fs::read(bench.hf().join("model.safetensors.index.json")).expect("index"),
    )
    .expect("json");
    let map = index["weight_map"].as_object().expect("a map");
    let (first_name, first_file) = map.iter().next().expect("a tensor");
    let second_file = map
        .values()
        .find(|f| *f != first_file)
        .expect("another shard")
        .as_str()
        .expect("a name");
    let (mut header, mut data) = read_safetensors(&bench.hf().join(second_file));
    let begin = data.len();
    data.extend_from_slice(&[0; 4]);
    header.insert(
        first_name.clone(),
        json!({"dtype": "F32", "shape": [1], "data_offsets": [begin, begin + 4]}),
    );
    write_safetensors(
        &bench.hf().join(second_file),
        &Value::Object(header).to_string(),
        &data,
    );
    refused(&bench, &[first_name]);
}

#[test]
fn missing_shards_and_entries_are_named() {
    let bench = sharded();
    fs::remove_file(bench.hf().join("model-00003-of-00009.safetensors")).expect("removed");
    refused(&bench, &["model-00003-of-00009.safetensors"]);

    let bench = sharded();
    edit_json(&bench.hf().join("model.safetensors.index.json"), |v| {
        v["weight_map"]
            .as_object_mut()
            .expect("a map")
            .remove("model.norm.weight");
    });
    refused(&bench, &["model.norm.weight"]);

    let bench = sharded();
    edit_json(&bench.hf().join("model.safetensors.index.json"), |v| {
        v["weight_map"]["model.norm.weight"] = json!("model-00001-of-00009.safetensors")
    });
    refused(
        &bench,
        &["model.norm.weight", "model-00001-of-00009.safetensors"],
    );

    let bench = single();
    fs::remove_file(bench.hf().join("model.safetensors")).expect("removed");
    refused(&bench, &["model.safetensors"]);
}

#[test]
fn index_entries_that_leave_the_folder_are_refused() {
    for name in [
        "../model-00001-of-00009.safetensors",
        "/etc/passwd",
        "sub/../../x.safetensors",
        "a\\..\\b",
        "",
        "x\0y",
        ".",
        "..",
        &"n".repeat(5000),
    ] {
        let bench = sharded();
        fs::copy(
            bench.hf().join("model-00001-of-00009.safetensors"),
            bench.dir.path().join("model-00001-of-00009.safetensors"),
        )
        .expect("a bait");
        edit_json(&bench.hf().join("model.safetensors.index.json"), |v| {
            v["weight_map"]["model.norm.weight"] = json!(name)
        });
        for outcome in readers(&bench) {
            outcome.fails(2, &["model.safetensors.index.json"]);
        }
        assert_eq!(bench.entries(), ["hf", "model-00001-of-00009.safetensors"]);
    }
    for index in [
        json!([]),
        json!({"weight_map": []}),
        json!({"weight_map": {"a": 3}}),
        json!({}),
    ] {
        let bench = sharded();
        fs::write(
            bench.hf().join("model.safetensors.index.json"),
            index.to_string(),
        )
        .expect("written");
        refused(&bench, &["model.safetensors.index.json"]);
    }
}

#[test]
fn hostile_tensor_names_never_become_paths() {
    for name in [
        "../x",
        "/etc/x",
        "a\0b",
        "..",
        &"n".repeat(1 << 16),
        "model.layers.18446744073709551616.x",
        "model.layers.-1.x",
    ] {
        let bench = single();
        bench.edit_header(|h| {
            let info = h.remove(TENSOR).expect("a tensor");
            h.insert(name.to_owned(), info);
        });
        for outcome in readers(&bench) {
            let outcome = outcome.fails(2, &[]);
            assert!(
                outcome.stderr.len() < 8000,
                "the message stays readable: {} bytes",
                outcome.stderr.len()
            );
            assert!(
                !outcome.stderr.contains('\0'),
                "control characters are escaped"
            );
        }
        assert_eq!(bench.entries(), ["hf"]);
    }
}

#[test]
fn unknown_architectures_and_broken_configs_are_refused() {
    let bench = single();
    bench.edit_config(|c| c["architectures"] = json!(["LlamaForCausalML"]));
    refused(&bench, &["LlamaForCausalML", "LlamaForCausalLM"]);
    let bench = single();
    bench.edit_config(|c| {
        drop(
            c.as_object_mut()
                .expect("an object")
                .remove("architectures"),
        )
    });
    refused(&bench, &["config.json", "architectures"]);

    let bench = single();
    bench.edit_config(|c| c["rope_parameters"]["rope_type"] = json!("spiral"));
    refused(&bench, &["config.json", "spiral"]);

    let bench = single();
    bench.edit_config(|c| drop(c.as_object_mut().expect("an object").remove("hidden_size")));
    refused(&bench, &["config.json", "hidden_size"]);

    for (key, value) in [
        ("hidden_size", json!(0)),
        ("num_hidden_layers", json!(-3)),
        ("vocab_size", json!(1e30)),
        ("num_attention_heads", json!("four")),
        ("num_key_value_heads", json!(3)),
        ("num_hidden_layers", json!(1u64 << 40)),
        ("hidden_size", json!(u64::MAX)),
        ("hidden_act", json!("swosh")),
        ("rms_norm_eps", json!("small")),
    ] {
        let bench = single();
        bench.edit_config(|c| c[key] = value);
        refused(&bench, &["config.json", key]);
    }
    for text in ["", "{", "[]", "null", &"[".repeat(100_000)] {
        let bench = single();
        fs::write(bench.hf().join("config.json"), text).expect("written");
        refused(&bench, &["config.json"]);
    }
    let bench = single();
    fs::remove_file(bench.hf().join("config.json")).expect("removed");
    refused(&bench, &["config.json"]);
}

#[test]
fn unknown_config_keys_get_the_nearest_right_one() {
    let bench = Workbench::empty();
    let run = bench.path("run");
    let checkpoint = format!("checkpoint.dir={}", arg(&run));
    xtask(&format!("pretrain {checkpoint} train.trian_iters=3"))
        .fails(2, &["train.trian_iters", "train_iters"]);
    xtask(&format!("pretrain {checkpoint} trian.train_iters=3")).fails(2, &["trian", "train"]);
    xtask(&format!("pretrain {checkpoint} train.train_iters=many"))
        .fails(2, &["train.train_iters", "many"]);
    xtask("pretrain tiny_lama").fails(2, &["tiny_lama", "tiny_llama"]);
    let config = bench.path("run.toml");
    fs::write(&config, "[optimizer]\nlearning_rate = 1e-3\n").expect("written");
    xtask(&format!("pretrain --config {}", arg(&config))).fails(2, &["run.toml", "learning_rate"]);
    fs::write(&config, "[optimizer\n").expect("written");
    xtask(&format!("pretrain --config {}", arg(&config))).fails(2, &["run.toml"]);
    xtask(&format!(
        "pretrain --config {}",
        arg(&bench.path("none.toml"))
    ))
    .fails(2, &["none.toml"]);
    assert_eq!(bench.entries(), ["run.toml"]);
}

#[test]
fn prompts_that_do_not_fit_are_refused() {
    let hf = support::fixture("llama3_2");
    let long = vec!["7"; 300].join(",");
    xtask(&format!(
        "generate --hf {} --prompt-ids {long} --max-new-tokens 1",
        arg(&hf)
    ))
    .fails(2, &["300", "256"]);
    // One that fits is answered as far as the context reaches.
    let full = xtask(&format!(
        "generate --hf {} --prompt-ids 1,2,3 --max-new-tokens 300",
        arg(&hf)
    ))
    .ok();
    assert!(
        full.stderr.contains("context is full") && full.stdout.split(',').count() == 253,
        "{}",
        full.stdout
    );
    xtask(&format!(
        "generate --hf {} --prompt-ids 1,160 --max-new-tokens 1",
        arg(&hf)
    ))
    .fails(2, &["160"]);
    xtask(&format!(
        "generate --hf {} --prompt-ids 1,x --max-new-tokens 1",
        arg(&hf)
    ))
    .fails(2, &["\"x\""]);
    xtask(&format!(
        "generate --hf {} --prompt text --max-new-tokens 1",
        arg(&hf)
    ))
    .fails(2, &["tokenizer"]);
}

#[test]
fn a_write_that_fails_leaves_nothing_behind() {
    // Files may not grow beyond 100 kB here; with the signal ignored, writing fails as it does on a full disk.
    let bench = Workbench::new("llama2");
    let mut command = surroundings(Command::new("sh"));
    command.args([
        "-c",
        "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\"",
        BRIDGE,
    ]);
    command.args([
        "import",
        "--hf",
        arg(&bench.hf()),
        "--out",
        arg(&bench.path("out")),
    ]);
    finish(command).fails(3, &[]);
    assert_eq!(bench.entries(), ["hf"], "something was left behind");
}

#[test]
fn a_full_disk_leaves_nothing_behind() {
    let bench = Workbench::new("llama2");
    let small = bench.path("small");
    fs::create_dir(&small).expect("a folder");
    let script = "mount -t tmpfs -o size=200k none \"$1\" || exit 77; shift; \"$@\"; code=$?; ls -A \"$SMALL\"; exit $code";
    let mut command = surroundings(Command::new("unshare"));
    command.env("SMALL", &small).args([
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        script,
        "sh",
        arg(&small),
        BRIDGE,
    ]);
    command.args([
        "import",
        "--hf",
        arg(&bench.hf()),
        "--out",
        arg(&small.join("out")),
    ]);
    let Ok(output) = command.output() else {
        eprintln!("skipped: no unshare on this machine");
        return;
    };
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.code() == Some(77) || stderr.contains("unshare:") {
        eprintln!("skipped: this machine does not let a test mount a small disk");
        return;
    }
    Outcome {
        code: output.status.code(),
        stdout: stdout.clone(),
        stderr,
    }
    .fails(3, &["no room"]);
    assert_eq!(stdout, "", "left on the small disk");
}

#[test]
fn damaged_native_checkpoints_are_refused() {
    type Damage = fn(&Path);
    let cases: [(Damage, &str); 7] = [
        (
            |dir| fs::remove_file(dir.join("model/rank_00000.safetensors")).expect("removed"),
            "rank_00000.safetensors",
        ),
        (
            |dir| {
                let path = dir.join("model/rank_00000.safetensors");
                let bytes = fs::read(&path).expect("weights");
                fs::write(&path, &bytes[..bytes.len() / 2]).expect("truncated");
            },
            "rank_00000.safetensors",
        ),
        (
            |dir| fs::remove_file(dir.join("index.json")).expect("removed"),
            "index.json",
        ),
        (
            |dir| fs::write(dir.join("index.json"), "{").expect("written"),
            "index.json",
        ),
        (
            |dir| {
                edit_json(&dir.join("index.json"), |v| {
                    v["groups"]["model"]["final_norm.weight"]["pieces"][0]["file"] =
                        json!("model/../../../x.safetensors")
                })
            },
            "final_norm.weight",
        ),
        (
            |dir| {
                edit_json(&dir.join("index.json"), |v| {
                    v["groups"]["model"]["final_norm.weight"]["pieces"] = json!([])
                })
            },
            "final_norm.weight",
        ),
        (
            |dir| {
                edit_json(&dir.join("index.json"), |v| {
                    v["groups"]["model"]
                        .as_object_mut()
                        .expect("tensors")
                        .remove("layers.1.mlp.up_proj.weight");
                })
            },
            "layers.1.mlp.up_proj.weight",
        ),
    ];
    for (damage, word) in cases {
        let bench = single();
        let (hf, native) = (bench.hf(), bench.path("native"));
        xtask(&format!("import --hf {} --out {}", arg(&hf), arg(&native))).ok();
        damage(&support::latest(&native));
        let out = bench.path("out");
        xtask(&format!(
            "export --checkpoint {} --out {}",
            arg(&native),
            arg(&out)
        ))
        .fails(2, &[word]);
        xtask(&format!(
            "generate --checkpoint {} --prompt-ids 1,2,3 --max-new-tokens 2",
            arg(&native)
        ))
        .fails(2, &[word]);
        assert_eq!(bench.entries(), ["hf", "native"], "{word}");
    }
}

#[test]
fn a_save_that_fails_keeps_the_checkpoint_before_it() {
    let bench = Workbench::empty();
    let run = bench.path("run");
    finish(support::pretrain(&run, &["train.train_iters=2"])).ok();
    let before = support::native_tensors(&support::latest(&run));
    // Files may not grow beyond 200 kB now; the weights take more.
    let more = support::pretrain(&run, &["train.train_iters=4"]);
    let mut command = surroundings(Command::new("sh"));
    command.args(["-c", "trap '' XFSZ; ulimit -f 400; exec \"$0\" \"$@\""]);
    command.arg(BRIDGE).args(more.get_args());
    finish(command).fails(3, &[]);
    assert!(support::latest(&run).ends_with("iter_0000002"));
    assert!(support::native_tensors(&support::latest(&run)) == before);
    // With room again, the run goes on as if nothing had been.
    finish(support::pretrain(&run, &["train.train_iters=4"])).ok();
    assert!(support::latest(&run).ends_with("iter_0000004"));
}

#[test]
fn unreadable_folders_and_files_are_named() {
    let bench = Workbench::new("llama2");
    // Root reads everything, so where tests run as root the binary runs as nobody, from a place that nobody can reach.
    let program = bench.path("bridge");
    fs::copy(BRIDGE, &program).expect("a copy");
    let is_root = fs::metadata(bench.dir.path())
        .map(|m| std::os::unix::fs::MetadataExt::uid(&m))
        .expect("an owner")
        == 0;
    let open = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("permissions")
    };
    open(bench.dir.path(), 0o755);
    let run = |path: &Path| {
        let mut command = surroundings(Command::new(&program));
        command
            .args(["plan", "--hf", arg(path)])
            .current_dir("/")
            .env("HOME", "/");
        if is_root {
            command.uid(65534);
        }
        finish(command)
    };
    open(&bench.hf(), 0o700);
    open(&bench.hf().join("model.safetensors"), 0o000);
    if is_root {
        open(&bench.hf(), 0o755);
    }
    run(&bench.hf()).fails(2, &["model.safetensors", "ermission denied"]);
    open(&bench.hf(), 0o000);
    run(&bench.hf()).fails(2, &["ermission denied"]);
    open(&bench.hf(), 0o755);
}

#[test]
fn outputs_that_exist_are_not_overwritten() {
    let bench = single();
    let out = bench.path("out");
    fs::create_dir(&out).expect("a folder");
    fs::write(out.join("precious.txt"), "keep").expect("a file");
    xtask(&format!(
        "import --hf {} --out {}",
        arg(&bench.hf()),
        arg(&out)
    ))
    .fails(2, &["out"]);
    assert_eq!(
        fs::read_to_string(out.join("precious.txt")).expect("still there"),
        "keep"
    );
    assert_eq!(fs::read_dir(&out).expect("a folder").count(), 1);
    xtask(&format!(
        "export --checkpoint {} --out {}",
        arg(&bench.path("none")),
        arg(&bench.path("x"))
    ))
    .fails(2, &["none"]);
    xtask(&format!(
        "import --hf {} --out {}",
        arg(&bench.path("nowhere")),
        arg(&bench.path("x"))
    ))
    .fails(2, &["nowhere"]);
    assert_eq!(bench.entries(), ["hf", "out"]);
}

#[test]
fn impossible_layouts_are_refused() {
    let hf = support::fixture("llama3_2");
    xtask(&format!("plan --hf {} --tp 0", arg(&hf))).fails(2, &["tp"]);
    xtask(&format!("plan --hf {} --tp 3", arg(&hf))).fails(2, &["tp"]);
    xtask(&format!("plan --hf {} --pp 9", arg(&hf))).fails(2, &["pp"]);
    xtask(&format!(
        "plan --hf {} --tp 18446744073709551615 --dp 2",
        arg(&hf)
    ))
    .fails(2, &[]);
}

/// What the layers cannot do is said by `plan` as by `verify`, before anything is run.
#[test]
fn layouts_that_layers_cannot_run_at_are_refused_by_the_plan() {
    for (name, layout, reason) in [
        ("nemotron_h", "--cp 64", "recurrent layers (Mamba-2)"),
        (
            "qwen3_next",
            "--cp 64",
            "recurrent layers (gated delta net)",
        ),
        (
            "gpt_oss",
            "--cp 2 --cp-comm-type a2a",
            "attention with sinks",
        ),
        ("llama3_2", "--sp", "sequence parallelism needs tp above 1"),
    ] {
        let hf = support::fixture(name);
        xtask(&format!("plan --hf {} {layout}", arg(&hf))).fails(2, &[reason]);
    }
    let hf = support::fixture("gpt_oss");
    xtask(&format!("plan --hf {} --cp 2", arg(&hf))).ok();
}
