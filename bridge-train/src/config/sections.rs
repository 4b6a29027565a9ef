//! The sections of a configuration, except `model` (see [`super::model`]).
//!
//! Training words are Megatron's, since that is what people type in recipes.

use super::section::section;
use super::value::choice;
use crate::lr_schedule::{LrDecayStyle, WeightDecayIncrStyle, WsdDecayStyle};

choice! {
    /// What is kept of a layer's forward pass for its backward pass.
    pub enum RecomputeGranularity {
        /// Every activation the backward pass needs.
        None = "none",
        /// All but what one pass over memory makes again: outputs of norms and of activation functions.
        Selective = "selective",
        /// Only the layer's input; the layer runs again in the backward pass. Less memory, about a third more work.
        Full = "full",
    }
}

choice! {
    /// What to do when the loss or the gradient norm is NaN or infinite.
    pub enum NonFinitePolicy {
        /// Stop with an error that names the iteration.
        Stop = "stop",
        /// Leave the weights as they are, count the step as skipped and go on.
        Skip = "skip",
    }
}

choice! {
    /// Over which tokens a router's balance loss wants experts to be equally busy.
    pub enum LoadBalancing {
        /// No balance loss.
        None = "none",
        /// The tokens of a micro-batch.
        AuxLoss = "aux_loss",
        /// Each sequence by itself.
        SeqAuxLoss = "seq_aux_loss",
        /// All tokens of the step so far, over all data-parallel ranks.
        GlobalAuxLoss = "global_aux_loss",
    }
}

choice! {
    /// Which assignments an expert with too many keeps.
    pub enum TokenDropPolicy {
        /// Those with the largest weights.
        Probs = "probs",
        /// The first ones.
        Position = "position",
    }
}

section! {
    /// Length of the run and how its batches are cut.
    pub struct TrainConfig("train") {
        /// Samples that go through the model at once, per rank. Changes memory and speed, never the result.
        micro_batch_size: usize = 1,
        /// Samples per optimizer step, over all ranks. A multiple of micro_batch_size times the data-parallel size.
        global_batch_size: usize,
        /// Optimizer steps of the whole run. Give this or train_samples.
        train_iters: Option<u64> = None,
        /// Length of the whole run in samples, rounded down to whole steps. Give this or train_iters.
        train_samples: Option<u64> = None,
        /// Stop (with a checkpoint) after this many minutes; the run can be continued later.
        exit_duration_in_mins: Option<f64> = None,
        /// Seed of the initial weights, and of the data order unless data.seed is given.
        seed: u64 = 1234,
        /// Trade time for memory: `selective` makes norms and activation functions again in the backward pass, `full`
        /// keeps only the input of every layer.
        recompute_granularity: RecomputeGranularity = RecomputeGranularity::None,
        /// Balance loss of the routers of a mixture of experts. Default: what the model's config.json says it was trained
        /// with (router_aux_loss_coef; aux_loss_alpha and seq_aux), or none.
        moe_router_load_balancing_type: Option<LoadBalancing> = None,
        /// Factor of the balance loss. Default: that of the model's config.json.
        moe_aux_loss_coeff: Option<f64> = None,
        /// Factor of the z loss, which keeps a router's logits small. 0 disables; 1e-3 is usual.
        moe_z_loss_coeff: f64 = 0.0,
        /// How far each step moves the bias that sways a router's choice, in models that have one. 0 keeps it.
        moe_router_bias_update_rate: f64 = 1e-3,
        /// Most assignments that an expert takes of a rank's micro-batch, as a multiple of an equal share; the rest are
        /// dropped. Default: no limit.
        moe_expert_capacity_factor: Option<f64> = None,
        /// Which assignments stay under such a limit.
        moe_token_drop_policy: TokenDropPolicy = TokenDropPolicy::Probs,
        /// Factor of the multi-token prediction loss, in models with such modules. 0 freezes them.
        mtp_loss_scaling_factor: f64 = 0.1,
        /// What a NaN or an infinity in the loss or the gradients does.
        on_non_finite: NonFinitePolicy = NonFinitePolicy::Stop,
        /// With on_non_finite = "skip": how many steps in a row may be skipped before the run stops with an error.
        max_skipped_in_a_row: u64 = 10,
    }
}

