//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{LayerConfig, RopeConfig, RopeScaling};

use crate::families::keys::plain_decoder;
use crate::families::spec::Preset;

pub(super) const ALL: &[Preset] = &[
    Preset {
        name: "llama2_7b",
        hub_id: "meta-llama/Llama-2-7b-hf",
        config: llama2_7b,
    },
    Preset {
        name: "llama2_13b",
        hub_id: "meta-llama/Llama-2-13b-hf",
        config: llama2_13b,
    },
    Preset {
        name: "llama2_70b",
        hub_id: "meta-llama/Llama-2-70b-hf",
        config: llama2_70b,
    },
    Preset {
        name: "llama3_8b",
        hub_id: "meta-llama/Meta-Llama-3-8B",
        config: llama3_8b,
    },
    Preset {
        name: "llama3_70b",
        hub_id: "meta-llama/Meta-Llama-3-70B",
        config: llama3_70b,
    },
    Preset {
        name: "llama31_8b",
        hub_id: "meta-llama/Llama-3.1-8B",
        config: llama31_8b,
    },
    Preset {
        name: "llama31_70b",
        hub_id: "meta-llama/Llama-3.1-70B",
        config: llama31_70b,
    },
    Preset {
        name: "llama31_405b",
        hub_id: "meta-llama/Llama-3.1-405B",
        config: llama31_405b,
    },
    Preset {
        name: "llama32_1b",
        hub_id: "meta-llama/Llama-3.2-1B",
        config: llama32_1b,
    },
    Preset {
        name: "llama32_3b",
        hub_id: "meta-llama/Llama-3.2-3B",
        config: llama32_3b,
    },
    Preset {
        name: "llama33_70b",
        hub_id: "meta-llama/Llama-3.3-70B-Instruct",
        config: llama33_70b,
    },
    Preset {
        name: "llama31_nemotron_nano_8b",
        hub_id: "nvidia/Llama-3.1-Nemotron-Nano-8B-v1",
        config: llama31_nemotron_nano_8b,
    },
    Preset {
        name: "llama31_nemotron_nano_4b",
        hub_id: "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1",
        config: llama31_nemotron_nano_4b,
    },
    Preset {
        name: "smollm2_135m",
        hub_id: "HuggingFaceTB/SmolLM2-135M",
        config: smollm2_135m,
    },
    Preset {
        name: "smollm2_360m",
        hub_id: "HuggingFaceTB/SmolLM2-360M",
        config: smollm2_360m,
    },
    Preset {
        name: "smollm2_1_7b",
        hub_id: "HuggingFaceTB/SmolLM2-1.7B",
        config: smollm2_1_7b,
    },
    Preset {
        name: "llama_tiny",
        hub_id: "",
        config: tiny,
    },
];

