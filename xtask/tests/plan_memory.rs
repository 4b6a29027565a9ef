//! `plan --memory`: known sizes come out, layouts are searched, and what does not fit is said.

mod support;

use support::xtask;

/// Parameters of Llama 3 8B.
const LLAMA3_8B: u64 = 8_030_261_248;

#[test]
fn a_recipe_on_one_gpu_needs_what_its_sizes_say() {
    let plan = |more: &str| {
        let line = format!("plan --memory --recipe llama3_8b --global-batch 1 --json {more}");
        xtask(&line).ok().json()["stages"][0].clone()
    };
    let stage = plan("parallel.context_parallel_size=1");
    assert_eq!(stage["weights"], 2 * LLAMA3_8B);
    assert_eq!(stage["gradients"], 4 * LLAMA3_8B);
    // The moments, and the 16 bits that complete a bf16 weight.
    assert_eq!(stage["optimizer"], 10 * LLAMA3_8B);
    // 8192 tokens, 32 layers, bf16: per token 4 x 4096 for norms and inputs, 6144 for q, k and v, 4096 for the attention's
    // output, 3 x 14336 for the MLP, and fp32 for 32 heads. Then one piece of logits and three tensors at the ends.
    let layers = 8192 * 32 * (2 * (4 * 4096 + 6144 + 4096 + 3 * 14336) + 4 * 32);
    let ends = (512u64 << 20) + 3 * 2 * 8192 * 4096;
    assert_eq!(stage["activations"], layers + ends);
    // What a setting says counts.
    let full = plan("parallel.context_parallel_size=1 train.recompute_granularity=full");
    assert!(full["activations"].as_u64() < stage["activations"].as_u64());
    let fp32 = plan("parallel.context_parallel_size=1 precision.mode=fp32");
    assert_eq!(fp32["optimizer"], 8 * LLAMA3_8B);
}

#[test]
fn the_search_finds_what_fits_eight_gpus() {
    let found = xtask("plan --memory --recipe llama3_8b --gpus 8 --gpu-memory 80GB --json")
        .ok()
        .json();
    let fits = found["fits"].as_array().expect("a list");
    assert!(!fits.is_empty());
    for fit in fits {
        let layout = &fit["layout"];
        let degrees = ["tp", "pp", "cp", "dp"].map(|axis| layout[axis].as_u64().expect("a degree"));
        assert_eq!(degrees.iter().product::<u64>(), 8, "{layout}");
    }
    xtask("plan --memory --recipe llama3_8b --gpus 2 --gpu-memory 24GB")
        .fails(1, &["no layout of 2 GPUs needs at most 20"]);
    xtask("plan --memory --recipe llama3_8b --dp 3").fails(2, &["train.global_batch_size", "512"]);
    xtask("plan --memory --recipe llama3_8b --tp 5").fails(2, &["tp=5 does not divide"]);
}
