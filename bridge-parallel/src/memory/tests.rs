use bridge_core::config::{
    GatedDeltaNetConfig, LayerConfig, Mamba2Config, Mixer, MlaConfig, MoeConfig, QkNorm,
};

use super::*;

const GIB: f64 = (1u64 << 30) as f64;

fn spec() -> MemorySpec {
    MemorySpec {
        micro_batch: 1,
        seq: 128,
        num_micro_batches: 8,
        state: StateBytes::bf16(false),
        recompute: Recompute::None,
        distributed_optimizer: false,
        shard_grads: false,
        shard_params: false,
        bucket_size: 0,
        split: None,
    }
}

/// Hidden 48, 6 heads of 16, 2 kv heads, inner 80, 131 tokens, 4 layers.
fn model() -> DecoderConfig {
    DecoderConfig {
        hidden_size: 48,
        intermediate_size: 80,
        num_hidden_layers: 4,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 16,
        vocab_size: 131,
        layers: vec![LayerConfig::dense(); 4],
        ..DecoderConfig::plain()
    }
}

fn count(config: &DecoderConfig) -> u64 {
    let tensors = config.tensors();
    tensors.iter().map(|tensor| tensor.numel() as u64).sum()
}

#[track_caller]
fn memory(layout: LayoutSpec, spec: &MemorySpec) -> Vec<RankMemory> {
    stage_memory(&model(), &layout, spec).unwrap()
}

/// Norm inputs, q, k, v, the attention's output, gate and up; then norm outputs and the product; 2 bytes each. And one
/// fp32 number per head.
const KEPT: u64 = 2 * (2 * 48 + (96 + 32 + 32) + 96 + 2 * 80) + 6 * 4;
const AGAIN: u64 = 2 * (2 * 48 + 80);
/// Logits, and three tensors of the residual stream, beside the last layer.
const HEAD: u64 = 2 * (131 + 3 * 48);

#[test]
fn one_rank_holds_everything() {
    let n = count(&model());
    let found = memory(LayoutSpec::default(), &spec());
    let activations = 128 * (4 * (KEPT + AGAIN) + HEAD);
    let expected = RankMemory {
        weights: 2 * n,
        gradients: 4 * n,
        optimizer: 10 * n,
        activations,
        peak: 16 * n + activations,
    };
    assert_eq!(found, [expected]);
    let fp32 = MemorySpec {
        state: StateBytes::fp32(),
        ..spec()
    };
    let fp32 = memory(LayoutSpec::default(), &fp32)[0];
    assert_eq!((fp32.weights, fp32.optimizer), (4 * n, 8 * n));
    // A single micro-batch leaves most gradients to the backward pass, when the activations go.
    let alone = MemorySpec {
        num_micro_batches: 1,
        ..spec()
    };
    let alone = memory(LayoutSpec::default(), &alone)[0];
    let head = 4 * 131 * 48;
    assert_eq!(
        alone.peak,
        12 * n + (activations + head).max(4 * n + 2 * 128 * 48)
    );
}

#[test]
fn recomputation_keeps_less() {
    let kept = |recompute| {
        let spec = MemorySpec {
            recompute,
            ..spec()
        };
        memory(LayoutSpec::default(), &spec)[0].activations
    };
    let ends = 3 * 2 * 48;
    assert_eq!(kept(Recompute::Selective), 128 * (4 * KEPT + AGAIN + ends));
    assert_eq!(
        kept(Recompute::Full),
        128 * (4 * 2 * 48 + (KEPT + AGAIN - 2 * 48) + ends)
    );
}

