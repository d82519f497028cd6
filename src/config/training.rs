//! The settings that define what is trained: the loss function and the linear layers that an adapter targets.

/// The loss function that training minimises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Cross-entropy of the label token over the whole vocabulary.
    Label,
    /// Cross-entropy over the logits of the two labels only.
    Pair,
    /// Cross-entropy of every next token of the prompt, the label and `<eos>`, as in the published method.
    Sequence,
}

/// A linear layer of a transformer block that an adapter can target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// The query projection of attention.
    Q,
    /// The key projection of attention.
    K,
    /// The value projection of attention.
    V,
    /// The output projection of attention.
    O,
    /// The gate projection of the MLP.
    Gate,
    /// The up projection of the MLP.
    Up,
    /// The down projection of the MLP.
    Down,
}

impl Projection {
    /// All seven projections, in the order of the forward pass.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Returns the name in the checkpoint, such as `q_proj`.
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

    /// Returns the path within a block of the checkpoint, such as `self_attn.q_proj`.
    pub fn path(self) -> String {
        let module = if self < Self::Gate { "self_attn" } else { "mlp" };
        format!("{module}.{}", self.name())
    }
}
