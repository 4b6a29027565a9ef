//! Strided views: which elements of a row-major tensor, in which order.

use std::fmt;
use std::ops::Range;

/// Some elements of a row-major tensor, addressed by an index per dimension: element `[i, j, ..]` lies at
/// `offset + i * strides[0] + j * strides[1] + ..`. All numbers count elements.
///
/// Views are made from [`View::whole`] by combinators, each of which fails rather than leave the tensor or repeat an
/// element:
///
/// ```
/// use bridge_core::mapping::View;
/// // Even rows of a [6, 4] matrix, transposed.
/// let view = View::whole(&[6, 4]).step(0, 0, 2)?.transpose(0, 1)?;
/// assert_eq!(view.shape(), [4, 3]);
/// assert_eq!(view.offsets().collect::<Vec<_>>(), [0, 8, 16, 1, 9, 17, 2, 10, 18, 3, 11, 19]);
/// # Ok::<(), bridge_core::mapping::ViewError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct View {
    extents: Vec<usize>,
    strides: Vec<usize>,
    offset: usize,
}

/// Why a view cannot be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewError(String);

impl fmt::Display for ViewError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ViewError {}

impl ViewError {
    /// A failure of a bridge's own making.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// The elements of a view in the order of a row-major tensor of another shape with as many elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arranged {
    pub(super) view: View,
    pub(super) shape: Vec<usize>,
}

impl From<View> for Arranged {
    fn from(view: View) -> Self {
        Self {
            shape: view.extents.clone(),
            view,
        }
    }
}

impl View {
    /// Every element of a tensor of `shape`, in its own order.
    pub fn whole(shape: &[usize]) -> Self {
        Self {
            extents: shape.to_vec(),
            strides: row_major(shape),
            offset: 0,
        }
    }

    /// A view from its numbers, for code that cuts views up.
    pub(crate) fn from_parts(extents: Vec<usize>, strides: Vec<usize>, offset: usize) -> Self {
        debug_assert_eq!(extents.len(), strides.len());
        Self {
            extents,
            strides,
            offset,
        }
    }