#[test]
fn layouts_divide_what_they_should() {
    let one = memory(LayoutSpec::default(), &spec())[0];
    // The optimizer's state over data and context parallel ranks, the rest copied; tokens over context parallel ones.
    let divided = MemorySpec {
        distributed_optimizer: true,
        ..spec()
    };
    let layout = LayoutSpec {
        dp: 2,
        cp: 2,
        ..LayoutSpec::default()
    };
    let found = memory(layout, &divided)[0];
    assert_eq!(
        (found.weights, found.gradients),
        (one.weights, one.gradients)
    );
    assert!(found.optimizer.abs_diff(one.optimizer / 4) < 100);
    assert_eq!(found.activations, one.activations / 2);
    // Sequence parallelism divides the norms' inputs too; what enters the blocks stays whole.
    let layout = LayoutSpec {
        sp: true,
        ..LayoutSpec::tp_pp(2, 1)
    };
    let per_layer = 2 * (48 + 2 * 48 + 80 + 48 + 120) + 3 * 4;
    let head = 2 * (66 + 3 * 48);
    assert_eq!(
        memory(layout, &spec())[0].activations,
        128 * (4 * per_layer + head)
    );
    // What ranks have exchanged is not made again.
    let selective = MemorySpec {
        recompute: Recompute::Selective,
        ..spec()
    };
    let product = 2 * 40;
    assert_eq!(
        memory(layout, &selective)[0].activations,
        128 * (4 * (per_layer - product) + head)
    );
    // Without it nothing is gathered.
    let kept = 2 * (2 * 48 + 80 + 48 + 80) + 3 * 4;
    let again = 2 * (2 * 48 + 40);
    assert_eq!(
        memory(LayoutSpec::tp_pp(2, 1), &selective)[0].activations,
        128 * (4 * kept + again + 3 * 2 * 48)
    );
    // The first of two stages holds one more micro-batch than the second, which has the head.
    let found = memory(LayoutSpec::tp_pp(1, 2), &spec());
    let layers = 128 * 2 * (KEPT + AGAIN);
    assert_eq!(found[0].activations, 2 * layers + 128 * 2 * 48);
    assert_eq!(found[1].activations, layers + 128 * HEAD);
    let few = MemorySpec {
        num_micro_batches: 1,
        ..spec()
    };
    let few = memory(LayoutSpec::tp_pp(1, 2), &few);
    assert_eq!(few[0].activations, layers + 128 * 2 * 48);
    // The other way round, with all layers in the last stage.
    let layout = LayoutSpec::tp_pp(1, 2);
    let uneven = MemorySpec {
        split: Some(PipelineSplit::uneven(&layout, 4, &[0, 4]).unwrap()),
        ..spec()
    };
    let found = memory(layout, &uneven);
    assert_eq!(found[0].weights, 2 * 131 * 48);
    assert_eq!(found[1].activations, 2 * layers + 128 * HEAD);
}

#[test]
fn experts_come_from_the_config() {
    let mut config = model();
    config.layers = vec![LayerConfig::moe(); 4];
    config.moe = Some(MoeConfig {
        num_experts: 8,
        num_experts_per_tok: 3,
        intermediate_size: 24,
        ..MoeConfig::plain()
    });
    let activations = |config: &DecoderConfig, layout: LayoutSpec| {
        stage_memory(config, &layout, &spec()).unwrap()[0].activations
    };
    let attention = 2 * (2 * 48 + 160 + 96) + 6 * 4;
    let moe = 2 * 48 + 4 * (48 + 8) + 3 * 2 * (2 * 48 + 3 * 24);
    assert_eq!(
        activations(&config, LayoutSpec::default()),
        128 * (4 * (attention + moe) + HEAD)
    );
    // A shared expert takes the norm's output in as well.
    let shared = |own: &mut MoeConfig| own.shared_intermediate_size = Some(40);
    config.moe.as_mut().map(shared);
    let more = 2 * (48 + 3 * 40);
    assert_eq!(
        activations(&config, LayoutSpec::default()),
        128 * (4 * (attention + moe + more) + HEAD)
    );
    // Each rank's weights are its own experts'.
    let layout = LayoutSpec {
        ep: 4,
        dp: 4,
        ..LayoutSpec::default()
    };
    let weights = |layout| stage_memory(&config, &layout, &spec()).unwrap()[0].weights;
    let experts = 2 * 4 * 8 * 3 * 24 * 48;
    assert_eq!(
        weights(LayoutSpec::default()) - weights(layout),
        experts * 3 / 4
    );
}

