//! Made-up checkpoints of any size, quickly.

use std::path::Path;

use bridge_core::checkpoint::{ShardedWriter, TensorSpec, WriterOptions};
use bridge_core::dtype::DType;
use bridge_core::plan::plan_from_shapes;
use bridge_core::{HfConfig, LayoutSpec};
use serde_json::{Value, json};

use crate::failure::{Failure, Result};
use crate::progress::ByteProgress;

/// How the weights of a synthetic checkpoint are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// A Llama in bf16.
    Bf16,
    /// A Llama with its projections in FP8 blocks, as DeepSeek-V3 is published.
    Fp8,
    /// A gpt-oss with its experts in MXFP4.
    Mxfp4,
}

/// What a tensor is filled with.
#[derive(Debug, Clone, Copy)]
enum Content {
    Random,
    Fp8Scales,
    Mxfp4Scales,
}

/// Rows and columns of a block of FP8 codes that share a scale.
const FP8_BLOCK: usize = 128;
/// Scale of every block of MXFP4: 2^-7.
const MXFP4_SCALE: u8 = 120;
/// Bytes written at a time.
const BLOCK: usize = 8 << 20;

/// Writes a checkpoint of about `bytes` to `folder`, and returns its exact size in tensor bytes.
pub(crate) fn write(folder: &Path, bytes: u64, stored: Stored) -> Result<u64> {
    let mut config = match stored {
        Stored::Bf16 => llama(bytes)?,
        // Codes are half as large as the numbers they stand for.
        Stored::Fp8 => llama(2 * bytes)?,
        Stored::Mxfp4 => gpt_oss(bytes)?,
    };
    let bridge = bridge_models::registry().detect(&config)?;
    let plan = plan_from_shapes(bridge, &config, DType::BF16, &LayoutSpec::default())?;
    let mut tensors: Vec<TensorSpec> = Vec::new();
    for tensor in &plan.mapping().foreign {
        let (name, shape) = (tensor.name.as_str(), tensor.shape.as_slice());
        match (stored, shape) {
            (Stored::Fp8, [rows, cols]) if name.ends_with("_proj.weight") => {
                let scales = [rows.div_ceil(FP8_BLOCK), cols.div_ceil(FP8_BLOCK)];
                tensors.push(TensorSpec::new(name, DType::F8E4M3, shape));
                tensors.push(TensorSpec::new(
                    format!("{name}_scale_inv"),
                    DType::F32,
                    scales,
                ));
            }
            // In bf16 these are stored the other way round.
            (Stored::Mxfp4, &[experts, cols, rows]) => {
                let blocks = [experts, rows, cols / 32];
                let codes = [experts, rows, cols / 32, 16];
                tensors.push(TensorSpec::new(format!("{name}_blocks"), DType::U8, codes));
                tensors.push(TensorSpec::new(format!("{name}_scales"), DType::U8, blocks));
            }
            _ => tensors.push(TensorSpec::new(name, DType::BF16, shape)),
        }
    }
    let settings = match stored {
        Stored::Bf16 => None,
        Stored::Fp8 => {
            Some(json!({"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}))
        }
        Stored::Mxfp4 => Some(json!({"quant_method": "mxfp4"})),
    };
    if let Some(settings) = settings {
        let mut keys = config.json().clone();
        keys.insert("quantization_config".to_owned(), settings);
        config = HfConfig::from_json(keys, "the synthetic checkpoint");
    }
    let sizes: Vec<(Content, u64)> = tensors
        .iter()
        .map(|t| {
            let content = match (t.dtype, t.name.ends_with("_scales")) {
                (DType::F32, _) => Content::Fp8Scales,
                (DType::U8, true) => Content::Mxfp4Scales,
                _ => Content::Random,
            };
            (content, t.dtype.byte_len(&t.shape).unwrap_or(0))
        })
        .collect();
    let total: u64 = sizes.iter().map(|(_, size)| size).sum();
    let writer = ShardedWriter::create(folder, tensors, WriterOptions::default())?;
    let progress = ByteProgress::new("making the checkpoint");
    let mut block = random_bf16(BLOCK);
    let fp8_scales: Vec<u8> = 0.01f32.to_le_bytes().repeat(BLOCK / 4);
    let mxfp4_scales = vec![MXFP4_SCALE; BLOCK];
    let mut done = 0u64;
    for (tensor, (content, size)) in sizes.into_iter().enumerate() {
        let mut offset = 0;
        while offset < size {
            let n = (size - offset).min(BLOCK as u64);
            // No two blocks are alike, so that nothing below can store one for many.
            block[..8].copy_from_slice(&(done | 0x3c00_3c00_3c00_3c00).to_le_bytes());
            let bytes = match content {
                Content::Random => &block,
                Content::Fp8Scales => &fp8_scales,
                Content::Mxfp4Scales => &mxfp4_scales,
            };
            writer.write_at(tensor, offset, &bytes[..n as usize])?;
            offset += n;
            done += n;
            progress.update(done, total, "");
        }
    }
    writer.add_file("config.json", config.raw())?;
    writer.finish()?;
    Ok(total)
}

/// A gpt-oss of few experts, with layers of the published width; whole layers as near to `bytes` as they come.
fn gpt_oss(bytes: u64) -> Result<HfConfig> {
    const EXPERTS: u64 = 8;
    const HIDDEN: u64 = 2880;
    // Three matrices an expert, 17 bytes for 32 numbers.
    let layer = EXPERTS * 3 * HIDDEN * HIDDEN / 32 * 17;
    let layers = (bytes / layer).max(1);
    let json = json!({
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "layer_types": vec!["full_attention"; layers as usize],
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 4,
        "attention_bias": true,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    });
    config_of(&json)
}

/// A Llama whose bf16 weights come as near to `bytes` as whole layers allow.
fn llama(bytes: u64) -> Result<HfConfig> {
    // Of the widths that leave at least four layers, the largest.
    let widths = [4096u64, 2048, 1024, 512, 256, 128, 64];
    let layer = |h: u64| 2 * 13 * h * h;
    let ends = |h: u64| 2 * 2 * vocab(h) * h;
    let hidden = widths
        .into_iter()
        .find(|h| bytes >= ends(*h) + 4 * layer(*h));
    let hidden = hidden.ok_or_else(|| {
        Failure::input(format!(
            "--synthetic: the smallest checkpoint has {} bytes",
            ends(64) + 4 * layer(64)
        ))
    })?;
    let layers = (bytes - ends(hidden)) / layer(hidden);
    // Four groups at least, heads of 128 at most.
    let heads = (hidden / 128).max(4);
    let json = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 7 / 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads / 4,
        "head_dim": hidden / heads,
        "vocab_size": vocab(hidden),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    });
    config_of(&json)
}

fn config_of(json: &Value) -> Result<HfConfig> {
    let what = "the synthetic checkpoint";
    Ok(HfConfig::from_slice(json.to_string().as_bytes(), what)?)
}

fn vocab(hidden: u64) -> u64 {
    hidden * 8
}

/// Bytes of bf16 numbers of either sign between 2^-7 and 2^-3.
fn random_bf16(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut block = Vec::with_capacity(bytes);
    while block.len() < bytes {
        // xorshift64, Marsaglia 2003.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        block.extend_from_slice(
            &((state & 0x81ff_81ff_81ff_81ff) | 0x3c00_3c00_3c00_3c00).to_le_bytes(),
        );
    }
    block.truncate(bytes);
    block
}
