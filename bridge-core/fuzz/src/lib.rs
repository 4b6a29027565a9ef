//! What the fuzz targets do with their input, as plain functions.
//!
//! They panic when a parser accepts what it should not, or does not read back what it would write; that the parsers
//! themselves never panic is the other half of the check.

mod hf_config;
mod run_config;
mod torch;

pub use hf_config::{hf_config, hf_config_seeds};
pub use run_config::{run_config, run_config_seeds};
pub use torch::{megatron_checkpoint, pickle, pickle_seeds, torch_archive};

use bridge_core::checkpoint::native::{Group, NativeIndex};
use bridge_core::checkpoint::{Header, Region, TensorSpec};

/// A file that is accepted has every byte in exactly one tensor, and writing its tensors anew gives the same header.
pub fn safetensors_header(file: &[u8]) {
    let Ok(header) = Header::parse(file) else { return };
    assert_eq!(header.data_start + header.data_len(), file.len() as u64);
    let mut end = 0;
    for entry in &header.entries {
        assert_eq!(entry.offset, end, "{entry:?}");
        assert_eq!(entry.spec.dtype.byte_len(&entry.spec.shape), Some(entry.len), "{entry:?}");
        end += entry.len;
    }
    let specs: Vec<TensorSpec> = header.entries.iter().map(|entry| entry.spec.clone()).collect();
    let (mut bytes, written) = Header::encode(&specs, &header.metadata).expect("what was read can be written");
    assert_eq!((&written.entries, &written.metadata), (&header.entries, &header.metadata));
    bytes.resize(bytes.len() + end as usize, 0);
    assert_eq!(Header::parse(&bytes).expect("what was written can be read"), written);
}

/// An index that is accepted has pieces that together have as many elements as their tensor and do not overlap, names
/// no file outside its folder, and survives being written and read.
pub fn native_index(json: &[u8]) {
    /// Above this many pieces, comparing each with each would dominate the run.
    const MAX_COMPARED: usize = 64;
    let Ok(index) = NativeIndex::parse(json) else { return };
    for group in Group::ALL {
        for tensor in index.group(group).values() {
            let regions: Vec<Region> = tensor.pieces.iter().map(|piece| piece.region()).collect();
            let elements: u128 = regions.iter().map(|region| u128::from(region.elements().expect("it fits"))).sum();
            assert_eq!(elements, u128::from(Region::whole(&tensor.shape).elements().expect("it fits")));
            for (position, region) in regions.iter().enumerate().take(MAX_COMPARED) {
                assert!(region.fits(&tensor.shape));
                let mut earlier = regions[..position].iter().filter(|other| !other.is_empty());
                assert!(region.is_empty() || earlier.all(|other| region.intersect(other).is_none()));
            }
            for piece in &tensor.pieces {
                let name = piece.file.strip_prefix(group.as_str()).and_then(|rest| rest.strip_prefix('/'));
                assert!(name.is_some_and(|name| !name.contains(['/', '\\', '\0']) && !name.starts_with('.')));
            }
        }
    }
    let written = index.to_json().expect("what was read can be written");
    assert_eq!(NativeIndex::parse(&written).expect("what was written can be read"), index);
}
