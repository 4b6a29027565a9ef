//! Runs a target on damaged copies of good inputs, without the fuzzing engine: needs nothing but stable cargo.
//!
//! `cargo run --release --example without_engine -- safetensors_header 10000000 [SEED]`

use std::process::ExitCode;
use std::time::Instant;

use bridge_core::checkpoint::native::{GroupIndex, NativeIndex, NativeTensor, Piece};
use bridge_core::checkpoint::{Header, TensorSpec};
use bridge_core::dtype::DType;

/// Steps of a linear congruential generator (Knuth's MMIX constants), upper bits only.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound.max(1)
    }
}

/// Texts that matter to the parsers, put in anywhere.
const TOKENS: [&str; 14] = [
    "0", "1", "18446744073709551615", "18446744073709551616", "-1", "1e9", "[]", "{}", "\"", ",", "\\u0000", "\"F4\"",
    "../", "null",
];

fn damage(input: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        let at = random.below(input.len());
        match random.below(6) {
            0 if at < input.len() => input[at] = random.below(256) as u8,
            1 if at < input.len() => input[at] ^= 1 << random.below(8),
            2 => input.truncate(at),
            3 => {
                let token = TOKENS[random.below(TOKENS.len())];
                input.splice(at..at, token.bytes());
            }
            4 => {
                let end = (at + random.below(24)).min(input.len());
                input.drain(at..end);
            }
            _ => {
                let end = (at + random.below(48)).min(input.len());
                let copy = input[at..end].to_vec();
                let to = random.below(input.len());
                input.splice(to..to, copy);
            }
        }
    }
}

fn headers() -> Vec<Vec<u8>> {
    let specs = [
        TensorSpec::new("a.weight", DType::F32, [2, 3]),
        TensorSpec::new("b", DType::BF16, []),
        TensorSpec::new("empty", DType::U8, [0, 7]),
        TensorSpec::new("packed", DType::F4, [4]),
    ];
    let metadata = [("format".to_owned(), "pt".to_owned())];
    let cases = [&specs[..], &specs[..1], &[]];
    let encode = |specs: &[TensorSpec]| {
        let (mut bytes, header) = Header::encode(specs, &metadata).expect("a good header");
        bytes.resize(bytes.len() + header.data_len() as usize, 0);
        bytes
    };
    cases.map(encode).to_vec()
}

fn indexes() -> Vec<Vec<u8>> {
    let piece = |row: usize, rows: usize| Piece {
        file: format!("model/rank_{row:05}.safetensors"),
        key: format!("w@{row},0"),
        offset: vec![row, 0],
        shape: vec![rows, 3],
    };
    let tensor = |pieces: Vec<Piece>| NativeTensor { dtype: DType::F32, shape: vec![4, 3], pieces };
    let whole = [("w".to_owned(), tensor(vec![piece(0, 4)]))];
    let halves = [("w".to_owned(), tensor(vec![piece(0, 2), piece(2, 2)])), ("v".to_owned(), tensor(vec![piece(0, 4)]))];
    let cases = [GroupIndex::new(), whole.into(), halves.into()];
    let json = |model| NativeIndex { iteration: 100, model, optimizer: GroupIndex::new() }.to_json().expect("a good index");
    cases.map(json).to_vec()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |position: usize, default: u64| arguments.get(position).map_or(Ok(default), |text| text.parse());
    let (seeds, target): (_, fn(&[u8])) = match arguments.first().map(String::as_str) {
        Some("safetensors_header") => (headers(), bridge_core_fuzz::safetensors_header),
        Some("native_index") => (indexes(), bridge_core_fuzz::native_index),
        Some("hf_config") => (bridge_core_fuzz::hf_config_seeds(), bridge_core_fuzz::hf_config),
        Some("run_config") => (bridge_core_fuzz::run_config_seeds(), bridge_core_fuzz::run_config),
        Some("pickle") => (bridge_core_fuzz::pickle_seeds(), bridge_core_fuzz::pickle),
        _ => {
            eprintln!("usage: without_engine safetensors_header|native_index|hf_config|run_config|pickle [RUNS] [SEED]");
            return ExitCode::from(2);
        }
    };
    let (Ok(runs), Ok(seed)) = (number(1, 1_000_000), number(2, 1)) else {
        eprintln!("RUNS and SEED are whole numbers");
        return ExitCode::from(2);
    };
    let mut random = Random(seed);
    let begun = Instant::now();
    for _ in 0..runs {
        let mut input = seeds[random.below(seeds.len())].clone();
        damage(&mut input, &mut random);
        target(&input);
    }
    println!("{runs} inputs in {:.1} s, none made the target panic", begun.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}