#[test]
fn latent_attention_keeps_its_latents() {
    let mut config = model();
    config.head_dim = 24;
    config.mla = Some(MlaConfig {
        q_lora_rank: None,
        kv_lora_rank: 20,
        qk_nope_head_dim: 16,
        qk_rope_head_dim: 8,
        v_head_dim: 12,
        norm_eps: 1e-6,
    });
    let found = stage_memory(&config, &LayoutSpec::default(), &spec()).unwrap()[0];
    let attention = 2 * (6 * (2 * 24 + 28 + 12) + 28 + 20) + 6 * 4;
    let rest = 2 * (4 * 48 + 3 * 80);
    assert_eq!(found.activations, 128 * (4 * (attention + rest) + HEAD));
}

/// A scan's backward pass lays out a state before and after each chunk of 64 tokens (32 in fp32), whatever is recomputed.
#[test]
fn recurrences_lay_out_the_states_between_chunks() {
    let mamba2 = Mamba2Config {
        num_heads: 6,
        head_dim: 20,
        num_groups: 2,
        state_size: 16,
        conv_kernel: 4,
        conv_bias: true,
        proj_bias: false,
        chunk_size: 256,
        time_step_min: 0.0,
    };
    let delta = GatedDeltaNetConfig {
        num_key_heads: 2,
        num_value_heads: 4,
        key_head_dim: 16,
        value_head_dim: 32,
        conv_kernel: 4,
    };
    let layer = |mixer| LayerConfig {
        mixer,
        ..LayerConfig::dense()
    };
    let config = DecoderConfig {
        mamba2: Some(mamba2),
        gated_delta_net: Some(delta),
        layers: vec![layer(Mixer::Mamba2), layer(Mixer::GatedDeltaNet)],
        num_hidden_layers: 2,
        ..model()
    };
    let working = |index: usize, state, recompute| {
        let spec = MemorySpec {
            recompute,
            state,
            ..spec()
        };
        let layout = LayoutSpec::default();
        layer_bytes(&config, index, &config.layers[index], &layout, &spec).working
    };
    let none = |index, state| working(index, state, Recompute::None);
    let scan = 6.0 * 2.0 * 32.0 * 16.0;
    assert_eq!(none(0, StateBytes::bf16(false)), 2.0 * scan / 64.0);
    assert_eq!(none(0, StateBytes::fp32()), 4.0 * scan / 32.0);
    let rows = 3.0 * 32.0 + 16.0;
    let (short, long) = (
        2.0 * 16.0 * 32.0 / 32.0 + rows + 32.0,
        2.0 * 16.0 * 32.0 / 64.0 + rows + 64.0,
    );
    assert_eq!(none(1, StateBytes::bf16(false)), 4.0 * 2.0 * long);
    assert_eq!(none(1, StateBytes::fp32()), 4.0 * 4.0 * short);
    let selective = working(0, StateBytes::bf16(false), Recompute::Selective);
    assert_eq!(selective, AGAIN as f64 + 2.0 * scan / 64.0);
}

#[test]
fn the_search_prefers_the_plainest_layout() {
    let config = model();
    let search = |ranks, bytes, distributed_optimizer| {
        let limits = SearchLimits {
            ranks,
            per_host: 8,
            bytes,
            global_batch: 16,
        };
        let spec = MemorySpec {
            distributed_optimizer,
            ..spec()
        };
        layouts_that_fit(&config, &limits, &spec)
    };
    let all = search(8, u64::MAX, true).unwrap();
    let plain = LayoutSpec {
        dp: 8,
        ..LayoutSpec::default()
    };
    assert_eq!(all[0].layout, plain);
    assert!(
        all.iter()
            .all(|fit| fit.layout.world_size() == 8 && fit.recompute == Recompute::None)
    );
    let peak = all[0].memory.peak;
    let tight = search(8, peak / 2, true).unwrap();
    assert!(!tight.is_empty() && tight.iter().all(|fit| fit.memory.peak <= peak / 2));
    assert!(search(8, 1, true).unwrap().is_empty());
    let odd = search(7, u64::MAX, false).unwrap_err().to_string();
    assert!(odd.contains("no layout of 7 ranks"), "{odd}");
}

