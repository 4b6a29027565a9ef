//! What a backward closure keeps of a value.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::ops::Ops;
use crate::primitive::Float;

/// A way to make a value again, with the value while several closures need it.
pub(crate) struct Recipe<B: Ops> {
    made: Mutex<Option<Float<B>>>,
    make: Box<dyn Fn() -> Float<B> + Send + Sync>,
}

impl<B: Ops> Recipe<B> {
    pub(crate) fn new(make: impl Fn() -> Float<B> + Send + Sync + 'static) -> Self {
        Self {
            made: Mutex::new(None),
            make: Box::new(make),
        }
    }
}

impl<B: Ops> fmt::Debug for Recipe<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recipe")
    }
}

/// A value kept for a backward pass: the tensor itself, or a way to make it again that takes no memory meanwhile. See
/// [`Var::saved`](crate::Var::saved).
#[derive(Debug)]
pub struct Saved<B: Ops>(Kept<B>);

#[derive(Debug)]
enum Kept<B: Ops> {
    Value(Float<B>),
    Recipe(Arc<Recipe<B>>),
}

impl<B: Ops> Saved<B> {
    pub(crate) fn new(value: &Float<B>, recipe: Option<&Arc<Recipe<B>>>) -> Self {
        Self(match recipe {
            Some(recipe) => Kept::Recipe(Arc::clone(recipe)),
            None => Kept::Value(value.clone()),
        })
    }

    /// The value. Made again at most once for all that keep it, and freed with the last of them.
    pub fn get(self) -> Float<B> {
        match self.0 {
            Kept::Value(value) => value,
            Kept::Recipe(recipe) => {
                let mut made = recipe.made.lock().unwrap_or_else(PoisonError::into_inner);
                let value = made.take().unwrap_or_else(|| (recipe.make)());
                if Arc::strong_count(&recipe) > 1 {
                    *made = Some(value.clone());
                }
                value
            }
        }
    }
}
