//! The folder of a run's checkpoints.

use std::path::{Path, PathBuf};

use bridge_core::checkpoint::native::{
    Group, NativeCheckpoint, NativeWriter, PieceSpec, PieceWriter, iteration_dir, list_iterations,
    retain,
};
use bridge_core::checkpoint::{CheckpointError, Durability};
use bridge_core::dtype::{DType, encode_f32};
use bridge_models::weights::{param_bytes, stored_dtype, value_bytes};
use bridge_ops::{Ops, Param, float_from_f32, to_f32_vec};
use bridge_parallel::ParallelContext;

use super::local::LocalView;
use super::state::{self, Saved, TRAIN_STATE_FILE, TrainState};
use crate::agree;
use crate::error::{Error, Result};
use crate::optimizer::{Optimizer, placements};

/// Name of the resolved configuration in a checkpoint.
pub const CONFIG_FILE: &str = "config.toml";

/// Where a run saves itself and continues from.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    dir: PathBuf,
    model: serde_json::Value,
    most_recent_k: usize,
    save_optim: bool,
    save: bool,
    trained_alone: bool,
    /// Files that go into every checkpoint, by their path in it.
    files: Vec<(String, Vec<u8>)>,
}

impl CheckpointStore {
    /// Checkpoints in `dir`, with optimizer state, all of them kept. `model` describes the model: a checkpoint with
    /// another description is refused. For a decoder this is its config; any JSON will do.
    pub fn new(dir: impl Into<PathBuf>, model: serde_json::Value) -> Self {
        Self {
            dir: dir.into(),
            model,
            most_recent_k: 0,
            save_optim: true,
            save: true,
            trained_alone: false,
            files: Vec::new(),
        }
    }

    /// Keeps only the newest `most_recent_k` checkpoints; 0 keeps all.
    #[must_use]
    pub fn keep(mut self, most_recent_k: usize) -> Self {
        self.most_recent_k = most_recent_k;
        self
    }

    /// Whether optimizer state is saved; without it a run cannot be continued.
    #[must_use]
    pub fn save_optim(mut self, save_optim: bool) -> Self {
        self.save_optim = save_optim;
        self
    }

    /// Whether anything is saved at all; if not, the store is only continued from.
    #[must_use]
    pub fn save_enabled(mut self, save: bool) -> Self {
        self.save = save;
        self
    }

    /// Saves weights that are trained alone, such as adapters; whoever continues brings the others.
    #[must_use]
    pub fn trained_weights_alone(mut self) -> Self {
        self.trained_alone = true;
        self
    }

    /// Those of `params` that are in its checkpoints.
    fn kept<B: Ops>(&self, params: &[Param<B>]) -> Vec<Param<B>> {
        let kept = |param: &&Param<B>| param.requires_grad() || !self.trained_alone;
        params.iter().filter(kept).cloned().collect()
    }

