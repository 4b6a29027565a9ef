//! The command line as a contract: help, exit codes, the fields of every JSON result.

mod support;

use std::fs;

use serde_json::Value;
use support::{Workbench, arg, bridge, edit_json, finish, fixture, pretrain, xtask};

const VERBS: [&[&str]; 28] = [
    &["pretrain"],
    &["finetune"],
    &["adapter", "export"],
    &["adapter", "import"],
    &["adapter", "merge"],
    &["convert"],
    &["launch"],
    &["import"],
    &["export"],
    &["roundtrip"],
    &["plan"],
    &["verify"],
    &["generate"],
    &["models", "list"],
    &["models", "show"],
    &["recipes", "list"],
    &["recipes", "show"],
    &["data", "preprocess"],
    &["data", "inspect"],
    &["data", "pack"],
    &["bench", "train"],
    &["bench", "generate"],
    &["bench", "convert"],
    &["bench", "ops"],
    &["doctor"],
    &["test"],
    &["models"],
    &["data"],
];

/// Asserts that a JSON object has exactly these fields.
#[track_caller]
fn has_fields(value: &Value, fields: &[&str]) {
    let mut found: Vec<&str> = value
        .as_object()
        .expect("an object")
        .keys()
        .map(String::as_str)
        .collect();
    let mut expected = fields.to_vec();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected);
}

#[test]
fn every_verb_has_help() {
    for verb in VERBS {
        let outcome = bridge(&[verb, &["--help"]].concat()).ok();
        assert!(
            outcome.stdout.contains("Usage: cargo xtask"),
            "{verb:?}: {}",
            outcome.stdout
        );
    }
    let all = xtask("--help").ok().stdout;
    for verb in VERBS {
        assert!(
            all.contains(verb[0]),
            "{verb:?} is missing from the overview"
        );
    }
}

#[test]
fn wrong_arguments_exit_with_2_and_the_nearest_right_one() {
    xtask("pertrain").fails(2, &["pretrain"]);
    xtask("plan --hff x").fails(2, &["--hf"]);
    xtask("plan").fails(2, &["--hf"]);
    bridge::<&str>(&[]).fails(2, &[]);
    xtask("plan --hf x --tp two").fails(2, &["two"]);
    xtask("models show lama").fails(2, &["did you mean `llama`?"]);
    xtask("recipes show tiny_lama").fails(2, &["tiny_llama"]);
    xtask("--threads 0 models list").fails(2, &["threads"]);
    let hf = fixture("llama3_2");
    let verify = ["verify", "--hf", arg(&hf), "--reference", arg(&hf)];
    bridge(&[&verify[..], &["--backend", "cuad"]].concat()).fails(2, &["cuda"]);
    bridge(&[&verify[..], &["--backend", "cpu", "--device", "1"]].concat())
        .fails(2, &["--device 1"]);
    xtask(&format!("generate --hf {} --max-new-tokens 3", arg(&hf))).fails(2, &["--prompt"]);
    xtask(&format!(
        "generate --hf {} --checkpoint {} --prompt-ids 1",
        arg(&hf),
        arg(&hf)
    ))
    .fails(2, &["cannot be used with"]);
}

#[test]
fn errors_are_json_as_well_when_asked_for() {
    let outcome = xtask("plan --hf /nowhere --json").fails(2, &["/nowhere"]);
    let error = outcome.json();
    has_fields(&error, &["error", "exit_code"]);
    assert_eq!(error["exit_code"], 2);
}

#[test]
fn models_and_recipes_are_listed() {
    let models = xtask("models list --json").ok().json();
    assert!(
        models["models"]
            .as_array()
            .expect("a list")
            .iter()
            .any(|m| m["name"] == "llama")
    );
    assert!(
        xtask("models show llama")
            .ok()
            .stdout
            .contains("model.layers.*.self_attn.q_proj.weight")
    );
    let recipes = xtask("recipes list").ok().stdout;
    for name in ["tiny_llama", "smollm2_135m", "llama32_1b", "llama3_8b"] {
        assert!(recipes.contains(name), "{name}");
        // What is shown is a config file that pretrain takes.
        let bench = Workbench::empty();
        let shown = xtask(&format!("recipes show {name}")).ok().stdout;
        fs::write(bench.path("shown.toml"), &shown).expect("written");
        let config = bench.path("shown.toml");
        let outcome = xtask(&format!("recipes show {name} --json")).ok().json();
        has_fields(&outcome, &["name", "description", "toml"]);
        let dry = xtask(&format!("pretrain --config {} --dry-run", arg(&config)));
        assert!(
            dry.code == Some(0)
                || dry.stderr.contains("precision")
                || dry.stderr.contains("HF_HUB_OFFLINE"),
            "{}",
            dry.stderr
        );
    }
}

