//! Which pipeline stage holds which layers and tensors.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::LayoutSpec;
use crate::error::{Error, Result};

/// In which pipeline stage a canonical tensor lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The first stage (embeddings).
    First,
    /// The stage of a decoder layer.
    Layer(usize),
    /// The last stage (final norm, output head).
    Last,
    /// Both ends, because an embedding is the output head as well.
    FirstAndLast,
}

/// Which pipeline stage, and which chunk of it, runs which decoder layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineSplit {
    /// First layer of each chunk in the order of the forward pass, and the number of layers at the end:
    /// chunk `c` is run by stage `c % pp`.
    bounds: Vec<usize>,
    pp: usize,
}

impl PipelineSplit {
    /// Chunks of equal length; what does not divide goes one layer each to the earliest chunks, since the last stage
    /// has the output head to run.
    ///
    /// # Errors
    /// If there are more chunks than layers.
    pub fn even(layout: &LayoutSpec, num_layers: usize) -> Result<Self> {
        let chunks = layout.pp * layout.vpp;
        if chunks == 0 || chunks > num_layers {
            return Err(Error::InvalidArgument(format!(
                "{num_layers} layers cannot be divided among pp={} times vpp={} chunks",
                layout.pp, layout.vpp
            )));
        }
        let (share, rest) = (num_layers / chunks, num_layers % chunks);
        let sizes: Vec<usize> = (0..chunks)
            .map(|chunk| share + usize::from(chunk < rest))
            .collect();
        Self::uneven(layout, num_layers, &sizes)
    }

    /// Chunks of the given lengths, in the order of the forward pass. A chunk may be empty: the first and last also
    /// hold the embedding and the head.
    ///
    /// # Errors
    /// If there is not one length per chunk, or they do not add up to `num_layers`.
    pub fn uneven(layout: &LayoutSpec, num_layers: usize, sizes: &[usize]) -> Result<Self> {
        let chunks = layout.pp * layout.vpp;
        let total: usize = sizes.iter().fold(0, |sum, size| sum.saturating_add(*size));
        if sizes.len() != chunks || total != num_layers {
            return Err(Error::InvalidArgument(format!(
                "pipeline split {sizes:?} has {} chunks of {total} layers, expected {chunks} (pp={} times vpp={}) of \
                 {num_layers}",
                sizes.len(),
                layout.pp,
                layout.vpp
            )));
        }
        let mut bounds = vec![0];
        for size in sizes {
            bounds.push(bounds[bounds.len() - 1] + size);
        }
        Ok(Self {
            bounds,
            pp: layout.pp,
        })
    }

    /// Number of chunks: stages times chunks per stage.
    pub fn num_chunks(&self) -> usize {
        self.bounds.len() - 1
    }

    /// The decoder layers of chunk `chunk` (in the order of the forward pass).
    pub fn layers(&self, chunk: usize) -> Range<usize> {
        self.bounds[chunk]..self.bounds[chunk + 1]
    }

    /// The segments of chunk `chunk`: segment 0 is what comes before the layers (the embedding), segment `l + 1` is layer
    /// `l`, and the last is what comes after them (the head).
    pub fn segments(&self, chunk: usize) -> Range<usize> {
        let layers = self.layers(chunk);
        let start = if chunk == 0 { 0 } else { layers.start + 1 };
        let end = layers.end + 1 + usize::from(chunk + 1 == self.num_chunks());
        start..end
    }

    /// The stage that runs `layer`; layers beyond the last belong to the last stage.
    pub fn stage_of_layer(&self, layer: usize) -> usize {
        let chunk = self.bounds.partition_point(|start| *start <= layer);
        chunk.clamp(1, self.num_chunks()).saturating_sub(1) % self.pp
    }

    /// The stages that hold a tensor of `place`, lowest first.
    pub fn stages(&self, place: Place) -> Vec<usize> {
        let last = (self.num_chunks() - 1) % self.pp;
        match place {
            Place::First => vec![0],
            Place::Layer(layer) => vec![self.stage_of_layer(layer)],
            Place::Last => vec![last],
            Place::FirstAndLast if last == 0 => vec![0],
            Place::FirstAndLast => vec![0, last],
        }
    }
}
