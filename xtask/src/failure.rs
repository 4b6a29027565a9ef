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
}

impl Failure {
    pub(crate) fn check(text: impl Display) -> Self {
        Self { cause: Cause::Check, error: anyhow::anyhow!("{text}") }
    }

    pub(crate) fn input(text: impl Display) -> Self {
        Self { cause: Cause::Input, error: anyhow::anyhow!("{text}") }
    }

    pub(crate) fn running(text: impl Display) -> Self {
        Self { cause: Cause::Running, error: anyhow::anyhow!("{text}") }
    }

    pub(crate) fn interrupted(text: impl Display) -> Self {
        Self { cause: Cause::Interrupted, error: anyhow::anyhow!("{text}") }
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
        self.map_err(|e| Failure { cause: Cause::Input, error: e.into().context(what.to_string()) })
    }

    fn running(self, what: impl Display) -> Result<T> {
        self.map_err(|e| Failure { cause: Cause::Running, error: e.into().context(what.to_string()) })
    }
}

/// Errors of the libraries know by themselves what is at fault.
macro_rules! blame_by_is_input {
    ($($error:ty),+ $(,)?) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                let cause = if error.is_input() { Cause::Input } else { Cause::Running };
                Self { cause, error: error.into() }
            }
        })+
    };
}

blame_by_is_input!(bridge_core::Error, bridge_hub::Error);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_tells_the_chain_once() {
        let error = anyhow::anyhow!("disk full").context("cannot write /x").context("saving");
        assert_eq!(Failure { cause: Cause::Running, error }.text(), "saving: cannot write /x: disk full");
        let repeated = anyhow::anyhow!("cannot write: disk full").context("x").root_cause().to_string();
        assert_eq!(repeated, "cannot write: disk full");
    }
}