choice! {
    /// The optimizer.
    pub enum OptimizerKind {
        /// Adam with decoupled weight decay (AdamW).
        Adam = "adam",
    }
}

choice! {
    /// Number format of what the optimizer keeps.
    pub enum StateDType {
        /// 32 bits.
        Fp32 = "fp32",
        /// 16 bits with the range of fp32.
        Bf16 = "bf16",
    }
}

impl StateDType {
    /// The dtype of tensors in this format.
    pub fn dtype(self) -> bridge_ops::DType {
        match self {
            Self::Fp32 => bridge_ops::DType::F32,
            Self::Bf16 => bridge_ops::DType::BF16,
        }
    }
}

section! {
    /// The optimizer.
    pub struct OptimizerConfig("optimizer") {
        /// Which optimizer.
        optimizer: OptimizerKind = OptimizerKind::Adam,
        /// Peak learning rate.
        lr: f64,
        /// Learning rate at the end of the decay.
        min_lr: f64 = 0.0,
        /// Decay of the running mean of the gradient.
        adam_beta1: f64 = 0.9,
        /// Decay of the running mean of the squared gradient.
        adam_beta2: f64 = 0.95,
        /// Added to the root of the squared-gradient mean.
        adam_eps: f64 = 1e-8,
        /// Decoupled weight decay. scheduler.start_weight_decay and end_weight_decay can let it grow over the run.
        weight_decay: f64 = 0.1,
        /// Patterns (with `*`) of canonical weight names that are not decayed. An empty list decays every weight.
        no_weight_decay: Vec<String> = vec!["*norm.weight".into(), "*.bias".into()],
        /// Largest global norm of the gradient; larger gradients are scaled down. 0 disables.
        clip_grad: f64 = 1.0,
        /// What gradients are kept in between the backward pass and the update. bf16 saves 2 bytes a weight and rounds
        /// the sum once per micro-batch; sums over ranks are fp32 all the same.
        main_grads_dtype: StateDType = StateDType::Fp32,
        /// What the running mean of the gradient is kept in. bf16 saves 2 bytes a weight.
        exp_avg_dtype: StateDType = StateDType::Fp32,
    }
}

section! {
    /// How learning rate and weight decay move over the run.
    pub struct SchedulerConfig("scheduler") {
        /// Shape of the decay after the warm-up.
        lr_decay_style: LrDecayStyle = LrDecayStyle::Cosine,
        /// Step at which the learning rate reaches min_lr. Default: the last step.
        lr_decay_iters: Option<u64> = None,
        /// The same in samples.
        lr_decay_samples: Option<u64> = None,
        /// Steps of linear warm-up. Give at most one of the three warm-up keys.
        lr_warmup_iters: Option<u64> = None,
        /// Warm-up in samples.
        lr_warmup_samples: Option<u64> = None,
        /// Warm-up as a fraction of the decay, from 0 to 1.
        lr_warmup_fraction: Option<f64> = None,
        /// Learning rate of the first warm-up step.
        lr_warmup_init: f64 = 0.0,
        /// Shape of the last phase of a WSD schedule.
        lr_wsd_decay_style: WsdDecayStyle = WsdDecayStyle::Exponential,
        /// Steps of the last phase of a WSD schedule.
        lr_wsd_decay_iters: Option<u64> = None,
        /// The same in samples.
        lr_wsd_decay_samples: Option<u64> = None,
        /// Weight decay at the start, when it moves. Default: optimizer.weight_decay.
        start_weight_decay: Option<f64> = None,
        /// Weight decay at the end, when it moves. Default: optimizer.weight_decay.
        end_weight_decay: Option<f64> = None,
        /// Shape of the move.
        weight_decay_incr_style: WeightDecayIncrStyle = WeightDecayIncrStyle::Constant,
    }
}

