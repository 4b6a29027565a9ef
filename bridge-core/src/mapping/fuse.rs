//! Fused and stacked tensors: several canonical tensors in one foreign tensor.

use std::collections::BTreeMap;

use super::builder::{Arrange, Entry};
use super::resolve::{Build, Member};
use super::view::View;

impl Build<'_> {
    pub(super) fn fused(
        &mut self,
        entry: &Entry,
        dim: usize,
        groups: usize,
        arrange: &Arrange,
        members: Vec<Member>,
    ) {
        let shared = entry.foreign.capture_names();
        // Foreign name -> stack index -> part -> member. The stack index is 0 where nothing is stacked.
        let mut found: BTreeMap<String, BTreeMap<usize, BTreeMap<usize, Member>>> = BTreeMap::new();
        let mut stacked = false;
        for member in members {
            let Some(name) = entry.foreign.fill(&member.captures) else {
                self.unfilled(entry, &member);
                continue;
            };
            let own = member.captures.filtered(|name| !shared.contains(&name));
            let counters: Vec<&str> = entry.canonical[member.part].capture_names();
            let counters: Vec<&str> = counters
                .into_iter()
                .filter(|name| !shared.contains(name))
                .collect();
            let index = match counters.as_slice() {
                [] => 0,
                [counter] => match own.number(counter) {
                    Some(index) => index,
                    None => {
                        self.problems.push(format!(
                            "capture {{{counter}}} of `{}` must count",
                            member.name
                        ));
                        continue;
                    }
                },
                _ => {
                    self.problems.push(format!(
                        "`{}` is stacked by more than one capture: {counters:?}",
                        member.name
                    ));
                    continue;
                }
            };
            stacked |= !counters.is_empty();
            found
                .entry(name)
                .or_default()
                .entry(index)
                .or_default()
                .insert(member.part, member);
        }
        for (name, stack) in found {
            if let Err(problem) =
                self.fused_tensor(&name, entry, dim, groups, arrange, stacked, stack)
            {
                self.problems
                    .push(format!("fused tensor `{name}`: {problem}"));
            }
        }
    }

    fn fused_tensor(
        &mut self,
        name: &str,
        entry: &Entry,
        dim: usize,
        groups: usize,
        arrange: &Arrange,
        stacked: bool,
        stack: BTreeMap<usize, BTreeMap<usize, Member>>,
    ) -> Result<(), String> {
        let depth = stack.len();
        if !stack.keys().copied().eq(0..depth) {
            return Err(format!(
                "its {depth} members are not numbered 0 to {}",
                depth - 1
            ));
        }
        if groups == 0 {
            return Err("it has 0 groups, expected at least 1".to_owned());
        }
        let mut pieces = Vec::new();
        let mut shape: Option<Vec<usize>> = None;
        let mut first: Option<Member> = None;
        for (index, parts) in stack {
            // Views of this member's parts, each with the dimension cut into groups: [.., groups, unit, ..].
            let mut views = Vec::new();
            let mut total = 0;
            for (part, pattern) in entry.canonical.iter().enumerate() {
                let member = parts
                    .get(&part)
                    .ok_or_else(|| format!("no canonical tensor matches part `{pattern}`"))?;
                let tensor = &self.tensors[member.tensor];
                let view = arrange(View::whole(&tensor.shape))
                    .map_err(|error| format!("`{}`: {error}", tensor.name))?;
                let view = view.view;
                let extent = *view.shape().get(dim).ok_or_else(|| {
                    format!(
                        "`{}` has shape {:?} without dimension {dim}",
                        tensor.name,
                        view.shape()
                    )
                })?;
                if extent % groups != 0 {
                    return Err(format!(
                        "dimension {dim} of `{}` is {extent}, expected a multiple of the {groups} groups",
                        tensor.name
                    ));
                }
                let unit = extent / groups;
                let cut = view
                    .split(dim, &[groups, unit])
                    .map_err(|error| error.to_string())?;
                views.push((member.tensor, cut, total..total + unit));
                total += unit;
            }
            let member_shape = |view: &View| {
                let mut shape = view.shape().to_vec();
                shape.splice(dim..dim + 2, [groups * total]);
                if stacked {
                    shape.insert(0, depth);
                }
                shape
            };
            for (tensor, canonical, range) in views {
                let own = member_shape(&canonical);
                let expected = shape.get_or_insert_with(|| own.clone());
                if *expected != own {
                    let name = &self.tensors[tensor].name;
                    return Err(format!(
                        "`{name}` would make its shape {own:?}, the parts before it {expected:?}"
                    ));
                }
                let whole = View::whole(&own);
                let member_view = if stacked {
                    whole.select(0, index)
                } else {
                    Ok(whole)
                };
                let foreign = member_view
                    .and_then(|view| view.split(dim, &[groups, total]))
                    .and_then(|view| view.slice(dim + 1, range))
                    .map_err(|error| error.to_string())?;
                pieces.push((tensor, canonical, foreign));
            }
            first = first.or_else(|| parts.into_values().next());
        }
        if let (Some(shape), Some(member)) = (shape, first) {
            let op = if !stacked { "fused" } else { "stacked" };
            self.add(name.to_owned(), shape, op, &member, pieces);
        }
        Ok(())
    }
}
