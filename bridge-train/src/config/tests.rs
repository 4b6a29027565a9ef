use super::*;
use crate::error::Error;

const MODEL: &str = r#"
[model]
architecture = "LlamaForCausalLM"
hidden_size = 48
intermediate_size = 80
num_hidden_layers = 3
num_attention_heads = 6
num_key_value_heads = 2
head_dim = 16
vocab_size = 131
max_position_embeddings = 64
[tokenizer]
kind = "null"
[data]
source = "mock"
seq_length = 24
"#;

const RUN: &str = r#"
[train]
micro_batch_size = 2
global_batch_size = 8
train_iters = 100
[optimizer]
lr = 1e-3
min_lr = 1e-4
"#;

fn layers(overrides: &[&str]) -> ConfigLayers {
    let mut layers = ConfigLayers::new();
    layers.push_toml("the recipe", MODEL).unwrap();
    layers.push_toml("the file", RUN).unwrap();
    overrides.iter().for_each(|o| layers.push_override(o));
    layers
}

fn resolved(overrides: &[&str]) -> Result<ResolvedConfig, Error> {
    resolve(
        &layers(overrides),
        &ResolveContext::new(&bridge_models::registry(), "test"),
    )
}

#[track_caller]
fn fails(overrides: &[&str], parts: &[&str]) {
    let Err(Error::Config(problems)) = resolved(overrides) else {
        panic!("{overrides:?} should not resolve")
    };
    let text = problems
        .iter()
        .map(Problem::to_string)
        .collect::<Vec<_>>()
        .join("\n");
    for part in parts {
        assert!(text.contains(part), "{text}\nshould contain {part}");
    }
    assert_eq!(problems.len(), parts.len(), "{text}");
}

#[test]
fn defaults_are_filled_in() {
    let config = resolved(&[]).unwrap();
    assert_eq!(config.checkpoint.dir, "runs/test");
    assert_eq!(config.logging.dir.as_deref(), Some("runs/test"));
    assert_eq!(config.data.seed, Some(1234));
    assert_eq!(config.scheduler.lr_decay_iters, Some(100));
    assert_eq!(config.model.decoder.num_key_value_heads, 2);
    assert_eq!(config.weight_decay_schedule().weight_decay(0), 0.1);
}

#[test]
fn the_printed_form_resolves_to_the_same() {
    let overrides = [
        "scheduler.lr_warmup_fraction=0.1",
        "train.exit_duration_in_mins=2",
        "checkpoint.dir=a b/c",
    ];
    let config = resolved(&overrides).unwrap();
    let mut again = ConfigLayers::new();
    again.push_toml("printed", &config.to_toml()).unwrap();
    assert_eq!(
        resolve(
            &again,
            &ResolveContext::new(&bridge_models::registry(), "other")
        )
        .unwrap(),
        config
    );
}

#[test]
fn samples_and_iterations_are_two_ways_to_say_one_length() {
    // 807 samples are 100 steps of 8, and a rest that makes no step.
    assert_eq!(
        resolved(&["train.train_samples=807"]).unwrap(),
        resolved(&["train.train_iters=100"]).unwrap()
    );
}

#[test]
fn warmups_agree_in_their_three_forms() {
    let of = |warmup: &str| resolved(&[warmup]).unwrap().lr_schedule().warmup_samples;
    assert_eq!(of("scheduler.lr_warmup_iters=10"), 80.0);
    assert_eq!(of("scheduler.lr_warmup_samples=80"), 80.0);
    assert_eq!(of("scheduler.lr_warmup_fraction=0.1"), 80.0);
}

#[test]
fn every_problem_is_reported_at_once_with_who_set_it() {
    fails(
        &[
            "train.trian_iters=1",
            "optimizer.lr=fast",
            "train.micro_batch_size=3.5",
            "data.seq_length=-1",
        ],
        &[
            "train.trian_iters (set by the command line): unknown key; did you mean `train.train_iters`?",
            "optimizer.lr (set by the command line): `fast` is not a number",
            "train.micro_batch_size (set by the command line): `3.5` is not a whole number",
            "data.seq_length (set by the command line): `-1` is not a whole number",
        ],
    );
}

