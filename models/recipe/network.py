"""Gemma 3's text decoder in plain PyTorch, which computes the frame's head once per batch.

The parameters have the names of a Hugging Face checkpoint, and `tests/transformers` checks that transformers computes
the same from the folder that is written. All rows start with the same head, so its keys and values are computed once
and every row attends to them. This saves two thirds of the work of a short comment. Gradients flow into the head from
every row.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """The sizes and hyperparameters of the network."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 4
    heads: int = 4
    head_dim: int = 64
    eps: float = 1e-6
    # Full layers use `rope_theta` and sliding ones `rope_local`. The window is longer than any training row.
    rope_theta: float = 1_000_000.0
    rope_local: float = 10_000.0
    sliding_window: int = 512

    @property
    def layer_types(self):
        """Returns the type of each layer: the last one is full, the others are sliding."""
        return ["sliding_attention"] * (self.layers - 1) + ["full_attention"]

    def config(self):
        """Returns the contents of config.json."""
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "final_logit_softcapping": None,
            "head_dim": self.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": self.layer_types,
            "max_position_embeddings": 8192,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": self.head_dim,
            "rms_norm_eps": self.eps,
            "rope_local_base_freq": self.rope_local,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_bidirectional_attention": False,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


class Norm(nn.Module):
    """RMSNorm that multiplies by `1 + weight`, as Gemma does."""

    def __init__(self, size, start=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), start))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], 1.0 + self.weight, 1e-6).to(x.dtype)


def linear(inputs, outputs):
    """Returns a projection without bias. The rows of its weight start at about unit length."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def rotate(x, cos, sin):
    """Applies RoPE to (…, tokens, head_dim), pairing the two halves as in Gemma."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with one key/value head and normalised queries and keys."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.q_proj = linear(shape.hidden_size, shape.heads * shape.head_dim)
        self.k_proj = linear(shape.hidden_size, shape.head_dim)
        self.v_proj = linear(shape.hidden_size, shape.head_dim)
        self.o_proj = linear(shape.heads * shape.head_dim, shape.hidden_size)
        self.q_norm = Norm(shape.head_dim)
        self.k_norm = Norm(shape.head_dim)

    def project(self, x, rope):
        """Returns queries (rows, heads, tokens, head_dim), and keys and values (rows, 1, tokens, head_dim)."""
        rows, tokens, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(rows, tokens, self.shape.heads, -1)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x)).unsqueeze(1)
        return rotate(q, *rope), rotate(k, *rope), self.v_proj(x).unsqueeze(1)

    def forward(self, head, rows, ropes, masks):
        out = []
        q0, k0, v0 = self.project(head, ropes[0])
        q1, k1, v1 = self.project(rows, ropes[1])
        count = rows.shape[0]
        k1 = torch.cat([k0.expand(count, -1, -1, -1), k1], dim=2)
        v1 = torch.cat([v0.expand(count, -1, -1, -1), v1], dim=2)
        for q, k, v, mask in [(q0, k0, v0, masks[0]), (q1, k1, v1, masks[1])]:
            # All heads share the keys, so one product computes (rows, heads * tokens, keys). On a CPU and rows this
            # short, it is three times as fast as torch's own attention.
            scores = (q.flatten(1, 2) @ k[:, 0].transpose(1, 2)).view(*q.shape[:3], -1)
            weights = (scores.float() * self.shape.head_dim**-0.5 + mask).softmax(-1).to(v.dtype)
            mixed = (weights.flatten(1, 2) @ v[:, 0]).view(*q.shape)
            out.append(self.o_proj(mixed.transpose(1, 2).flatten(2)))
        return out


class Mlp(nn.Module):
    """The gated feed-forward part of a layer."""

    def __init__(self, shape):
        super().__init__()
        self.gate_proj = linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and after."""

    def __init__(self, shape):
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape)
        self.input_layernorm = Norm(shape.hidden_size)
        self.pre_feedforward_layernorm = Norm(shape.hidden_size)
        # At the start, a layer adds little to the residual stream.
        self.post_attention_layernorm = Norm(shape.hidden_size, -0.6)
        self.post_feedforward_layernorm = Norm(shape.hidden_size, -0.6)

    def forward(self, head, rows, ropes, masks):
        mixed = self.self_attn(self.input_layernorm(head), self.input_layernorm(rows), ropes, masks)
        head, rows = (x + self.post_attention_layernorm(m) for x, m in zip((head, rows), mixed, strict=True))
        return tuple(
            x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))) for x in (head, rows)
        )


class Network(nn.Module):
    """Maps token ids to normalised hidden states. The logits are `hidden @ embed_tokens.weight.T`."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden_size)

    def rope(self, theta, start, count):
        """Returns the cosines and sines of the positions from `start`, each (count, head_dim / 2)."""
        half = self.shape.head_dim // 2
        angles = torch.arange(start, start + count)[:, None] * theta ** (-torch.arange(half) / half)
        return angles.cos(), angles.sin()

    def forward(self, head, rows):
        """Returns (rows, tokens, hidden_size) for `head` (tokens) and `rows` (rows, tokens), padded at the end."""
        before, tokens = head.shape[0], rows.shape[1]
        scale = math.sqrt(self.shape.hidden_size)
        x0, x1 = (self.embed_tokens(ids) * scale for ids in (head[None], rows))
        causal = torch.full((before + tokens, before + tokens), -torch.inf).triu(1)
        masks = causal[:before, :before], causal[before:]
        ropes = {
            kind: (self.rope(theta, 0, before), self.rope(theta, before, tokens))
            for kind, theta in [
                ("full_attention", self.shape.rope_theta),
                ("sliding_attention", self.shape.rope_local),
            ]
        }
        for layer, kind in zip(self.layers, self.shape.layer_types, strict=True):
            x0, x1 = layer(x0, x1, ropes[kind], masks)
        return self.norm(x1)
