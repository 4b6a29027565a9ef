//! Graphs of cuDNN operations and the plans made of them.

use std::ffi::c_void;

use burn_backend::DType;

use crate::cudnn::{Api, Descriptor, Raw, attribute, kind, value};
use crate::error::{Error, Result};

/// Sizes or strides of a tensor: `[batch, heads, rows, columns]`.
pub(crate) type Four = [i64; 4];

/// Element types of tensors and computations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub(crate) enum Element {
    F32 = 0,
    F16 = 2,
    I32 = 4,
    BF16 = 9,
    I64 = 10,
    Bool = 11,
}

impl Element {
    /// The element type of `dtype`, if it is one of the 16-bit types that attention is served in.
    pub(crate) fn half(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::BF16),
            _ => None,
        }
    }
}

/// Pointwise operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Pointwise {
    Add = 0,
    Mul = 1,
    Max = 3,
    Div = 6,
    Sub = 9,
    Exp = 13,
    Log = 15,
    Identity = 21,
    Tanh = 101,
    /// `x` is the gradient of the output, `b` the input.
    TanhBackward = 201,
    Greater = 302,
    GreaterEqual = 303,
    Less = 304,
    And = 400,
    /// Position along an axis.
    Index = 501,
    /// `t ? x : b`.
    Select = 601,
}

/// Reductions along the columns, or over the heads that share a key head.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub(crate) enum Reduction {
    Add = 0,
    Max = 3,
}

/// A tensor of a graph.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node {
    raw: Raw,
    pub(crate) id: i64,
    pub(crate) sizes: Four,
    pub(crate) strides: Four,
}

/// Where a tensor lives.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Memory,
    /// Inside the fused kernel.
    Virtual,
    /// A number that is passed when the plan runs.
    Value,
}

/// A number passed by value; its address is what cuDNN reads.
#[derive(Debug, Clone, Copy)]
enum Number {
    Float(f32),
    Int(i32),
}

/// The device a plan is made for.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// The device of a handle.
    Handle(Raw),
    /// A device known by its properties alone: a plan can be made for it, but not run.
    #[cfg(test)]
    Described(Raw),
}

/// Operations gathered until a plan is made of them.
pub(crate) struct Graph {
    api: &'static Api,
    /// Everything the operations refer to.
    descriptors: Vec<Descriptor>,
    operations: Vec<Raw>,
    numbers: Vec<(i64, Number)>,
    tensors: i64,
}

/// Strides of a tensor whose elements lie in row-major order.
pub(crate) fn packed(sizes: Four) -> Four {
    let [_, heads, rows, columns] = sizes;
    [heads * rows * columns, rows * columns, columns, 1]
}

/// Sizes or strides with rows and columns exchanged.
pub(crate) fn transposed([a, b, c, d]: Four) -> Four {
    [a, b, d, c]
}

impl Graph {
    pub(crate) fn new(api: &'static Api) -> Self {
        Self {
            api,
            descriptors: Vec::new(),
            operations: Vec::new(),
            numbers: Vec::new(),
            tensors: 0,
        }
    }

    fn keep(&mut self, descriptor: Descriptor) -> Raw {
        let raw = descriptor.raw();
        self.descriptors.push(descriptor);
        raw
    }

    fn tensor(
        &mut self,
        place: Place,
        sizes: Four,
        strides: Four,
        element: Element,
        starts: Option<Node>,
    ) -> Result<Node> {
        self.tensors += 1;
        let id = self.tensors;
        let tensor = Descriptor::new(self.api, kind::TENSOR)?;
        tensor.set(attribute::TENSOR_ID, value::INT64, &[id])?;
        tensor.set(
            attribute::TENSOR_DATA_TYPE,
            value::DATA_TYPE,
            &[element as i32],
        )?;
        tensor.set(attribute::TENSOR_DIMENSIONS, value::INT64, &sizes)?;
        tensor.set(attribute::TENSOR_STRIDES, value::INT64, &strides)?;
        tensor.set(attribute::TENSOR_ALIGNMENT, value::INT64, &[16i64])?;
        match place {
            Place::Memory => {}
            Place::Virtual => {
                tensor.set(attribute::TENSOR_IS_VIRTUAL, value::BOOLEAN, &[true])?;
            }
            Place::Value => tensor.set(attribute::TENSOR_IS_BY_VALUE, value::BOOLEAN, &[true])?,
        }
        if let Some(starts) = starts {
            tensor.link(attribute::TENSOR_RAGGED_OFFSETS, starts.raw)?;
        }
        let tensor = tensor.finalize("a tensor")?;
        Ok(Node {
            raw: self.keep(tensor),
            id,
            sizes,
            strides,
        })
    }