    /// Adds a file to every checkpoint, such as `hf/config.json`.
    #[must_use]
    pub fn with_file(mut self, name: impl Into<String>, bytes: Vec<u8>) -> Self {
        self.files.push((name.into(), bytes));
        self
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether there is a checkpoint to continue from.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn has_checkpoint(&self) -> Result<bool> {
        if !self.dir.exists() {
            return Ok(false);
        }
        let found = list_iterations(&self.dir).map_err(core_error)?;
        Ok(!found.is_empty())
    }

    /// Saves a state of a run. Every rank calls this, with the weights it holds. The checkpoint appears under its name
    /// when it is complete. Returns its folder, or `None` if saving is disabled.
    ///
    /// # Errors
    /// If it cannot be written, on any rank; earlier checkpoints are untouched then.
    pub fn save<B: Ops>(
        &self,
        state: &TrainState,
        params: &[Param<B>],
        optimizer: &Optimizer<B>,
        parallel: &ParallelContext<B>,
    ) -> Result<Option<PathBuf>> {
        if !self.save {
            return Ok(None);
        }
        let saved = Saved {
            state: state.clone(),
            optimizer_steps: optimizer.steps(),
            model: self.model.clone(),
        };
        // The first rank makes the folder, all fill it, the first rank publishes it. After each of these all ranks meet,
        // so that one that failed is waited for by none and what is half-written is removed.
        // A run's progress is worth the seconds that surviving a power cut costs.
        let iteration = saved.state.iteration;
        let begun = if parallel.rank() == 0 {
            NativeWriter::begin(&self.dir, iteration, Durability::Synced).map(Some)
        } else {
            Ok(None)
        };
        let writer = agree::all_well(parallel, begun.map_err(core_error))?;
        // The hidden folder lies beside the iterations; its name is ours, and plain text.
        let name = writer.as_ref().and_then(|writer| {
            let name = writer.staging_dir().file_name()?;
            Some(name.to_string_lossy().into_owned().into_bytes())
        });
        let name = agree::from_first(parallel, name.unwrap_or_default())?;
        let staging = self.dir.join(String::from_utf8_lossy(&name).into_owned());
        let params = &self.kept(params);
        let written = self.write_pieces(&staging, params, optimizer, parallel);
        agree::all_well(parallel, written)?;
        let published = match writer {
            Some(writer) => self.publish(writer, &saved, parallel.world_size()),
            None => Ok(()),
        };
        agree::all_well(parallel, published.map_err(core_error))?;
        Ok(Some(iteration_dir(&self.dir, iteration)))
    }

    fn write_pieces<B: Ops>(
        &self,
        staging: &Path,
        params: &[Param<B>],
        optimizer: &Optimizer<B>,
        parallel: &ParallelContext<B>,
    ) -> Result<()> {
        // What is written are the weights after the last update.
        optimizer.finish_param_gather()?;
        let mut pieces = Pieces::default();
        let placements = placements(params, parallel)?;
        for (param, placement) in params.iter().zip(&placements) {
            if placement.writes() && !param.is_released() {
                let dtype = stored_dtype(param);
                let bytes = move || param_bytes(param, dtype);
                pieces.add(param, param.name(), dtype, 0..param.numel(), bytes);
            }
        }
        for part in optimizer.weight_parts() {
            // Weights that are whole at the moment have been written so.
            for (_, values) in part.values {
                if !part.param.is_released() {
                    continue;
                }
                let dtype = stored_dtype(&part.param);
                let bytes = move || value_bytes::<B>(values, dtype);
                pieces.add(
                    &part.param,
                    part.param.name(),
                    dtype,
                    part.elements.clone(),
                    bytes,
                );
            }
        }
        let file = pieces.create(staging, Group::Model, parallel.rank());
        pieces
            .write(file.map_err(core_error)?)
            .map_err(core_error)?;
        if self.save_optim {
            let mut pieces = Pieces::default();
            for part in optimizer.state_parts() {
                for (kind, values) in part.values {
                    let name = state_name(kind, part.param.name());
                    let bytes = move || {
                        let values = to_f32_vec::<B>(values);
                        let mut bytes = vec![0; 4 * values.len()];
                        encode_f32(&values, DType::F32, &mut bytes)
                            .expect("fp32 is written as it is");
                        bytes
                    };
                    pieces.add(&part.param, &name, DType::F32, part.elements.clone(), bytes);
                }
            }
            let file = pieces.create(staging, Group::Optimizer, parallel.rank());
            pieces
                .write(file.map_err(core_error)?)
                .map_err(core_error)?;
        }
        Ok(())
    }

    fn publish(
        &self,
        writer: NativeWriter,
        saved: &Saved,
        parts: usize,
    ) -> Result<(), CheckpointError> {
        writer.add_file(TRAIN_STATE_FILE, &state::to_json(saved))?;
        for (name, bytes) in &self.files {
            writer.add_file(name, bytes)?;
        }
        writer.finish(parts, if self.save_optim { parts } else { 0 })?;
        if self.most_recent_k > 0 {
            retain(&self.dir, self.most_recent_k, saved.state.iteration)?;
        }
        Ok(())
    }

    /// Puts weights and optimizer state of the newest checkpoint back, if there is one. Every rank calls this, with the
    /// weights it holds, whatever layout wrote the checkpoint. Returns its state and what the user should hear about it.
    ///
    /// # Errors
    /// If it cannot be read, is of another model, or holds no state of a run.
    pub fn resume<B: Ops>(
        &self,
        params: &[Param<B>],
        optimizer: &mut Optimizer<B>,
        parallel: &ParallelContext<B>,
    ) -> Result<Option<(TrainState, Vec<String>)>> {
        // The first rank looks, so that all continue from the same checkpoint.
        let found = if parallel.rank() == 0 {
            self.newest()
        } else {
            Ok(None)
        };
        let found = agree::all_well(parallel, found)?;
        let (iteration, notes) = found.unzip();
        let bytes = iteration.map_or(Vec::new(), |iteration| iteration.to_le_bytes().to_vec());
        let bytes = agree::from_first(parallel, bytes)?;
        let Ok(iteration) = <[u8; 8]>::try_from(bytes.as_slice()) else {
            return Ok(None);
        };
        let iteration = u64::from_le_bytes(iteration);
        let dir = iteration_dir(&self.dir, iteration);
        let resumed = self.read(&dir, &self.kept(params), optimizer);
        let state = agree::all_well(parallel, resumed)?;
        Ok(Some((state, notes.unwrap_or_default())))
    }

    /// The iteration to continue from, and what the user should hear about how it was chosen.
    fn newest(&self) -> Result<Option<(u64, Vec<String>)>> {
        if !self.has_checkpoint()? {
            return Ok(None);
        }
        let checkpoint = NativeCheckpoint::open(&self.dir).map_err(core_error)?;
        Ok(Some((checkpoint.iteration(), checkpoint.notes().to_vec())))
    }

    fn read<B: Ops>(
        &self,
        dir: &Path,
        params: &[Param<B>],
        optimizer: &mut Optimizer<B>,
    ) -> Result<TrainState> {
        let checkpoint = NativeCheckpoint::open(dir).map_err(core_error)?;
        let origin = checkpoint.dir().join(TRAIN_STATE_FILE);
        if !origin.exists() {
            return Err(Error::NotARun {
                path: checkpoint.dir().to_owned(),
                missing: TRAIN_STATE_FILE,
            });
        }
        let json = checkpoint.read_file(TRAIN_STATE_FILE).map_err(core_error)?;
        let saved = state::parse(&json, &origin.display().to_string())?;
        let differences = state::differences(&saved.model, &self.model);
        if !differences.is_empty() {
            return Err(Error::ModelDiffers {
                path: checkpoint.dir().to_owned(),
                differences,
            });
        }
        if checkpoint.index().optimizer.is_empty() && !optimizer.params().is_empty() {
            return Err(Error::NotARun {
                path: checkpoint.dir().to_owned(),
                missing: "optimizer state",
            });
        }
        // Sharded weights come with the optimizer's parts.
        for param in params.iter().filter(|param| !param.is_released()) {
            let all = 0..param.numel();
            let view = LocalView::of(param);
            let values = view.read(&checkpoint, Group::Model, param.name(), &all)?;
            let value = float_from_f32::<B>(&values, &param.shape(), &param.device());
            param.set_value(B::cast(value, param.dtype()));
        }
        let stored = &checkpoint.index().optimizer;
        optimizer.restore(|kind, param, elements| {
            let view = LocalView::of(param);
            let name = state_name(kind, param.name());
            // A run that was in bf16 goes on from the fp32 weights, whatever precision it goes on in; one that was in
            // fp32 has no others.
            if kind == "master" && !stored.contains_key(&name) {
                return view.read(&checkpoint, Group::Model, param.name(), &elements);
            }
            view.read(&checkpoint, Group::Optimizer, &name, &elements)
        })?;
        optimizer.set_steps(saved.optimizer_steps);
        Ok(saved.state)
    }
}

fn core_error(error: CheckpointError) -> Error {
    Error::Core(error.into())
}

/// Names of a parameter's optimizer state.
fn state_name(kind: &str, name: &str) -> String {
    format!("{kind}/{name}")
}

/// Pieces of tensors that a rank is going to write.
#[derive(Default)]
struct Pieces<'a> {
    specs: Vec<PieceSpec>,
    /// By tensor: how its bytes are made, and for each of its pieces how they are cut from them.
    tensors: Vec<Tensor<'a>>,
}

