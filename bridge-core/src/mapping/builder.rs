//! The declarative form of a mapping: one line per kind of tensor.

use std::sync::Arc;

use super::pattern::Pattern;
use super::view::{Arranged, View, ViewError};

/// What [`WeightMap::less_one`] is called in plans.
pub(super) const LESS_ONE: &str = "less one";

/// Puts a canonical tensor's elements into the order of its foreign counterpart.
pub(super) type Arrange = Arc<dyn Fn(View) -> Result<Arranged, ViewError> + Send + Sync>;

/// How the weights of a family correspond to a foreign checkpoint's, declared once for both directions.
///
/// Names are [patterns](Pattern). For each canonical tensor the first entry whose pattern matches decides.
///
/// ```
/// use bridge_core::WeightMap;
/// let (tied, kv_heads) = (true, 2);
/// let map = WeightMap::new()
///     .copy("embedding.weight", "model.embed_tokens.weight")
///     .copy("lm_head.weight", "lm_head.weight")
///     .copy("layers.{l}.attention.{p}_proj.weight", "model.layers.{l}.self_attn.{p}_proj.weight")
///     .fused(
///         "model.layers.{l}.mlp.gate_up_proj.weight",
///         &["layers.{l}.mlp.gate_proj.weight", "layers.{l}.mlp.up_proj.weight"],
///         0,
///     )
///     .map("layers.{l}.mlp.down_proj.weight", "model.layers.{l}.mlp.wo", |view| view.transpose(0, 1))
///     .tied("lm_head.weight", "embedding.weight", tied)
///     .ignore("model.layers.{l}.self_attn.rotary_emb.inv_freq", "recomputed from rope_theta");
/// # let _ = (map, kv_heads);
/// ```
#[derive(Clone, Default)]
pub struct WeightMap {
    pub(super) entries: Vec<Entry>,
    pub(super) tied: Vec<(String, String)>,
    pub(super) ignored: Vec<(Pattern, String)>,
    /// Maps of other forms of the same model, each with a name that gives the form away.
    alternatives: Vec<(Pattern, WeightMap)>,
    /// Patterns that do not parse; reported when the map is used.
    pub(super) errors: Vec<String>,
}

/// One line of a [`WeightMap`].
#[derive(Clone)]
pub(super) struct Entry {
    /// The canonical patterns: one, or the parts of a fused tensor in its order.
    pub(super) canonical: Vec<Pattern>,
    pub(super) foreign: Pattern,
    pub(super) form: Form,
}

#[derive(Clone)]
pub(super) enum Form {
    /// One canonical tensor is one foreign tensor.
    One { op: &'static str, arrange: Arrange },
    /// Several canonical tensors lie in one foreign tensor.
    Fused {
        dim: usize,
        groups: usize,
        arrange: Arrange,
    },
    /// One canonical tensor lists foreign tensors along its first dimension; the string names the counting capture.
    Unstacked { counter: String, arrange: Arrange },
}

/// Several canonical tensors that lie in one foreign tensor; see [`WeightMap::fuse`].
///
/// The parts follow each other along [`dim`](Fused::dim), once, or in turns of one [group](Fused::groups) each. Where
/// the parts have a capture that the foreign name lacks, as `{e}`, the fused tensors it counts are stacked along a new
/// first dimension.
#[derive(Clone)]
pub struct Fused {
    foreign: String,
    parts: Vec<String>,
    dim: usize,
    groups: usize,
    arrange: Arrange,
}

impl Fused {
    /// `parts` in the order in which they lie in `foreign`, along dimension 0.
    pub fn new(foreign: &str, parts: &[&str]) -> Self {
        Self {
            foreign: foreign.to_owned(),
            parts: parts.iter().map(|&part| part.to_owned()).collect(),
            dim: 0,
            groups: 1,
            arrange: Arc::new(|view| Ok(view.into())),
        }
    }

    /// The dimension along which the parts follow each other, counted without the dimension of a stack.
    pub fn dim(mut self, dim: usize) -> Self {
        self.dim = dim;
        self
    }

