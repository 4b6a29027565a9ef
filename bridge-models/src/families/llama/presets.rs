//! Named sizes. The numbers are those of the published `config.json` files.

use bridge_core::DecoderConfig;
use bridge_core::config::{RopeConfig, RopeScaling};

use crate::families::keys::plain_decoder;
use crate::families::sizes::Size;
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

fn llama2(dims: Size) -> DecoderConfig {
    let mut config = dims.of(plain_decoder());
    config.vocab_size = 32_000;
    config.max_position_embeddings = 4096;
    config.norm.eps = 1e-5;
    config.bos_token_id = Some(1);
    config.eos_token_ids = vec![2];
    config
}

/// Llama 2 7B.
pub fn llama2_7b() -> DecoderConfig {
    llama2(Size::new(4096, 11_008, 32, 32, 32, 128))
}

/// Llama 2 13B.
pub fn llama2_13b() -> DecoderConfig {
    llama2(Size::new(5120, 13_824, 40, 40, 40, 128))
}

/// Llama 2 70B.
pub fn llama2_70b() -> DecoderConfig {
    llama2(SIZE_70B)
}

const SIZE_8B: Size = Size::new(4096, 14_336, 32, 32, 8, 128);
const SIZE_70B: Size = Size::new(8192, 28_672, 80, 64, 8, 128);

fn llama3(dims: Size) -> DecoderConfig {
    let mut config = dims.of(plain_decoder());
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
    let dims = Size::new(16_384, 53_248, 126, 128, 8, 128);
    llama3_long(dims, 8.0)
}

/// Llama 3.2 1B.
pub fn llama32_1b() -> DecoderConfig {
    let dims = Size::new(2048, 8192, 16, 32, 8, 64);
    DecoderConfig {
        tie_word_embeddings: true,
        ..llama3_long(dims, 32.0)
    }
}

/// Llama 3.2 3B.
pub fn llama32_3b() -> DecoderConfig {
    let dims = Size::new(3072, 8192, 28, 24, 8, 128);
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
    let dims = Size::new(3072, 9216, 32, 32, 8, 128);
    DecoderConfig {
        eos_token_ids: INSTRUCT_EOS.to_vec(),
        ..llama3_long(dims, 8.0)
    }
}

fn smollm2(dims: Size, theta: f64) -> DecoderConfig {
    let mut config = dims.of(plain_decoder());
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
    let dims = Size::new(576, 1536, 30, 9, 3, 64);
    DecoderConfig {
        initializer_range: 1.0 / 24.0,
        ..smollm2(dims, 100_000.0)
    }
}

/// SmolLM2 360M.
pub fn smollm2_360m() -> DecoderConfig {
    let dims = Size::new(960, 2560, 32, 15, 5, 64);
    smollm2(dims, 100_000.0)
}

/// SmolLM2 1.7B.
pub fn smollm2_1_7b() -> DecoderConfig {
    let dims = Size::new(2048, 8192, 24, 32, 32, 64);
    smollm2(dims, 130_000.0)
}

/// A toy with all dimensions different and small, for tests.
pub fn tiny() -> DecoderConfig {
    let dims = Size::new(48, 80, 3, 6, 2, 16);
    let mut config = dims.of(plain_decoder());
    config.vocab_size = 131;
    config.max_position_embeddings = 96;
    config.norm.eps = 1e-5;
    config
}