    /// Extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        &self.extents
    }

    /// Distance between neighbours along each dimension, in elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// Position of the first element.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.extents.iter().product()
    }

    /// Position of every element, in the order of the view. For tests and small views.
    pub fn offsets(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.numel()).map(|mut index| {
            let mut at = self.offset;
            for (extent, stride) in self.extents.iter().zip(&self.strides).rev() {
                at += index % extent * stride;
                index /= extent;
            }
            at
        })
    }

    /// Swaps dimensions `a` and `b`.
    pub fn transpose(mut self, a: usize, b: usize) -> Result<Self, ViewError> {
        self.check_dim(a)?;
        self.check_dim(b)?;
        self.extents.swap(a, b);
        self.strides.swap(a, b);
        Ok(self)
    }

    /// Dimension `i` of the result is dimension `order[i]` of this view.
    pub fn permute(self, order: &[usize]) -> Result<Self, ViewError> {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..self.extents.len()) {
            return Err(ViewError(format!(
                "{order:?} is no order of the dimensions of {:?}",
                self.extents
            )));
        }
        Ok(Self {
            extents: order.iter().map(|dim| self.extents[*dim]).collect(),
            strides: order.iter().map(|dim| self.strides[*dim]).collect(),
            offset: self.offset,
        })
    }

    /// Indices `range` of dimension `dim`.
    pub fn slice(mut self, dim: usize, range: Range<usize>) -> Result<Self, ViewError> {
        self.check_dim(dim)?;
        if range.start > range.end || range.end > self.extents[dim] {
            return Err(ViewError(format!(
                "slice {range:?} leaves dimension {dim} of {:?}",
                self.extents
            )));
        }
        self.offset += range.start * self.strides[dim];
        self.extents[dim] = range.len();
        Ok(self)
    }

    /// Indices `start`, `start + step`, `start + 2 * step` .. of dimension `dim`, up to its end.
    pub fn step(mut self, dim: usize, start: usize, step: usize) -> Result<Self, ViewError> {
        self.check_dim(dim)?;
        let extent = self.extents[dim];
        if step == 0 || start >= extent {
            return Err(ViewError(format!(
                "steps of {step} from {start} leave dimension {dim} of {:?}",
                self.extents
            )));
        }
        self.offset += start * self.strides[dim];
        self.extents[dim] = (extent - start).div_ceil(step);
        self.strides[dim] *= step;
        Ok(self)
    }

    /// Index `index` of dimension `dim`, which disappears.
    pub fn select(self, dim: usize, index: usize) -> Result<Self, ViewError> {
        self.check_dim(dim)?;
        if index >= self.extents[dim] {
            return Err(ViewError(format!(
                "index {index} leaves dimension {dim} of {:?}",
                self.extents
            )));
        }
        let mut view = self.slice(dim, index..index + 1)?;
        view.extents.remove(dim);
        view.strides.remove(dim);
        Ok(view)
    }

    /// Replaces dimension `dim` by dimensions of `sizes`, slowest first, whose product is its extent.
    pub fn split(mut self, dim: usize, sizes: &[usize]) -> Result<Self, ViewError> {
        self.check_dim(dim)?;
        let product = sizes
            .iter()
            .try_fold(1usize, |product, size| product.checked_mul(*size));
        if product != Some(self.extents[dim]) || sizes.is_empty() {
            return Err(ViewError(format!(
                "dimension {dim} of {:?} cannot be split into {sizes:?}: the product differs",
                self.extents
            )));
        }
        let stride = self.strides[dim];
        self.extents.splice(dim..=dim, sizes.iter().copied());
        self.strides.splice(
            dim..=dim,
            row_major(sizes).into_iter().map(|inner| inner * stride),
        );
        Ok(self)
    }

    /// Joins dimensions `dims` into one. They must lie in the tensor one after the other, as after a
    /// [`View::split`]; to list a permuted view under another shape use [`View::reads_as`].
    pub fn merge(mut self, dims: Range<usize>) -> Result<Self, ViewError> {
        if dims.is_empty() || dims.end > self.extents.len() {
            return Err(ViewError(format!(
                "dimensions {dims:?} are not in {:?}",
                self.extents
            )));
        }
        for dim in dims.start..dims.end - 1 {
            if self.strides[dim] != self.strides[dim + 1] * self.extents[dim + 1] {
                return Err(ViewError(format!(
                    "dimensions {dim} and {} of {:?} with strides {:?} do not join into one",
                    dim + 1,
                    self.extents,
                    self.strides
                )));
            }
        }
        let stride = self.strides[dims.end - 1];
        let extent = self.extents[dims.clone()].iter().product();
        self.extents.splice(dims.clone(), [extent]);
        self.strides.splice(dims, [stride]);
        Ok(self)
    }

    /// The elements in the order of this view, as a tensor of `shape`.
    pub fn reads_as(self, shape: &[usize]) -> Result<Arranged, ViewError> {
        let numel = shape
            .iter()
            .try_fold(1usize, |product, extent| product.checked_mul(*extent));
        if numel != Some(self.numel()) {
            return Err(ViewError(format!(
                "{:?} cannot be read as {shape:?}: the sizes differ",
                self.extents
            )));
        }
        Ok(Arranged {
            view: self,
            shape: shape.to_vec(),
        })
    }

    /// Indices `ranges` of each dimension, which must be within the extents.
    pub(crate) fn narrow(&self, ranges: &[Range<usize>]) -> View {
        let starts = ranges
            .iter()
            .zip(&self.strides)
            .map(|(range, stride)| range.start * stride);
        View {
            extents: ranges.iter().map(Range::len).collect(),
            offset: self.offset + starts.sum::<usize>(),
            strides: self.strides.clone(),
        }
    }

    /// Dimensions with more than one index.
    pub(crate) fn long_axes(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.extents.len()).filter(|dim| self.extents[*dim] > 1)
    }

    fn check_dim(&self, dim: usize) -> Result<(), ViewError> {
        if dim < self.extents.len() {
            return Ok(());
        }
        Err(ViewError(format!(
            "{:?} has no dimension {dim}",
            self.extents
        )))
    }
}

/// Strides of a row-major tensor. Shapes whose size overflows get strides that wrap: such tensors are refused where
/// headers and configs are checked, before any view of them is used.
pub(crate) fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim].wrapping_mul(shape[dim]);
    }
    strides
}
