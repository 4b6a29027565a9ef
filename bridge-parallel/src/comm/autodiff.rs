//! Differentiable collectives.
