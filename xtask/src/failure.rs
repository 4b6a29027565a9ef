//! How a verb fails: an error and the exit code that scripts rely on.

use std::fmt::Display;
use std::process::ExitCode;

/// Result of a verb.
pub(crate) type Result<T = (), E = Failure> = std::result::Result<T, E>;

/// Why the process ends with something other than 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A check did not hold (verify, roundtrip, test).
    Check,
    /// Bad arguments, config or input.
    Input,
    /// Failed while running.
    Running,
    /// Interrupted after a graceful stop.
    Interrupted,
}

impl Cause {
    /// The exit code.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Check => 1,
            Self::Input => 2,
            Self::Running => 3,
            Self::Interrupted => 130,
        }
    }
}

/// An error with its cause.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) cause: Cause,
    pub(crate) error: anyhow::Error,
    /// What scripts read in place of the bare error: the full result of a check that did not hold.
    pub(crate) result: Option<serde_json::Value>,
}

impl Failure {
    fn new(cause: Cause, error: anyhow::Error) -> Self {
        Self {
            cause,
            error,
            result: None,
        }
    }

    /// The same failure with a result for scripts.
    pub(crate) fn with(mut self, result: serde_json::Value) -> Self {
        self.result = Some(result);
        self
    }

    pub(crate) fn check(text: impl Display) -> Self {
        Self::new(Cause::Check, anyhow::anyhow!("{text}"))
    }

    pub(crate) fn input(text: impl Display) -> Self {
        Self::new(Cause::Input, anyhow::anyhow!("{text}"))
    }

    pub(crate) fn running(text: impl Display) -> Self {
        Self::new(Cause::Running, anyhow::anyhow!("{text}"))
    }

    pub(crate) fn interrupted(text: impl Display) -> Self {
        Self::new(Cause::Interrupted, anyhow::anyhow!("{text}"))
    }

    /// The whole story on one line: the error and what caused it.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for cause in self.error.chain() {
            let cause = cause.to_string();
            // Transparent wrappers repeat what they wrap.
            if text.ends_with(&cause) {
                continue;
            }
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
        text
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.cause.code())
    }
}

/// Marks errors whose type does not tell what is at fault.
pub(crate) trait Blame<T> {
    /// What the user gave is at fault; `what` says what was being done with it.
    fn input(self, what: impl Display) -> Result<T>;
    /// The run is at fault; `what` says what was being done.
    fn running(self, what: impl Display) -> Result<T>;
}

impl<T, E: Into<anyhow::Error>> Blame<T> for std::result::Result<T, E> {
    fn input(self, what: impl Display) -> Result<T> {
        self.map_err(|e| Failure::new(Cause::Input, e.into().context(what.to_string())))
    }

    fn running(self, what: impl Display) -> Result<T> {
        self.map_err(|e| Failure::new(Cause::Running, e.into().context(what.to_string())))
    }
}

/// Errors of the libraries know by themselves what is at fault.
macro_rules! blame_by_is_input {
    ($($error:ty),+ $(,)?) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                let cause = if error.is_input() { Cause::Input } else { Cause::Running };
                Self::new(cause, error.into())
            }
        })+
    };
}

blame_by_is_input!(
    bridge_core::checkpoint::CheckpointError,
    bridge_data::DataError,
    bridge_hub::Error,
    bridge_models::Error,
    bridge_peft::Error,
    bridge_tokenizers::TokenizerError,
    bridge_train::Error
);

impl From<bridge_core::Error> for Failure {
    fn from(error: bridge_core::Error) -> Self {
        let cause = match &error {
            bridge_core::Error::Cancelled => Cause::Interrupted,
            error if error.is_input() => Cause::Input,
            _ => Cause::Running,
        };
        Self::new(cause, error.into())
    }
}

impl From<bridge_parallel::Error> for Failure {
    fn from(error: bridge_parallel::Error) -> Self {
        let cause = match &error {
            bridge_parallel::Error::Invalid(_) => Cause::Input,
            _ => Cause::Running,
        };
        Self::new(cause, error.into())
    }
}

impl From<bridge_recipes::Error> for Failure {
    fn from(error: bridge_recipes::Error) -> Self {
        Self::new(Cause::Input, error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_tells_the_chain_once() {
        let error = anyhow::anyhow!("disk full")
            .context("cannot write /x")
            .context("saving");
        assert_eq!(
            Failure::new(Cause::Running, error).text(),
            "saving: cannot write /x: disk full"
        );
        let repeated = anyhow::anyhow!("disk full").context("cannot write: disk full");
        assert_eq!(
            Failure::new(Cause::Running, repeated).text(),
            "cannot write: disk full"
        );
    }
}