#[test]
fn contradictions_are_found() {
    fails(
        &["train.micro_batch_size=3"],
        &["is 8, which is not a multiple of micro_batch_size=3"],
    );
    fails(
        &["train.train_samples=80", "train.train_iters=10"],
        &["is set together with train.train_iters"],
    );
    fails(
        &["scheduler.lr_warmup_iters=100"],
        &["does not end before the decay"],
    );
    fails(
        &[
            "scheduler.lr_warmup_iters=1",
            "scheduler.lr_warmup_fraction=0.1",
        ],
        &["keep one of them"],
    );
    fails(
        &["scheduler.lr_decay_style=WSD"],
        &["must be set (or lr_wsd_decay_samples)"],
    );
    fails(
        &["optimizer.min_lr=1"],
        &["is 1, more than optimizer.lr=0.001"],
    );
    fails(&["optimizer.adam_beta2=1"], &["expected from 0 to below 1"]);
    fails(
        &["data.seq_length=65"],
        &["longer than the model's context of 64 tokens"],
    );
    fails(&["data.source=indexed"], &["data.data_path"]);
    fails(
        &["data.source=text", "data.data_path=a.txt"],
        &["is null, but data.source"],
    );
    fails(&["tokenizer.kind=hf"], &["tokenizer.path: must be set"]);
    fails(
        &["scheduler.end_weight_decay=0.2"],
        &["choose linear or cosine"],
    );
    fails(&["model.num_attention_heads=5"], &["num_attention_heads"]);
    fails(&["model.hf=/nowhere"], &["there is no folder /nowhere"]);
    fails(&["model.rope_scaling.rope_type=llama9"], &["llama9"]);
    fails(
        &["model.architecture=LlamaForCausalLN"],
        &["LlamaForCausalLM"],
    );
    fails(
        &["parallel.data_parallel_size=0"],
        &["is 0, expected 1 or more"],
    );
    fails(
        &["parallel.pipeline_model_parallel_size=4"],
        &["the most is pp=3"],
    );
    fails(
        &[
            "parallel.pipeline_model_parallel_size=2",
            "parallel.pipeline_model_parallel_layout=2,2",
        ],
        &["[2, 2]"],
    );
    fails(
        &[
            "parallel.pipeline_model_parallel_size=2",
            "parallel.pipeline_model_parallel_layout=2,x",
        ],
        &["expected numbers of layers such as 3,2,2"],
    );
    fails(
        &[
            "parallel.pipeline_model_parallel_size=2",
            "parallel.pipeline_model_parallel_layout=Et|tm|tL",
        ],
        &["has 3 chunks, for pp=2 times vpp=1"],
    );
}

#[test]
fn an_empty_configuration_says_what_it_needs() {
    let Err(Error::Config(problems)) = resolve(
        &ConfigLayers::new(),
        &ResolveContext::new(&bridge_models::registry(), "test"),
    ) else {
        panic!("nothing is no configuration")
    };
    let keys: Vec<_> = problems
        .iter()
        .map(|problem| problem.key.as_str())
        .collect();
    assert_eq!(
        keys,
        [
            "model",
            "train.global_batch_size",
            "optimizer.lr",
            "data.seq_length"
        ]
    );
}

