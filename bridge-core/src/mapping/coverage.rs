//! Exact coverage: whether views of one tensor meet every element once.
//!
//! The strides of the views of one tensor almost always divide one another, so positions can be written as digits of
//! one mixed radix, in which every view is a few boxes (a range per digit). Boxes that are disjoint and whose volumes
//! add up to the tensor cover it exactly; no element is visited. Where strides do not divide, a bitmap decides.

use std::ops::Range;

use super::view::View;

/// Largest tensor that is checked by a bitmap, in elements (8 MiB of bits).
const MAX_BITMAP: usize = 1 << 26;

/// A range for each digit of the mixed radix, lowest digit first.
type Ranges = Vec<Range<usize>>;

/// Checks that `views` together meet every element of a tensor of `shape` exactly once.
pub(super) fn check(shape: &[usize], views: &[&View]) -> Result<(), String> {
    let Some(numel) = checked_product(shape) else {
        return Err("its size overflows".to_owned());
    };
    let met = views.iter().try_fold(0usize, |sum, view| {
        sum.checked_add(checked_product(view.shape())?)
    });
    for view in views.iter().filter(|view| view.numel() > 0) {
        let last = view
            .shape()
            .iter()
            .zip(view.strides())
            .try_fold(view.offset(), |at, (extent, stride)| {
                at.checked_add((extent - 1).checked_mul(*stride)?)
            });
        if last.is_none_or(|last| last >= numel) {
            return Err(format!("a view with extents {:?} leaves it", view.shape()));
        }
    }
    if met != Some(numel) {
        let met = met.map_or("too many".to_owned(), |met| met.to_string());
        return Err(format!("{met} of its {numel} elements are mapped"));
    }
    if numel == 0 || views.len() == 1 && is_whole(shape, views[0]) {
        return Ok(());
    }
    let views: Vec<&View> = views
        .iter()
        .copied()
        .filter(|view| view.numel() > 0)
        .collect();
    let views = views.as_slice();
    match boxes_of(views) {
        Some(boxes) => disjoint(boxes),
        None if numel <= MAX_BITMAP => by_bitmap(numel, views),
        None => Err("its views have strides that do not divide one another, so its coverage cannot be checked; \
                     declare the mapping with fewer steps"
            .to_owned()),
    }
}

fn checked_product(shape: &[usize]) -> Option<usize> {
    shape
        .iter()
        .try_fold(1usize, |product, extent| product.checked_mul(*extent))
}

/// The commonest case: one view that is the tensor itself, perhaps with its dimensions in another order.
fn is_whole(shape: &[usize], view: &View) -> bool {
    let whole = View::whole(shape);
    let axes = |view: &View| {
        let mut axes: Vec<(usize, usize)> = view
            .shape()
            .iter()
            .copied()
            .zip(view.strides().iter().copied())
            .filter(|(extent, _)| *extent > 1)
            .collect();
        axes.sort_unstable();
        axes
    };
    view.offset() == 0 && axes(view) == axes(&whole)
}

/// Every view as boxes over one mixed radix; `None` if there is no such radix.
fn boxes_of(views: &[&View]) -> Option<Vec<Ranges>> {
    let mut radix: Vec<usize> = vec![1];
    for view in views {
        let long = view
            .shape()
            .iter()
            .zip(view.strides())
            .filter(|(extent, _)| **extent > 1);
        radix.extend(long.map(|(_, stride)| *stride));
    }
    radix.sort_unstable();
    radix.dedup();
    if radix.windows(2).any(|pair| pair[1] % pair[0] != 0) {
        return None;
    }
    let mut boxes = Vec::with_capacity(views.len());
    for view in views {
        boxes_of_view(&radix, view, &mut boxes)?;
    }
    Some(boxes)
}

