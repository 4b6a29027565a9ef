//! From the declared form to pieces: every pattern filled in, every view made, coverage checked.

use std::collections::HashMap;

use super::builder::{Arrange, Entry, Form, LESS_ONE, WeightMap};
use super::coverage;
use super::pattern::{Captures, Pattern};
use super::view::{View, ViewError};
use crate::bridge::CanonicalTensor;
use crate::error::Problems;

/// What a foreign tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignRole {
    /// Weights of its own.
    Weight,
    /// A second name of canonical tensor number `of`, which a checkpoint may leave out.
    TiedCopy {
        /// Index into [`Mapping::canonical`].
        of: usize,
    },
}

/// A tensor that a foreign checkpoint of the model is expected to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignTensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it holds.
    pub role: ForeignRole,
}

/// Equal elements (but for [`Mapping::is_less_one`]): the view `canonical_view` of one canonical tensor and `foreign_view` of one foreign tensor, of equal
/// shape, element by element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Index into [`Mapping::canonical`].
    pub canonical: usize,
    /// Index into [`Mapping::foreign`].
    pub foreign: usize,
    /// Which elements of the canonical tensor.
    pub canonical_view: View,
    /// Which elements of the foreign tensor.
    pub foreign_view: View,
}

/// A [`WeightMap`] applied to the canonical tensors of one model.
#[derive(Debug, Clone)]
pub struct Mapping {
    /// The canonical tensors.
    pub canonical: Vec<CanonicalTensor>,
    /// The foreign tensors, in the order of the canonical ones that they first meet.
    pub foreign: Vec<ForeignTensor>,
    /// What each foreign tensor is made by, in words: "copy", "map", "less one", "fused", "stacked", "unstacked".
    pub ops: Vec<&'static str>,
    /// The pieces.
    pub pieces: Vec<Piece>,
    ignored: Vec<(Pattern, String)>,
    by_name: HashMap<String, usize>,
    of_foreign: Vec<Vec<usize>>,
    of_canonical: Vec<Vec<usize>>,
}

impl Mapping {
    /// Index of the foreign tensor called `name`.
    pub fn foreign_index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Whether foreign tensor number `foreign` holds the canonical elements less one. Of all others the elements are
    /// equal.
    pub fn is_less_one(&self, foreign: usize) -> bool {
        self.ops[foreign] == LESS_ONE
    }

    /// The pieces of foreign tensor number `foreign`.
    pub fn pieces_of_foreign(&self, foreign: usize) -> impl Iterator<Item = &Piece> {
        self.of_foreign[foreign]
            .iter()
            .map(|piece| &self.pieces[*piece])
    }

    /// The pieces of canonical tensor number `canonical`, tied copies included.
    pub fn pieces_of_canonical(&self, canonical: usize) -> impl Iterator<Item = &Piece> {
        self.of_canonical[canonical]
            .iter()
            .map(|piece| &self.pieces[*piece])
    }

    /// Why foreign tensor `name` is not needed, if the map says so.
    pub fn ignored(&self, name: &str) -> Option<&str> {
        self.ignored
            .iter()
            .find(|(pattern, _)| pattern.matches(name).is_some())
            .map(|(_, reason)| reason.as_str())
    }
}

impl WeightMap {
    /// Applies the map to the canonical tensors of a model, and checks that every element of every tensor on both
    /// sides is met exactly once.
    ///
    /// # Errors
    /// Every gap, overlap and misfit.
    pub fn resolve(&self, tensors: &[CanonicalTensor]) -> Result<Mapping, Problems> {
        let mut build = Build {
            map: self,
            tensors,
            problems: Problems::new(),
            foreign: Vec::new(),
            by_name: HashMap::new(),
        };
        for error in &self.errors {
            build.problems.push(error.clone());
        }
        let members = build.assign();
        for (entry, members) in self.entries.iter().zip(members) {
            build.entry(entry, members);
        }
        build.finish()
    }
}

/// A canonical tensor that an entry takes, under its own name or, where tied, under a second one.
pub(super) struct Member {
    /// Index of the tensor that holds the elements.
    pub(super) tensor: usize,
    pub(super) tied: bool,
    pub(super) name: String,
    /// Which of the entry's canonical patterns matched.
    pub(super) part: usize,
    pub(super) captures: Captures,
}

pub(super) struct Build<'a> {
    map: &'a WeightMap,
    pub(super) tensors: &'a [CanonicalTensor],
    pub(super) problems: Problems,
    foreign: Vec<(ForeignTensor, &'static str, Vec<(usize, View, View)>)>,
    by_name: HashMap<String, usize>,
}

