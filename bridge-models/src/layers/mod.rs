//! The parts that decoders are built from, each generic over the backend and told what to do by config fields.

mod attention;
mod decoder_layer;
mod gated_delta_net;
mod latent_attention;
mod linear;
mod mamba2;
mod mlp;
mod moe;
mod mtp;
mod norm;
mod rope;
mod short_conv;
mod vocabulary;

pub use attention::Attention;
pub use decoder_layer::DecoderLayer;
pub use gated_delta_net::GatedDeltaNet;
pub use latent_attention::LatentAttention;
pub use linear::{Linear, LinearAdapter};
pub use mamba2::Mamba2;
pub use mlp::Mlp;
pub use moe::{Experts, GroupedLinear, Moe};
pub use mtp::MtpModule;
pub use norm::Norm;
pub use rope::rotary_table;
pub use short_conv::ShortConv;
pub use vocabulary::{Embedding, Head};
