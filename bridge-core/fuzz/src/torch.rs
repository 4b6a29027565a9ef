//! The bodies of the `pickle`, `torch_archive` and `megatron_checkpoint` targets.

use std::path::Path;

use bridge_core::checkpoint::megatron::MegatronCheckpoint;
use bridge_core::checkpoint::torch::{Limits, Node, NodeId, Pickle, TorchWeights};
use bridge_core::checkpoint::{BlockStore, MemoryReader, RangeReader};

/// Few enough that a small input can pass them.
const LIMITS: Limits = Limits { bytes: 1 << 16, nodes: 1 << 12 };

/// A pickle that is accepted is a table in which every reference leads to a node, within its limits, and every question
/// about every node has an answer.
pub fn pickle(bytes: &[u8]) {
    let Ok(pickle) = Pickle::parse(bytes.to_vec(), LIMITS) else { return };
    let mut seen = vec![pickle.root()];
    let mut known = std::collections::HashSet::from([pickle.root()]);
    let mut references = 0;
    let mut at = 0;
    while at < seen.len() {
        let id = seen[at];
        at += 1;
        let mut visit = |id: &NodeId| {
            references += 1;
            if known.insert(*id) {
                seen.push(*id);
            }
        };
        match pickle.node(id) {
            Node::Tuple(items) | Node::List(items) | Node::Set(items) => items.iter().for_each(visit),
            Node::Dict(items) => items.iter().for_each(|(key, value)| {
                visit(key);
                visit(value);
            }),
            Node::Global { module, name } => {
                // What names something is text, or messages could not say what was refused.
                assert!(pickle.str(*module).is_some() && pickle.str(*name).is_some());
            }
            Node::Call(call) => {
                [Some(call.callable), Some(call.args), call.state].iter().flatten().for_each(&mut visit);
                call.list.iter().for_each(&mut visit);
                call.dict.iter().for_each(|(key, value)| {
                    visit(key);
                    visit(value);
                });
            }
            Node::Persistent(id) => visit(id),
            Node::Str(range) => assert_eq!(pickle.str(id).expect("text is UTF-8").len(), range.len()),
            Node::Bytes(range) => assert_eq!(pickle.bytes(id).expect("bytes").len(), range.len()),
            Node::None | Node::Bool(_) | Node::Int(_) | Node::LargeInt | Node::Float(_) => {}
        }
        // Eighty characters, each escaped.
        assert!(pickle.describe(id).chars().count() < 1000);
        let _ = (pickle.sizes(id), pickle.items(id), pickle.call(id), pickle.get(id, "size"));
        let _ = (pickle.attribute(id, "Metadata", "storage_data"), pickle.state(id, "TensorProperties"));
    }
    assert!(known.len() <= LIMITS.nodes && references <= 3 * LIMITS.nodes, "{} nodes, {references}", known.len());
}

/// An archive that is accepted has every element of every tensor inside of the file, no two of one tensor in one place.
pub fn torch_archive(file: &[u8]) {
    let file: Box<dyn RangeReader> = Box::new(MemoryReader::new("weights.bin", file));
    let Ok(store) = TorchWeights::from_files(Path::new("weights.bin"), vec![("weights.bin".to_owned(), file)]) else {
        return;
    };
    check_store(&store);
}

/// A checkpoint that is accepted has tensors made up of boxes that hold each element once, all inside of their files, and
/// names no file outside of its folder. The input is the length of `.metadata` (4 bytes, little-endian), `.metadata`, and
/// the bytes of every file that it names.
pub fn megatron_checkpoint(input: &[u8]) {
    let Some((len, rest)) = input.split_first_chunk::<4>() else { return };
    let Some((metadata, file)) = rest.split_at_checked(u32::from_le_bytes(*len) as usize) else { return };
    let open = |names: Vec<String>| {
        let file = |name: String| -> (String, Box<dyn RangeReader>) {
            assert!(!name.contains(['/', '\\', '\0']) && !name.starts_with('.'), "{name:?}");
            let reader = MemoryReader::new(name.as_str(), file);
            (name, Box::new(reader))
        };
        Ok(names.into_iter().map(file).collect())
    };
    let Ok(checkpoint) = MegatronCheckpoint::from_files(Path::new("checkpoint"), metadata.to_vec(), open) else {
        return;
    };
    let _ = (checkpoint.objects(), checkpoint.other_state(), checkpoint.has_layer_names());
    check_store(checkpoint.store());
    check_store(&checkpoint.into_store(3));
}

/// Above this many elements, counting each would dominate the run.
const MAX_COUNTED: usize = 1 << 12;

fn check_store(store: &BlockStore) {
    for tensor in store.tensors() {
        let element = tensor.dtype.bytes().expect("types with whole bytes only") as u64;
        let numel = tensor.shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
        let mut holders = match numel {
            Some(numel) if numel <= MAX_COUNTED => vec![0u8; numel],
            _ => Vec::new(),
        };
        for block in &tensor.blocks {
            let (offset, shape) = (&block.region.offset, &block.region.shape);
            assert!(block.region.fits(&tensor.shape) && block.strides.len() == shape.len());
            if shape.contains(&0) {
                continue;
            }
            let last: u64 = shape.iter().zip(&block.strides).map(|(n, s)| (*n as u64 - 1) * *s as u64).sum();
            let end = block.offset + (last + 1) * element;
            assert!(end <= store.reader(block).len(), "{tensor:?}");
            if holders.is_empty() {
                continue;
            }
            let mut places = std::collections::HashSet::new();
            for index in 0..shape.iter().product::<usize>() {
                let (mut rest, mut whole, mut stored, mut step) = (index, 0, 0, 1);
                for dim in (0..shape.len()).rev() {
                    let at = rest % shape[dim];
                    rest /= shape[dim];
                    whole += (offset[dim] + at) * step;
                    step *= tensor.shape[dim];
                    stored += at * block.strides[dim];
                }
                holders[whole] += 1;
                assert!(places.insert(stored), "two elements in one place: {tensor:?}");
            }
        }
        assert!(holders.iter().all(|count| *count == 1), "{tensor:?}");
    }
}

/// What the reader of PyTorch's pickles is seeded with besides files: programs of a few opcodes.
pub fn pickle_seeds() -> Vec<Vec<u8>> {
    [
        &b"\x80\x02}q\0(X\x01\0\0\0aK\x01X\x04\0\0\0sizectorch\nSize\nK\x02K\x03\x86\x85Ru."[..],
        b"\x80\x04\x95\x40\0\0\0\0\0\0\0}\x94(\x8c\x01a\x94](K\x01J\xfe\xff\xff\xffG\x3f\xf8\0\0\0\0\0\0N\x88eC\x01x\x8c\x01y\x85u.",
        b"\x80\x02ccollections\nOrderedDict\n)Rq\0X\x01\0\0\0wX\x07\0\0\0storageQs}b.",
        b"\x80\x02]q\0h\0a.",
    ]
    .map(<[u8]>::to_vec)
    .to_vec()
}