/// What training steps on an H100 used (`docs/performance-cuda.md`), in GiB.
#[test]
fn predictions_are_near_what_a_gpu_used() {
    let sized = |hidden, inner, layers, heads, head_dim, vocab| DecoderConfig {
        hidden_size: hidden,
        intermediate_size: inner,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: 8,
        head_dim,
        vocab_size: vocab,
        layers: vec![LayerConfig::dense(); layers],
        ..DecoderConfig::plain()
    };
    let llama32_1b = DecoderConfig {
        tie_word_embeddings: true,
        ..sized(2048, 8192, 16, 32, 64, 128_256)
    };
    let llama3_8b_4l = sized(4096, 14336, 4, 32, 128, 128_256);
    let qwen3_600m = DecoderConfig {
        tie_word_embeddings: true,
        qk_norm: Some(QkNorm::PerHead),
        ..sized(1024, 3072, 28, 16, 128, 151_936)
    };
    let gemma2 = DecoderConfig {
        tie_word_embeddings: true,
        attention_output_norm: true,
        mlp_output_norm: true,
        ..sized(2048, 8192, 8, 16, 128, 64_000)
    };
    let case = |micro_batch, seq, num_micro_batches, recompute| MemorySpec {
        micro_batch,
        seq,
        num_micro_batches,
        recompute,
        ..spec()
    };
    let divided = MemorySpec {
        state: StateBytes::bf16(true),
        distributed_optimizer: true,
        bucket_size: 40_000_000,
        ..case(2, 4096, 1, Recompute::Selective)
    };
    for (config, spec, used) in [
        (&llama32_1b, case(4, 4096, 1, Recompute::Selective), 28.0),
        (&llama32_1b, case(4, 4096, 1, Recompute::None), 34.0),
        (&llama32_1b, case(2, 8192, 1, Recompute::Selective), 28.0),
        (&llama32_1b, case(1, 4096, 4, Recompute::None), 23.62),
        (&llama3_8b_4l, case(1, 8192, 1, Recompute::Selective), 28.8),
        (&qwen3_600m, case(4, 4096, 1, Recompute::Selective), 22.7),
        (&gemma2, case(2, 4096, 1, Recompute::None), 13.45),
        (&gemma2, case(2, 4096, 1, Recompute::Selective), 11.95),
        (&gemma2, case(2, 4096, 1, Recompute::Full), 9.94),
        (&gemma2, case(2, 4096, 2, Recompute::Selective), 13.82),
        (&gemma2, divided, 13.13),
    ] {
        let found = stage_memory(config, &LayoutSpec::default(), &spec).unwrap()[0];
        let gib = found.peak as f64 / GIB;
        assert!(
            (gib / used - 1.0).abs() < 0.02,
            "{gib:.2} GiB, used {used}: {spec:?}"
        );
    }
}

#[test]
fn divided_weights_are_whole_for_two_segments_at_most() {
    let n = count(&model());
    let layout = LayoutSpec {
        dp: 4,
        ..LayoutSpec::default()
    };
    let sharded = MemorySpec {
        shard_params: true,
        state: StateBytes::bf16(true),
        ..spec()
    };
    let found = memory(layout, &sharded)[0];
    let layer = 2 * 48 + (96 + 2 * 32) * 48 + 48 * 96 + 3 * 80 * 48;
    let head = 48 + 131 * 48;
    let two = u64::max(2 * layer, layer + head);
    assert_eq!(found.weights, 2 * two);
    assert!(found.gradients.abs_diff(n + 4 * two) < 100);
    // Masters and moments of a quarter.
    assert!(found.optimizer.abs_diff(3 * n) < 100);
    assert_eq!(
        found.peak,
        found.weights + found.gradients + found.optimizer + found.activations
    );
    // Gradients alone.
    let grads = MemorySpec {
        shard_params: false,
        shard_grads: true,
        ..sharded.clone()
    };
    let grads = memory(layout, &grads)[0];
    assert_eq!(grads.weights, 2 * n);
    assert_eq!(
        (grads.gradients, grads.optimizer),
        (found.gradients, found.optimizer)
    );
    // In fp32 the parts of the weights are nobody else's.
    let fp32 = MemorySpec {
        state: StateBytes::fp32(),
        ..sharded
    };
    let fp32 = memory(layout, &fp32)[0];
    assert!(fp32.weights.abs_diff(n + 4 * two) < 100);
    assert!(fp32.optimizer.abs_diff(2 * n) < 100);
}
