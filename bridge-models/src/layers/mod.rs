//! The parts that decoders are built from, each generic over the backend and told what to do by config fields.

mod attention;
mod linear;
mod mlp;
mod norm;
mod rope;

pub use attention::Attention;
pub use linear::Linear;
pub use mlp::Mlp;
pub use norm::Norm;
pub use rope::rotary_table;
