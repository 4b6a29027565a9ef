//! bridge-recipes