#[test]
fn plan_json_holds_every_tensor_and_rank() {
    let hf = fixture("llama3_1");
    let plan = xtask(&format!("plan --hf {} --tp 2 --pp 3 --json", arg(&hf)))
        .ok()
        .json();
    assert_eq!(
        plan["tensors"].as_array().expect("tensors").len(),
        support::tensors(&hf).len()
    );
    let ranks = plan["ranks"].as_array().expect("ranks");
    assert_eq!(ranks.len(), 6);
    let bytes: u64 = ranks
        .iter()
        .map(|r| r["bytes"].as_u64().expect("bytes"))
        .sum();
    assert!(bytes >= plan["total_bytes"].as_u64().expect("a total"));
    let text = xtask(&format!("plan --hf {} --tp 2", arg(&hf))).ok().stdout;
    assert!(
        text.contains("model.layers.*.self_attn.q_proj.weight") && text.contains("tp=2"),
        "{text}"
    );
}

#[test]
fn verify_tells_what_it_compared() {
    let hf = fixture("llama3_2");
    let result = xtask(&format!(
        "verify --hf {} --reference {} --grads --json",
        arg(&hf),
        arg(&hf)
    ))
    .ok()
    .json();
    has_fields(
        &result,
        &[
            "family",
            "layout",
            "backend",
            "dtype",
            "logits_max_abs_diff",
            "loss",
            "loss_reference",
            "grad_norm_max_rel_diff",
            "worst_grad",
            "greedy_match",
            "passed",
        ],
    );
    assert_eq!(result["passed"], true);
    assert_eq!(result["backend"], "cpu");
    let without = xtask(&format!(
        "verify --hf {} --reference {} --json",
        arg(&hf),
        arg(&hf)
    ))
    .ok()
    .json();
    assert!(without["grad_norm_max_rel_diff"].is_null() && without["worst_grad"].is_null());
}

#[test]
fn a_check_that_does_not_hold_exits_with_1() {
    let hf = fixture("llama3_2");
    let verify = |reference: &Workbench| {
        let reference = reference.hf();
        xtask(&format!(
            "verify --hf {} --reference {} --grads --json",
            arg(&hf),
            arg(&reference)
        ))
    };
    let loss = Workbench::new("llama3_2");
    edit_json(&loss.hf().join("oracle.json"), |v| {
        v["loss"] = (v["loss"].as_f64().expect("a loss") + 1e-3).into()
    });
    assert_eq!(verify(&loss).fails(1, &["loss"]).json()["passed"], false);

    let gradient = Workbench::new("llama3_2");
    edit_json(&gradient.hf().join("oracle.json"), |v| {
        let norm = &mut v["grads"]["model.layers.1.mlp.up_proj.weight"][0];
        *norm = (norm.as_f64().expect("a norm") * 1.01).into();
    });
    let outcome = verify(&gradient).fails(1, &["model.layers.1.mlp.up_proj.weight"]);
    assert_eq!(
        outcome.json()["worst_grad"],
        "model.layers.1.mlp.up_proj.weight"
    );

    let tokens = Workbench::new("llama3_2");
    edit_json(&tokens.hf().join("oracle.json"), |v| {
        v["gen_ids"][3] = ((v["gen_ids"][3].as_u64().expect("an id") + 1) % 100).into()
    });
    assert_eq!(
        verify(&tokens).fails(1, &["greedy"]).json()["greedy_match"],
        false
    );

    // Weights of another seed: everything differs.
    let other = fixture("llama2");
    xtask(&format!(
        "verify --hf {} --reference {}",
        arg(&hf),
        arg(&other)
    ))
    .fails(1, &["logits"]);
}

