//! bridge-data
