//! A pickle as a table of inert nodes.

use std::collections::HashMap;
use std::ops::Range;

/// Number of a node in its [`Pickle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(u32);

/// One value of a pickle. Containers hold numbers of other nodes, so a value that contains itself is no problem here;
/// whoever walks the table bounds its own depth.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer of at most 64 bits.
    Int(i64),
    /// A longer integer, which no format here needs.
    LargeInt,
    /// A float.
    Float(f64),
    /// Text: a byte range of the input, found to be UTF-8.
    Str(Range<u32>),
    /// Bytes: a byte range of the input.
    Bytes(Range<u32>),
    /// A tuple.
    Tuple(Vec<NodeId>),
    /// A list.
    List(Vec<NodeId>),
    /// A set, frozen or not.
    Set(Vec<NodeId>),
    /// A dict, in the order of insertion; a key may repeat, and then the last one counts.
    Dict(Vec<(NodeId, NodeId)>),
    /// A name that would have been imported.
    Global {
        /// Dotted module name (text node).
        module: NodeId,
        /// Name within it (text node).
        name: NodeId,
    },
    /// A call that was not made, or an instance that was not built.
    Call(Box<Call>),
    /// A reference to data outside of the pickle, with its id.
    Persistent(NodeId),
}

/// A call that was not made.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// What would have been called or instantiated.
    pub callable: NodeId,
    /// Its arguments.
    pub args: NodeId,
    /// What `__setstate__` would have got.
    pub state: Option<NodeId>,
    /// Items that would have been appended to it.
    pub list: Vec<NodeId>,
    /// Items that would have been set in it.
    pub dict: Vec<(NodeId, NodeId)>,
}

/// What a pickle may be at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of input.
    pub bytes: usize,
    /// Nodes, and references between them, together.
    pub nodes: usize,
}

impl Limits {
    /// For the description of a whole checkpoint.
    pub const METADATA: Limits = Limits {
        bytes: 1 << 30,
        nodes: 1 << 26,
    };
    /// For the description of one file of tensors.
    pub const STATE_DICT: Limits = Limits {
        bytes: 64 << 20,
        nodes: 1 << 24,
    };
    /// For the description of one tensor.
    pub const TENSOR: Limits = Limits {
        bytes: 64 << 10,
        nodes: 1 << 14,
    };
}

/// A parsed pickle.
#[derive(Debug)]
pub struct Pickle {
    input: Vec<u8>,
    nodes: Vec<Node>,
    root: NodeId,
}

impl Pickle {
    /// Parses a pickle of protocol 2 to 5 that fills `input`.
    ///
    /// # Errors
    /// What is wrong, with the byte at which it was found: an unknown opcode, an operand that leaves the input, an empty
    /// stack, an unknown memo entry, a limit passed.
    pub fn parse(input: Vec<u8>, limits: Limits) -> Result<Self, String> {
        if input.len() > limits.bytes.min(u32::MAX as usize) {
            return Err(format!(
                "a pickle of {} bytes, more than the {} that are read here",
                input.len(),
                limits.bytes
            ));
        }
        let mut machine = Machine {
            input: &input,
            at: 0,
            nodes: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Memo::default(),
            budget: limits.nodes,
        };
        let root = machine
            .run()
            .map_err(|problem| format!("{problem}, at byte {} of the pickle", machine.at))?;
        let nodes = machine.nodes;
        Ok(Self { input, nodes, root })
    }

    /// The value of the whole.
    pub fn root(&self) -> NodeId {
        self.root
    }

    /// A node by number.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// The text of a text node.
    pub fn str(&self, id: NodeId) -> Option<&str> {
        match self.node(id) {
            // Found to be UTF-8 when it was read.
            Node::Str(range) => std::str::from_utf8(self.slice(range)).ok(),
            _ => None,
        }
    }

    /// The bytes of a bytes node.
    pub fn bytes(&self, id: NodeId) -> Option<&[u8]> {
        match self.node(id) {
            Node::Bytes(range) => Some(self.slice(range)),
            _ => None,
        }
    }

