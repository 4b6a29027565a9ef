//! At every layout the models compute what the reference implementation computes on one rank: logits, loss, every
//! gradient. Ranks are threads.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bridge_core::LayoutSpec;
use bridge_core::convert::HfModel;
use bridge_models::generate::{GenerateOptions, generate_parallel};
use bridge_models::run::loss_and_gradients;
use bridge_models::verify::{Reference, Tolerances, VerifyOptions, VerifyReport};
use bridge_models::weights::load_hf_parallel;
use bridge_models::{
    AuxiliaryLosses, AuxiliaryOptions, DtypePolicy, ForwardContext, IGNORED_TARGET,
    ParallelOptions, registry,
};
use bridge_ops::to_f32_vec;
use bridge_parallel::{CpCommType, ParallelContext, run_threads};
use bridge_tests::{families, fixture};
use bridge_train::verify::Verification;
use burn_flex::Flex;

/// What sums in another order may change.
const TOLERANCES: Tolerances = Tolerances {
    logits: 2e-4,
    loss: 2e-5,
    gradient: 2e-3,
    gradient_floor: 1e-6,
};

/// Families with experts.
const EXPERTS: [&str; 11] = [
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "deepseek_v3_mtp",
    "glm4_moe",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "nemotron_h_moe",
    "olmoe",
    "qwen3_moe",
    "qwen3_next",
];

/// What is refused, by a word of the layout.
const REFUSED: [(&str, &str); 10] = [
    // Eight and four recurrent heads.
    ("nemotron_h", "cp=3"),
    ("nemotron_h_moe", "cp=3"),
    ("qwen3_next", "cp=3"),
    ("qwen3_next", "tp=4 cp=2"),
    // Two groups of norms.
    ("nemotron_h", "tp=4"),
    ("nemotron_h_moe", "tp=4"),
    // Sinks are no matter of all-to-all.
    ("gpt_oss", "a2a"),
    ("gpt_oss_mxfp4", "a2a"),
    // Six experts.
    ("gpt_oss", "ep=4"),
    ("gpt_oss_mxfp4", "ep=4"),
];

/// What divides experts, alone and among other axes.
const EXPERT_LAYOUTS: [&str; 12] = [
    "tp=2",
    "tp=2 sp",
    "ep=2 dp=2",
    "ep=4 dp=4",
    "ep=2 cp=2",
    "etp=2 dp=2",
    "ep=2 etp=2 dp=4",
    "ep=2 tp=2 etp=1",
    "ep=2 tp=2 etp=1 sp",
    "ep=2 tp=2 etp=2 dp=2 sp",
    "ep=2 tp=2 cp=2 dp=2 sp",
    "ep=2 tp=2 pp=2 sp",
];

/// Layouts as the command line writes them, with the way of talking for context parallelism.
const LAYOUTS: [&str; 26] = [
    "tp=2",
    "tp=4",
    "tp=2 sp",
    "tp=4 sp",
    "cp=2",
    "cp=2 all_gather",
    "cp=3",
    "cp=4 all_gather",
    "pp=2",
    "pp=3",
    "pp=1 dp=2",
    "dp=3",
    "tp=2 cp=2",
    "tp=2 cp=2 sp",
    "tp=2 cp=2 sp all_gather",
    "tp=4 cp=2 sp",
    "tp=2 pp=2",
    "tp=2 pp=2 sp",
    "tp=2 pp=2 dp=2",
    "tp=2 pp=2 dp=2 sp",
    "tp=2 pp=3 cp=2 sp",
    "pp=2 cp=2",
    "pp=2 dp=2",
    "cp=2 dp=2",
    "tp=2 cp=2 dp=2",
    "tp=2 cp=2 a2a",
];

fn layout(text: &str) -> (LayoutSpec, ParallelOptions) {
    let mut spec = LayoutSpec::default();
    let mut comm = CpCommType::default();
    for word in text.split_whitespace() {
        let Some((axis, degree)) = word.split_once('=') else {
            match word {
                "sp" => spec.sp = true,
                comm_type => comm = comm_type.parse().expect("a way of talking"),
            }
            continue;
        };
        let degree = degree.parse().expect("a degree");
        match axis {
            "tp" => spec.tp = degree,
            "pp" => spec.pp = degree,
            "vpp" => spec.vpp = degree,
            "cp" => spec.cp = degree,
            "ep" => spec.ep = degree,
            "etp" => spec.etp = degree,
            "dp" => spec.dp = degree,
            other => panic!("no axis {other}"),
        }
    }
    let options = ParallelOptions {
        cp_comm_type: comm,
        ..ParallelOptions::default()
    };
    (spec, options)
}

