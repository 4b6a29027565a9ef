//! The one failure of a job.

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// Keeps the first failure; later ones follow from it and are dropped.
#[derive(Debug, Default)]
pub(crate) struct Failure(OnceLock<Error>);

impl Failure {
    /// Records `error` unless the job has failed already. Returns whether it was the first.
    pub(crate) fn set(&self, error: Error) -> bool {
        self.0.set(error).is_ok()
    }

    pub(crate) fn get(&self) -> Option<&Error> {
        self.0.get()
    }

    pub(crate) fn health(&self) -> Result<()> {
        match self.get() {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }
}
