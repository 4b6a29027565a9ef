#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| bridge_data_fuzz::dataset_index(input));