    /// A tensor in memory.
    pub(crate) fn memory(&mut self, sizes: Four, strides: Four, element: Element) -> Result<Node> {
        self.tensor(Place::Memory, sizes, strides, element, None)
    }

    /// A tensor in memory whose batch entries start where `starts`, `[batch + 1]` positions in elements, says.
    pub(crate) fn ragged(
        &mut self,
        sizes: Four,
        strides: Four,
        element: Element,
        starts: Option<Node>,
    ) -> Result<Node> {
        self.tensor(Place::Memory, sizes, strides, element, starts)
    }

    /// A tensor inside the fused kernel.
    pub(crate) fn inner(&mut self, sizes: Four, strides: Four, element: Element) -> Result<Node> {
        self.tensor(Place::Virtual, sizes, strides, element, None)
    }

    /// A float constant.
    pub(crate) fn float(&mut self, x: f32) -> Result<Node> {
        let node = self.tensor(Place::Value, [1; 4], [1; 4], Element::F32, None)?;
        self.numbers.push((node.id, Number::Float(x)));
        Ok(node)
    }

    /// An integer constant.
    pub(crate) fn int(&mut self, x: i32) -> Result<Node> {
        let node = self.tensor(Place::Value, [1; 4], [1; 4], Element::I32, None)?;
        self.numbers.push((node.id, Number::Int(x)));
        Ok(node)
    }

    /// Adds a pointwise operation that writes `y`. `inputs`: x, b, t. `axis` is that of [`Pointwise::Index`].
    pub(crate) fn pointwise_into(
        &mut self,
        mode: Pointwise,
        inputs: &[Node],
        y: Node,
        compute: Element,
        axis: Option<i64>,
    ) -> Result<Node> {
        let what = Descriptor::new(self.api, kind::POINTWISE)?;
        what.set(
            attribute::POINTWISE_MODE,
            value::POINTWISE_MODE,
            &[mode as i32],
        )?;
        what.set(
            attribute::POINTWISE_PRECISION,
            value::DATA_TYPE,
            &[compute as i32],
        )?;
        if let Some(axis) = axis {
            what.set(attribute::POINTWISE_AXIS, value::INT64, &[axis])?;
        }
        let what = what.finalize("a pointwise mode")?;
        let operation = Descriptor::new(self.api, kind::OPERATION_POINTWISE)?;
        operation.link(attribute::OPERATION_POINTWISE, what.raw())?;
        let ports = if mode == Pointwise::TanhBackward {
            [
                attribute::OPERATION_POINTWISE_DY,
                attribute::OPERATION_POINTWISE_X,
                0,
            ]
        } else {
            [
                attribute::OPERATION_POINTWISE_X,
                attribute::OPERATION_POINTWISE_B,
                attribute::OPERATION_POINTWISE_T,
            ]
        };
        for (port, input) in ports.into_iter().zip(inputs) {
            operation.link(port, input.raw)?;
        }
        let out = if mode == Pointwise::TanhBackward {
            attribute::OPERATION_POINTWISE_DX
        } else {
            attribute::OPERATION_POINTWISE_Y
        };
        operation.link(out, y.raw)?;
        let operation = operation.finalize(&format!("the operation {mode:?}"))?;
        self.keep(what);
        let operation = self.keep(operation);
        self.operations.push(operation);
        Ok(y)
    }

    /// Adds a pointwise operation in f32 whose result, shaped like the first input, stays inside the kernel.
    pub(crate) fn pointwise(&mut self, mode: Pointwise, inputs: &[Node]) -> Result<Node> {
        let y = self.inner(inputs[0].sizes, inputs[0].strides, Element::F32)?;
        self.pointwise_into(mode, inputs, y, Element::F32, None)
    }

    /// The same with results of another type, computed in that type; `axis` counts along.
    pub(crate) fn pointwise_as(
        &mut self,
        mode: Pointwise,
        inputs: &[Node],
        element: Element,
        axis: Option<i64>,
    ) -> Result<Node> {
        let y = self.inner(inputs[0].sizes, inputs[0].strides, element)?;
        // Positions are made in f32 and stored as integers, which is the form that cuDNN's engines know.
        let compute = if mode == Pointwise::Index {
            Element::F32
        } else {
            element
        };
        self.pointwise_into(mode, inputs, y, compute, axis)
    }

