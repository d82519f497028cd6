//! What can be trained: the loss, and the linear layers that an adapter targets.

/// What is fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Cross-entropy of the label token over the whole vocabulary.
    Label,
    /// Cross-entropy of the two label logits alone.
    Pair,
    /// Cross-entropy of every next token of prompt, label and `<eos>`: the published method's.
    Sequence,
}

/// The seven linear layers of a block that an adapter can target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// MLP gate.
    Gate,
    /// MLP up.
    Up,
    /// MLP down.
    Down,
}

impl Projection {
    /// All seven, in the order of the forward pass.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Name in the checkpoint, such as `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// Path inside a layer, such as `self_attn.q_proj`.
    pub fn path(self) -> String {
        let module = if self < Self::Gate { "self_attn" } else { "mlp" };
        format!("{module}.{}", self.name())
    }
}
