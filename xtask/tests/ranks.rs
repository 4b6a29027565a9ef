//! Layouts from the command line, every rank a thread of one process or a process of its own: the numbers are those of one
//! rank.

#![cfg(unix)]

mod support;

use std::collections::BTreeMap;

use support::{
    Outcome, Workbench, arg, bridge, edit_json, finish, fixture, losses, pretrain, xtask,
};

/// `verify --grads` of a fixture against itself, with further words, as processes where a number of them is given.
fn verify(family: &str, processes: Option<usize>, words: &str) -> Outcome {
    let folder = fixture(family);
    let launch = processes.map_or(String::new(), |n| {
        format!("launch --nproc {n} --timeout 60 -- ")
    });
    let folder = arg(&folder);
    // Sums in another order.
    let bounds = "--atol 2e-4 --rtol 2e-3";
    xtask(&format!(
        "{launch}verify --hf {folder} --reference {folder} --grads --json {bounds} {words}"
    ))
}

#[test]
fn processes_agree_with_the_reference() {
    for (family, processes, words, layout) in [
        ("llama3_1", 1, "", "single rank"),
        ("llama3_1", 2, "--tp 2 --sp", "tp=2 sp"),
        ("llama3_1", 2, "--cp 2 --cp-comm-type all_gather", "cp=2"),
        ("llama3_1", 4, "--pp 2 --tp 2", "tp=2 pp=2"),
        ("gemma2", 4, "--pp 2 --vpp 2 --dp 2", "pp=2 vpp=2 dp=2"),
        ("deepseek_v3", 4, "--ep 2 --tp 2 --dp 2", "tp=2 ep=2 dp=2"),
        ("nemotron_h", 2, "--tp 2", "tp=2"),
    ] {
        let found = verify(family, Some(processes), words).ok().json();
        let what = format!("{family} {words}: {found}");
        assert_eq!(found["passed"], true, "{what}");
        assert_eq!(found["layout"], layout, "{what}");
        assert!(found["logits_max_abs_diff"].is_number(), "{what}");
        assert!(found["grad_norm_max_rel_diff"].is_number(), "{what}");
    }
}

#[test]
fn a_reference_that_is_wrong_fails_on_every_process() {
    let bench = Workbench::new("llama2");
    edit_json(&bench.hf().join("oracle.json"), |json| {
        json["loss"] = (json["loss"].as_f64().expect("a loss") + 0.1).into();
    });
    let folder = bench.hf();
    let folder = arg(&folder);
    let line = format!("launch --nproc 2 -- verify --hf {folder} --reference {folder} --dp 2");
    xtask(&line).fails(
        1,
        &[
            "[rank 0] error: the model does not agree with the reference",
            "FAILED loss, absolute difference",
            "[rank 1] error: the model does not agree with the reference; rank 0 says where",
        ],
    );
}

#[test]
fn a_layout_of_another_size_than_the_job_is_refused_before_ranks_meet() {
    let words = "layout tp=4 has 4 ranks, the job has 2 processes";
    verify("llama3_1", Some(2), "--tp 4").fails(2, &["[rank 0] ", "[rank 1] ", words]);
    let folder = fixture("llama3_1");
    let folder = arg(&folder);
    let line = format!("launch --nproc 2 -- generate --hf {folder} --prompt-ids 1,2 --tp 4");
    xtask(&line).fails(2, &[words]);
}

#[test]
fn text_is_the_same_from_one_rank_from_threads_and_from_processes() {
    let folder = fixture("llama3_1");
    let generate = |before: &str, after: &str| {
        let folder = arg(&folder);
        let words = "--prompt-ids 3,1,4,1,5 --max-new-tokens 12 --json";
        let line = format!("{before} generate --hf {folder} {words} {after}");
        xtask(&line).ok()
    };
    let alone = generate("", "").json()["token_ids"].clone();
    assert_eq!(alone.as_array().expect("a list").len(), 12);
    assert_eq!(generate("", "--tp 2").json()["token_ids"], alone);
    let processes = generate("launch --nproc 2 --", "--tp 2");
    assert_eq!(processes.json()["token_ids"], alone);
    // One rank speaks.
    assert_eq!(processes.stdout.lines().count(), 1, "{}", processes.stdout);
}