    /// In how many turns the parts lie: 1 is plain concatenation; the number of key-value heads interleaves q, k and v
    /// by group; the extent of a part interleaves its rows one by one.
    pub fn groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    /// What is done to each part first, such as a transpose.
    pub fn arrange(
        mut self,
        arrange: impl Fn(View) -> Result<View, ViewError> + Send + Sync + 'static,
    ) -> Self {
        self.arrange = Arc::new(move |view| arrange(view).map(Arranged::from));
        self
    }
}

impl WeightMap {
    /// A map without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// A renamed tensor.
    pub fn copy(self, canonical: &str, foreign: &str) -> Self {
        self.one(canonical, foreign, "copy", |view| Ok(view.into()))
    }

    /// A tensor whose elements lie in another order: `arrange` takes the whole canonical tensor to a view that lists
    /// its elements as the foreign tensor does. The foreign shape is the view's, unless
    /// [`View::reads_as`] gives another.
    pub fn map<A: Into<Arranged>>(
        self,
        canonical: &str,
        foreign: &str,
        arrange: impl Fn(View) -> Result<A, ViewError> + Send + Sync + 'static,
    ) -> Self {
        self.one(canonical, foreign, "map", move |view| {
            arrange(view).map(Into::into)
        })
    }

    /// A renamed tensor whose elements the foreign checkpoint stores less one: the weight of a norm that scales by one
    /// plus its weight there, and by its weight here. Whoever moves elements must see
    /// [`Mapping::is_less_one`](super::Mapping::is_less_one).
    pub fn less_one(self, canonical: &str, foreign: &str) -> Self {
        self.one(canonical, foreign, LESS_ONE, |view| Ok(view.into()))
    }

    /// Several canonical tensors concatenated along `dim` of one foreign tensor.
    pub fn fused(self, foreign: &str, parts: &[&str], dim: usize) -> Self {
        self.fuse(Fused::new(foreign, parts).dim(dim))
    }

    /// Several canonical tensors in one foreign tensor, in any of the ways of [`Fused`].
    pub fn fuse(mut self, fused: Fused) -> Self {
        let Fused {
            foreign,
            parts,
            dim,
            groups,
            arrange,
        } = fused;
        let canonical: Vec<Pattern> = parts.iter().filter_map(|part| self.pattern(part)).collect();
        if let Some(foreign) = self.pattern(&foreign)
            && canonical.len() == parts.len()
        {
            self.entries.push(Entry {
                canonical,
                foreign,
                form: Form::Fused {
                    dim,
                    groups,
                    arrange,
                },
            });
        }
        self
    }

    /// Canonical tensors counted by a capture (as `{e}`) that `foreign` lacks, stacked along its first dimension.
    pub fn stacked_experts(self, foreign: &str, canonical: &str) -> Self {
        self.fuse(Fused::new(foreign, &[canonical]))
    }

    /// A canonical tensor whose first dimension lists foreign tensors, counted by a capture (as `{e}`) that
    /// `canonical` lacks.
    pub fn unstacked_experts(mut self, canonical: &str, foreign: &str) -> Self {
        if let (Some(canonical), Some(foreign)) = (self.pattern(canonical), self.pattern(foreign)) {
            let names = canonical.capture_names();
            let counters: Vec<&str> = foreign
                .capture_names()
                .into_iter()
                .filter(|n| !names.contains(n))
                .collect();
            if let [counter] = counters.as_slice() {
                let form = Form::Unstacked {
                    counter: (*counter).to_owned(),
                    arrange: Arc::new(|v| Ok(v.into())),
                };
                self.entries.push(Entry {
                    canonical: vec![canonical],
                    foreign,
                    form,
                });
            } else {
                self.errors.push(format!(
                    "`{foreign}` must have exactly one capture that `{canonical}` lacks"
                ));
            }
        }
        self
    }

    /// The lines of this map, then those of `other`.
    pub fn then(mut self, other: WeightMap) -> Self {
        self.entries.extend(other.entries);
        self.tied.extend(other.tied);
        self.ignored.extend(other.ignored);
        self.errors.extend(other.errors);
        self.alternatives.extend(other.alternatives);
        self
    }