    /// The value of an integer node.
    pub fn int(&self, id: NodeId) -> Option<i64> {
        match self.node(id) {
            Node::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// A size: an integer that is not negative.
    pub fn size(&self, id: NodeId) -> Option<usize> {
        self.int(id).and_then(|value| usize::try_from(value).ok())
    }

    /// The members of a tuple or list, or of a call of `torch.Size` on one.
    pub fn sequence(&self, id: NodeId) -> Option<&[NodeId]> {
        match self.node(id) {
            Node::Tuple(items) | Node::List(items) => Some(items),
            Node::Call(call) if self.is_global(call.callable, "torch", "Size") => {
                let &[inner] = self.sequence_of(call.args)? else {
                    return None;
                };
                self.sequence_of(inner)
            }
            _ => None,
        }
    }

    fn sequence_of(&self, id: NodeId) -> Option<&[NodeId]> {
        match self.node(id) {
            Node::Tuple(items) | Node::List(items) => Some(items),
            _ => None,
        }
    }

    /// A sequence of sizes.
    pub fn sizes(&self, id: NodeId) -> Option<Vec<usize>> {
        self.sequence(id)?.iter().map(|id| self.size(*id)).collect()
    }

    /// The items of a dict or of an ordered dict.
    pub fn items(&self, id: NodeId) -> Option<&[(NodeId, NodeId)]> {
        match self.node(id) {
            Node::Dict(items) => Some(items),
            Node::Call(call) if self.is_global(call.callable, "collections", "OrderedDict") => {
                Some(&call.dict)
            }
            _ => None,
        }
    }

    /// The value under a text key of a dict; the last one where the key repeats.
    pub fn get(&self, id: NodeId, key: &str) -> Option<NodeId> {
        let items = self.items(id)?;
        let found = items.iter().rev().find(|(k, _)| self.str(*k) == Some(key));
        found.map(|(_, value)| *value)
    }

    /// Module and name of a global.
    pub fn global(&self, id: NodeId) -> Option<(&str, &str)> {
        match self.node(id) {
            Node::Global { module, name } => Some((self.str(*module)?, self.str(*name)?)),
            _ => None,
        }
    }

    /// Whether a node is the global `module.name`.
    pub fn is_global(&self, id: NodeId, module: &str, name: &str) -> bool {
        self.global(id) == Some((module, name))
    }

    /// Module, name and arguments of a call.
    pub fn call(&self, id: NodeId) -> Option<(&str, &str, &[NodeId])> {
        match self.node(id) {
            Node::Call(call) => {
                let (module, name) = self.global(call.callable)?;
                Some((module, name, self.sequence_of(call.args)?))
            }
            _ => None,
        }
    }

    /// The attribute `name` of an instance of class `class` (its last name), whose state is a dict of attributes.
    pub fn attribute(&self, id: NodeId, class: &str, name: &str) -> Option<NodeId> {
        self.get(self.state(id, class)?, name)
    }

    /// The state of an instance of class `class` (its last name).
    pub fn state(&self, id: NodeId, class: &str) -> Option<NodeId> {
        match self.node(id) {
            Node::Call(call) if self.global(call.callable)?.1 == class => call.state,
            _ => None,
        }
    }

    /// What a node is, in a few words, for messages.
    pub fn describe(&self, id: NodeId) -> String {
        let cut = |text: &str| text.chars().take(80).collect::<String>();
        match self.node(id) {
            Node::None => "None".to_owned(),
            Node::Bool(value) => format!("{value}"),
            Node::Int(value) => format!("the number {value}"),
            Node::LargeInt => "a number of more than 64 bits".to_owned(),
            Node::Float(value) => format!("the number {value}"),
            Node::Str(_) => format!("the text {:?}", cut(self.str(id).unwrap_or_default())),
            Node::Bytes(range) => format!("{} bytes", range.len()),
            Node::Tuple(items) => format!("a tuple of {}", items.len()),
            Node::List(items) => format!("a list of {}", items.len()),
            Node::Set(items) => format!("a set of {}", items.len()),
            Node::Dict(items) => format!("a dict of {}", items.len()),
            Node::Global { .. } => self.global_text(id),
            Node::Call(call) => format!("an object of {}", self.global_text(call.callable)),
            Node::Persistent(_) => "a reference to data outside of the pickle".to_owned(),
        }
    }

    fn global_text(&self, id: NodeId) -> String {
        match self.global(id) {
            Some((module, name)) => format!("{module}.{name}")
                .escape_debug()
                .take(120)
                .collect(),
            None => "something that is not a name".to_owned(),
        }
    }

    fn slice(&self, range: &Range<u32>) -> &[u8] {
        &self.input[range.start as usize..range.end as usize]
    }
}

/// Memo entries by number: files count them up from 0, and a hostile one may name any number.
#[derive(Default)]
struct Memo {
    dense: Vec<NodeId>,
    sparse: HashMap<u32, NodeId>,
}

impl Memo {
    fn put(&mut self, index: u32, node: NodeId) {
        let known = self.dense.len();
        match self.dense.get_mut(index as usize) {
            Some(entry) => *entry = node,
            None if index as usize == known => self.dense.push(node),
            None => {
                self.sparse.insert(index, node);
            }
        }
    }

    fn get(&self, index: u32) -> Option<NodeId> {
        let dense = self.dense.get(index as usize).copied();
        dense.or_else(|| self.sparse.get(&index).copied())
    }

    fn len(&self) -> u32 {
        (self.dense.len() + self.sparse.len()) as u32
    }
}

/// The machine that a pickle is a program for, without its callables.
struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<NodeId>,
    /// Heights of the stack at which a mark lies.
    marks: Vec<usize>,
    memo: Memo,
    budget: usize,
}

impl Machine<'_> {
    fn run(&mut self) -> Result<NodeId, String> {
        loop {
            match self.byte()? {
                b'.' => {
                    let root = self.pop()?;
                    return if self.at == self.input.len() {
                        Ok(root)
                    } else {
                        Err("bytes follow the end".to_owned())
                    };
                }
                0x80 => match self.byte()? {
                    2..=5 => {}
                    other => return Err(format!("protocol {other}; 2 to 5 are read")),
                },
                // A frame only says how much may be read ahead.
                0x95 => _ = self.number(8)?,
                opcode => self.step(opcode)?,
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Result<(), String> {
        match opcode {
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'K' => self.small_int(1),
            b'M' => self.small_int(2),
            b'J' => {
                let value = self.number(4)? as u32 as i32;
                self.push(Node::Int(value.into()))
            }
            0x8a => {
                let length = self.byte()? as usize;
                self.long(length)
            }
            0x8b => {
                let length = self.number(4)? as usize;
                self.long(length)
            }
            b'G' => {
                let bits = self.take(8)?;
                let bits = u64::from_be_bytes(self.input[bits].try_into().unwrap_or_default());
                self.push(Node::Float(f64::from_bits(bits)))
            }
            0x8c => self.text(1),
            b'X' => self.text(4),
            0x8d => self.text(8),
            b'C' => self.blob(1),
            b'B' => self.blob(4),
            0x8e | 0x96 => self.blob(8),
            b')' => self.push(Node::Tuple(Vec::new())),
            b']' => self.push(Node::List(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            0x8f => self.push(Node::Set(Vec::new())),
            b'(' => {
                self.charge(1)?;
                self.marks.push(self.stack.len());
                Ok(())
            }
            b't' => {
                let items = self.since_mark()?;
                self.push(Node::Tuple(items))
            }
            0x85..=0x87 => {
                let count = (opcode - 0x84) as usize;
                let items = self.pop_many(count)?;
                self.push(Node::Tuple(items))
            }
            b'l' => {
                let items = self.since_mark()?;
                self.push(Node::List(items))
            }
            b'd' => {
                let items = self.since_mark()?;
                let pairs = pairs(items)?;
                self.push(Node::Dict(pairs))
            }
            0x91 => {
                let items = self.since_mark()?;
                self.push(Node::Set(items))
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])
            }
            b'e' => {
                let items = self.since_mark()?;
                self.append(items)
            }
            0x90 => {
                let items = self.since_mark()?;
                match self.top()? {
                    Node::Set(members) => members.extend(items),
                    _ => return Err("items are added to what is no set".to_owned()),
                }
                Ok(())
            }
            b's' => {
                let items = self.pop_many(2)?;
                self.set_items(pairs(items)?)
            }
            b'u' => {
                let items = self.since_mark()?;
                self.set_items(pairs(items)?)
            }
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.push(module)?;
                self.push(name)?;
                self.global()
            }
            0x93 => self.global(),
            b'R' | 0x81 => {
                let parts = self.pop_many(2)?;
                self.call(parts[0], parts[1])
            }
            0x92 => {
                // Keyword arguments are a third operand; instances with them are noted without.
                let parts = self.pop_many(3)?;
                self.call(parts[0], parts[1])
            }
            b'b' => {
                let value = self.pop()?;
                match self.top()? {
                    Node::Call(call) => call.state = Some(value),
                    _ => return Err("a state is set on what is no object".to_owned()),
                }
                Ok(())
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id))
            }
            b'0' => self.pop().map(|_| ()),
            b'1' => self.since_mark().map(|_| ()),
            b'2' => {
                let top = *self.stack.last().ok_or_else(empty_stack)?;
                self.charge(1)?;
                self.stack.push(top);
                Ok(())
            }
            0x94 => {
                let index = self.memo.len();
                self.remember(index)
            }
            b'q' => {
                let index = self.byte()?.into();
                self.remember(index)
            }
            b'r' => {
                let index = self.number(4)? as u32;
                self.remember(index)
            }
            b'h' => {
                let index = self.byte()?.into();
                self.recall(index)
            }
            b'j' => {
                let index = self.number(4)? as u32;
                self.recall(index)
            }
            other => Err(format!("opcode {other:#04x} is not one that is read")),
        }
    }

