//! Adapters from the command line: imported, merged, and generated with beside their model.

mod support;

use serde_json::Value;
use support::{Workbench, arg, fixture, xtask};

/// Greedy text of a model that `source` names.
fn text(source: &str) -> Value {
    let prompt = "--prompt-ids 1,17,42,9 --max-new-tokens 24 --json";
    xtask(&format!("generate {source} {prompt}")).ok().json()["token_ids"].clone()
}

#[test]
fn a_model_with_an_adapter_writes_what_the_merged_model_writes() {
    for (base, adapter) in [
        ("llama3_2", "lora_llama"),
        ("deepseek_v3", "dora_deepseek_v3"),
    ] {
        let bench = Workbench::new(base);
        let (hf, peft) = (bench.hf(), fixture("peft").join(adapter));
        let (hf, peft) = (arg(&hf), arg(&peft));
        let path = |name: &str| bench.path(name);
        let (merged, adapters, native) = (path("merged"), path("adapters"), path("native"));
        xtask(&format!(
            "adapter merge --hf {hf} --adapter {peft} --out {}",
            arg(&merged)
        ))
        .ok();
        xtask(&format!(
            "adapter import --hf {hf} --adapter {peft} --out {}",
            arg(&adapters)
        ))
        .ok();
        xtask(&format!("import --hf {hf} --out {}", arg(&native))).ok();

        let expected = text(&format!("--hf {}", arg(&merged)));
        assert_ne!(
            expected,
            text(&format!("--hf {hf}")),
            "{adapter} does nothing"
        );
        for source in [
            format!("--hf {hf} --adapter {peft}"),
            format!("--hf {hf} --adapter {}", arg(&adapters)),
            format!("--hf {hf} --adapter {peft} --tp 2"),
            format!("--checkpoint {} --adapter {peft}", arg(&native)),
        ] {
            assert_eq!(text(&source), expected, "{source}");
        }
    }
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let bench = Workbench::new("llama3_2");
    let (hf, peft) = (bench.hf(), fixture("peft").join("lora_llama"));
    let (hf, peft) = (arg(&hf), arg(&peft));
    let adapters = bench.path("adapters");
    xtask(&format!(
        "adapter import --hf {hf} --adapter {peft} --out {}",
        arg(&adapters)
    ))
    .ok();
    let generate = |model: &str, adapter: &str| {
        xtask(&format!(
            "generate --hf {} --adapter {adapter} --prompt-ids 1,2 --max-new-tokens 2",
            arg(&fixture(model))
        ))
    };
    // Other weights; another shape; no adapter at all.
    generate("llama3_1", arg(&adapters)).fails(2, &["trained beside", "--any-base"]);
    generate("qwen3_moe", peft).fails(2, &["no LoRA tensor of a linear layer"]);
    generate("llama3_2", hf).fails(2, &["is no PEFT folder", "adapter_config.json"]);
    xtask(&format!("generate --hf {hf} --any-base --prompt-ids 1")).fails(2, &["--adapter"]);
}
