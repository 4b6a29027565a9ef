//! Weights, gradients and optimizer state divided among data-parallel ranks, and weights that arrive while the next forward
//! pass is at work: the same training as on one rank.

mod training;

use std::sync::Arc;

use bridge_core::DecoderConfig;
use bridge_models::families::{deepseek_v3, llama, nemotron_h};
use bridge_models::{
    AuxiliaryOptions, BalanceScope, Boundary, Decoder, ForwardContext, SegmentedModel, Targets,
};
use bridge_ops::{DType, Param, Tape, Var};
use bridge_parallel::run_threads;
use bridge_train::Trainer;
use bridge_train::config::RecomputeGranularity;
use burn_flex::Flex;

use training::{Run, Step, TIMEOUT, build, close, data};

/// How ranks share weights and state.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    /// All of it on each.
    Whole,
    /// The optimizer's state in parts.
    State,
    /// The same, with weights gathered during the next forward pass.
    Overlapped,
    /// Gradients and state in parts.
    Gradients,
    /// Weights, gradients and state in parts.
    Everything,
}

fn run(config: DecoderConfig, at: &str, mode: Mode) -> Run {
    let mut run = Run::of(config, at).distributed(mode != Mode::Whole);
    run.options.data_parallel.overlap_param_gather = mode == Mode::Overlapped;
    run.options.data_parallel.shard_grads = mode == Mode::Gradients;
    run.options.data_parallel.shard_params = mode == Mode::Everything;
    run.options.auxiliary = AuxiliaryOptions {
        balance: 0.02,
        scope: BalanceScope::Sequence,
        router_z: 0.01,
        mtp: 0.3,
        bias_update_rate: 0.01,
        capacity: None,
    };
    // Weights that are whole nowhere must be found by evaluations as well.
    run.options.eval_interval = 6;
    run.options.eval_iters = 1;
    run
}

fn dense() -> DecoderConfig {
    let mut config = llama::presets::tiny();
    config.num_attention_heads = 8;
    config.num_hidden_layers = 4;
    config.layers.push(config.layers[0].clone());
    config.tie_word_embeddings = true;
    config
}

fn experts() -> DecoderConfig {
    deepseek_v3::presets::tiny()
}

/// Mamba-2, attention and MLP layers; six of them.
fn hybrid() -> DecoderConfig {
    let mut config = nemotron_h::presets::tiny();
    config.num_hidden_layers += 1;
    config.layers.push(config.layers[0].clone());
    config.num_key_value_heads = 2;
    config
}

#[track_caller]
fn check(config: fn() -> DecoderConfig, modes: &[Mode], layouts: &[&str]) {
    let expected = run(config(), "", Mode::Whole).trace();
    assert!(expected[0].loss - expected[19].loss > 0.05, "{expected:?}");
    for at in layouts {
        for mode in modes {
            let found = run(config(), at, *mode).trace();
            close(&format!("{at}, {mode:?}"), &found, &expected);
        }
    }
}

#[test]
fn a_dense_model_with_divided_weights_trains_as_on_one_rank() {
    check(
        dense,
        &[Mode::Everything],
        &[
            "dp2",
            "dp4",
            "cp2",
            "tp2 dp2",
            "tp2 sp dp2",
            // Key-value heads that two ranks hold.
            "tp4 dp2",
            "pp2 dp2",
            "pp2 vpp2 dp2",
            "tp2 pp2 dp2",
        ],
    );
}

#[test]
fn divided_gradients_train_as_on_one_rank() {
    check(
        dense,
        &[Mode::Gradients],
        &["dp4", "tp2 sp dp2", "tp4 dp2", "pp2 vpp2 dp2"],
    );
    check(
        experts,
        &[Mode::Gradients],
        &["tp2 ep2 etp2 dp2", "pp3 dp2"],
    );
}

#[test]
fn weights_may_arrive_during_the_next_forward_pass() {
    check(
        dense,
        &[Mode::Overlapped],
        &["dp4", "tp2 sp dp2", "pp2 vpp2 dp2"],
    );
    check(experts, &[Mode::Overlapped], &["ep2 dp2"]);
}

#[test]
fn a_mixture_of_experts_with_divided_weights_trains_as_on_one_rank() {
    check(
        experts,
        &[Mode::Everything],
        &[
            "dp2",
            "ep2 dp4",
            "tp2 sp ep2 dp2",
            "tp2 ep2 etp2 dp2",
            "pp3 dp2",
        ],
    );
}

#[test]
fn a_hybrid_model_with_divided_weights_trains_as_on_one_rank() {
    check(
        hybrid,
        &[Mode::Everything],
        &["dp2", "dp4", "tp2 dp2", "pp2 dp2"],
    );
}

#[test]
fn divided_weights_and_recomputation_go_together() {
    for config in [dense, hybrid] {
        let expected = run(config(), "", Mode::Whole).trace();
        for recompute in [RecomputeGranularity::Selective, RecomputeGranularity::Full] {
            let mut run = run(config(), "pp2 dp2", Mode::Everything);
            run.options.recompute = recompute;
            run.options.data_parallel.overlap_grad_reduce = recompute == RecomputeGranularity::Full;
            close(&format!("{recompute}"), &run.trace(), &expected);
        }
    }
}

