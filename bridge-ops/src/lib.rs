//! bridge-ops
