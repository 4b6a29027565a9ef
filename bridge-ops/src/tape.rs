//! A reverse-mode tape with hand-written gradients.
//!
//! One tape serves one segment of a model (the embedding, one layer, the head): the segment's input is a
//! [`leaf`](Tape::leaf), its output is seeded with the gradient that the segment after it returned. Nothing is global
//! and no lock is held while a closure runs, so a backward closure may wait for other ranks (a collective), also when
//! ranks are threads of one process.
//!
//! The order of work is fixed: nodes run in the reverse order of recording, and where a value is used more than once
//! the gradients are added in that order, so results repeat bit for bit.

use std::cell::{OnceCell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::Tensor;
use burn_backend::{DType, TensorMetadata};

use crate::deferred::Deferred;
use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, dims, tensor};
use crate::saved::{Recipe, Saved};

/// A value on a [`Tape`]. Cloning shares the buffer and stands for the same value.
#[derive(Debug, Clone)]
pub struct Var<B: Ops> {
    value: Float<B>,
    node: Option<NodeId>,
    /// How to make the value again, where the tape would rather do that than keep it.
    recipe: Option<Arc<Recipe<B>>>,
}

#[derive(Debug, Clone, Copy)]
struct NodeId {
    tape: u64,
    index: usize,
}

impl<B: Ops> Var<B> {
    /// The tensor; shares the buffer.
    pub fn value(&self) -> Float<B> {
        self.value.clone()
    }

    /// The tensor, giving up this handle, so that a kernel may work in place if it was the last one.
    pub fn into_value(self) -> Float<B> {
        self.value
    }

    /// The value as a backward closure should keep it: the tensor, or on a tape that makes cheap values again
    /// ([`Tape::recompute_cheap`]) the way to make it.
    pub fn saved(&self) -> Saved<B> {
        Saved::new(&self.value, self.recipe.as_ref())
    }

    /// The shape.
    pub fn shape(&self) -> Vec<usize> {
        dims(&self.value)
    }

    /// The dtype.
    pub fn dtype(&self) -> DType {
        self.value.dtype()
    }

    /// The same value with a way to make it again.
    pub(crate) fn with_recipe(self, recipe: Option<Arc<Recipe<B>>>) -> Self {
        Self { recipe, ..self }
    }

    /// The value as a Burn tensor of rank `D`.
    ///
    /// # Panics
    /// When the rank is not `D`.
    #[track_caller]
    pub fn tensor<const D: usize>(&self) -> Tensor<B, D> {
        tensor(self.value())
    }

    /// Whether a gradient flows through this value.
    pub fn is_tracked(&self) -> bool {
        self.node.is_some()
    }
}

/// What a node does with the gradient of its output.
enum Backward<B: Ops> {
    /// Returns the gradient of each parent, to be added to what they have.
    Returns(Box<dyn FnOnce(Float<B>) -> Vec<Option<Float<B>>> + Send>),
    /// Gets what its only parent has so far and returns the sum, so that one kernel can do both.
    Accumulates(Box<dyn FnOnce(Float<B>, Option<Float<B>>) -> Option<Float<B>> + Send>),
}

/// One recorded operation. Leaves have no `backward`.
struct Node<B: Ops> {
    /// Index of each parent's node, `None` for parents that are not tracked.
    parents: Vec<Option<usize>>,
    backward: Option<Backward<B>>,
}

/// A record of operations, to be run backward once. See the module documentation.
pub struct Tape<B: Ops> {
    id: u64,
    /// `None` on an inference tape.
    nodes: Option<RefCell<Vec<Node<B>>>>,
    recompute_cheap: bool,
    pass: Option<u64>,
    deferred: OnceCell<Deferred>,
}

