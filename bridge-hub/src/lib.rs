//! bridge-hub