fn boxes_of_view(radix: &[usize], view: &View, boxes: &mut Vec<Ranges>) -> Option<()> {
    let mut rest = view.offset();
    let mut start: Ranges = vec![0..1; radix.len()];
    for digit in (0..radix.len()).rev() {
        start[digit] = rest / radix[digit]..rest / radix[digit] + 1;
        rest %= radix[digit];
    }
    let mut axes: Vec<(usize, usize)> = view
        .shape()
        .iter()
        .zip(view.strides())
        .filter(|(extent, _)| **extent > 1)
        .filter_map(|(extent, stride)| Some((radix.binary_search(stride).ok()?, *extent)))
        .collect();
    axes.sort_unstable_by(|a, b| b.cmp(a));
    // Highest digit first, so that an axis which runs over into a digit above finds it taken, if it is.
    let mut own = vec![start];
    let mut taken = vec![false; radix.len()];
    for (digit, extent) in axes {
        let mut longer = Vec::with_capacity(own.len());
        for ranges in own {
            run(radix, &taken, ranges, digit, extent, &mut longer)?;
        }
        if std::mem::replace(&mut taken[digit], true) {
            return None;
        }
        own = longer;
    }
    boxes.extend(own);
    Some(())
}

/// Extends the single value of `ranges[digit]` to a run of `extent` values, carrying into the digits above.
fn run(
    radix: &[usize],
    taken: &[bool],
    ranges: Ranges,
    digit: usize,
    extent: usize,
    out: &mut Vec<Ranges>,
) -> Option<()> {
    let base = radix.get(digit + 1).map(|above| above / radix[digit]);
    let start = ranges[digit].start;
    let fits = base.is_none_or(|base| start + extent <= base);
    if fits {
        let mut ranges = ranges;
        ranges[digit] = start..start + extent;
        out.push(ranges);
        return Some(());
    }
    let base = base?;
    if taken[digit + 1] {
        return None;
    }
    let set = |range: Range<usize>, above: usize| {
        let mut cut = ranges.clone();
        cut[digit] = range;
        let mut value = above;
        // The digit above may itself overflow its base; carry on upwards.
        for digit in digit + 1..radix.len() {
            if value == 0 {
                break;
            }
            if taken[digit] {
                return None;
            }
            let base = radix.get(digit + 1).map(|above| above / radix[digit]);
            let sum = cut[digit].start + value;
            let (digit_value, carry) = base.map_or((sum, 0), |base| (sum % base, sum / base));
            cut[digit] = digit_value..digit_value + 1;
            value = carry;
        }
        Some(cut)
    };
    let mut left = extent;
    let mut above = 0;
    if start > 0 {
        out.push(set(start..base, above)?);
        left -= base - start;
        above += 1;
    }
    if left / base > 0 {
        run(
            radix,
            taken,
            set(0..base, above)?,
            digit + 1,
            left / base,
            out,
        )?;
        above += left / base;
    }
    if !left.is_multiple_of(base) {
        out.push(set(0..left % base, above)?);
    }
    Some(())
}

fn disjoint(mut boxes: Vec<Ranges>) -> Result<(), String> {
    // Sorted by the highest digit, a box can only meet those that start before its end.
    let top = boxes.first().map_or(0, |ranges| ranges.len() - 1);
    boxes.sort_by_key(|ranges| ranges[top].start);
    for (index, a) in boxes.iter().enumerate() {
        for b in boxes[index + 1..]
            .iter()
            .take_while(|b| b[top].start < a[top].end)
        {
            if a.iter()
                .zip(b)
                .all(|(a, b)| a.start < b.end && b.start < a.end)
            {
                return Err("some of its elements are mapped twice, others not at all".to_owned());
            }
        }
    }
    Ok(())
}

fn by_bitmap(numel: usize, views: &[&View]) -> Result<(), String> {
    let mut met = vec![0u64; numel.div_ceil(64)];
    for at in views.iter().flat_map(|view| view.offsets()) {
        let bit = 1u64 << (at % 64);
        if met[at / 64] & bit != 0 {
            return Err("some of its elements are mapped twice, others not at all".to_owned());
        }
        met[at / 64] |= bit;
    }
    Ok(())
}