impl<B: Ops> Tape<B> {
    /// A tape that records.
    #[expect(
        clippy::new_without_default,
        reason = "whether a tape records should be said where it is made"
    )]
    pub fn new() -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            nodes: Some(RefCell::new(Vec::new())),
            recompute_cheap: false,
            pass: None,
            deferred: OnceCell::new(),
        }
    }

    /// The same tape, but values that one pass over memory makes (outputs of norms and activations) are not kept for
    /// the backward pass; they are made again there.
    pub fn recompute_cheap(mut self) -> Self {
        self.recompute_cheap = true;
        self
    }

    /// The same tape for a training pass that `key` tells from all others of a run: what is drawn at random in it is a
    /// function of the key, so that a pass that runs again draws the same.
    pub fn for_pass(mut self, key: Option<u64>) -> Self {
        self.pass = key;
        self
    }

    /// The key of the training pass, if this is one: without it nothing is to be dropped at random.
    pub fn pass(&self) -> Option<u64> {
        self.pass
    }

    /// Puts off the weight gradients of what is recorded from here on. For operations whose backward pass waits for other
    /// ranks and can do such work meanwhile; see [`Deferred`].
    pub fn defer(&self) -> Deferred {
        self.deferred.get_or_init(Deferred::default).clone()
    }

    /// Where weight gradients are to wait, if they are put off.
    pub(crate) fn deferred(&self) -> Option<Deferred> {
        self.deferred.get().cloned()
    }

    /// A tape that records nothing: saved tensors are freed at once.
    pub fn inference() -> Self {
        Self {
            nodes: None,
            ..Self::new()
        }
    }

    /// Whether operations are recorded.
    pub fn is_recording(&self) -> bool {
        self.nodes.is_some()
    }

    /// The number of nodes recorded so far, leaves included.
    pub fn num_nodes(&self) -> usize {
        self.nodes.as_ref().map_or(0, |nodes| nodes.borrow().len())
    }

    /// An input that gradients flow to.
    pub fn leaf(&self, value: Float<B>) -> Var<B> {
        self.push(value, Vec::new(), None)
    }

    /// An input that is not tracked.
    pub fn constant(&self, value: Float<B>) -> Var<B> {
        Var {
            value,
            node: None,
            recipe: None,
        }
    }

    /// Adds an operation. `backward` gets the gradient of `output` and returns that of each of `parents`, in order,
    /// `None` where there is none (or none is needed, see [`Var::is_tracked`]). When no parent is tracked, nothing is
    /// recorded.
    ///
    /// # Panics
    /// When a parent belongs to another tape.
    #[track_caller]
    pub fn record(
        &self,
        output: Float<B>,
        parents: &[&Var<B>],
        backward: impl FnOnce(Float<B>) -> Vec<Option<Float<B>>> + Send + 'static,
    ) -> Var<B> {
        self.record_with_params(output, parents, &[], backward)
    }

    /// Like [`record`](Self::record) for an operation that also accumulates gradients of `params`: recorded as well
    /// when no parent is tracked but one of `params` requires a gradient (as an embedding does).
    ///
    /// # Panics
    /// When a parent belongs to another tape.
    #[track_caller]
    pub fn record_with_params(
        &self,
        output: Float<B>,
        parents: &[&Var<B>],
        params: &[&Param<B>],
        backward: impl FnOnce(Float<B>) -> Vec<Option<Float<B>>> + Send + 'static,
    ) -> Var<B> {
        if !self.needs_grad(parents, params) {
            return self.constant(output);
        }
        let parents = parents.iter().map(|parent| self.index_of(parent)).collect();
        self.push(output, parents, Some(Backward::Returns(Box::new(backward))))
    }

    /// Like [`record_with_params`](Self::record_with_params) for an operation with one parent whose backward kernel
    /// can add to the gradient that the parent has so far. `backward` gets the gradient of `output` and that gradient,
    /// if there is one, and returns their sum: `None` only where the parent is not tracked.
    ///
    /// # Panics
    /// When the parent belongs to another tape.
    #[track_caller]
    pub fn record_accumulating(
        &self,
        output: Float<B>,
        parent: &Var<B>,
        params: &[&Param<B>],
        backward: impl FnOnce(Float<B>, Option<Float<B>>) -> Option<Float<B>> + Send + 'static,
    ) -> Var<B> {
        if !self.needs_grad(&[parent], params) {
            return self.constant(output);
        }
        let parents = vec![self.index_of(parent)];
        let backward = Backward::Accumulates(Box::new(backward));
        self.push(output, parents, Some(backward))
    }

    /// Says how `var` can be made again at little cost. On a tape that prefers that to keeping
    /// ([`recompute_cheap`](Self::recompute_cheap)), [`Var::saved`] then does.
    pub fn cheap(
        &self,
        var: Var<B>,
        make: impl Fn() -> Float<B> + Send + Sync + 'static,
    ) -> Var<B> {
        if !(self.recompute_cheap && var.is_tracked()) {
            return var;
        }
        Var {
            recipe: Some(Arc::new(Recipe::new(false, make))),
            ..var
        }
    }

    /// `var`, which has the value of `original`, as cheap as that is: what makes one again makes the other.
    pub fn cheap_as(&self, var: Var<B>, original: &Var<B>) -> Var<B> {
        let recipe = original.recipe.clone().filter(|_| var.is_tracked());
        var.with_recipe(recipe)
    }

    /// Whether cheap values are made again rather than kept.
    pub(crate) fn recomputes_cheap(&self) -> bool {
        self.recompute_cheap
    }

    /// Whether an operation on these inputs would be recorded. An operation that must prepare something for its
    /// backward pass can skip it when not.
    pub fn needs_grad(&self, parents: &[&Var<B>], params: &[&Param<B>]) -> bool {
        self.is_recording()
            && (parents.iter().any(|parent| parent.is_tracked())
                || params.iter().any(|param| param.requires_grad()))
    }

    /// Runs the recorded operations backward and consumes the tape.
    ///
    /// `seeds` are outputs with the gradient of the objective with respect to them. Returns the gradients of `leaves`,
    /// in order; `None` for one that no seed depends on. Weight gradients end up in their [`Param`]s. Each closure, and
    /// what it saved, is dropped as soon as it has run.
    ///
    /// # Panics
    /// When a seed or leaf is of another tape, a seed's shape differs from its output's, or a closure returns another
    /// number of gradients than it has parents.
    #[track_caller]
    pub fn backward(
        self,
        seeds: Vec<(Var<B>, Float<B>)>,
        leaves: &[&Var<B>],
    ) -> Vec<Option<Float<B>>> {
        let leaves: Vec<Option<usize>> = leaves.iter().map(|leaf| self.index_of(leaf)).collect();
        let mut grads: Vec<Option<Float<B>>> = vec![None; self.num_nodes()];
        for (output, seed) in seeds {
            let (expected, found) = (output.shape(), dims(&seed));
            assert_eq!(
                expected, found,
                "the output has shape {expected:?}, its seed {found:?}"
            );
            if let Some(index) = self.index_of(&output) {
                add_grad::<B>(&mut grads[index], seed);
            }
        }

        let mut nodes = self.nodes.map(RefCell::into_inner).unwrap_or_default();
        while let Some(node) = nodes.pop() {
            let Some(backward) = node.backward else {
                continue;
            };
            // Intermediate gradients are consumed here; a leaf keeps its own until the end.
            let Some(grad) = grads[nodes.len()].take() else {
                continue;
            };
            let backward = match backward {
                Backward::Returns(backward) => backward,
                Backward::Accumulates(backward) => {
                    let parent = node.parents[0];
                    let so_far = parent.and_then(|parent| grads[parent].take());
                    let sum = backward(grad, so_far);
                    if let Some(parent) = parent {
                        grads[parent] = sum;
                    }
                    continue;
                }
            };
            let parent_grads = backward(grad);
            assert_eq!(
                parent_grads.len(),
                node.parents.len(),
                "a backward closure returned {} gradients for {} parents",
                parent_grads.len(),
                node.parents.len()
            );
            for (parent, grad) in node.parents.into_iter().zip(parent_grads) {
                if let (Some(parent), Some(grad)) = (parent, grad) {
                    add_grad::<B>(&mut grads[parent], grad);
                }
            }
        }
        if let Some(deferred) = self.deferred.get() {
            deferred.finish();
        }
        leaves
            .into_iter()
            .map(|leaf| grads[leaf?].clone())
            .collect()
    }

    fn push(
        &self,
        value: Float<B>,
        parents: Vec<Option<usize>>,
        backward: Option<Backward<B>>,
    ) -> Var<B> {
        let node = self.nodes.as_ref().map(|nodes| {
            let mut nodes = nodes.borrow_mut();
            nodes.push(Node { parents, backward });
            NodeId {
                tape: self.id,
                index: nodes.len() - 1,
            }
        });
        Var {
            value,
            node,
            recipe: None,
        }
    }

    #[track_caller]
    fn index_of(&self, var: &Var<B>) -> Option<usize> {
        let node = var.node?;
        assert_eq!(
            node.tape, self.id,
            "a value of another tape was used; pass it through `Tape::leaf`"
        );
        Some(node.index)
    }
}