    fn call(&mut self, callable: NodeId, args: NodeId) -> Result<(), String> {
        self.push(Node::Call(Box::new(Call {
            callable,
            args,
            state: None,
            list: Vec::new(),
            dict: Vec::new(),
        })))
    }

    fn global(&mut self) -> Result<(), String> {
        let parts = self.pop_many(2)?;
        let (module, name) = (parts[0], parts[1]);
        for part in [module, name] {
            if !matches!(self.nodes[part.0 as usize], Node::Str(_)) {
                return Err("a global is named by what is no text".to_owned());
            }
        }
        self.push(Node::Global { module, name })
    }

    fn append(&mut self, items: Vec<NodeId>) -> Result<(), String> {
        match self.top()? {
            Node::List(list) => list.extend(items),
            Node::Call(call) => call.list.extend(items),
            _ => return Err("items are appended to what is no list".to_owned()),
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<(NodeId, NodeId)>) -> Result<(), String> {
        match self.top()? {
            Node::Dict(dict) => dict.extend(items),
            Node::Call(call) => call.dict.extend(items),
            _ => return Err("items are set in what is no dict".to_owned()),
        }
        Ok(())
    }

    fn remember(&mut self, index: u32) -> Result<(), String> {
        let top = *self.stack.last().ok_or_else(empty_stack)?;
        self.charge(1)?;
        self.memo.put(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), String> {
        let node = self
            .memo
            .get(index)
            .ok_or_else(|| format!("memo entry {index} does not exist"))?;
        self.charge(1)?;
        self.stack.push(node);
        Ok(())
    }

    /// Takes part of the budget. Every node and every reference is paid for, so memory is bounded by it.
    fn charge(&mut self, count: usize) -> Result<(), String> {
        self.budget = self
            .budget
            .checked_sub(count)
            .ok_or("more values than are read here")?;
        Ok(())
    }

    fn push(&mut self, node: Node) -> Result<(), String> {
        self.charge(1)?;
        let id = u32::try_from(self.nodes.len()).map_err(|_| "more values than are read here")?;
        self.nodes.push(node);
        self.stack.push(NodeId(id));
        Ok(())
    }

    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<NodeId, String> {
        if self.stack.len() <= self.floor() {
            return Err(empty_stack());
        }
        self.stack.pop().ok_or_else(empty_stack)
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<NodeId>, String> {
        let start = self.stack.len().checked_sub(count);
        let start = start
            .filter(|start| *start >= self.floor())
            .ok_or_else(empty_stack)?;
        Ok(self.stack.split_off(start))
    }

    fn since_mark(&mut self) -> Result<Vec<NodeId>, String> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&mut self) -> Result<&mut Node, String> {
        if self.stack.len() <= self.floor() {
            return Err(empty_stack());
        }
        let top = self.stack.last().ok_or_else(empty_stack)?;
        Ok(&mut self.nodes[top.0 as usize])
    }

    fn byte(&mut self) -> Result<u8, String> {
        let range = self.take(1)?;
        Ok(self.input[range.start])
    }

    /// A little-endian number of at most 8 bytes.
    fn number(&mut self, bytes: usize) -> Result<u64, String> {
        let range = self.take(bytes)?;
        let mut value = [0; 8];
        value[..bytes].copy_from_slice(&self.input[range]);
        Ok(u64::from_le_bytes(value))
    }

    fn take(&mut self, bytes: usize) -> Result<Range<usize>, String> {
        let end = self
            .at
            .checked_add(bytes)
            .filter(|end| *end <= self.input.len());
        let end = end.ok_or("the pickle ends early")?;
        let range = self.at..end;
        self.at = end;
        Ok(range)
    }

    fn small_int(&mut self, bytes: usize) -> Result<(), String> {
        let value = self.number(bytes)? as i64;
        self.push(Node::Int(value))
    }

    /// A two's complement number of `length` bytes.
    fn long(&mut self, length: usize) -> Result<(), String> {
        let range = self.take(length)?;
        let bytes = &self.input[range];
        if bytes.len() > 8 {
            return self.push(Node::LargeInt);
        }
        let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
        let mut value = [if negative { 0xff } else { 0 }; 8];
        value[..bytes.len()].copy_from_slice(bytes);
        self.push(Node::Int(i64::from_le_bytes(value)))
    }

    fn operand(&mut self, length_bytes: usize) -> Result<Range<u32>, String> {
        let length = self.number(length_bytes)?;
        let length = usize::try_from(length).map_err(|_| "the pickle ends early")?;
        let range = self.take(length)?;
        // The input's length fits 32 bits.
        Ok(range.start as u32..range.end as u32)
    }

    fn text(&mut self, length_bytes: usize) -> Result<(), String> {
        let range = self.operand(length_bytes)?;
        let node = self.utf8(range)?;
        self.push(node)
    }

    fn blob(&mut self, length_bytes: usize) -> Result<(), String> {
        let range = self.operand(length_bytes)?;
        self.push(Node::Bytes(range))
    }

    fn line(&mut self) -> Result<Node, String> {
        let rest = &self.input[self.at..];
        let end = rest.iter().position(|byte| *byte == b'\n');
        let end = end.ok_or("a line does not end")?;
        let range = self.at as u32..(self.at + end) as u32;
        self.at += end + 1;
        self.utf8(range)
    }

    fn utf8(&self, range: Range<u32>) -> Result<Node, String> {
        match std::str::from_utf8(&self.input[range.start as usize..range.end as usize]) {
            Ok(_) => Ok(Node::Str(range)),
            Err(_) => Err("text is not valid UTF-8".to_owned()),
        }
    }
}

fn empty_stack() -> String {
    "the stack is empty where a value is needed".to_owned()
}

fn pairs(items: Vec<NodeId>) -> Result<Vec<(NodeId, NodeId)>, String> {
    let (pairs, rest) = items.as_chunks::<2>();
    if rest.is_empty() {
        Ok(pairs.iter().map(|[key, value]| (*key, *value)).collect())
    } else {
        Err("a key has no value".to_owned())
    }
}

#[cfg(test)]
#[path = "pickle_tests.rs"]
mod tests;