#[test]
fn generate_gives_the_reference_tokens_from_either_source() {
    let bench = Workbench::new("llama3_2");
    let oracle: Value =
        serde_json::from_slice(&fs::read(bench.hf().join("oracle.json")).expect("oracle"))
            .expect("json");
    let prompt = oracle["gen_prompt"]
        .as_array()
        .expect("a prompt")
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(",");
    let checkpoint = bench.path("ckpt");
    xtask(&format!(
        "import --hf {} --out {}",
        arg(&bench.hf()),
        arg(&checkpoint)
    ))
    .ok();
    for source in [
        ["--hf", arg(&bench.hf())],
        ["--checkpoint", arg(&checkpoint)],
    ] {
        let args = [
            &["generate"],
            &source[..],
            &["--prompt-ids", &prompt, "--max-new-tokens", "16", "--json"],
        ]
        .concat();
        let result = bridge(&args).ok().json();
        has_fields(
            &result,
            &["prompt_ids", "token_ids", "text", "tokens_per_s"],
        );
        assert_eq!(result["token_ids"], oracle["gen_ids"]);
        assert_eq!(result["prompt_ids"], oracle["gen_prompt"]);
        assert!(
            result["text"].is_null(),
            "there is no tokenizer to make text with"
        );
    }
    let sampled = |seed: &str| {
        let hf = bench.hf();
        let args = [
            "generate",
            "--hf",
            arg(&hf),
            "--prompt-ids",
            &prompt,
            "--max-new-tokens",
            "16",
            "--temperature",
            "1.5",
        ];
        bridge(&[&args[..], &["--top-p", "0.95", "--seed", seed, "--json"]].concat())
            .ok()
            .json()["token_ids"]
            .clone()
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

#[test]
fn pretrain_reports_where_everything_is() {
    let bench = Workbench::empty();
    let dir = bench.path("run");
    let mut command = pretrain(
        &dir,
        &[
            "train.train_iters=3",
            "logging.plot=true",
            "logging.tensorboard=true",
            "eval.eval_interval=2",
        ],
    );
    command.arg("--json");
    let result = finish(command).ok().json();
    for field in ["checkpoint", "metrics", "plot"] {
        let path = result[field]
            .as_str()
            .unwrap_or_else(|| panic!("{field} in {result}"));
        assert!(std::path::Path::new(path).exists(), "{path}");
    }
    assert_eq!(result["iteration"], 3);
    assert!(
        result["loss"].as_f64().is_some() && result["eval_loss"].as_f64().is_some(),
        "{result}"
    );
    assert_eq!(
        &fs::read(dir.join("loss.png")).expect("a plot")[1..4],
        b"PNG"
    );

    let text = finish(pretrain(&bench.path("again"), &["train.train_iters=2"])).ok();
    for words in ["loss", "checkpoint", "metrics.jsonl", "generate", "export"] {
        assert!(
            text.stdout.contains(words),
            "{words} is not in: {}",
            text.stdout
        );
    }
}

#[test]
fn a_dry_run_prints_the_config_and_writes_nothing() {
    let bench = Workbench::empty();
    let mut command = pretrain(&bench.path("run"), &["optimizer.lr=1.5e-3"]);
    command.arg("--dry-run");
    let outcome = finish(command).ok();
    assert!(
        outcome.stdout.contains("lr = 0.0015") && outcome.stdout.contains("[model]"),
        "{}",
        outcome.stdout
    );
    assert!(bench.entries().is_empty());
}

#[test]
fn a_trained_model_can_be_exported_and_read_back() {
    let bench = Workbench::empty();
    let (run, hf) = (bench.path("run"), bench.path("exported"));
    finish(pretrain(&run, &["train.train_iters=2"])).ok();
    xtask(&format!(
        "export --checkpoint {} --out {}",
        arg(&run),
        arg(&hf)
    ))
    .ok();
    xtask(&format!("roundtrip --hf {}", arg(&hf))).ok();
    let from = |source: &str, path: &std::path::Path| {
        bridge(&[
            "generate",
            source,
            arg(path),
            "--prompt",
            "The ",
            "--max-new-tokens",
            "8",
            "--json",
        ])
        .ok()
        .json()
    };
    let (a, b) = (from("--checkpoint", &run), from("--hf", &hf));
    assert_eq!(a["token_ids"], b["token_ids"]);
    assert!(a["text"].is_string() && a["text"] == b["text"], "{a} {b}");
}

#[test]
fn text_becomes_a_dataset_that_can_be_inspected_and_trained_on() {
    let bench = Workbench::empty();
    let text = bench.path("text.jsonl");
    let lines: Vec<String> = (0..200)
        .map(|i| format!("{{\"text\": \"Sentence number {i}, and some more words.\"}}"))
        .collect();
    fs::write(&text, lines.join("\n")).expect("written");
    let data = bench.path("made/here/data");
    let args = [
        "data",
        "preprocess",
        "--input",
        arg(&text),
        "--output",
        arg(&data),
        "--tokenizer",
        "bytes",
        "--json",
    ];
    let result = bridge(&args).ok().json();
    assert_eq!(result["documents"], 200);
    // A prefix holds a dataset for each key of the JSON objects.
    let data = std::path::Path::new(result["datasets"][0]["prefix"].as_str().expect("a prefix"));
    assert_eq!(data, bench.path("made/here/data_text_document"));
    let inspected = xtask(&format!("data inspect --data {} --json", arg(data)))
        .ok()
        .json();
    assert_eq!(inspected["documents"], 200);
    assert_eq!(inspected["tokens"], result["tokens"]);
    let shown = xtask(&format!(
        "data inspect --data {} --tokenizer bytes --document 3",
        arg(data)
    ))
    .ok()
    .stdout;
    assert!(shown.contains("Sentence number 3"), "{shown}");
    let path = format!("data.data_path=[{:?}]", arg(data));
    finish(pretrain(
        &bench.path("run"),
        &[
            "train.train_iters=2",
            "data.source=indexed",
            &path,
            "tokenizer.kind=bytes",
            "model.vocab_size=260",
        ],
    ))
    .ok();
    fs::write(&text, "{\"text\": 3}\n").expect("written");
    xtask(&format!(
        "data preprocess --input {} --output {} --tokenizer bytes",
        arg(&text),
        arg(&bench.path("bad/data"))
    ))
    .fails(2, &["text.jsonl", "1"]);
    assert!(
        !bench.entries().iter().any(|n| n.starts_with("bad")),
        "{:?}",
        bench.entries()
    );
}

#[test]
fn benchmarks_print_one_json_line_a_case() {
    let fields = [
        "shape",
        "seq",
        "micro_batch",
        "precision",
        "step_ms",
        "min_ms",
        "tokens_per_s",
        "model_tflops",
        "peak_gib",
        "startup_s",
        "gpu",
    ];
    let train = xtask("bench train --shape tiny --seq 16 --batch 2 --steps 2")
        .ok()
        .json();
    for field in fields {
        assert!(
            train.get(field).is_some(),
            "{field} is missing from {train}"
        );
    }
    assert!(train["tokens_per_s"].as_f64().expect("a number") > 0.0 && train["gpu"].is_null());
    let hf = fixture("llama3_2");
    let generate = xtask(&format!("bench generate --hf {} --tokens 8", arg(&hf)))
        .ok()
        .json();
    assert!(generate["tokens_per_s"].as_f64().expect("a number") > 0.0);
    let bench = Workbench::empty();
    let convert = bridge(&[
        "bench",
        "convert",
        "--synthetic",
        "20MB",
        "--dir",
        bench.dir.path().to_str().expect("utf-8"),
    ])
    .ok()
    .json();
    for field in [
        "bytes",
        "cp_s",
        "import_s",
        "export_s",
        "import_peak_gib",
        "export_peak_gib",
    ] {
        assert!(
            convert[field].as_f64().is_some(),
            "{field} is missing from {convert}"
        );
    }
    assert!(
        bench.entries().is_empty(),
        "it tidies up: {:?}",
        bench.entries()
    );
}
