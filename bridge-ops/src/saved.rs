//! What a backward closure keeps of a value.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ops::Ops;
use crate::primitive::Float;

/// Work that waits for a value.
pub(crate) type Waiting<B> = Box<dyn FnOnce(Float<B>) + Send>;

/// A way to make a value again.
pub(crate) struct Recipe<B: Ops> {
    state: Mutex<State<B>>,
    make: Box<dyn Fn() -> Float<B> + Send + Sync>,
    /// Whether the operation's own backward pass makes the value on the side, so that work can wait for that.
    is_by_product: bool,
}

struct State<B: Ops> {
    /// The value, while several closures need it.
    made: Option<Float<B>>,
    waiting: Vec<Waiting<B>>,
}

impl<B: Ops> Recipe<B> {
    pub(crate) fn new(
        is_by_product: bool,
        make: impl Fn() -> Float<B> + Send + Sync + 'static,
    ) -> Self {
        Self {
            state: Mutex::new(State {
                made: None,
                waiting: Vec::new(),
            }),
            make: Box::new(make),
            is_by_product,
        }
    }

    /// The work that waits for the value, which the backward pass that makes it must do.
    pub(crate) fn take_waiting(&self) -> Vec<Waiting<B>> {
        std::mem::take(&mut self.state().waiting)
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
                let mut state = recipe.state();
                let value = state.made.take().unwrap_or_else(|| (recipe.make)());
                if Arc::strong_count(&recipe) > 1 {
                    state.made = Some(value.clone());
                }
                drop(state);
                value
            }
        }
    }

    /// Does `work` with the value: at once, or where the backward pass of the operation that made the value makes it
    /// again on the side, then. For work that nothing after it waits for, such as the gradient of a weight, of an
    /// operation that gives the value a gradient: only then does that pass come.
    pub fn use_when_made(self, work: impl FnOnce(Float<B>) + Send + 'static) {
        match self.0 {
            Kept::Recipe(recipe) if recipe.is_by_product => {
                recipe.state().waiting.push(Box::new(work));
            }
            kept => work(Self(kept).get()),
        }
    }
}