/// What tells the sizes of one generation apart.
struct Size {
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

fn size(size: Size, generation: DecoderConfig) -> DecoderConfig {
    DecoderConfig {
        hidden_size: size.hidden_size,
        intermediate_size: size.intermediate_size,
        num_hidden_layers: size.layers,
        layers: vec![LayerConfig::dense(); size.layers],
        num_attention_heads: size.heads,
        num_key_value_heads: size.kv_heads,
        head_dim: size.head_dim,
        ..generation
    }
}

fn llama2(dims: Size) -> DecoderConfig {
    let mut config = size(dims, plain_decoder());
    config.vocab_size = 32_000;
    config.max_position_embeddings = 4096;
    config.norm.eps = 1e-5;
    config.bos_token_id = Some(1);
    config.eos_token_ids = vec![2];
    config
}

/// Llama 2 7B.
pub fn llama2_7b() -> DecoderConfig {
    llama2(Size {
        hidden_size: 4096,
        intermediate_size: 11_008,
        layers: 32,
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
    })
}

/// Llama 2 13B.
pub fn llama2_13b() -> DecoderConfig {
    llama2(Size {
        hidden_size: 5120,
        intermediate_size: 13_824,
        layers: 40,
        heads: 40,
        kv_heads: 40,
        head_dim: 128,
    })
}

/// Llama 2 70B.
pub fn llama2_70b() -> DecoderConfig {
    llama2(SIZE_70B)
}

const SIZE_8B: Size = Size {
    hidden_size: 4096,
    intermediate_size: 14_336,
    layers: 32,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
};
const SIZE_70B: Size = Size {
    hidden_size: 8192,
    intermediate_size: 28_672,
    layers: 80,
    heads: 64,
    kv_heads: 8,
    head_dim: 128,
};

fn llama3(dims: Size) -> DecoderConfig {
    let mut config = size(dims, plain_decoder());
    config.vocab_size = 128_256;
    config.max_position_embeddings = 8192;
    config.norm.eps = 1e-5;
    config.rope = Some(RopeConfig::new(500_000.0));
    config.bos_token_id = Some(128_000);
    config.eos_token_ids = vec![128_001];
    config
}

/// Llama 3 8B.
pub fn llama3_8b() -> DecoderConfig {
    llama3(SIZE_8B)
}

/// Llama 3 70B.
pub fn llama3_70b() -> DecoderConfig {
    llama3(SIZE_70B)
}

/// Llama 3 with its context stretched from 8192 to 131072 tokens.
fn llama3_long(dims: Size, factor: f64) -> DecoderConfig {
    let mut config = llama3(dims);
    config.max_position_embeddings = 131_072;
    let scaling = RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    config.rope = Some(RopeConfig {
        theta: 500_000.0,
        scaling,
    });
    config
}

/// Ends a text, a message awaiting a tool's answer, or a turn.
const INSTRUCT_EOS: [u32; 3] = [128_001, 128_008, 128_009];

/// Llama 3.1 8B.
pub fn llama31_8b() -> DecoderConfig {
    llama3_long(SIZE_8B, 8.0)
}

/// Llama 3.1 70B.
pub fn llama31_70b() -> DecoderConfig {
    llama3_long(SIZE_70B, 8.0)
}

/// Llama 3.1 405B.
pub fn llama31_405b() -> DecoderConfig {
    let dims = Size {
        hidden_size: 16_384,
        intermediate_size: 53_248,
        layers: 126,
        heads: 128,
        kv_heads: 8,
        head_dim: 128,
    };
    llama3_long(dims, 8.0)
}

/// Llama 3.2 1B.
pub fn llama32_1b() -> DecoderConfig {
    let dims = Size {
        hidden_size: 2048,
        intermediate_size: 8192,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
    };
    DecoderConfig {
        tie_word_embeddings: true,
        ..llama3_long(dims, 32.0)
    }
}

/// Llama 3.2 3B.
pub fn llama32_3b() -> DecoderConfig {
    let dims = Size {
        hidden_size: 3072,
        intermediate_size: 8192,
        layers: 28,
        heads: 24,
        kv_heads: 8,
        head_dim: 128,
    };
    DecoderConfig {
        tie_word_embeddings: true,
        ..llama3_long(dims, 32.0)
    }
}

/// Llama 3.3 70B Instruct.
pub fn llama33_70b() -> DecoderConfig {
    DecoderConfig {
        eos_token_ids: INSTRUCT_EOS.to_vec(),
        ..llama31_70b()
    }
}

/// Llama 3.1 Nemotron Nano 8B.
pub fn llama31_nemotron_nano_8b() -> DecoderConfig {
    DecoderConfig {
        eos_token_ids: INSTRUCT_EOS.to_vec(),
        ..llama31_8b()
    }
}

/// Llama 3.1 Nemotron Nano 4B: pruned in width, so that its heads together are wider than the residual stream.
pub fn llama31_nemotron_nano_4b() -> DecoderConfig {
    let dims = Size {
        hidden_size: 3072,
        intermediate_size: 9216,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
    };
    DecoderConfig {
        eos_token_ids: INSTRUCT_EOS.to_vec(),
        ..llama3_long(dims, 8.0)
    }
}

fn smollm2(dims: Size, theta: f64) -> DecoderConfig {
    let mut config = size(dims, plain_decoder());
    config.vocab_size = 49_152;
    config.max_position_embeddings = 8192;
    config.norm.eps = 1e-5;
    config.rope = Some(RopeConfig::new(theta));
    config.tie_word_embeddings = true;
    config.bos_token_id = Some(0);
    config.eos_token_ids = vec![0];
    config
}

/// SmolLM2 135M.
pub fn smollm2_135m() -> DecoderConfig {
    let dims = Size {
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
    };
    DecoderConfig {
        initializer_range: 1.0 / 24.0,
        ..smollm2(dims, 100_000.0)
    }
}

/// SmolLM2 360M.
pub fn smollm2_360m() -> DecoderConfig {
    let dims = Size {
        hidden_size: 960,
        intermediate_size: 2560,
        layers: 32,
        heads: 15,
        kv_heads: 5,
        head_dim: 64,
    };
    smollm2(dims, 100_000.0)
}

/// SmolLM2 1.7B.
pub fn smollm2_1_7b() -> DecoderConfig {
    let dims = Size {
        hidden_size: 2048,
        intermediate_size: 8192,
        layers: 24,
        heads: 32,
        kv_heads: 32,
        head_dim: 64,
    };
    smollm2(dims, 130_000.0)
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    let dims = Size {
        hidden_size: 48,
        intermediate_size: 80,
        layers: 3,
        heads: 6,
        kv_heads: 2,
        head_dim: 16,
    };
    let mut config = size(dims, plain_decoder());
    config.vocab_size = 131;
    config.max_position_embeddings = 96;
    config.norm.eps = 1e-5;
    config
}