    /// Adds `c = a b`, a batch of products accumulated in f32. `lengths`, `[batch]` each: how many rows of `a`, columns
    /// of `b` and depth count, where not all do. `padding`: what the rest of `c` holds.
    pub(crate) fn matmul(
        &mut self,
        a: Node,
        b: Node,
        c: Node,
        lengths: [Option<Node>; 3],
        padding: Option<f64>,
    ) -> Result<Node> {
        let what = Descriptor::new(self.api, kind::MATMUL)?;
        what.set(
            attribute::MATMUL_PRECISION,
            value::DATA_TYPE,
            &[Element::F32 as i32],
        )?;
        if let Some(padding) = padding {
            what.set(attribute::MATMUL_PADDING, value::DOUBLE, &[padding])?;
        }
        let what = what.finalize("a product")?;
        let operation = Descriptor::new(self.api, kind::OPERATION_MATMUL)?;
        operation.link(attribute::OPERATION_MATMUL_A, a.raw)?;
        operation.link(attribute::OPERATION_MATMUL_B, b.raw)?;
        operation.link(attribute::OPERATION_MATMUL_C, c.raw)?;
        operation.link(attribute::OPERATION_MATMUL, what.raw())?;
        for (port, length) in (attribute::OPERATION_MATMUL_LENGTHS..).zip(lengths) {
            if let Some(length) = length {
                operation.link(port, length.raw)?;
            }
        }
        let operation = operation.finalize("the operation matmul")?;
        self.keep(what);
        let operation = self.keep(operation);
        self.operations.push(operation);
        Ok(c)
    }

    /// Adds a reduction of `x` to the sizes of `y`.
    pub(crate) fn reduce(&mut self, operator: Reduction, x: Node, y: Node) -> Result<Node> {
        let what = Descriptor::new(self.api, kind::REDUCTION)?;
        what.set(
            attribute::REDUCTION_OPERATOR,
            value::REDUCTION_OPERATOR,
            &[operator as i32],
        )?;
        what.set(
            attribute::REDUCTION_PRECISION,
            value::DATA_TYPE,
            &[Element::F32 as i32],
        )?;
        let what = what.finalize("a reduction")?;
        let operation = Descriptor::new(self.api, kind::OPERATION_REDUCTION)?;
        operation.link(attribute::OPERATION_REDUCTION_X, x.raw)?;
        operation.link(attribute::OPERATION_REDUCTION_Y, y.raw)?;
        operation.link(attribute::OPERATION_REDUCTION, what.raw())?;
        let operation = operation.finalize("the operation reduction")?;
        self.keep(what);
        let operation = self.keep(operation);
        self.operations.push(operation);
        Ok(y)
    }

    /// Adds a view of `x` with rows and columns exchanged, as `element`. `starts` as for [`Self::ragged`].
    pub(crate) fn transpose(
        &mut self,
        x: Node,
        element: Element,
        starts: Option<Node>,
    ) -> Result<Node> {
        let y = self.tensor(
            Place::Virtual,
            transposed(x.sizes),
            transposed(x.strides),
            element,
            starts,
        )?;
        let operation = Descriptor::new(self.api, kind::OPERATION_RESHAPE)?;
        operation.link(attribute::OPERATION_RESHAPE_X, x.raw)?;
        operation.link(attribute::OPERATION_RESHAPE_Y, y.raw)?;
        let operation = operation.finalize("the operation reshape")?;
        let operation = self.keep(operation);
        self.operations.push(operation);
        Ok(y)
    }

