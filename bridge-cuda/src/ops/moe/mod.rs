//! Mixture of experts: routing, the order of rows by expert, and the experts' products. How many rows an expert has never
//! leaves the device.

pub(super) mod grouped_linear;
pub(super) mod permute;
pub(super) mod router;
