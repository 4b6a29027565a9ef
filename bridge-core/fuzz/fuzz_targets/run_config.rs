#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bridge_core_fuzz::run_config(input));