impl Build<'_> {
    /// Hands each canonical tensor to the first entry that takes it. One list per entry.
    fn assign(&mut self) -> Vec<Vec<Member>> {
        let mut members: Vec<Vec<Member>> = self.map.entries.iter().map(|_| Vec::new()).collect();
        let mut by_name: HashMap<&str, usize> = HashMap::new();
        for (index, tensor) in self.tensors.iter().enumerate() {
            if by_name.insert(&tensor.name, index).is_some() {
                self.problems.push(format!(
                    "canonical tensor `{}` is declared twice",
                    tensor.name
                ));
            }
        }
        let own = self
            .tensors
            .iter()
            .enumerate()
            .map(|(index, tensor)| (tensor.name.as_str(), index, false));
        let mut tied = Vec::new();
        for (name, source) in &self.map.tied {
            match by_name.get(source.as_str()) {
                Some(_) if by_name.contains_key(name.as_str()) => {
                    self.problems.push(format!(
                        "canonical tensor `{name}` is tied, and a tensor of its own as well"
                    ));
                }
                Some(source) => tied.push((name.as_str(), *source, true)),
                None => self.problems.push(format!(
                    "`{name}` is tied to `{source}`, which is no canonical tensor"
                )),
            }
        }
        for (name, tensor, tied) in own.chain(tied) {
            let found = self
                .map
                .entries
                .iter()
                .enumerate()
                .find_map(|(entry, declared)| {
                    let matched =
                        |(part, pattern): (usize, &Pattern)| Some((part, pattern.matches(name)?));
                    declared
                        .canonical
                        .iter()
                        .enumerate()
                        .find_map(matched)
                        .map(|(part, captures)| (entry, part, captures))
                });
            match found {
                Some((entry, part, captures)) => {
                    members[entry].push(Member {
                        tensor,
                        tied,
                        name: name.to_owned(),
                        part,
                        captures,
                    });
                }
                // A second name that no entry maps is simply never written.
                None if tied => {}
                None => self.problems.push(format!(
                    "canonical tensor `{name}` has no entry in the weight map"
                )),
            }
        }
        members
    }

    fn entry(&mut self, entry: &Entry, members: Vec<Member>) {
        match &entry.form {
            Form::One { op, arrange } => {
                for member in members {
                    let shape = &self.tensors[member.tensor].shape;
                    match (
                        arrange(View::whole(shape)),
                        entry.foreign.fill(&member.captures),
                    ) {
                        (Ok(arranged), Some(name)) => {
                            let foreign = self.spread(&arranged.shape, arranged.view.shape());
                            match foreign {
                                Ok(foreign_view) => {
                                    let pieces = vec![(member.tensor, arranged.view, foreign_view)];
                                    self.add(name, arranged.shape, op, &member, pieces);
                                }
                                Err(error) => self.misfit(&member.name, &name, &error),
                            }
                        }
                        (Err(error), name) => {
                            self.misfit(&member.name, name.as_deref().unwrap_or("?"), &error)
                        }
                        (Ok(_), None) => self.unfilled(entry, &member),
                    }
                }
            }
            Form::Unstacked { counter, arrange } => {
                self.unstacked(entry, counter, arrange, members)
            }
            Form::Fused {
                dim,
                groups,
                arrange,
            } => self.fused(entry, *dim, *groups, arrange, members),
        }
    }

    /// A view of a whole tensor of `shape` with the finer dimensions `extents`, whose elements lie in the same order.
    fn spread(&self, shape: &[usize], extents: &[usize]) -> Result<View, ViewError> {
        if shape == extents {
            return Ok(View::whole(shape));
        }
        let numel: usize = shape.iter().product();
        if numel == 0 {
            return Ok(View::whole(extents));
        }
        // Row-major order of `extents` is row-major order of `shape`: the strides are those of a fresh tensor.
        View::whole(&[numel]).split(0, extents)
    }

    fn unstacked(&mut self, entry: &Entry, counter: &str, arrange: &Arrange, members: Vec<Member>) {
        for member in members {
            let shape = &self.tensors[member.tensor].shape;
            let Some(count) = shape.first().copied() else {
                self.problems.push(format!(
                    "canonical tensor `{}` has no dimension that counts tensors",
                    member.name
                ));
                continue;
            };
            for index in 0..count {
                let captures = member.captures.with(counter, index.to_string());
                let Some(name) = entry.foreign.fill(&captures) else {
                    self.unfilled(entry, &member);
                    break;
                };
                let made = View::whole(shape)
                    .select(0, index)
                    .and_then(|view| arrange(view));
                match made.and_then(|made| Ok((self.spread(&made.shape, made.view.shape())?, made)))
                {
                    Ok((foreign_view, made)) => {
                        let pieces = vec![(member.tensor, made.view, foreign_view)];
                        self.add(name, made.shape, "unstacked", &member, pieces);
                    }
                    Err(error) => self.misfit(&member.name, &name, &error),
                }
            }
        }
    }

    pub(super) fn add(
        &mut self,
        name: String,
        shape: Vec<usize>,
        op: &'static str,
        member: &Member,
        pieces: Vec<(usize, View, View)>,
    ) {
        let role = if member.tied {
            ForeignRole::TiedCopy { of: member.tensor }
        } else {
            ForeignRole::Weight
        };
        if self
            .by_name
            .insert(name.clone(), self.foreign.len())
            .is_some()
        {
            self.problems.push(format!(
                "foreign tensor `{name}` is made by two entries of the weight map"
            ));
            return;
        }
        self.foreign
            .push((ForeignTensor { name, shape, role }, op, pieces));
    }

    fn misfit(&mut self, canonical: &str, foreign: &str, error: &ViewError) {
        self.problems.push(format!(
            "canonical tensor `{canonical}` does not map to `{foreign}`: {error}"
        ));
    }

    pub(super) fn unfilled(&mut self, entry: &Entry, member: &Member) {
        self.problems.push(format!(
            "`{}` has a capture that canonical tensor `{}` lacks",
            entry.foreign, member.name
        ));
    }

    fn finish(mut self) -> Result<Mapping, Problems> {
        // In the order of the canonical tensors, so that plans and files list layers one after the other.
        self.foreign.sort_by_key(|(tensor, _, pieces)| {
            (
                matches!(tensor.role, ForeignRole::TiedCopy { .. }),
                pieces.iter().map(|(canonical, ..)| *canonical).min(),
            )
        });
        let mut mapping = Mapping {
            canonical: self.tensors.to_vec(),
            foreign: Vec::with_capacity(self.foreign.len()),
            ops: Vec::with_capacity(self.foreign.len()),
            pieces: Vec::new(),
            ignored: self.map.ignored.clone(),
            by_name: HashMap::with_capacity(self.foreign.len()),
            of_foreign: Vec::with_capacity(self.foreign.len()),
            of_canonical: vec![Vec::new(); self.tensors.len()],
        };
        for (index, (tensor, op, pieces)) in self.foreign.into_iter().enumerate() {
            mapping.by_name.insert(tensor.name.clone(), index);
            let start = mapping.pieces.len();
            for (canonical, canonical_view, foreign_view) in pieces {
                mapping.of_canonical[canonical].push(mapping.pieces.len());
                mapping.pieces.push(Piece {
                    canonical,
                    foreign: index,
                    canonical_view,
                    foreign_view,
                });
            }
            mapping
                .of_foreign
                .push((start..mapping.pieces.len()).collect());
            mapping.foreign.push(tensor);
            mapping.ops.push(op);
        }
        check_coverage(&mapping, &mut self.problems);
        if self.problems.is_empty() {
            Ok(mapping)
        } else {
            Err(self.problems)
        }
    }
}

/// Every element of every tensor on both sides exactly once. Tied copies count for the foreign side only.
fn check_coverage(mapping: &Mapping, problems: &mut Problems) {
    for (index, tensor) in mapping.canonical.iter().enumerate() {
        let own = |piece: &&Piece| mapping.foreign[piece.foreign].role == ForeignRole::Weight;
        let views: Vec<&View> = mapping
            .pieces_of_canonical(index)
            .filter(own)
            .map(|p| &p.canonical_view)
            .collect();
        // A tensor without an entry has been reported.
        if !views.is_empty()
            && let Err(problem) = coverage::check(&tensor.shape, &views)
        {
            problems.push(format!(
                "canonical tensor `{}` of shape {:?}: {problem}",
                tensor.name, tensor.shape
            ));
        }
    }
    for (index, tensor) in mapping.foreign.iter().enumerate() {
        let views: Vec<&View> = mapping
            .pieces_of_foreign(index)
            .map(|piece| &piece.foreign_view)
            .collect();
        if let Err(problem) = coverage::check(&tensor.shape, &views) {
            problems.push(format!(
                "foreign tensor `{}` of shape {:?}: {problem}",
                tensor.name, tensor.shape
            ));
        }
    }
}