#[test]
fn the_platform_refuses_what_it_cannot_run() {
    let check = |overrides: &[&str]| Platform::cpu().check(&resolved(overrides).unwrap());
    check(&[]).unwrap();
    for (overrides, part) in [
        (
            &["precision.mode=bf16_mixed"][..],
            "set precision.mode=fp32",
        ),
        (
            &["parallel.tensor_model_parallel_size=2"],
            "layout tp=2 has 2 ranks",
        ),
        (&["parallel.sequence_parallel=true"], "set it to false"),
    ] {
        let message = check(overrides).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(
        Platform::cpu().precision(PrecisionMode::Auto),
        PrecisionMode::Fp32
    );
}

#[test]
fn every_key_is_documented() {
    for section in schema() {
        for key in section.keys {
            assert!(
                key.doc.trim().ends_with('.'),
                "{}.{}: {:?}",
                section.name,
                key.name,
                key.doc
            );
        }
    }
}

/// A preset in the place of the model's words.
fn preset(name: &str, overrides: &[&str]) -> Result<ResolvedConfig, Error> {
    let mut layers = ConfigLayers::new();
    let model = format!("[model]\npreset = \"{name}\"\n");
    let data =
        "[tokenizer]\nkind = \"null\"\n[data]\nsource = \"mock\"\nseq_length = 24\n".to_owned();
    layers.push_toml("the recipe", &(model + &data)).unwrap();
    layers.push_toml("the file", RUN).unwrap();
    overrides.iter().for_each(|o| layers.push_override(o));
    resolve(
        &layers,
        &ResolveContext::new(&bridge_models::registry(), "test"),
    )
}

#[test]
fn router_losses_default_to_what_the_models_config_says() {
    use bridge_models::BalanceScope;
    for (name, balance, scope, rate, mtp) in [
        ("llama32_1b", 0.0, BalanceScope::MicroBatch, 0.0, 0.0),
        ("qwen3_30b_a3b", 0.001, BalanceScope::MicroBatch, 0.0, 0.0),
        ("olmoe_tiny", 0.01, BalanceScope::MicroBatch, 0.0, 0.0),
        ("gpt_oss_20b", 0.0, BalanceScope::MicroBatch, 0.0, 0.0),
        ("deepseek_v3", 0.001, BalanceScope::Sequence, 1e-3, 0.1),
    ] {
        let found = preset(name, &[]).unwrap().auxiliary_options();
        assert_eq!(
            (
                found.balance,
                found.scope,
                found.bias_update_rate,
                found.mtp
            ),
            (balance, scope, rate, mtp),
            "{name}"
        );
    }
    let overrides = [
        "train.moe_router_load_balancing_type=global_aux_loss",
        "train.moe_aux_loss_coeff=0.02",
        "train.moe_z_loss_coeff=1e-3",
        "train.moe_expert_capacity_factor=1.25",
        "train.moe_token_drop_policy=position",
    ];
    let config = preset("qwen3_moe_tiny", &overrides).unwrap();
    let found = config.auxiliary_options();
    assert_eq!((found.balance, found.router_z), (0.02, 1e-3));
    assert_eq!(found.scope, BalanceScope::Step);
    assert_eq!(found.capacity.unwrap().factor, 1.25);
    // What is printed comes to the same.
    let mut layers = ConfigLayers::new();
    layers.push_toml("printed", &config.to_toml()).unwrap();
    let registry = bridge_models::registry();
    let again = resolve(&layers, &ResolveContext::new(&registry, "test")).unwrap();
    assert_eq!(again.auxiliary_options(), found);
}

#[test]
fn router_losses_that_do_not_fit_are_refused() {
    fails(
        &["train.moe_z_loss_coeff=0.1", "train.moe_aux_loss_coeff=0.1"],
        &["train.moe_aux_loss_coeff", "train.moe_z_loss_coeff"],
    );
    let refused =
        |name: &str, overrides: &[&str]| preset(name, overrides).expect_err("refused").to_string();
    let text = refused(
        "gpt_oss_tiny",
        &["train.moe_router_load_balancing_type=aux_loss"],
    );
    assert!(text.contains("names no coefficient"), "{text}");
    let text = refused(
        "gpt_oss_tiny",
        &[
            "train.moe_router_load_balancing_type=none",
            "train.moe_aux_loss_coeff=0.1",
        ],
    );
    assert!(
        text.contains("moe_router_load_balancing_type is none"),
        "{text}"
    );
    let text = refused(
        "qwen3_moe_tiny",
        &[
            "train.moe_expert_capacity_factor=0",
            "train.moe_z_loss_coeff=-1",
        ],
    );
    assert!(text.contains("must be more than 0"), "{text}");
}

#[test]
fn adapters_need_a_model_and_layers_that_it_has() {
    let base = "checkpoint.pretrained=somewhere";
    assert_eq!(resolved(&[]).unwrap().peft.adapters(1), None);
    let config = resolved(&["peft.scheme=dora", "peft.dim=4", base]).unwrap();
    let adapters = config.peft.adapters(7).unwrap();
    assert_eq!((adapters.dim, adapters.seed), (4, 7));
    assert_eq!(adapters.kind, bridge_peft::AdapterKind::Dora);
    fails(&["peft.scheme=lora"], &["checkpoint.pretrained"]);
    let wrong = ["peft.target_modules=q_porj", "peft.scheme=lora", base];
    fails(&wrong, &["did you mean `q_proj`?"]);
    fails(
        &["peft.dropout=1.5", "peft.scheme=lora", base],
        &["peft.dropout"],
    );
    fails(&["peft.shceme=lora"], &["scheme"]);
}

#[test]
fn answers_come_from_files() {
    let sft = "data.source=sft";
    fails(&[sft, "tokenizer.kind=bytes"], &["data.data_path"]);
    fails(
        &["data.validation_path=x.jsonl", "tokenizer.kind=bytes"],
        &["data.validation_path"],
    );
}
