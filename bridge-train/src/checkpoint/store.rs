//! The folder of a run's checkpoints.

use std::path::{Path, PathBuf};

use bridge_core::checkpoint::native::{
    Group, NativeCheckpoint, NativeWriter, PieceSpec, PieceWriter, list_iterations, retain,
};
use bridge_core::checkpoint::{CheckpointError, Durability};
use bridge_core::dtype::{DType, encode_f32};
use bridge_models::weights::{param_bytes, stored_dtype};
use bridge_ops::{Float, Ops, Param, to_f32_vec};

use super::state::{self, Saved, TRAIN_STATE_FILE, TrainState};
use super::weights::read_tensor;
use crate::error::{Error, Result};
use crate::optimizer::{AdamW, ParamState};

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
        let found = list_iterations(&self.dir).map_err(bridge_core::Error::from)?;
        Ok(!found.is_empty())
    }

    /// Saves a state of a run. The checkpoint appears under its name when it is complete. Returns its folder, or `None`
    /// if saving is disabled.
    ///
    /// # Errors
    /// If it cannot be written; earlier checkpoints are untouched then.
    pub fn save<B: Ops>(
        &self,
        state: &TrainState,
        params: &[Param<B>],
        optimizer: &AdamW<B>,
    ) -> Result<Option<PathBuf>> {
        if !self.save {
            return Ok(None);
        }
        let saved = Saved {
            state: state.clone(),
            optimizer_steps: optimizer.steps(),
            model: self.model.clone(),
        };
        let path = self
            .write(&saved, params, optimizer)
            .map_err(bridge_core::Error::from)?;
        if self.most_recent_k > 0 {
            retain(&self.dir, self.most_recent_k, state.iteration)
                .map_err(bridge_core::Error::from)?;
        }
        Ok(Some(path))
    }

    fn write<B: Ops>(
        &self,
        saved: &Saved,
        params: &[Param<B>],
        optimizer: &AdamW<B>,
    ) -> Result<PathBuf, CheckpointError> {
        // A run's progress is worth the seconds that surviving a power cut costs.
        let writer = NativeWriter::begin(&self.dir, saved.state.iteration, Durability::Synced)?;
        let pieces = params
            .iter()
            .map(|p| PieceSpec::whole(p.name(), stored_dtype(p), p.shape()))
            .collect();
        let file = writer.piece_file(Group::Model, 0, pieces)?;
        for (index, param) in params.iter().enumerate() {
            file.write_at(index, 0, &param_bytes(param, stored_dtype(param)))?;
        }
        file.finish()?;
        if self.save_optim {
            write_optimizer(&writer, optimizer.states())?;
        }
        writer.add_file(TRAIN_STATE_FILE, &state::to_json(saved))?;
        for (name, bytes) in &self.files {
            writer.add_file(name, bytes)?;
        }
        writer.finish(1, usize::from(self.save_optim))
    }

    /// Puts weights and optimizer state of the newest checkpoint back, if there is one. Returns its state and what the
    /// user should hear about it.
    ///
    /// # Errors
    /// If it cannot be read, is of another model, or holds no state of a run.
    pub fn resume<B: Ops>(
        &self,
        params: &[Param<B>],
        optimizer: &mut AdamW<B>,
    ) -> Result<Option<(TrainState, Vec<String>)>> {
        if !self.has_checkpoint()? {
            return Ok(None);
        }
        let checkpoint = NativeCheckpoint::open(&self.dir).map_err(bridge_core::Error::from)?;
        let origin = checkpoint.dir().join(TRAIN_STATE_FILE);
        if !origin.exists() {
            return Err(Error::NotARun {
                path: checkpoint.dir().to_owned(),
                missing: TRAIN_STATE_FILE,
            });
        }
        let json = checkpoint
            .read_file(TRAIN_STATE_FILE)
            .map_err(bridge_core::Error::from)?;
        let saved = state::parse(&json, &origin.display().to_string())?;
        let differences = state::differences(&saved.model, &self.model);
        if !differences.is_empty() {
            return Err(Error::ModelDiffers {
                path: checkpoint.dir().to_owned(),
                differences,
            });
        }
        if checkpoint.index().optimizer.is_empty() && !optimizer.states().is_empty() {
            return Err(Error::NotARun {
                path: checkpoint.dir().to_owned(),
                missing: "optimizer state",
            });
        }
        for param in params {
            let value = read_tensor::<B>(
                &checkpoint,
                Group::Model,
                param.name(),
                &param.shape(),
                &param.device(),
            )?;
            param.set_value(B::cast(value, param.dtype()));
        }
        for state in optimizer.states_mut() {
            restore_optimizer(&checkpoint, state)?;
        }
        optimizer.set_steps(saved.optimizer_steps);
        Ok(Some((saved.state, checkpoint.notes().to_vec())))
    }
}

/// Names of a parameter's optimizer state.
fn state_name(kind: &str, name: &str) -> String {
    format!("{kind}/{name}")
}

fn write_optimizer<B: Ops>(
    writer: &NativeWriter,
    states: &[ParamState<B>],
) -> Result<(), CheckpointError> {
    /// The kinds of state a parameter has, in the order they are written.
    fn kinds<B: Ops>(state: &ParamState<B>) -> impl Iterator<Item = (&'static str, Float<B>)> {
        let master = state.master().map(|master| ("master", master));
        [
            ("exp_avg", state.exp_avg()),
            ("exp_avg_sq", state.exp_avg_sq()),
        ]
        .into_iter()
        .chain(master)
    }
    let pieces = states.iter().flat_map(|state| {
        let (name, shape) = (state.param.name().to_owned(), state.param.shape());
        kinds(state).map(move |(kind, _)| {
            PieceSpec::whole(state_name(kind, &name), DType::F32, shape.clone())
        })
    });
    let file = writer.piece_file(Group::Optimizer, 0, pieces.collect())?;
    let mut index = 0;
    for state in states {
        for (_, values) in kinds(state) {
            write_f32::<B>(&file, index, values)?;
            index += 1;
        }
    }
    file.finish()
}

fn write_f32<B: Ops>(
    file: &PieceWriter,
    piece: usize,
    values: Float<B>,
) -> Result<(), CheckpointError> {
    let values = to_f32_vec::<B>(values);
    let mut bytes = vec![0; 4 * values.len()];
    encode_f32(&values, DType::F32, &mut bytes).expect("fp32 is written as it is");
    file.write_at(piece, 0, &bytes)
}

fn restore_optimizer<B: Ops>(
    checkpoint: &NativeCheckpoint,
    state: &mut ParamState<B>,
) -> Result<()> {
    let (name, shape, device) = (
        state.param.name().to_owned(),
        state.param.shape(),
        state.param.device(),
    );
    let read = |kind: &str| {
        read_tensor::<B>(
            checkpoint,
            Group::Optimizer,
            &state_name(kind, &name),
            &shape,
            &device,
        )
    };
    state.set_moments(read("exp_avg")?, read("exp_avg_sq")?);
    // A run that was in bf16 goes on from the fp32 weights, whatever precision it goes on in.
    if checkpoint
        .index()
        .optimizer
        .contains_key(&state_name("master", &name))
    {
        state.set_weight(read("master")?);
    } else if state.master().is_some() {
        state.set_weight(read_tensor::<B>(
            checkpoint,
            Group::Model,
            &name,
            &shape,
            &device,
        )?);
    }
    Ok(())
}