/// A short run of a tiny model. Made-up tokens take no time to learn a vocabulary from.
const RUN: [&str; 4] = [
    "train.micro_batch_size=1",
    "model.num_hidden_layers=4",
    "data.source=mock",
    "tokenizer.kind=null",
];

/// Losses of a short run of a tiny model at a layout, as processes where a number of them is given.
#[track_caller]
fn trained(processes: Option<usize>, words: &[&str]) -> BTreeMap<u64, f64> {
    let bench = Workbench::empty();
    let dir = bench.path("run");
    let command = pretrain(&dir, &[&RUN[..], &["train.train_iters=3"], words].concat());
    let outcome = match processes {
        None => finish(command),
        Some(n) => {
            let nproc = n.to_string();
            let mut line = vec!["launch", "--nproc", &nproc, "--timeout", "60", "--"];
            line.extend(command.get_args().map(|word| word.to_str().expect("utf-8")));
            bridge(&line)
        }
    };
    outcome.ok();
    losses(&dir)
}

#[track_caller]
fn close(what: &str, found: &BTreeMap<u64, f64>, expected: &BTreeMap<u64, f64>) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for ((step, loss), alone) in found.iter().zip(expected.values()) {
        assert!(
            (loss - alone).abs() < 1e-4,
            "{what}, step {step}: {loss}, on one rank {alone}"
        );
    }
}

#[test]
fn training_at_mixed_layouts_is_training_on_one_rank() {
    let expected = trained(None, &[]);
    assert_eq!(expected.len(), 3);
    let divided = "parallel.data_parallel_sharding_strategy=optim_grads_params";
    let cases: [(&str, Option<usize>, &[&str]); 11] = [
        ("--pp 2 --dp 2", None, &[]),
        (
            "--pp 2 --vpp 2 --tp 2",
            None,
            &["parallel.use_distributed_optimizer=true"],
        ),
        (
            "--tp 2 --cp 2 --sp --dp 2",
            None,
            &["parallel.use_distributed_optimizer=true"],
        ),
        (
            "--pp 4",
            None,
            &[
                "parallel.pipeline_model_parallel_layout=Et|(t|)*2tL",
                "train.recompute_granularity=full",
            ],
        ),
        ("", Some(1), &[]),
        ("", Some(1), &["parallel.use_distributed_optimizer=true"]),
        (
            "--pp 2 --dp 2",
            Some(4),
            &["parallel.use_distributed_optimizer=true"],
        ),
        (
            "--tp 2 --pp 2 --sp",
            Some(4),
            &["parallel.pipeline_model_parallel_layout=Et*3|tL"],
        ),
        ("--dp 4", None, &[divided, "eval.eval_interval=2"]),
        ("", Some(1), &[divided]),
        ("--tp 2 --dp 2", Some(4), &[divided]),
    ];
    for (layout, processes, more) in cases {
        let words: Vec<&str> = layout
            .split_whitespace()
            .chain(more.iter().copied())
            .collect();
        let found = trained(processes, &words);
        close(
            &format!("{words:?}, processes {processes:?}"),
            &found,
            &expected,
        );
    }
}

#[test]
fn a_run_of_processes_continues_as_threads_of_another_layout() {
    let bench = Workbench::empty();
    let dir = bench.path("run");
    let whole = trained(None, &[]);
    let first = pretrain(
        &dir,
        &[&RUN[..], &["train.train_iters=3", "--tp", "2", "--dp", "2"]].concat(),
    );
    let mut line = vec!["launch", "--nproc", "4", "--"];
    line.extend(first.get_args().map(|word| word.to_str().expect("utf-8")));
    bridge(&line).ok();
    close("four processes", &losses(&dir), &whole);
    let longer = [
        "train.train_iters=4",
        "--pp",
        "2",
        "parallel.use_distributed_optimizer=true",
    ];
    finish(pretrain(&dir, &[&RUN[..], &longer].concat())).ok();
    let found = losses(&dir);
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
    let expected = {
        let bench = Workbench::empty();
        let dir = bench.path("run");
        finish(pretrain(
            &dir,
            &[&RUN[..], &["train.train_iters=3"]].concat(),
        ))
        .ok();
        finish(pretrain(
            &dir,
            &[&RUN[..], &["train.train_iters=4"]].concat(),
        ))
        .ok();
        losses(&dir)
    };
    close("continued at another layout", &found, &expected);
}