/// Without clipping, which needs a sum over all gradients, every mode does the same arithmetic in the same order; but where
/// weights are divided, the parts of the gradient of a weight that several segments use are summed one by one.
#[test]
fn bf16_weights_are_the_same_whoever_keeps_their_masters() {
    let untied = || DecoderConfig {
        tie_word_embeddings: false,
        ..dense()
    };
    let trace = |config: DecoderConfig, mode| -> Vec<(f64, Vec<f64>)> {
        let mut run = run(config, "dp2", mode);
        run.dtype = DType::BF16;
        run.options.clip_grad = 0.0;
        // One micro-batch on each rank: sums of several may be taken in another order.
        run.options.micro_batch_size = 4;
        let steps: Vec<Step> = run.trace();
        steps
            .into_iter()
            .map(|step| (step.loss, step.others))
            .collect()
    };
    for (config, modes) in [
        (
            untied(),
            &[Mode::State, Mode::Overlapped, Mode::Everything][..],
        ),
        (experts(), &[Mode::State, Mode::Overlapped]),
    ] {
        let expected = trace(config.clone(), Mode::Whole);
        assert_ne!(expected[0].0, expected[19].0);
        for mode in modes {
            assert_eq!(trace(config.clone(), *mode), expected, "{mode:?}");
        }
    }
}

#[test]
fn a_run_saved_in_one_mode_continues_in_any_other() {
    let expected = run(experts(), "", Mode::Whole).trace();
    for ((before, mode_before), (after, mode_after)) in [
        (("dp2", Mode::Everything), ("", Mode::Whole)),
        (("", Mode::Whole), ("dp4", Mode::Everything)),
        (("ep2 dp4", Mode::Everything), ("tp2 dp2", Mode::Overlapped)),
        (("tp2 dp2", Mode::Overlapped), ("pp3 dp2", Mode::Everything)),
        (("dp2", Mode::Gradients), ("dp4", Mode::Everything)),
    ] {
        let dir = tempfile::tempdir().expect("a folder");
        let part = |at: &str, mode| Run {
            dir: Some(dir.path().to_owned()),
            ..run(experts(), at, mode)
        };
        let mut first = part(before, mode_before);
        first.stop_after = 8;
        let mut found = first.trace();
        found.extend(part(after, mode_after).trace());
        close(
            &format!("{before} {mode_before:?} to {after} {mode_after:?}"),
            &found,
            &expected,
        );
    }
}

#[test]
fn a_run_with_divided_weights_continues_bit_for_bit() {
    for dtype in [DType::F32, DType::BF16] {
        let at = || Run {
            dtype,
            ..run(experts(), "ep2 dp4", Mode::Everything)
        };
        let whole = at().trace();
        let dir = tempfile::tempdir().expect("a folder");
        let part = || Run {
            dir: Some(dir.path().to_owned()),
            ..at()
        };
        let mut first = part();
        first.stop_after = 7;
        let mut found = first.trace();
        found.extend(part().trace());
        assert_eq!(found, whole, "{dtype:?}");
    }
}

/// A model that looks, whenever a segment runs, at which weights are whole.
struct Watched {
    inner: Decoder<Flex>,
}

impl Watched {
    fn look(&self, running: usize) {
        let own = self.inner.segment_params(running);
        assert!(
            own.iter().all(|param| !param.is_released()),
            "segment {running} has its weights"
        );
        let names = |segment: usize| -> Vec<String> {
            let params = self.inner.segment_params(segment);
            params.iter().map(|param| param.name().to_owned()).collect()
        };
        // Those of the segment before or after it may have arrived as well.
        let near: Vec<String> = [running.saturating_sub(1), running, running + 1]
            .into_iter()
            .filter(|segment| *segment < self.inner.num_segments())
            .flat_map(names)
            .collect();
        for param in SegmentedModel::params(&self.inner) {
            assert!(
                param.is_released()
                    || !param.requires_grad()
                    || near.contains(&param.name().to_owned()),
                "{} is whole while segment {running} runs",
                param.name()
            );
        }
    }
}

impl SegmentedModel<Flex> for Watched {
    fn num_segments(&self) -> usize {
        self.inner.num_segments()
    }
    fn holds_segment(&self, index: usize) -> bool {
        self.inner.holds_segment(index)
    }
    fn boundary(&self, ctx: &ForwardContext<'_, Flex>) -> Option<Boundary> {
        self.inner.boundary(ctx)
    }
    fn forward_segment(
        &self,
        index: usize,
        tape: &Tape<Flex>,
        input: Option<&Var<Flex>>,
        ctx: &ForwardContext<'_, Flex>,
    ) -> Var<Flex> {
        self.look(index);
        self.inner.forward_segment(index, tape, input, ctx)
    }
    fn head_loss(
        &self,
        tape: &Tape<Flex>,
        input: &Var<Flex>,
        targets: &Targets<Flex>,
        ctx: &ForwardContext<'_, Flex>,
    ) -> Var<Flex> {
        self.look(self.num_segments() - 1);
        self.inner.head_loss(tape, input, targets, ctx)
    }
    fn segment_params(&self, index: usize) -> Vec<Param<Flex>> {
        self.inner.segment_params(index)
    }
}

#[test]
fn whole_weights_are_there_only_where_they_are_used() {
    let run = run(dense(), "pp2 dp2", Mode::Everything);
    run_threads::<Flex, (), _>(run.layout, TIMEOUT, move |parallel| {
        let model = Watched {
            inner: build(&run.config, 3, &parallel, None),
        };
        let mut options = run.options.clone();
        options.train_iters = 2;
        options.recompute = RecomputeGranularity::Full;
        let data = data(&run.config);
        let trainer = Trainer::on_rank(&model, data.clone(), &parallel, options)?;
        let trained = || -> Vec<Param<Flex>> {
            let params = SegmentedModel::params(&model.inner);
            params.into_iter().filter(Param::requires_grad).collect()
        };
        assert!(
            trained().iter().all(Param::is_released),
            "divided from the start"
        );
        trainer.with_validation(Arc::clone(&data) as _).run()?;
        assert!(trained().iter().all(Param::is_released), "and at the end");
        Ok::<_, bridge_train::Error>(())
    })
    .unwrap_or_else(|error| panic!("{error}"));
}