fn add_grad<B: Ops>(slot: &mut Option<Float<B>>, grad: Float<B>) {
    *slot = Some(match slot.take() {
        None => grad,
        Some(sum) => B::add(sum, grad),
    });
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use burn_flex::Flex;

    use super::*;
    use crate::testing::{DEVICE, random};
    use crate::{add, float_from_f32, mul, scale, to_f32_vec};

    fn number(x: f32) -> Float<Flex> {
        float_from_f32::<Flex>(&[x], &[1], &DEVICE)
    }

    #[test]
    fn gradients_of_several_seeds_and_uses_add_up() {
        let tape = Tape::<Flex>::new();
        let (x, unused) = (tape.leaf(number(3.0)), tape.leaf(number(1.0)));
        let square = mul(&tape, &x, &x); // slope 6
        let triple = scale(&tape, &x, 3.0); // slope 3
        let sum = add(&tape, &square, &triple); // slope 9
        let grads = tape.backward(
            vec![(sum, number(1.0)), (triple, number(10.0))],
            &[&x, &unused],
        );
        assert_eq!(to_f32_vec::<Flex>(grads[0].clone().unwrap()), [39.0]);
        assert!(grads[1].is_none());
    }

    #[test]
    fn closures_run_in_reverse_order_and_are_dropped_as_they_finish() {
        let log = Arc::new(Mutex::new(Vec::new()));
        struct Saved(Arc<Mutex<Vec<String>>>, usize);
        impl Drop for Saved {
            fn drop(&mut self) {
                self.0.lock().unwrap().push(format!("drop {}", self.1));
            }
        }
        let tape = Tape::<Flex>::new();
        let mut x = tape.leaf(number(1.0));
        for i in 0..3 {
            let saved = Saved(Arc::clone(&log), i);
            x = tape.record(x.value(), &[&x], move |dy| {
                let saved = &saved;
                saved.0.lock().unwrap().push(format!("run {}", saved.1));
                vec![Some(dy)]
            });
        }
        // Not connected to a seed: never run, but dropped.
        let saved = Saved(Arc::clone(&log), 9);
        tape.record(x.value(), &[&x], move |_| {
            let saved = &saved;
            panic!("no gradient flows here, {}", saved.1)
        });
        tape.backward(vec![(x, number(1.0))], &[]);
        let log = std::mem::take(&mut *log.lock().unwrap());
        assert_eq!(
            log,
            [
                "drop 9", "run 2", "drop 2", "run 1", "drop 1", "run 0", "drop 0"
            ]
        );
    }

    #[test]
    fn accumulating_nodes_add_to_what_the_parent_has() {
        let tape = Tape::<Flex>::new();
        let x = tape.leaf(number(3.0));
        let double = |tape: &Tape<Flex>, x: &Var<Flex>| {
            tape.record_accumulating(Flex::scale(x.value(), 2.0), x, &[], |dy, so_far| {
                let dx = Flex::scale(dy, 2.0);
                Some(match so_far {
                    Some(so_far) => Flex::add(so_far, dx),
                    None => dx,
                })
            })
        };
        let y = double(&tape, &x);
        let z = add(&tape, &double(&tape, &y), &double(&tape, &y)); // slope 4 in y
        let sum = add(&tape, &z, &x);
        let grads = tape.backward(vec![(sum, number(1.0))], &[&x]);
        assert_eq!(to_f32_vec::<Flex>(grads[0].clone().unwrap()), [9.0]);
    }

    #[test]
    fn cheap_values_are_made_again_once_and_only_when_asked_for() {
        use std::sync::atomic::AtomicUsize;
        for (recompute, expected) in [(false, 0), (true, 1)] {
            let made = Arc::new(AtomicUsize::new(0));
            let tape = Tape::<Flex>::new();
            let tape = if recompute {
                tape.recompute_cheap()
            } else {
                tape
            };
            let x = tape.leaf(number(3.0));
            let counter = Arc::clone(&made);
            let y = tape.cheap(scale(&tape, &x, 2.0), move || {
                counter.fetch_add(1, Ordering::Relaxed);
                number(6.0)
            });
            let copy = tape.record(y.value(), &[&y], |dy| vec![Some(dy)]);
            let copy = tape.cheap_as(copy, &y);
            let kept = [y.saved(), y.saved(), copy.saved()];
            drop((y, copy));
            for saved in kept {
                assert_eq!(to_f32_vec::<Flex>(saved.get()), [6.0]);
            }
            assert_eq!(made.load(Ordering::Relaxed), expected);
        }
    }

    #[test]
    fn constants_and_inference_tapes_record_nothing() {
        let tape = Tape::<Flex>::new();
        let c = tape.constant(number(1.0));
        assert!(!add(&tape, &c, &c).is_tracked());
        assert_eq!(tape.num_nodes(), 0);
        let tape = Tape::<Flex>::inference();
        let x = tape.leaf(number(1.0));
        assert!(!scale(&tape, &x, 2.0).is_tracked() && !tape.is_recording());
        assert!(tape.backward(vec![(x.clone(), number(1.0))], &[&x])[0].is_none());
    }

    #[test]
    fn saved_tensors_live_as_long_as_the_node() {
        let tape = Tape::<Flex>::new();
        let x = tape.leaf(random(&[4], 1));
        let factor = random(&[4], 2);
        let y = mul(&tape, &x, &tape.constant(factor.clone()));
        assert!(!factor.is_unique());
        tape.backward(vec![(y, random(&[4], 3))], &[&x]);
        assert!(factor.is_unique());
    }

    #[test]
    #[should_panic(expected = "another tape")]
    fn values_of_another_tape_are_refused() {
        let (one, other) = (Tape::<Flex>::new(), Tape::<Flex>::new());
        scale(&one, &other.leaf(number(1.0)), 2.0);
    }

    #[test]
    #[should_panic(expected = "the output has shape [1], its seed [4]")]
    fn seeds_must_have_the_shape_of_their_output() {
        let tape = Tape::<Flex>::new();
        let x = tape.leaf(number(1.0));
        tape.backward(vec![(x, random(&[4], 1))], &[]);
    }
}