    /// The plan of the engine that cuDNN's heuristics prefer.
    ///
    /// With `cache`, a plan is not compiled anew when the cache has seen the same operations in another size. The cache
    /// is made when it is empty.
    ///
    /// # Errors
    /// No engine takes the graph; the text says why the last one did not.
    pub(crate) fn plan(
        self,
        target: Target,
        cache: Option<&mut Option<Descriptor>>,
    ) -> Result<Plan> {
        let api = self.api;
        let graph = Descriptor::new(api, kind::GRAPH)?;
        graph.set(
            attribute::GRAPH_OPERATIONS,
            value::DESCRIPTOR,
            &self.operations,
        )?;
        match target {
            Target::Handle(handle) => {
                graph.set(attribute::GRAPH_HANDLE, value::HANDLE, &[handle])?;
            }
            #[cfg(test)]
            Target::Described(_) => {}
        }
        if cache.is_some() {
            graph.set(attribute::GRAPH_DYNAMIC_SHAPE, value::BOOLEAN, &[true])?;
        }
        let graph = graph.finalize("the graph")?;

        let heuristics = Descriptor::new(api, kind::HEURISTICS)?;
        heuristics.link(attribute::HEURISTICS_GRAPH, graph.raw())?;
        // CUDNN_HEUR_MODE_A.
        heuristics.set(attribute::HEURISTICS_MODE, value::HEURISTICS_MODE, &[3i32])?;
        #[cfg(test)]
        if let Target::Described(device) = target {
            heuristics.link(attribute::HEURISTICS_DEVICE, device)?;
        }
        let configs = heuristics
            .finalize("the heuristics")?
            .descriptors(attribute::HEURISTICS_RESULTS, kind::ENGINE_CONFIG)?;

        let mut refusal = Error::Dnn {
            call: "looking for an engine".into(),
            status: "no engine takes this graph".into(),
            detail: String::new(),
        };
        if configs.is_empty() {
            return Err(refusal);
        }
        let cache = match cache {
            Some(slot) if slot.is_none() => {
                let new = Descriptor::new(api, kind::KERNEL_CACHE)?;
                new.link(attribute::KERNEL_CACHE_GRAPH, graph.raw())?;
                Some(slot.insert(new.finalize("a kernel cache")?).raw())
            }
            Some(slot) => slot.as_ref().map(Descriptor::raw),
            None => None,
        };
        for config in configs {
            let plan = Descriptor::new(api, kind::PLAN)?;
            plan.link(attribute::PLAN_ENGINE_CONFIG, config.raw())?;
            match target {
                Target::Handle(handle) => {
                    plan.set(attribute::PLAN_HANDLE, value::HANDLE, &[handle])?;
                }
                #[cfg(test)]
                Target::Described(device) => plan.link(attribute::PLAN_DEVICE, device)?,
            }
            if let Some(cache) = cache {
                plan.link(attribute::PLAN_KERNEL_CACHE, cache)?;
            }
            match plan.finalize("a plan") {
                Ok(plan) => {
                    let workspace = plan.integer(attribute::PLAN_WORKSPACE_SIZE)?;
                    let mut descriptors = self.descriptors;
                    descriptors.extend([graph, config]);
                    return Ok(Plan {
                        plan,
                        workspace: usize::try_from(workspace).unwrap_or(0),
                        numbers: self.numbers,
                        _descriptors: descriptors,
                    });
                }
                Err(error) => refusal = error,
            }
        }
        Err(refusal)
    }
}

/// A compiled graph.
pub(crate) struct Plan {
    plan: Descriptor,
    /// Bytes of scratch memory a run needs.
    pub(crate) workspace: usize,
    numbers: Vec<(i64, Number)>,
    /// What the plan was made of.
    _descriptors: Vec<Descriptor>,
}

impl Plan {
    /// Queues the plan. `tensors`: number and address of every tensor in memory.
    ///
    /// # Safety
    /// Every tensor needs device memory of its sizes and strides, and `workspace` that many bytes.
    pub(crate) unsafe fn run(
        &self,
        api: &'static Api,
        handle: Raw,
        tensors: &[(i64, u64)],
        workspace: u64,
    ) -> Result<()> {
        let mut ids: Vec<i64> = tensors.iter().map(|&(id, _)| id).collect();
        let mut pointers: Vec<Raw> = tensors
            .iter()
            .map(|&(_, address)| address as *mut c_void)
            .collect();
        for (id, number) in &self.numbers {
            ids.push(*id);
            let pointer: *const c_void = match number {
                Number::Float(x) => std::ptr::from_ref(x).cast(),
                Number::Int(x) => std::ptr::from_ref(x).cast(),
            };
            pointers.push(pointer.cast_mut());
        }
        let pack = Descriptor::new(api, kind::VARIANT_PACK)?;
        pack.set(attribute::VARIANT_PACK_IDS, value::INT64, &ids)?;
        pack.set(attribute::VARIANT_PACK_POINTERS, value::POINTER, &pointers)?;
        pack.set(
            attribute::VARIANT_PACK_WORKSPACE,
            value::POINTER,
            &[workspace as *mut c_void],
        )?;
        let pack = pack.finalize("the addresses")?;
        // SAFETY: as the caller promises; numbers outlive the call, which reads them at once.
        unsafe { api.execute(handle, &self.plan, &pack) }
    }
}