struct Tensor<'a> {
    dtype: DType,
    bytes: Box<dyn FnOnce() -> Vec<u8> + 'a>,
    cuts: Vec<super::local::Cut>,
}

impl<'a> Pieces<'a> {
    /// Adds `elements` of `param`, or of state shaped like it, under `name`. `bytes` gives them when they are written.
    fn add<B: Ops>(
        &mut self,
        param: &Param<B>,
        name: &str,
        dtype: DType,
        elements: std::ops::Range<usize>,
        bytes: impl FnOnce() -> Vec<u8> + 'a,
    ) {
        let view = LocalView::of(param);
        let cuts = view.cuts(&elements);
        self.specs.extend(cuts.iter().map(|cut| PieceSpec {
            name: name.to_owned(),
            dtype,
            shape: view.global_shape.clone(),
            region: cut.global.clone(),
        }));
        self.tensors.push(Tensor {
            dtype,
            bytes: Box::new(bytes),
            cuts,
        });
    }

    fn create(
        &mut self,
        staging: &Path,
        group: Group,
        rank: usize,
    ) -> Result<PieceWriter, CheckpointError> {
        let specs = std::mem::take(&mut self.specs);
        PieceWriter::create(staging, group, rank, specs, Durability::Synced)
    }

    fn write(self, file: PieceWriter) -> Result<(), CheckpointError> {
        let mut piece = 0;
        for tensor in self.tensors {
            let bytes = (tensor.bytes)();
            let size = tensor.dtype.bytes().unwrap_or(1);
            for cut in tensor.cuts {
                file.write_at(piece, 0, &cut.bytes(&bytes, size))?;
                piece += 1;
            }
        }
        file.finish()
    }
}
