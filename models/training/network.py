"""The network: a small decoder with the shapes of llama.cpp's `llama` graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; every matrix dimension is a multiple of 32."""

    vocabulary: int = 3072
    width: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    feed_forward: int = 512
    context: int = 512
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each [context, head_width / 2]."""
    steps = torch.arange(0, shape.head_width, 2).float() / shape.head_width
    angles = torch.outer(torch.arange(shape.context).float(), shape.rope_base**-steps)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs (llama.cpp's "normal" order).

    x is [batch, time, heads, head_width]; cos and sin broadcast to [batch, time, 1, half].
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each behind an RMS norm."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.dropout = dropout
        width, kv_width = shape.width, shape.kv_heads * shape.head_width
        self.attn_norm = nn.RMSNorm(width, shape.norm_epsilon)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, kv_width, bias=False)
        self.attn_v = nn.Linear(width, kv_width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, shape.norm_epsilon)
        self.ffn_gate = nn.Linear(width, shape.feed_forward, bias=False)
        self.ffn_up = nn.Linear(width, shape.feed_forward, bias=False)
        self.ffn_down = nn.Linear(shape.feed_forward, width, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [batch, time, width], each [batch, heads, time, head]."""
        shape = self.shape
        x = self.attn_norm(x)
        q = rotate(self.attn_q(x).unflatten(-1, (shape.heads, shape.head_width)), cos, sin)
        k = rotate(self.attn_k(x).unflatten(-1, (shape.kv_heads, shape.head_width)), cos, sin)
        v = self.attn_v(x).unflatten(-1, (shape.kv_heads, shape.head_width))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def mix(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's output [batch, heads, time, head] and the feed-forward layer."""
        attended = self.attn_output(attended.transpose(1, 2).flatten(2))
        x = x + F.dropout(attended, self.dropout, self.training)
        y = self.ffn_norm(x)
        y = self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y))
        return x + F.dropout(y, self.dropout, self.training)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, time, width] to [batch, time, width], causal."""
        q, k, v = self.project(x, cos, sin)
        groups = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        # On a processor the attention's own kernels are faster in float32, even where bfloat16 matrices are.
        with torch.autocast("cpu", enabled=False):
            if x.device.type == "cpu":
                q, k, v = q.float(), k.float(), v.float()
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.mix(x, attended)


class Network(nn.Module):
    """Token embedding, blocks, a final norm, and a head tied to the embedding."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.width)
        self.blk = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.width, shape.norm_epsilon)
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blk:
            for module in (block.attn_output, block.ffn_down):
                nn.init.normal_(module.weight, std=0.02 / (2 * shape.layers) ** 0.5)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden state [batch, time, width] of tokens [batch, time]."""
        time = tokens.shape[1]
        cos, sin = self.cos[:time, None], self.sin[:time, None]
        x = self.token_embd(tokens)
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output_norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] of hidden states [..., width]."""
        return F.linear(hidden, self.token_embd.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, time, vocabulary] of tokens [batch, time]."""
        return self.head(self.hidden(tokens))

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
