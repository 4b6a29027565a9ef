//! bridge-train