choice! {
    /// What data-parallel ranks divide among them instead of each having all of it.
    pub enum ShardingStrategy {
        /// Nothing, or the optimizer's state where use_distributed_optimizer says so.
        NoShard = "no_shard",
        /// The optimizer's state (ZeRO-1).
        Optim = "optim",
        /// Optimizer's state and gradients (ZeRO-2).
        OptimGrads = "optim_grads",
        /// Optimizer's state, gradients and weights (ZeRO-3).
        OptimGradsParams = "optim_grads_params",
    }
}

choice! {
    /// How attention reaches the parts of its sequences that other context-parallel ranks have. Words are Megatron-Core's.
    pub enum ContextExchange {
        /// Keys and values travel around the ring of ranks.
        P2p = "p2p",
        /// Keys and values of the whole sequence are gathered first.
        AllGather = "all_gather",
        /// Each rank gets the whole sequence for some of the heads.
        A2a = "a2a",
    }
}

impl ContextExchange {
    /// What layers call it.
    pub fn comm_type(self) -> bridge_parallel::CpCommType {
        match self {
            Self::P2p => bridge_parallel::CpCommType::P2p,
            Self::AllGather => bridge_parallel::CpCommType::AllGather,
            Self::A2a => bridge_parallel::CpCommType::A2a,
        }
    }
}

section! {
    /// How the work is laid out over ranks. Every degree is 1 unless set.
    pub struct ParallelConfig("parallel") {
        /// Ranks that share each layer's matrices.
        tensor_model_parallel_size: usize = 1,
        /// Stages the layers are cut into.
        pipeline_model_parallel_size: usize = 1,
        /// Chunks of layers per pipeline stage, for the interleaved schedule.
        virtual_pipeline_model_parallel_size: usize = 1,
        /// Ranks that share each sequence.
        context_parallel_size: usize = 1,
        /// How attention reaches the other parts of a sequence.
        cp_comm_type: ContextExchange = ContextExchange::P2p,
        /// Ranks that share the experts.
        expert_model_parallel_size: usize = 1,
        /// Ranks that share each expert's matrices.
        expert_tensor_parallel_size: usize = 1,
        /// Copies of the model that see different samples.
        data_parallel_size: usize = 1,
        /// Splits norms and residuals over the tensor-parallel ranks as well.
        sequence_parallel: bool = false,
        /// Which pipeline chunk has which layers, where they are not to be divided evenly: numbers of layers in the order of
        /// the forward pass (3,2,2), or Megatron's form (Et*3|tt|ttL).
        pipeline_model_parallel_layout: Option<String> = None,
        /// Each data-parallel rank keeps a part of the optimizer's state (and of the fp32 weights) rather than all of it.
        use_distributed_optimizer: bool = false,
        /// What data-parallel ranks divide: no_shard, optim (the same as use_distributed_optimizer), optim_grads, or
        /// optim_grads_params, with which a rank has whole weights only of the layers at work.
        data_parallel_sharding_strategy: ShardingStrategy = ShardingStrategy::NoShard,
        /// With use_distributed_optimizer, new weights are gathered while the next forward pass is at work.
        overlap_param_gather: bool = true,
        /// Gradients are summed over data-parallel ranks while the backward pass goes on.
        overlap_grad_reduce: bool = true,
        /// Gradient elements that are summed together.
        ddp_bucket_size: usize = 40_000_000,
    }
}

choice! {
    /// Number formats of weights, arithmetic and optimizer.
    pub enum PrecisionMode {
        /// [`PrecisionMode::Bf16Mixed`] on a backend that trains in it, else [`PrecisionMode::Fp32`].
        Auto = "auto",
        /// Everything in 32 bits.
        Fp32 = "fp32",
        /// bf16 weights and activations; master weights in fp32, and so gradients and optimizer state unless
        /// optimizer.main_grads_dtype or exp_avg_dtype say otherwise.
        Bf16Mixed = "bf16_mixed",
    }
}

section! {
    /// Number formats.
    pub struct PrecisionConfig("precision") {
        /// Formats of weights, activations and optimizer state.
        mode: PrecisionMode = PrecisionMode::Auto,
    }
}