    /// The lines of this map whose names start with `canonical.0` and `foreign.0`, with `canonical.1` and `foreign.1` in
    /// their places: the same layer somewhere else.
    ///
    /// ```
    /// use bridge_core::WeightMap;
    /// let layers = WeightMap::new().copy("layers.{l}.norm.weight", "model.layers.{l}.ln.weight");
    /// // A module after the last of 61 layers is made like one of them.
    /// let module = layers.relocated(("layers.{l}.", "mtp.0.layer."), ("model.layers.{l}.", "model.layers.61."));
    /// let map = module.then(layers);
    /// # let _ = map;
    /// ```
    pub fn relocated(&self, canonical: (&str, &str), foreign: (&str, &str)) -> WeightMap {
        let mut moved = WeightMap::new();
        moved.errors.clone_from(&self.errors);
        let rename = |pattern: &Pattern, (from, to): (&str, &str)| {
            let text = pattern.to_string();
            text.strip_prefix(from).map(|rest| format!("{to}{rest}"))
        };
        for entry in &self.entries {
            let names: Option<Vec<String>> = entry
                .canonical
                .iter()
                .map(|pattern| rename(pattern, canonical))
                .collect();
            let (Some(names), Some(stored)) = (names, rename(&entry.foreign, foreign)) else {
                continue;
            };
            let patterns: Vec<Pattern> = names.iter().filter_map(|n| moved.pattern(n)).collect();
            if let Some(stored) = moved.pattern(&stored)
                && patterns.len() == names.len()
            {
                moved.entries.push(Entry {
                    canonical: patterns,
                    foreign: stored,
                    form: entry.form.clone(),
                });
            }
        }
        for (pattern, reason) in &self.ignored {
            if let Some(name) = rename(pattern, foreign) {
                moved = moved.ignore(&name, reason);
            }
        }
        moved
    }

    /// Takes `map` in place of this one for a checkpoint that holds a tensor called `sign`, a pattern. For models that
    /// are stored in several forms which no config key tells apart.
    pub fn when_stored(mut self, sign: &str, map: WeightMap) -> Self {
        if let Some(pattern) = self.pattern(sign) {
            self.alternatives.push((pattern, map));
        }
        self
    }

    /// The alternative whose sign ends with `suffix`.
    pub(crate) fn form_with_suffix(&self, suffix: &str) -> Option<WeightMap> {
        self.alternatives
            .iter()
            .find(|(sign, _)| sign.to_string().ends_with(suffix))
            .map(|(_, map)| map.clone())
    }

    /// The map for a checkpoint with tensors of these names: the first alternative whose sign is among them, or this.
    pub(crate) fn for_stored<'n>(self, names: impl Iterator<Item = &'n str> + Clone) -> WeightMap {
        let found = self
            .alternatives
            .iter()
            .position(|(sign, _)| names.clone().any(|name| sign.matches(name).is_some()));
        match found {
            Some(index) => {
                let (_, map) = self.alternatives[index].clone();
                map
            }
            None => self,
        }
    }

    /// Where `when` holds, `canonical` is no tensor of its own but `source` under another name. A foreign checkpoint
    /// may hold either or both; both must then be equal. Names, not patterns.
    pub fn tied(mut self, canonical: &str, source: &str, when: bool) -> Self {
        if when {
            self.tied.push((canonical.to_owned(), source.to_owned()));
        }
        self
    }

    /// A foreign tensor that is not needed, and why. It may be absent; it is listed in every plan that meets it.
    pub fn ignore(mut self, foreign: &str, reason: &str) -> Self {
        if let Some(pattern) = self.pattern(foreign) {
            self.ignored.push((pattern, reason.to_owned()));
        }
        self
    }

    fn one(
        mut self,
        canonical: &str,
        foreign: &str,
        op: &'static str,
        arrange: impl Fn(View) -> Result<Arranged, ViewError> + Send + Sync + 'static,
    ) -> Self {
        if let (Some(canonical), Some(foreign)) = (self.pattern(canonical), self.pattern(foreign)) {
            let form = Form::One {
                op,
                arrange: Arc::new(arrange),
            };
            self.entries.push(Entry {
                canonical: vec![canonical],
                foreign,
                form,
            });
        }
        self
    }

    fn pattern(&mut self, text: &str) -> Option<Pattern> {
        Pattern::parse(text)
            .map_err(|error| self.errors.push(error))
            .ok()
    }
}
