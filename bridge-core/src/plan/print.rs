//! A plan as a table: one line per kind of tensor, however many layers and experts there are.

use std::collections::HashMap;
use std::fmt;

use super::{Plan, PlannedTensor};
use crate::layout::{Place, ShardRule};

/// Tensors that differ in the numbers of their names only.
struct Group<'a> {
    canonical: String,
    foreign: String,
    first: &'a PlannedTensor,
    /// Lowest and highest number at each place of the canonical name.
    numbers: Vec<(usize, usize)>,
    count: usize,
    bytes: u64,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} parameters in {} tensors, {}",
            self.family,
            grouped(self.parameters),
            self.tensors.len(),
            size(self.total_bytes)
        )?;
        let header = [
            "canonical",
            "in the checkpoint",
            "shape",
            "dtype",
            "op",
            "sharding",
            "tensors",
            "size",
        ];
        let mut rows = vec![header.map(str::to_owned)];
        for group in groups(&self.tensors) {
            let mut canonical = group.canonical;
            for (low, high) in group.numbers {
                let range = if low == high {
                    low.to_string()
                } else {
                    format!("{low}-{high}")
                };
                canonical = canonical.replacen("{}", &range, 1);
            }
            rows.push([
                canonical,
                group.foreign.replace("{}", "*"),
                format!("{:?}", group.first.shape),
                group.first.dtype.to_string(),
                group.first.op.to_owned(),
                sharding(&group.first.shard),
                group.count.to_string(),
                size(group.bytes),
            ]);
        }
        write_table(f, &rows)?;
        for tied in &self.tied {
            let state = if tied.present {
                "present, must be equal"
            } else {
                "absent"
            };
            writeln!(f, "tied: {} is {} ({state})", tied.name, tied.canonical)?;
        }
        for (reason, count, bytes) in ignored(self) {
            writeln!(f, "ignored: {count} tensors, {} ({reason})", size(bytes))?;
        }
        writeln!(f, "layout: {}, {} ranks", self.layout, self.ranks.len())?;
        // Ranks that hold as much stand together; data parallel replicas are the commonest case.
        let mut shown: Vec<(u64, usize, usize, usize)> = Vec::new();
        for rank in &self.ranks {
            match shown
                .iter_mut()
                .find(|(bytes, tensors, ..)| (*bytes, *tensors) == (rank.bytes, rank.tensors))
            {
                Some((.., count)) => *count += 1,
                None => shown.push((rank.bytes, rank.tensors, rank.rank, 1)),
            }
        }
        for (bytes, tensors, first, count) in shown {
            let more = if count > 1 {
                format!(" and {} more like it", count - 1)
            } else {
                String::new()
            };
            writeln!(
                f,
                "  rank {first}{more}: {tensors} tensors, {}",
                size(bytes)
            )?;
        }
        Ok(())
    }
}

/// A name with `{}` in place of each number between dots, and the numbers.
fn template(name: &str) -> (String, Vec<usize>) {
    let mut numbers = Vec::new();
    let parts: Vec<&str> = name
        .split('.')
        .map(|part| match part.parse() {
            Ok(number) => {
                numbers.push(number);
                "{}"
            }
            Err(_) => part,
        })
        .collect();
    (parts.join("."), numbers)
}

fn groups(tensors: &[PlannedTensor]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    let mut index: HashMap<(String, String, String), usize> = HashMap::new();
    for tensor in tensors {
        let (canonical, numbers) = template(&tensor.canonical);
        let mut foreign: Vec<String> = tensor.foreign.iter().map(|name| template(name).0).collect();
        foreign.dedup();
        let foreign = foreign.join(" + ");
        let in_layer = matches!(tensor.place, Place::Layer(_));
        let kind = format!(
            "{:?} {} {} {} {in_layer}",
            tensor.shape,
            tensor.dtype,
            tensor.op,
            sharding(&tensor.shard)
        );
        let at = *index
            .entry((canonical.clone(), foreign.clone(), kind))
            .or_insert(groups.len());
        if at == groups.len() {
            let numbers = numbers.iter().map(|number| (*number, *number)).collect();
            groups.push(Group {
                canonical,
                foreign,
                first: tensor,
                numbers,
                count: 0,
                bytes: 0,
            });
        } else {
            for (range, number) in groups[at].numbers.iter_mut().zip(&numbers) {
                *range = (range.0.min(*number), range.1.max(*number));
            }
        }
        groups[at].count += 1;
        groups[at].bytes += tensor.bytes;
    }
    groups
}

fn ignored(plan: &Plan) -> Vec<(&str, usize, u64)> {
    let mut reasons: Vec<(&str, usize, u64)> = Vec::new();
    for tensor in &plan.ignored {
        match reasons
            .iter_mut()
            .find(|(reason, ..)| *reason == tensor.reason)
        {
            Some((_, count, bytes)) => {
                *count += 1;
                *bytes += tensor.bytes;
            }
            None => reasons.push((&tensor.reason, 1, tensor.bytes)),
        }
    }
    reasons
}

fn sharding(rule: &ShardRule) -> String {
    let inner = |dim: &Option<usize>| dim.map_or(String::new(), |dim| format!(", etp dim {dim}"));
    match rule {
        ShardRule::Replicated => "replicated".to_owned(),
        ShardRule::Split { dim } => format!("tp dim {dim}"),
        ShardRule::Vocab { dim, .. } => format!("tp dim {dim} (vocabulary)"),
        ShardRule::Heads { dim, heads } => format!("tp dim {dim} ({heads} heads)"),
        ShardRule::StackedExperts { inner: dim } => format!("ep dim 0{}", inner(dim)),
        ShardRule::Expert {
            count, inner: dim, ..
        } => format!("ep ({count} experts){}", inner(dim)),
    }
}

fn write_table<const N: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let mut line = String::new();
        for (column, (width, cell)) in widths.iter().zip(row).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            // The last two columns are numbers.
            let aligned = if column + 2 >= N {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            };
            line.push_str(gap);
            line.push_str(&aligned);
        }
        writeln!(f, "{}", line.trim_end())?;
    }
    Ok(())
}

/// A size in the unit that suits it, powers of 1024.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.2} {}", UNITS[unit])
    }
}

/// A number with commas between groups of three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