/// Runs a family at a layout, with its reference.
fn run(family: &str, text: &str, options: &VerifyOptions) -> bridge_train::Result<VerifyReport> {
    let folder = fixture(family);
    let (layout, parallel) = layout(text);
    Verification::open(&registry(), &folder, &folder, options, &layout, &parallel)?
        .on_threads::<Flex>(Duration::from_secs(60), "cpu")
}

/// Compares a family at a layout with its reference; says what is wrong.
fn compared(family: &str, text: &str) -> Result<(), String> {
    let options = VerifyOptions {
        gradients: true,
        tolerances: TOLERANCES,
    };
    let report = run(family, text, &options);
    let report = report.map_err(|error| error.to_string())?;
    let compared = [
        report.logits_max_abs_diff.is_some(),
        report.loss.is_some(),
        report.grad_norm_max_rel_diff.is_some(),
    ];
    match (report.passed, compared) {
        (true, [true, true, true]) => Ok(()),
        (true, _) => Err("something was not compared".to_owned()),
        (false, _) => Err(report.to_string()),
    }
}

/// Compares families at layouts, but for those that are refused, which must be.
#[track_caller]
fn agree(families: &[&str], layouts: &[&str]) {
    let mut wrong = Vec::new();
    for family in families {
        for text in layouts {
            let refused = REFUSED
                .iter()
                .any(|(name, word)| name == family && text.contains(word));
            match (compared(family, text), refused) {
                (Ok(()), false) => {}
                (Err(problem), true) if problem.starts_with("layout") => {}
                (Ok(()), true) => wrong.push(format!("{family} at {text}: is no longer refused")),
                (Err(problem), _) => wrong.push(format!("{family} at {text}: {problem}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_family_agrees_at_every_layout() {
    let families = families();
    let families: Vec<&str> = families.iter().map(String::as_str).collect();
    agree(&families, &LAYOUTS);
}

#[test]
fn families_with_experts_agree() {
    agree(&EXPERTS, &EXPERT_LAYOUTS);
}

/// Heads divided among ranks, each with a cache of its own.
#[test]
fn greedy_texts_are_those_of_one_rank() {
    for (family, tp) in [
        ("llama3_1", 2),
        ("llama3_1", 8),
        ("gemma2", 4),
        ("qwen3_moe", 2),
    ] {
        let dir = fixture(family);
        let greedy = Reference::load(&dir)
            .expect("a reference")
            .greedy
            .expect("a text");
        let folder = HfModel::open(&dir, &registry(), &LayoutSpec::tp_pp(tp, 1)).expect("a model");
        let options = GenerateOptions {
            max_new_tokens: greedy.token_ids.len(),
            ..GenerateOptions::default()
        };
        let load = move |ctx: &Arc<ParallelContext<Flex>>| {
            load_hf_parallel(
                &folder,
                DtypePolicy::Float32,
                ctx,
                &ParallelOptions::default(),
            )
        };
        let mut seen = Vec::new();
        let text = generate_parallel(
            LayoutSpec::tp_pp(tp, 1),
            load,
            &greedy.prompt,
            &options,
            &mut |token| {
                seen.push(token);
                ControlFlow::Continue(())
            },
        );
        let text = text.unwrap_or_else(|error| panic!("{family} at tp={tp}: {error}"));
        assert_eq!(text.token_ids, greedy.token_ids, "{family} at tp={tp}");
        assert_eq!(seen, greedy.token_ids);
    }
}

/// These have at least four layers.
#[test]
fn virtual_stages_agree() {
    agree(
        &["gemma2", "gemma3_text", "gpt_oss"],
        &["pp=2 vpp=2", "pp=2 vpp=2 dp=2", "tp=2 pp=2 vpp=2 cp=2 sp"],
    );
}

/// 64 ranks of a model with 3 layers and 8 heads.
#[test]
fn sixty_four_ranks_agree() {
    agree(&["llama3_1"], &["tp=8 pp=2 cp=2 dp=2 sp"]);
}

#[test]
fn a_layout_that_does_not_fit_is_refused_with_the_nearest_that_does() {
    let refused = |family: &str, text: &str| {
        let found = run(family, text, &VerifyOptions::default());
        found.expect_err("refused").to_string()
    };
    assert!(refused("llama2", "tp=3").contains("does not divide"));
    assert!(refused("llama2", "cp=2 sp").contains("tp above 1"));
    assert!(refused("llama2", "cp=8 a2a").contains("use p2p or all_gather"));
    assert!(refused("llama2", "pp=4").contains("the most is pp=3"));
}

/// The gradients of the losses of the next token and, half as much, of the one after it, over all ranks of `cp`.
fn mtp_gradients(cp: usize) -> BTreeMap<String, Vec<f64>> {
    let layout = LayoutSpec {
        cp,
        ..LayoutSpec::default()
    };
    let dir = fixture("deepseek_v3_mtp");
    let folder = HfModel::open(&dir, &registry(), &layout).expect("a model");
    let reference = Reference::load(&dir).expect("a reference");
    let work = move |parallel: Arc<ParallelContext<Flex>>| {
        let options = ParallelOptions::default();
        let model = load_hf_parallel(&folder, DtypePolicy::Float32, &parallel, &options)?;
        let (inputs, mut targets) = reference.inputs(model.config().vocab_size)?;
        // As many targets on each rank of two or four, so that their means have the same weight.
        for row in targets.chunks_mut(inputs.seq) {
            for place in [4, 8, 12] {
                row[place] = IGNORED_TARGET;
            }
        }
        let options = AuxiliaryOptions {
            mtp: 0.5,
            ..AuxiliaryOptions::default()
        };
        let auxiliary = AuxiliaryLosses::new(options, inputs.batch * inputs.seq);
        // Two documents a row, the first one of five tokens.
        let rows = (0..inputs.batch).flat_map(|row| [row * inputs.seq, row * inputs.seq + 5]);
        let documents: Vec<usize> = rows.chain([inputs.batch * inputs.seq]).collect();
        let size = [inputs.batch, inputs.seq];
        let ctx = ForwardContext::for_rank(&inputs.input_ids, size, &parallel)
            .with_documents(documents.into())
            .with_auxiliary(&auxiliary);
        let step = loss_and_gradients(&model, &ctx, &ctx.own_targets(&targets));
        parallel.health()?;
        let gradients = model.params().into_iter().filter_map(|param| {
            let values = to_f32_vec::<Flex>(param.take_grad()?);
            Some((param.name().to_owned(), values))
        });
        Ok::<_, bridge_models::Error>((step.num_tokens, gradients.collect::<Vec<_>>()))
    };
    let ranks = run_threads::<Flex, _, _>(layout, Duration::from_secs(60), work).expect("ranks");
    let (first, count) = (ranks[0].0, ranks.len() as f64);
    assert!(ranks.iter().all(|(tokens, _)| *tokens == first));
    let mut sums: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (_, gradients) in ranks {
        for (name, values) in gradients {
            let sum = sums.entry(name).or_insert_with(|| vec![0.0; values.len()]);
            let pairs = sum.iter_mut().zip(values);
            pairs.for_each(|(sum, value)| *sum += f64::from(value) / count);
        }
    }
    sums
}

#[test]
fn multi_token_prediction_sees_the_tokens_of_other_ranks() {
    let expected = mtp_gradients(1);
    assert!(expected.keys().any(|name| name.starts_with("mtp.")));
    for cp in [2, 4] {
        let found = mtp_gradients(cp);
        assert!(found.keys().eq(expected.keys()));
        for ((name, found), expected) in found.iter().zip(expected.values()) {
            let norm =
                |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
            let apart = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
            let size = norm(&mut expected.iter().copied());
            assert!(
                apart <= TOLERANCES.gradient * size.max(1e-4),
                "cp={cp}, {name}: {apart:e} apart, of {size:e}"
            );
        }
    }
}
