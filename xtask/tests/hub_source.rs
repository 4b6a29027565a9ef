//! A hub id in place of a folder, through the real binary and a hub on loopback.

mod support;

#[allow(dead_code)]
#[path = "../../bridge-hub/tests/fake_hub/mod.rs"]
mod fake_hub;

use std::fs;
use std::net::TcpListener;

use fake_hub::{COMMIT, FakeHub, Served};
use support::{Outcome, Workbench, command, finish, fixture};

fn hub(name: &str) -> FakeHub {
    let files = fs::read_dir(fixture(name))
        .expect("the fixture")
        .flatten()
        .filter(|e| e.path().is_file());
    FakeHub::start(
        files
            .map(|e| {
                let name = e.file_name().to_string_lossy().into_owned();
                let content = fs::read(e.path()).expect("a file");
                let lfs = name.ends_with(".safetensors");
                (
                    name,
                    Served {
                        content,
                        lfs,
                        ..Served::default()
                    },
                )
            })
            .collect(),
    )
}

fn run(endpoint: &str, bench: &Workbench, args: &[&str]) -> Outcome {
    let mut command = command();
    command
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HOME", bench.path("home"))
        .env_remove("HF_HUB_OFFLINE")
        .args(args);
    finish(command)
}

#[test]
fn a_hub_id_works_wherever_a_folder_does() {
    let (hub, bench) = (hub("llama3_1"), Workbench::empty());
    let plan = run(
        &hub.endpoint,
        &bench,
        &["plan", "--hf", "org/name", "--json"],
    )
    .ok()
    .json();
    assert_eq!(plan["family"], "llama");
    let args = [
        "generate",
        "--hf",
        "org/name@main",
        "--prompt-ids",
        "9,8,7",
        "--max-new-tokens",
        "4",
        "--json",
    ];
    let there = run(&hub.endpoint, &bench, &args).ok().json();
    let here = fixture("llama3_1");
    let args = [
        "generate",
        "--hf",
        support::arg(&here),
        "--prompt-ids",
        "9,8,7",
        "--max-new-tokens",
        "4",
        "--json",
    ];
    assert_eq!(
        there["token_ids"],
        run(&hub.endpoint, &bench, &args).ok().json()["token_ids"]
    );
    assert!(
        bench
            .path("home/hub/models--org--name/snapshots")
            .join(COMMIT)
            .is_dir(),
        "the Python tools' layout"
    );
    assert_eq!(
        hub.requests("model-00001-of-00009.safetensors").len(),
        1,
        "fetched once"
    );
}

#[test]
fn hub_errors_have_their_exit_codes() {
    let (hub, bench) = (hub("llama3_2"), Workbench::empty());
    let plan = |source: &str| run(&hub.endpoint, &bench, &["plan", "--hf", source]);
    plan("org/nothing").fails(2, &["org/nothing", "check the spelling"]);
    plan("org/name@nope").fails(2, &["nope"]);
    plan("./org/name").fails(2, &["no folder"]);
    hub.set_gated();
    plan("org/name").fails(2, &["gated", "HF_TOKEN"]);
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        format!("http://{}", listener.local_addr().expect("its address"))
    };
    run(&closed, &bench, &["plan", "--hf", "org/name"]).fails(3, &["cannot reach", "HF_ENDPOINT"]);
    run("nonsense", &bench, &["plan", "--hf", "org/name"]).fails(2, &["HF_ENDPOINT"]);
}
