//! A graceful stop: the first SIGINT or SIGTERM asks for it, the second ends the process at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Exit code of a process that stopped on request.
pub const INTERRUPTED_EXIT_CODE: i32 = 130;

/// A flag that asks a run to finish its step, save and stop.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// A flag that nothing has raised. Programs that embed a run can raise it themselves.
    pub fn new() -> Self {
        Self::default()
    }

    /// A flag that SIGINT and SIGTERM raise. A second signal ends the process with code 130, for a user who will not wait.
    ///
    /// # Errors
    /// If the operating system refuses the handlers.
    pub fn on_signals() -> io::Result<Self> {
        let stop = Self::new();
        for signal in [SIGINT, SIGTERM] {
            // Handlers run in this order, so the check sees the flag as an earlier signal left it.
            flag::register_conditional_shutdown(
                signal,
                INTERRUPTED_EXIT_CODE,
                Arc::clone(&stop.0),
            )?;
            flag::register(signal, Arc::clone(&stop.0))?;
        }
        Ok(stop)
    }

    /// Asks for the stop.
    pub fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether a stop was asked for.
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