choice! {
    /// Where samples come from.
    pub enum DataSource {
        /// The public-domain prose that comes with this project.
        Corpus = "corpus",
        /// Text or JSONL files, tokenized at the start.
        Text = "text",
        /// Megatron-Core indexed datasets (`.bin` and `.idx`).
        Indexed = "indexed",
        /// Made-up tokens, for measuring speed.
        Mock = "mock",
        /// Conversations or prompts with answers, as JSONL; only answers count in the loss.
        Sft = "sft",
    }
}

section! {
    /// What the model is trained on.
    pub struct DataConfig("data") {
        /// Tokens the model sees per sample. The sample itself holds one more, the last target.
        seq_length: usize,
        /// Where samples come from.
        source: DataSource = DataSource::Corpus,
        /// Files (source `text`) or path prefixes without `.bin` (source `indexed`). Each may have its weight in the
        /// mixture before it: 0.3,first,0.7,second.
        data_path: Vec<String> = Vec::new(),
        /// Shares of the documents for training, validation and test.
        split: String = "969,30,1".into(),
        /// Field of a JSONL line that holds the text.
        json_key: String = "text".into(),
        /// Seed of the sample order. Default: train.seed.
        seed: Option<u64> = None,
        /// Positions begin again with each document.
        reset_position_ids: bool = false,
        /// Attention stays within a document.
        reset_attention_mask: bool = false,
        /// The first token of a document, which nothing before it foretells, does not count in the loss.
        eod_mask_loss: bool = false,
        /// With source `sft`: several samples share a window of seq_length tokens, none of which sees another.
        packing: bool = true,
        /// With source `sft`: JSONL files to evaluate on. Default: the share of data_path that `split` says.
        validation_path: Vec<String> = Vec::new(),
    }
}

choice! {
    /// Where the tokenizer comes from.
    pub enum TokenizerKind {
        /// A Hugging Face folder with `tokenizer.json`.
        HuggingFace = "hf",
        /// One token per byte, and a few special ones.
        Bytes = "bytes",
        /// A byte-level BPE of model.vocab_size tokens, learnt from the training text at the start.
        Bpe = "bpe",
        /// No text at all: ids only. For made-up or already tokenized data.
        Null = "null",
    }
}

section! {
    /// How text becomes tokens.
    pub struct TokenizerConfig("tokenizer") {
        /// Which tokenizer.
        kind: TokenizerKind = TokenizerKind::HuggingFace,
        /// Folder with `tokenizer.json`, or a hub id. Default: model.hf.
        path: Option<String> = None,
    }
}

section! {
    /// Where the run saves itself, and what it starts from.
    pub struct CheckpointConfig("checkpoint") {
        /// Folder of the run's checkpoints. A checkpoint already in it is continued. Default: runs/NAME.
        dir: String,
        /// Save every so many steps, besides the save at the end. 0 saves only at the end.
        save_interval: u64 = 0,
        /// Save at all.
        save: bool = true,
        /// Keep only this many of the newest checkpoints. 0 keeps all.
        most_recent_k: usize = 0,
        /// Save the optimizer state, without which a run cannot be continued exactly.
        save_optim: bool = true,
        /// Weights to start from: a native checkpoint, or a Hugging Face folder or hub id.
        pretrained: Option<String> = None,
    }
}

section! {
    /// Evaluation on held-out samples.
    pub struct EvalConfig("eval") {
        /// Evaluate every so many steps, besides the evaluation at the end. 0 disables.
        eval_interval: u64 = 0,
        /// Global batches per evaluation.
        eval_iters: u64 = 8,
    }
}

section! {
    /// What is reported, and where.
    pub struct LoggingConfig("logging") {
        /// Report every so many steps.
        log_interval: u64 = 1,
        /// Folder of the reports. Default: checkpoint.dir.
        dir: Option<String> = None,
        /// Write metrics.jsonl.
        jsonl: bool = true,
        /// Write TensorBoard event files.
        tensorboard: bool = true,
        /// Draw loss.png at the end.
        plot: bool = true,
    }
}
